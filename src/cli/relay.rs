//! `postbox relay`.

use std::sync::Arc;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, value_parser};
use postbox::duration::in_words;
use postbox::envelope::{Format, HeaderStyle, Route};
use postbox::health::Health;
use postbox::http::{Endpoints, Exposed};
use postbox::metrics::Metrics;
use postbox::parked::{OnPoison, ParkedSettings};
use postbox::relay::{CleanupSettings, Relay, RelaySettings};
use postbox::table::{ATTEMPTS_MAX, Placement, Preset};
use postbox::{Error, ErrorKind};

use super::arguments::{
    ContractArguments, DatabaseArguments, KafkaArguments, ModeArgument, check_topic,
};
use super::cleanup::{OLDER_THAN_MAX, OLDER_THAN_MIN};
use super::quantity::{check_order, size, time};
use super::service::{Http, Service};

/// Carries committed events to Kafka until it is told to stop.
///
/// It waits for Postgres and Kafka for as long as it takes, also at the start, and ends only on
/// errors that waiting does not mend. A second relay on the same slot stands by. SIGTERM and SIGINT
/// drain: it reads on to the end of the transaction, delivers, confirms, and exits with 0; nothing is
/// repeated then. A second signal, half a second later or more, ends it at once.
///
/// A TIME is a whole number of ms, s, m, h or d; a SIZE is one of bytes, KiB, MiB or GiB.
#[derive(Debug, Args)]
pub(super) struct RelayCommand {
    /// How events are read, which must be as it was set up.
    #[arg(long, env = "POSTBOX_MODE", default_value = "wal", value_name = "MODE")]
    mode: ModeArgument,

    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    contract: ContractArguments,

    #[command(flatten)]
    claims: ClaimArguments,

    #[command(flatten)]
    kafka: KafkaArguments,

    #[command(flatten)]
    records: RecordArguments,

    #[command(flatten)]
    parked: ParkedArguments,

    #[command(flatten)]
    tuning: TuningArguments,

    #[command(flatten)]
    cleanup: CleanupArguments,

    /// Where /metrics, /healthz and /readyz are served: ADDRESS:PORT, port 0 takes a free one; none
    /// turns them off.
    ///
    /// /readyz is green while events flow or there are none, and says in its body why it is not.
    #[arg(
        long,
        env = "POSTBOX_HTTP",
        default_value = "127.0.0.1:9464",
        value_name = "ADDRESS"
    )]
    http: Http,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Records")]
struct RecordArguments {
    /// What a record's value is: envelope (a JSON object around the payload), raw (the payload), or
    /// versioned ({"schema_version","payload"}). Without it, that of the preset: raw for spakky and
    /// debezium, else envelope.
    #[arg(long, env = "POSTBOX_FORMAT", value_name = "FORMAT")]
    format: Option<Format>,

    /// The topic of an event whose row names none; {aggregate_type} and {event_type} stand for the
    /// event's. A topic's name is 1 to 249 of a-z, A-Z, 0-9, ".", "_" and "-".
    ///
    /// [default: {aggregate_type}; for debezium outbox.event.{aggregate_type}]
    // Not a default of clap's, as it is that of the preset.
    #[arg(long, env = "POSTBOX_ROUTE", value_name = "TEMPLATE")]
    route: Option<Route>,

    /// Which headers a record has beside the row's own: postbox (id, event_type, …), omni-box (event_id,
    /// event_type, …), debezium (id, and none of the row's) or none. Without it, those of the preset;
    /// for spakky none.
    #[arg(long, env = "POSTBOX_HEADERS", value_name = "WHOSE")]
    headers: Option<HeaderStyle>,

    /// Columns that become headers too, after these: COLUMN:header, or COLUMN:header:NAME for another
    /// name, parted by commas, as in table.fields.additional.placement of Debezium's router; NULL is a
    /// null header. Not with claims.
    #[arg(
        long,
        env = "POSTBOX_PLACEMENT",
        value_delimiter = ',',
        value_name = "COLUMN:header[:NAME]"
    )]
    placement: Vec<Placement>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Claims")]
