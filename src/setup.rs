//! Creates, upgrades or checks the tables, the publication, the slot, the grants.
//!
//! Every step looks first and can be run again. Their order matters:
//!
//! 1. **Tables.** Missing migrations, each in one transaction; and an outbox that is to be
//!    partitioned, as long as nobody has written to it.
//! 2. **Publication.** A slot sees the catalogue as it was at each point of the
//!    WAL, so a publication must be older than its slot.
//! 3. **Slot and checkpoint.** Only where the checkpoint names no slot: see
//!    `setup/slot.rs`. A relay that polls has neither publication nor slot, but an index:
//!    see `setup/polling.rs`.
//! 4. **Grants.** Last, so that no application writes before there is a slot that
//!    sees it.

mod adopt;
mod backfill;
mod grants;
mod merge;
mod migrations;
mod partitioned;
mod polling;
mod print;
mod recover;
mod slot;

use std::fmt;
use std::time::{Duration, Instant};

use pgwire_replication::ReplicationClient;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::catalog::{self, Mode, PUBLICATION, Stored};
use crate::contract::{Contract, check_name};
use crate::database::{Database, sort, sort_replication, within};
use crate::error::{Error, ErrorKind, Result};
use crate::source::claim;
use crate::table::Table;

pub use print::print_sql;
pub use recover::recover;

/// How long set-up waits for a lock, or for another's transaction to end.
const PATIENCE: &str = "60s";
const PATIENCE_TIME: Duration = Duration::from_secs(60);

/// How often it is asked for.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);

/// How long the server may take for anything else, longer than for a lock: a commit may
/// wait for a synchronous standby.
const ANSWER_MAX: Duration = Duration::from_secs(90);

/// Takes the time limits away that the server or the role has for a transaction which reads
/// or copies what lies before a slot: that may take as long as it takes. Not each version of
/// the server has each of them.
const UNLIMITED: &str = "SELECT set_config(name, '0', true) FROM pg_settings \
     WHERE name IN ('statement_timeout', 'transaction_timeout')";

/// What a session begins with. A policy that hides rows of the outbox must be an error.
const SETTINGS: [(&str, &str); 2] = [("row_security", "off"), ("lock_timeout", PATIENCE)];

/// Names our advisory lock. Locks of this kind are per database.
pub(crate) const LOCK: i64 = i64::from_be_bytes(*b"\0postbox");

/// What to set up beside the tables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SetupOptions {
    /// How the relay reads.
    pub mode: Reading,
    /// The role that runs the relay, which gets what it needs and no more.
    pub relay_role: Option<String>,
    /// The role that writes events, which gets what it needs and no more.
    pub writer_role: Option<String>,
    /// The role of people who decide about events that wait, which gets what they need and no
    /// more.
    pub operator_role: Option<String>,
    /// The role that cleans up, which gets what it needs and no more; it may be the relay's.
    pub cleanup_role: Option<String>,
    /// The role that runs an inbox, which gets what it needs and no more; its handler's rights
    /// are its own.
    pub inbox_role: Option<String>,
    /// The role of an application that handles messages by itself, which gets what it needs and
    /// no more.
    pub handler_role: Option<String>,
    /// What becomes of rows that were committed before.
    pub backfill: Backfill,
    /// What came from another cluster, with a dump, is taken over: what was not published
    /// there is published here.
    pub adopt: bool,
    /// Whether a trigger wakes a relay that polls. If it is not said, that stays as it
    /// is.
    pub notify: Option<bool>,
    /// How wide the partitions of the outbox are that are made from now on. If it is not said,
    /// as they were; at first there are none.
    pub partitioned: Option<Width>,
}

/// What time a partition of the outbox is for, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Width {
    /// A day. They are made for a week ahead.
    Day,
    /// An hour. They are made for a day ahead.
    Hour,
}

impl Width {
    fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Hour => "hour",
        }
    }
}

/// How a relay is to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reading {
    /// As it was set up; at first from a slot.
    #[default]
    AsItWas,
    /// As it was set up; at first from a slot, if there can be one.
    Auto,
    /// So. What was set up for the other way is changed, without losing rows.
    By(Mode),
}

