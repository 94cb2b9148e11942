//! `postbox demo`: the whole thing, in front of one's eyes.
//!
//! Writers commit orders, and roll some back. A relay, a process of its own,
//! carries them to Kafka, and an inbox, another, has each handled. Both are killed
//! with SIGKILL and started again. A consumer reads what arrives. At the end the
//! oracle says whether anything was lost, reordered, invented or repeated too
//! often, and whether each order was handled once.

mod audience;
mod child;
mod screen;

use std::time::{Duration, Instant};

use crate::contract::Contract;
use crate::database::{Database, Session};
use crate::error::{Error, ErrorKind, Result};
use crate::oracle::{self, Load, Verdict, Writers};
use crate::publisher::KafkaSettings;
use crate::servers::Server;
use crate::setup::{self, SetupOptions};
use audience::Audience;
use child::Process;
use screen::Screen;

/// What the demo does.
#[derive(Debug, Clone)]
pub struct Demo {
    /// The user's database; `None` starts a throw-away one.
    pub database_url: Option<String>,
    /// The user's brokers; `None` starts a throw-away one.
    pub brokers: Option<String>,
    /// How long orders are placed. The relay is killed after a third of it, and the inbox after two.
    pub duration: Duration,
    /// How many orders a second.
    pub events_per_second: f64,
}

/// The relay's limit, which bounds what one kill may repeat: what is in flight,
/// and what was delivered since the last confirmation.
const IN_FLIGHT_MAX: usize = 10_000;

/// How long what was killed stays dead.
const DEAD: Duration = Duration::from_secs(1);

/// How long what was committed may take to arrive, and to be handled, after the last order.
const ARRIVAL_MAX: Duration = Duration::from_secs(30);

/// How often the live line is drawn.
const FRAME: Duration = Duration::from_millis(250);

/// Where a demo takes place.
struct Stage {
    database_url: String,
    database: Database,
    kafka: KafkaSettings,
    contract: Contract,
    topic: String,
    /// Who handles what arrives.
    handler: String,
    /// Stopped and removed when the demo ends.
    _servers: Vec<Server>,
}

impl Demo {
    /// Runs the demo and prints what happens on stdout.
    ///
    /// # Errors
    /// If an address is malformed, a server does not start, or the oracle's verdict
    /// is guilty.
    pub async fn run(&self) -> Result<()> {
        self.check()?;
        let mut screen = Screen::new();
        screen.title(
            "postbox demo: orders committed in Postgres arrive in Kafka, and are handled once",
        );
        let stage = self.set_up(&mut screen).await?;
        let played = self.play(&stage, &mut screen).await;
        stage.clean_up().await?;
        let judged = played?;
        screen.verdict(&judged);
        if judged.is_clean() {
            return Ok(());
        }
        let message = format!(
            "the oracle found a defect: {}; handled: {}",
            judged.records, judged.effects
        );
        Err(Error::new(ErrorKind::Unexpected, message))
    }

    /// What is wrong with an address shows before a server is started.
    fn check(&self) -> Result<()> {
        if let Some(url) = &self.database_url {
            Database::resolve(Some(url), &environment)?;
        }
        match &self.brokers {
            Some(brokers) => kafka(brokers).check(),
            None => Ok(()),
        }
    }

    async fn set_up(&self, screen: &mut Screen) -> Result<Stage> {
        let mut servers = Vec::new();
        let database_url = match &self.database_url {
            Some(url) => url.clone(),
            None => {
                let postgres = Server::postgres(&[])?;
                let (folder, url) = (postgres.fact("socket_dir"), postgres.socket_url());
                screen.step(&format!("Postgres is up, with its Unix socket in {folder}"));
                servers.push(postgres);
                url
            }
        };
        let brokers = match &self.brokers {
            Some(brokers) => brokers.clone(),
            None => {
                let kafka = Server::kafka(&[])?;
                let brokers = kafka.fact("brokers").to_owned();
                screen.step(&format!("Kafka is up at {brokers}"));
                servers.push(kafka);
                brokers
            }
        };
        // Names of our own, so that a user's servers keep theirs.
        let name = format!("postbox_demo_{}", std::process::id());
        let database = Database::resolve(Some(&database_url), &environment)?;
        let contract = Contract::new(&name, &name, &name)?;
        setup::setup(&database, &contract, &SetupOptions::default()).await?;
        let session = database.connect("postbox demo").await?;
        oracle::prepare(&session.client, &name).await?;
        let handler = oracle::prepare_handler(&session.client, &name).await?;
        screen.step(&format!(
            "outbox, publication and slot \"{name}\" are set up"
        ));
        Ok(Stage {
            database,
            database_url,
            kafka: kafka(&brokers),
            contract,
            topic: format!("orders-{}", std::process::id()),
            handler,
            _servers: servers,
        })
    }