struct ClaimArguments {
    /// With --mode wal, mark rows published in their table, before they are confirmed, as omni-box and
    /// spakky do; true or false in the variable.
    #[arg(long, env = "POSTBOX_MARK", value_parser = BoolishValueParser::new())]
    mark: bool,

    /// After how long the workers of a table's own library take a claim for dead that is not renewed: as
    /// they are set; 15s to 1h. Claims of this relay end 10s after it, at most.
    #[arg(
        long,
        env = "POSTBOX_CLAIM_TIMEOUT",
        default_value = "300s",
        value_parser = time(Duration::from_secs(15)..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    claim_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Events that wait")]
struct ParkedArguments {
    /// What becomes of an event that can never go out as it is: park (it waits in postbox.parked and is
    /// tried again, later events of its topic and key wait behind it, and after --max-attempts it is a
    /// dead letter), skip (it is a dead letter at once, and nothing waits), or stop (the relay ends with
    /// exit code 8). Not with claims, whose table says.
    ///
    /// [default: park]
    // These defaults are not clap's: with claims the flags are refused.
    #[arg(long, env = "POSTBOX_ON_POISON", value_name = "POLICY")]
    on_poison: Option<OnPoison>,

    /// How long a refused event waits for its second attempt, at random from half of it on; twice as long
    /// for each further one; 10ms to 1h. Not with claims, as all that follow.
    ///
    /// [default: 10s]
    #[arg(
        long,
        env = "POSTBOX_RETRY_BACKOFF_MIN",
        value_parser = time(Duration::from_millis(10)..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    retry_backoff_min: Option<Duration>,

    /// How long it waits at most; 10ms to 1d.
    ///
    /// [default: 1h]
    #[arg(
        long,
        env = "POSTBOX_RETRY_BACKOFF_MAX",
        value_parser = time(Duration::from_millis(10)..=Duration::from_secs(86_400)),
        value_name = "TIME"
    )]
    retry_backoff_max: Option<Duration>,

    /// A topic to which a copy of each dead letter is sent, with its error and its origin in headers.
    #[arg(long, env = "POSTBOX_DEAD_LETTER_TOPIC", value_name = "TOPIC")]
    dead_letter_topic: Option<String>,

    /// The most events that may be waiting or dead in postbox.parked; 1 to 10000000. With one more the
    /// relay ends with exit code 8, as something is wrong with more than some events.
    ///
    /// [default: 100000]
    #[arg(
        long,
        env = "POSTBOX_PARKED_MAX",
        value_parser = value_parser!(u32).range(1..=10_000_000),
        value_name = "EVENTS"
    )]
    parked_max: Option<u32>,

    /// The most bytes of them; 1 to 1GiB.
    ///
    /// [default: 1GiB]
    #[arg(
        long,
        env = "POSTBOX_PARKED_BYTES_MAX",
        value_parser = size(1..=1 << 30),
        value_name = "SIZE"
    )]
    parked_bytes_max: Option<u32>,

    /// How far ahead of its commit an event may be scheduled; 1s to 36500d. One beyond cannot go out as it
    /// is.
    ///
    /// [default: 365d]
    #[arg(
        long,
        env = "POSTBOX_MAX_SCHEDULE",
        value_parser = time(Duration::from_secs(1)..=Duration::from_secs(36_500 * 86_400)),
        value_name = "TIME"
    )]
    max_schedule: Option<Duration>,

    /// The most events that may be scheduled; 1 to 1000000000. With one more the relay ends with exit
    /// code 8.
    ///
    /// [default: 10000000]
    #[arg(
        long,
        env = "POSTBOX_SCHEDULED_MAX",
        value_parser = value_parser!(u32).range(1..=1_000_000_000),
        value_name = "EVENTS"
    )]
    scheduled_max: Option<u32>,
}