/// What becomes of rows that were committed before there was a relay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backfill {
    /// They are an error.
    #[default]
    Refuse,
    /// They stay unpublished.
    None,
    /// They are published first.
    Pending,
}

/// What becomes of rows that a lost slot has not given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Missed {
    /// They are sent first. An error where a table does not say which they are.
    #[default]
    Send,
    /// They stay unpublished.
    Skip,
    /// They are sent first, and with them, of another library's table, all that is not
    /// marked published.
    Resend,
}

impl Backfill {
    fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::None => "none",
            Self::Pending => "pending",
        }
    }
}

/// What set-up found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// In the order of the steps.
    pub lines: Vec<Line>,
}

/// One object of the database contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its kind and its name.
    pub object: String,
    /// What was done to it.
    pub state: State,
    /// What there is to know besides.
    pub note: Option<String>,
}

/// What set-up did to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// It was missing.
    Created,
    /// It was there and is right.
    AlreadyThere,
    /// It was there in an earlier version.
    Upgraded,
    /// It was there, made by someone else or for something else, and is ours now.
    TakenOver,
    /// It was there and is no longer needed.
    Dropped,
    /// It was ours to decide.
    Chosen,
}

impl Report {
    fn add(&mut self, object: impl Into<String>, state: State) {
        self.add_with_note(object, state, None);
    }

    fn add_with_note(&mut self, object: impl Into<String>, state: State, note: Option<String>) {
        self.lines.push(Line {
            object: object.into(),
            state,
            note,
        });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            write!(f, "{}: {}", line.object, line.state)?;
            match &line.note {
                Some(note) => writeln!(f, " ({note})")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::AlreadyThere => "already there",
            Self::Upgraded => "upgraded",
            Self::TakenOver => "taken over",
            Self::Dropped => "dropped",
            Self::Chosen => "chosen",
        })
    }
}

/// Sets the database up, or checks that it is. Can be run again at any time, also
/// after it was interrupted, and by two at once.
///
/// # Errors
///
/// Each says what is wrong and the statement that mends it. `Slot`: a slot that
/// once existed is gone (it is never made again without being asked to), is
/// another's, or would leave rows unpublished. `Publication`: it is there and
/// wrong, or has been changed since. `Rights`: the session's role, or a role that
/// was named, lacks something. `SlotInUse`: a relay is at work.
pub async fn setup(
    database: &Database,
    contract: &Contract,
    options: &SetupOptions,
) -> Result<Report> {
    let done = set_up(database, contract, options).await;
    done.map_err(stop_it_first)
}

/// What to do about who is at work, which another relay would only wait for.
fn stop_it_first(error: Error) -> Error {
    match error.kind() {
        ErrorKind::SlotInUse => {
            let message = format!("{}; stop it first", error.chain());
            Error::new(ErrorKind::SlotInUse, message)
        }
        _ => error,
    }
}

async fn set_up(
    database: &Database,
    contract: &Contract,
    options: &SetupOptions,
) -> Result<Report> {
    contract.validate()?;
    options.validate(&contract.outbox)?;
    let mut session = database.connect_alone("postbox setup", &SETTINGS).await?;
    let client = &mut session.client;
    lock(client).await?;
    catalog::check_server(client).await?;
    grants::check_roles(client, options).await?;
    if !contract.outbox.is_ours() {
        claim::shape(client, &contract.outbox).await?;
        check_kind(client, contract).await?;
    }

    let mut report = Report::default();
    let mut stored = catalog::stored(client, contract).await?;
    if let Stored::At(checkpoint) = &stored
        && checkpoint.mode == Mode::Poll
        && !contract.outbox.is_ours()
    {
        return Err(polls_our_outbox(contract));
    }
    let mode = match (options.mode, &stored) {
        (Reading::By(mode), _) => mode,
        (_, Stored::At(checkpoint) | Stored::Recovering(checkpoint)) => checkpoint.mode,
        (Reading::Auto, Stored::Missing) => {
            choose_mode(database, client, contract, &mut report).await?
        }
        _ => Mode::Wal,
    };
    options.check_notify(mode)?;
    if options.adopt {
        stored = adopt(database, client, contract, stored, &mut report).await?;
    }
    match mode {
        Mode::Wal => {
            catalog::check_wal_level(client).await?;
            set_up_slot(database, client, contract, options, stored, &mut report).await?;
        }
        Mode::Poll => set_up_polling(client, contract, options, stored, &mut report).await?,
    }
    if let Some(wanted) = options.notify {
        polling::set_notify(client, contract, wanted, &mut report).await?;
    }
    grants::apply(client, contract, options, mode, &mut report).await?;
    Ok(report)
}