    async fn play(&self, stage: &Stage, screen: &mut Screen) -> Result<Judged> {
        let load = Load {
            events_per_second: self.events_per_second,
            ..Load::new(&stage.contract.schema, &stage.topic)
        };
        let session = stage.database.connect("postbox demo").await?;
        let mut show = Show {
            relay: Process::relay(stage)?,
            writers: Writers::start(&stage.database, load),
            audience: Audience::seat(&stage.kafka, &stage.topic),
            inbox: None,
            session,
            stage,
            screen,
        };
        show.screen
            .step("4 writers place orders, a relay carries them, a consumer reads them");
        let began = Instant::now();
        // The relay's first record makes the topic.
        while show.audience.records() == 0 && began.elapsed() < ARRIVAL_MAX {
            show.go_on_until(Instant::now() + FRAME).await?;
        }
        show.inbox = Some(Process::inbox(stage)?);
        show.screen
            .step("an inbox has each of them handled by a function of the database");

        show.go_on_until(began + self.duration / 3).await?;
        show.relay.kill()?;
        let pid = show.relay.pid();
        show.screen
            .event(&format!("SIGKILL: relay {pid} is dead; writers go on"));
        show.go_on_without_relay_until(Instant::now() + DEAD)
            .await?;
        show.relay = Process::relay(stage)?;
        let pid = show.relay.pid();
        show.screen.event(&format!(
            "relay {pid} takes over where the slot was confirmed"
        ));

        show.go_on_until(began + self.duration * 2 / 3).await?;
        if let Some(mut inbox) = show.inbox.take() {
            inbox.kill()?;
            show.screen
                .event(&format!("SIGKILL: inbox {} is dead", inbox.pid()));
        }
        show.go_on_until(Instant::now() + DEAD).await?;
        let inbox = Process::inbox(stage)?;
        show.screen.event(&format!(
            "inbox {} takes over where its offsets say",
            inbox.pid()
        ));
        show.inbox = Some(inbox);
        show.go_on_until(began + self.duration).await?;
        show.end(self.events_per_second).await
    }
}

/// What the oracle says of all that was played.
struct Judged {
    records: Verdict,
    duplicates_max: usize,
    effects: Verdict,
}

impl Judged {
    fn is_clean(&self) -> bool {
        self.records.is_clean(self.duplicates_max) && self.effects.is_clean(0)
    }
}

/// A demo that is being played.
struct Show<'s> {
    stage: &'s Stage,
    screen: &'s mut Screen,
    session: Session,
    writers: Writers,
    relay: Process,
    audience: Audience,
    inbox: Option<Process>,
}

impl Show<'_> {
    async fn go_on_until(&mut self, end: Instant) -> Result<()> {
        while Instant::now() < end {
            tokio::time::sleep(FRAME).await;
            self.relay.check()?;
            self.draw().await?;
        }
        Ok(())
    }

    async fn go_on_without_relay_until(&mut self, end: Instant) -> Result<()> {
        while Instant::now() < end {
            tokio::time::sleep(FRAME).await;
            self.draw().await?;
        }
        Ok(())
    }

    async fn draw(&mut self) -> Result<()> {
        if let Some(inbox) = &mut self.inbox {
            inbox.check()?;
        }
        if self.screen.is_due() {
            let handled = self.handled().await?;
            self.screen.draw(&self.writers, &self.audience, handled);
        }
        Ok(())
    }

    async fn handled(&self) -> Result<usize> {
        oracle::handled(&self.session.client, &self.stage.contract.schema).await
    }

    /// Waits until all has arrived and is handled, and has it judged.
    async fn end(mut self, events_per_second: f64) -> Result<Judged> {
        let rolled_back = self.writers.rolled_back();
        self.writers.stop().await?;
        self.screen.event(&format!(
            "no more orders; {rolled_back} were rolled back on the way"
        ));
        let (client, schema) = (&self.session.client, &self.stage.contract.schema);
        let ledger = oracle::ledger(client, schema).await?;
        let all = ledger.events.len();
        let patience = Instant::now() + ARRIVAL_MAX;
        while Instant::now() < patience
            && (self.audience.distinct() < all || oracle::handled(client, schema).await? < all)
        {
            self.relay.check()?;
            tokio::time::sleep(FRAME).await;
        }
        self.relay.stop()?;
        self.screen
            .event("SIGTERM: the relay drained, confirmed and ended with exit code 0");
        if let Some(mut inbox) = self.inbox {
            inbox.stop()?;
            self.screen
                .event("SIGTERM: the inbox gave its partitions back and ended with exit code 0");
        }
        let confirmed_late = events_per_second.min(100_000.0) / 10.0;
        Ok(Judged {
            records: oracle::judge(&ledger, &self.audience.leave()?),
            duplicates_max: IN_FLIGHT_MAX + confirmed_late as usize,
            effects: oracle::judge(&ledger, &oracle::effects(client, schema).await?),
        })
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn kafka(brokers: &str) -> KafkaSettings {
    KafkaSettings {
        brokers: brokers.to_owned(),
        properties: Vec::new(),
    }
}

impl Stage {
    async fn clean_up(&self) -> Result<()> {
        let session = self.database.connect("postbox demo").await?;
        // Names that we made: no quotes needed.
        let name = &self.contract.slot;
        let sql = format!(
            "SET client_min_messages = warning;
             SELECT pg_drop_replication_slot('{name}');
             DROP PUBLICATION {name};
             DROP SCHEMA {name}_oracle CASCADE;
             DROP SCHEMA {name} CASCADE;"
        );
        let dropped = session.client.batch_execute(&sql).await;
        dropped.map_err(|error| crate::database::sort("remove what the demo made", error))
    }
}