impl ParkedArguments {
    fn resolve(
        &self,
        preset: Preset,
        attempts_max: Option<u32>,
    ) -> postbox::Result<ParkedSettings> {
        let defaults = ParkedSettings::default();
        let backoff_min = self.retry_backoff_min.unwrap_or(defaults.backoff_min);
        let backoff_max = self.retry_backoff_max.unwrap_or(defaults.backoff_max);
        check_order(
            ("--retry-backoff-min", backoff_min),
            ("--retry-backoff-max", backoff_max),
        )?;
        check_topic("--dead-letter-topic", self.dead_letter_topic.as_deref())?;
        let as_ever = match preset {
            Preset::Spakky => ATTEMPTS_MAX,
            _ => defaults.attempts_max,
        };
        Ok(ParkedSettings {
            on_poison: self.on_poison.unwrap_or_default(),
            attempts_max: attempts_max.unwrap_or(as_ever),
            backoff_min,
            backoff_max,
            dead_letter_topic: self.dead_letter_topic.clone(),
            rows_max: self.parked_max.map_or(defaults.rows_max, u64::from),
            bytes_max: self.parked_bytes_max.map_or(defaults.bytes_max, u64::from),
            schedule_max: self.max_schedule.unwrap_or(defaults.schedule_max),
            scheduled_max: self.scheduled_max.map_or(defaults.scheduled_max, u64::from),
        })
    }

    /// Those of the flags that were given.
    fn given(&self) -> Vec<&'static str> {
        [
            ("--on-poison", self.on_poison.is_some()),
            ("--retry-backoff-min", self.retry_backoff_min.is_some()),
            ("--retry-backoff-max", self.retry_backoff_max.is_some()),
            ("--dead-letter-topic", self.dead_letter_topic.is_some()),
            ("--parked-max", self.parked_max.is_some()),
            ("--parked-bytes-max", self.parked_bytes_max.is_some()),
            ("--max-schedule", self.max_schedule.is_some()),
            ("--scheduled-max", self.scheduled_max.is_some()),
        ]
        .into_iter()
        .filter_map(|(flag, is_given)| is_given.then_some(flag))
        .collect()
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct TuningArguments {
    /// The most events sent and not yet acknowledged, or held behind one that is not; 1 to 1000000.
    /// A crash may repeat as many.
    #[arg(
        long,
        env = "POSTBOX_IN_FLIGHT_MAX",
        default_value = "10000",
        value_parser = value_parser!(u32).range(1..=1_000_000),
        value_name = "EVENTS"
    )]
    // 500,000 rows, the broker on the same machine, medians of three: 187,000/s with 2,000,
    // 166,000 with 10,000, 163,000 with 40,000, all within a spread of 15 %. To a broker
    // that takes 100 ms, 10,000 are as many as 100,000/s.
    in_flight_max: u32,

    /// The most bytes of them; 1 to 1GiB. One larger event passes alone.
    #[arg(
        long,
        env = "POSTBOX_IN_FLIGHT_BYTES_MAX",
        default_value = "32MiB",
        // With one larger event, within what librdkafka's queue can be told to hold.
        value_parser = size(1..=1 << 30),
        value_name = "SIZE"
    )]
    in_flight_bytes_max: u32,

    /// How often progress is told to Postgres; 10ms to 10s, and half of --wal-sender-timeout at most.
    /// A crash repeats what was delivered since.
    #[arg(
        long,
        env = "POSTBOX_STATUS_INTERVAL",
        default_value = "50ms",
        value_parser = time(Duration::from_millis(10)..=Duration::from_secs(10)),
        value_name = "TIME"
    )]
    status_interval: Duration,

    /// How often the publication is checked and, after events, a fence for recovery is written; 1s to
    /// 10m.
    #[arg(
        long,
        env = "POSTBOX_HEARTBEAT_INTERVAL",
        default_value = "10s",
        value_parser = time(Duration::from_secs(1)..=Duration::from_secs(600)),
        value_name = "TIME"
    )]
    heartbeat_interval: Duration,

    /// After how long without a sign of life Postgres and the relay give each other up; 1s to 10m.
    #[arg(
        long,
        env = "POSTBOX_WAL_SENDER_TIMEOUT",
        default_value = "8s",
        value_parser = time(Duration::from_secs(1)..=Duration::from_secs(600)),
        value_name = "TIME"
    )]
    wal_sender_timeout: Duration,

    /// With --mode poll, how long to wait at least before the table is asked again; 1ms to 10s.
    #[arg(
        long,
        env = "POSTBOX_POLL_INTERVAL_MIN",
        default_value = "10ms",
        value_parser = time(Duration::from_millis(1)..=Duration::from_secs(10)),
        value_name = "TIME"
    )]
    poll_interval_min: Duration,

    /// With --mode poll, how long to wait at most: as long as nothing comes, each pause is twice the one
    /// before; 1ms to 1m. A trigger (`postbox setup --notify true`) ends it at once.
    #[arg(
        long,
        env = "POSTBOX_POLL_INTERVAL_MAX",
        default_value = "200ms",
        value_parser = time(Duration::from_millis(1)..=Duration::from_secs(60)),
        value_name = "TIME"
    )]
    poll_interval_max: Duration,

    /// With --mode poll, up to how many relays share the table, each with a part of the record keys; 1
    /// to 64. They divide them by themselves, and one more stands by. Without it one is at work.
    #[arg(
        long,
        env = "POSTBOX_SHARDS",
        value_parser = value_parser!(u8).range(1..=64),
        value_name = "RELAYS"
    )]
    shards: Option<u8>,

    /// How long a stop may take to drain; 0ms to 1h. If it is not enough, the exit code is 9 and events
    /// repeat.
    #[arg(
        long,
        env = "POSTBOX_SHUTDOWN_TIMEOUT",
        default_value = "30s",
        value_parser = time(Duration::ZERO..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    shutdown_timeout: Duration,
}