/// A slot gives the rows of tables only.
async fn check_kind(client: &Client, contract: &Contract) -> Result<()> {
    let outbox = contract.outbox.quoted();
    let sql = "SELECT CASE relkind WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view' \
                                   WHEN 'f' THEN 'a foreign table' END \
               FROM pg_class WHERE oid = to_regclass($1)";
    let rows = client.query_typed(sql, &[(&outbox, Type::TEXT)]).await;
    let rows = rows.map_err(|error| sort(format!("look at {outbox}"), error))?;
    match rows.first().and_then(|row| row.get::<_, Option<&str>>(0)) {
        None => Ok(()),
        Some(kind) => Err(Error::new(
            ErrorKind::Database,
            format!("{outbox} is {kind} and must be a table: a slot gives the rows of tables only"),
        )),
    }
}

/// From a slot, unless there is a reason why not that waiting does not mend.
async fn choose_mode(
    database: &Database,
    client: &Client,
    contract: &Contract,
    report: &mut Report,
) -> Result<Mode> {
    let possible = async {
        catalog::check_wal_level(client).await?;
        Box::pin(open_replication(database, client, contract)).await
    };
    match possible.await {
        Ok(_) => Ok(Mode::Wal),
        Err(error) if error.kind().is_transient() => Err(error),
        Err(error) => {
            let why = format!("a replication slot is not to be had: {}", error.chain());
            report.add_with_note("mode poll", State::Chosen, Some(why));
            Ok(Mode::Poll)
        }
    }
}

/// Takes over what came from another cluster, if it did.
async fn adopt(
    database: &Database,
    client: &mut Client,
    contract: &Contract,
    stored: Stored,
    report: &mut Report,
) -> Result<Stored> {
    let (Stored::At(checkpoint) | Stored::Recovering(checkpoint)) = &stored else {
        return Ok(stored);
    };
    let system = catalog::system(client).await?;
    if checkpoint.system.identifier == system.identifier {
        return Ok(stored);
    }
    adopt::check_alone(client, contract, &system).await?;
    if let (Mode::Wal, Some(slot)) = (
        checkpoint.mode,
        catalog::find_slot(client, &contract.slot).await?,
    ) {
        return Err(slot::is_in_the_way(contract, &slot));
    }
    let checkpoint = adopt::adopt(client, contract, checkpoint, &system, report).await?;
    if checkpoint.mode == Mode::Wal {
        Box::pin(recover::make_slot(
            database,
            client,
            contract,
            &checkpoint,
            Missed::Send,
            report,
        ))
        .await?;
    }
    catalog::stored(client, contract).await
}

async fn set_up_slot(
    database: &Database,
    client: &mut Client,
    contract: &Contract,
    options: &SetupOptions,
    stored: Stored,
    report: &mut Report,
) -> Result<()> {
    match stored {
        Stored::At(checkpoint) if checkpoint.mode == Mode::Poll => {
            checkpoint.check_system(contract, &catalog::system(client).await?)?;
            make_tables(client, contract, options, report).await?;
            check_rows(client, contract).await?;
            merge::merge(client, contract, report).await?;
            let Stored::At(checkpoint) = catalog::stored(client, contract).await? else {
                return Err(slot::taken_over(contract));
            };
            let note = recover::take_over_polling(database, client, contract, &checkpoint, report);
            Box::pin(note).await
        }
        Stored::At(checkpoint) => {
            make_tables(client, contract, options, report).await?;
            slot::check(client, contract, checkpoint, report).await
        }
        Stored::Recovering(_) => Err(catalog::recovery_is_unfinished(contract)),
        Stored::Missing | Stored::Unfinished => {
            // Before anything is written: it may be refused.
            let replication = Box::pin(open_replication(database, client, contract)).await?;
            migrations::version(client, contract).await?;
            if stored == Stored::Missing && options.backfill == Backfill::Refuse {
                slot::refuse_rows(client, contract).await?;
            }
            make_tables(client, contract, options, report).await?;
            check_rows(client, contract).await?;
            let made = create_publication(client, contract).await?;
            catalog::check_publication(client, contract).await?;
            report.add(publication(contract), made);
            let is_new = made == State::Created;
            let backfill = options.backfill;
            slot::create(client, replication, contract, is_new, backfill, report).await
        }
    }
}

/// The tables of our schema, and the partitions of the outbox.
async fn make_tables(
    client: &mut Client,
    contract: &Contract,
    options: &SetupOptions,
    report: &mut Report,
) -> Result<()> {
    migrations::apply(client, contract, report).await?;
    partitioned::apply(client, contract, options.partitioned, report).await
}

/// Refuses rows that would never be read from the table.
async fn check_rows(client: &Client, contract: &Contract) -> Result<()> {
    if !contract.outbox.is_ours() {
        return Ok(());
    }
    match catalog::rows_to_come(client, contract).await? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The relay of this name was set up for another table.
fn polls_our_outbox(contract: &Contract) -> Error {
    let message = format!(
        "relay \"{}\" was set up to poll {}: name another --slot, and another --publication",
        contract.slot,
        contract.table("outbox")
    );
    Error::new(ErrorKind::Slot, message)
}

async fn set_up_polling(
    client: &mut Client,
    contract: &Contract,
    options: &SetupOptions,
    stored: Stored,
    report: &mut Report,
) -> Result<()> {
    match &stored {
        Stored::Recovering(_) => return Err(catalog::recovery_is_unfinished(contract)),
        Stored::Unfinished => return Err(slot::setup_is_unfinished(contract)),
        Stored::At(checkpoint) if checkpoint.mode == Mode::Wal => {
            catalog::check_table(client, contract, checkpoint).await?;
        }
        Stored::At(_) | Stored::Missing => {}
    }
    make_tables(client, contract, options, report).await?;
    check_rows(client, contract).await?;
    match &stored {
        Stored::At(checkpoint) if checkpoint.mode == Mode::Poll => {
            polling::check(client, contract, checkpoint, report).await
        }
        Stored::At(checkpoint) => {
            polling::take_over_slot(client, contract, checkpoint, report).await
        }
        _ => polling::create(client, contract, options.backfill, report).await,
    }
}

impl SetupOptions {
    fn validate(&self, table: &Table) -> Result<()> {
        if !table.is_ours() {
            self.check_preset(table)?;
        }
        for role in self.roles() {
            check_name("role", role)?;
        }
        Ok(())
    }

    /// The roles that get rights.
    fn roles(&self) -> impl Iterator<Item = &String> {
        let roles = [
            &self.relay_role,
            &self.writer_role,
            &self.operator_role,
            &self.cleanup_role,
            &self.inbox_role,
            &self.handler_role,
        ];
        roles.into_iter().flatten()
    }
}

impl SetupOptions {
    /// A trigger that nobody listens to makes commits wait for each other.
    fn check_notify(&self, mode: Mode) -> Result<()> {
        if (mode, self.notify) != (Mode::Wal, Some(true)) {
            return Ok(());
        }
        let message =
            "--notify true fights --mode wal: only a relay that polls is woken; leave it out";
        Err(Error::new(ErrorKind::Settings, message))
    }

    /// Of another library's table, only a slot is ours to set up.
    fn check_preset(&self, table: &Table) -> Result<()> {
        let preset = table.preset.name();
        let why = if matches!(self.mode, Reading::By(Mode::Poll) | Reading::Auto) {
            match table.preset.tracking() {
                Some(_) => {
                    "needs no set-up to be polled, as its rows are claimed: start `postbox relay --mode poll`"
                }
                None => {
                    "needs --mode wal: its rows say neither in which order they come nor whether they are published"
                }
            }
        } else if self.adopt {
            "fights --adopt: its rows do not say what was published; start with --backfill pending or none"
        } else if self.notify.is_some() {
            "fights --notify: only our own outbox has that trigger"
        } else if self.partitioned.is_some() {
            "fights --partitioned: only our own outbox is partitioned by it"
        } else if self.writer_role.is_some() {
            "fights --grant-writer-to: who writes to it, its own library says"
        } else {
            return Ok(());
        };
        let message = format!("--table-preset {preset} {why}");
        Err(Error::new(ErrorKind::Settings, message))
    }
}

/// One set-up at a time in a database. The lock goes with the session.
async fn lock(client: &Client) -> Result<()> {
    let doing = "wait for another `postbox setup`";
    // Not by waiting in a statement: who builds an index beside writers waits for all
    // statements that have begun.
    let sql = format!("SELECT pg_try_advisory_lock({LOCK})");
    let deadline = Instant::now() + PATIENCE_TIME;
    loop {
        let locked = client.query_typed_one(&sql, &[]).await;
        if locked.map_err(|error| sort(doing, error))?.get(0) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let message = "another `postbox setup` or `recover` is at work in this database";
            return Err(Error::new(ErrorKind::Database, message));
        }
        tokio::time::sleep(LOCK_INTERVAL).await;
    }
}