impl TuningArguments {
    fn check(&self) -> postbox::Result<()> {
        if self.status_interval * 2 > self.wal_sender_timeout {
            let message = format!(
                "--status-interval {} fights --wal-sender-timeout {}: it may be half of it at most",
                in_words(self.status_interval),
                in_words(self.wal_sender_timeout)
            );
            return Err(Error::new(ErrorKind::Settings, message));
        }
        check_order(
            ("--poll-interval-min", self.poll_interval_min),
            ("--poll-interval-max", self.poll_interval_max),
        )
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Cleanup")]
struct CleanupArguments {
    /// How often the relay removes published events, as `postbox cleanup` does; 1s to 30d. Without it
    /// never. The relay's role needs the right to delete: `postbox setup --grant-cleanup-to` gives it.
    #[arg(
        long,
        env = "POSTBOX_CLEANUP_INTERVAL",
        requires = "cleanup_older_than",
        value_parser = time(Duration::from_secs(1)..=Duration::from_secs(30 * 86_400)),
        value_name = "TIME"
    )]
    cleanup_interval: Option<Duration>,

    /// The retention then: how long events are kept, by their created_at; 1s to 3650d.
    #[arg(
        long,
        env = "POSTBOX_CLEANUP_OLDER_THAN",
        requires = "cleanup_interval",
        value_parser = time(OLDER_THAN_MIN..=OLDER_THAN_MAX),
        value_name = "TIME"
    )]
    cleanup_older_than: Option<Duration>,
}

impl CleanupArguments {
    fn resolve(&self, preset: Preset) -> postbox::Result<Option<CleanupSettings>> {
        let (Some(interval), Some(older_than)) = (self.cleanup_interval, self.cleanup_older_than)
        else {
            return Ok(None);
        };
        if !preset.can_be_polled() {
            let message = format!(
                "--cleanup-interval fights --table-preset {}: its rows do not say whether they are published",
                preset.name()
            );
            return Err(Error::new(ErrorKind::Settings, message));
        }
        Ok(Some(CleanupSettings {
            interval,
            older_than,
        }))
    }
}