/// A replication session, and with it the proof that we may have one.
async fn open_replication(
    database: &Database,
    client: &Client,
    contract: &Contract,
) -> Result<ReplicationClient> {
    check_room(client, contract).await?;
    let config = database
        .replication(&contract.slot, &contract.publication)
        .with_application_name("postbox setup");
    let doing = "open a replication session";
    let mut replication = ReplicationClient::connect_gated(config)
        .await
        .map_err(|error| sort_replication(doing, error))?;
    // The session that holds a slot's exported snapshot is idle in a transaction. That there
    // is a limit for a whole transaction came with Postgres 17.
    let bound = format!(
        "SET lock_timeout = '{PATIENCE}'; SET idle_in_transaction_session_timeout = 0; \
         SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'"
    );
    // The client connects with its first command.
    let bounded = async { Ok(replication.simple_query(&bound).await) };
    match within(database.connect_timeout(), doing, bounded).await? {
        Ok(_) => Ok(replication),
        Err(error) => {
            let error = sort_replication(doing, error);
            if error.kind() != ErrorKind::Rights {
                return Err(error);
            }
            let role = grants::current_role(client).await?;
            Err(grants::replication_is_missing(client, &role)
                .await?
                .caused_by(error))
        }
    }
}

/// The slot's name may be another's, and the server has a fixed number of slots
/// and of senders.
async fn check_room(client: &Client, contract: &Contract) -> Result<()> {
    let sql = "SELECT current_setting('max_replication_slots')::bigint, \
                      (SELECT count(*) FROM pg_replication_slots), \
                      current_setting('max_wal_senders')::bigint, \
                      (SELECT count(*) FROM pg_stat_replication)";
    let row = client
        .query_one(sql, &[])
        .await
        .map_err(|error| sort("count replication slots", error))?;
    let (slots, slots_used): (i64, i64) = (row.get(0), row.get(1));
    let (senders, senders_used): (i64, i64) = (row.get(2), row.get(3));
    let existing = catalog::find_slot(client, &contract.slot).await?;
    if let Some(slot) = &existing {
        // Of an interrupted set-up it would be dropped.
        slot.check_ours(&contract.slot)?;
    } else if slots_used >= slots {
        return Err(Error::new(
            ErrorKind::Slot,
            format!(
                "no replication slot is free, max_replication_slots is {slots}: drop one that nothing reads, \
                 or ALTER SYSTEM SET max_replication_slots = {}; then restart Postgres",
                slots + 4
            ),
        ));
    }
    if senders_used >= senders {
        return Err(Error::new(
            ErrorKind::Database,
            format!(
                "no WAL sender is free, max_wal_senders is {senders}: \
                 ALTER SYSTEM SET max_wal_senders = {}; then restart Postgres",
                senders + 4
            ),
        ));
    }
    Ok(())
}

/// Makes the publication where there is none of its name.
async fn create_publication(client: &Client, contract: &Contract) -> Result<State> {
    if catalog::publication_exists(client, contract).await? {
        return Ok(State::AlreadyThere);
    }
    let doing = format!("create {}", publication(contract));
    match client.batch_execute(&contract.sql(PUBLICATION)).await {
        Ok(()) => Ok(State::Created),
        Err(error) => Err(grants::sort_create(client, doing, error).await),
    }
}

fn publication(contract: &Contract) -> String {
    format!("publication \"{}\"", contract.publication)
}