impl RelayCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        self.tuning.check()?;
        self.check_shards()?;
        let mut contract = self.contract.resolve()?;
        let placements = self.records.placement.clone();
        contract.outbox = contract.outbox.placing(placements);
        let (preset, attempts_max) = (contract.outbox.preset, contract.outbox.attempts_max);
        self.check_preset(preset)?;
        let settings = RelaySettings {
            mode: self.mode.into(),
            contract,
            mark: self.claims.mark,
            claim_timeout: self.claims.claim_timeout,
            attempts_max,
            parked: self.parked.resolve(preset, self.contract.max_attempts())?,
            kafka: match preset.compression() {
                Some(codec) => self.kafka.resolve()?.compressed(codec),
                None => self.kafka.resolve()?,
            },
            database: self.database.resolve()?,
            format: self.records.format.unwrap_or(preset.format()),
            route: self.records.route.clone().unwrap_or(preset.route()),
            headers: self.records.headers.unwrap_or(preset.headers()),
            in_flight_max: self.tuning.in_flight_max as usize,
            in_flight_bytes_max: self.tuning.in_flight_bytes_max as usize,
            status_interval: self.tuning.status_interval,
            heartbeat_interval: self.tuning.heartbeat_interval,
            wal_sender_timeout: self.tuning.wal_sender_timeout,
            poll_interval_min: self.tuning.poll_interval_min,
            poll_interval_max: self.tuning.poll_interval_max,
            shards: self.tuning.shards,
            shutdown_timeout: self.tuning.shutdown_timeout,
            cleanup: self.cleanup.resolve(preset)?,
        };
        let metrics = Arc::new(Metrics::default());
        let health = Arc::new(Health::default());
        let endpoints = Endpoints {
            metrics: Exposed::Relay(metrics.clone()),
            health: health.clone(),
        };
        let relay = Relay::new(settings, metrics, health);
        let service = Service {
            name: "relay",
            repeats: "events in flight will be sent again",
            http: self.http,
        };
        service.run(endpoints, |stopped| relay.run(stopped))
    }

    fn check_shards(&self) -> postbox::Result<()> {
        match (self.tuning.shards, self.mode) {
            (Some(shards), ModeArgument::Wal) => {
                let message = format!(
                    "--shards {shards} fights --mode wal: a slot has one reader; use --mode poll"
                );
                Err(Error::new(ErrorKind::Settings, message))
            }
            _ => Ok(()),
        }
    }

    /// Rows of a table that tracks their status are claimed, and in no other way read; of
    /// some tables nothing can be read but their changes.
    fn check_preset(&self, preset: Preset) -> postbox::Result<()> {
        let refuse = |why: &str| {
            let message = format!("--table-preset {} {why}", preset.name());
            Err(Error::new(ErrorKind::Settings, message))
        };
        if self.claims.mark && preset.tracking().is_none() {
            return refuse("fights --mark: its rows have no column for that");
        }
        if self.claims.mark && matches!(self.mode, ModeArgument::Poll) {
            let message = "--mark fights --mode poll: rows that are claimed are completed anyway";
            return Err(Error::new(ErrorKind::Settings, message));
        }
        let claims = matches!(self.mode, ModeArgument::Poll) && preset.tracking().is_some();
        let parked = self.parked.given();
        if claims && !parked.is_empty() {
            return refuse(&format!(
                "fights {} with --mode poll: its rows are claimed, and put off and given up as their own columns say",
                parked.join(", ")
            ));
        }
        match (preset.tracking(), self.mode, self.tuning.shards) {
            (None, ModeArgument::Poll | ModeArgument::Auto, _) if !preset.can_be_polled() => {
                refuse(
                    "needs --mode wal: its rows say neither when they were committed nor whether they are published",
                )
            }
            (None, ..) | (_, ModeArgument::Wal, _) => Ok(()),
            (_, ModeArgument::Poll, None) if self.records.placement.is_empty() => Ok(()),
            (_, ModeArgument::Poll, None) => {
                refuse("fights --placement: rows that are claimed are read without it")
            }
            (_, ModeArgument::Poll, Some(_)) => refuse(
                "fights --shards: its rows are claimed one by one, by as many relays as you start",
            ),
            _ => refuse("needs --mode poll, as its rows are claimed, or --mode wal"),
        }
    }
}
