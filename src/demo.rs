//! `postbox demo`: the whole thing, in front of one's eyes.
//!
//! Writers commit orders, and roll some back. A relay, a process of its own,
//! carries them to Kafka; in the middle it is killed with SIGKILL and started
//! again. A consumer reads what arrives. At the end the oracle says whether
//! anything was lost, reordered, invented or repeated too often.

mod audience;
mod child;
mod screen;

use std::time::{Duration, Instant};

use crate::contract::Contract;
use crate::database::Database;
use crate::error::{Error, ErrorKind, Result};
use crate::oracle::{self, Load, Verdict, Writers};
use crate::publisher::KafkaSettings;
use crate::servers::Server;
use crate::setup::{self, SetupOptions};
use audience::Audience;
use child::RelayProcess;
use screen::Screen;

/// What the demo does.
#[derive(Debug, Clone)]
pub struct Demo {
    /// The user's database; `None` starts a throw-away one.
    pub database_url: Option<String>,
    /// The user's brokers; `None` starts a throw-away one.
    pub brokers: Option<String>,
    /// How long orders are placed. The relay is killed in the middle.
    pub duration: Duration,
    /// How many orders a second.
    pub events_per_second: f64,
}

/// The relay's limit, which bounds what one kill may repeat: what is in flight,
/// and what was delivered since the last confirmation.
const IN_FLIGHT_MAX: usize = 10_000;

/// How long the relay stays dead.
const DEAD: Duration = Duration::from_secs(1);

/// How long what was committed may take to arrive after the last order.
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
        screen.title("postbox demo: orders committed in Postgres arrive in Kafka");
        let stage = self.set_up(&mut screen).await?;
        let played = self.play(&stage, &mut screen).await;
        stage.clean_up().await?;
        let (verdict, duplicates_max) = played?;
        screen.verdict(&verdict, duplicates_max);
        if verdict.is_clean(duplicates_max) {
            return Ok(());
        }
        let message = format!("the oracle found a defect: {verdict}");
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
        let stage = Stage {
            database: Database::resolve(Some(&database_url), &environment)?,
            database_url,
            kafka: kafka(&brokers),
            contract: Contract::new(&name, &name, &name)?,
            topic: format!("orders-{}", std::process::id()),
            _servers: servers,
        };
        setup::setup(&stage.database, &stage.contract, &SetupOptions::default()).await?;
        let session = stage.database.connect("postbox demo").await?;
        oracle::prepare(&session.client, &name).await?;
        screen.step(&format!(
            "outbox, publication and slot \"{name}\" are set up"
        ));
        Ok(stage)
    }

    /// The verdict, and how many duplicates it may count.
    async fn play(&self, stage: &Stage, screen: &mut Screen) -> Result<(Verdict, usize)> {
        let mut relay = RelayProcess::start(stage)?;
        let load = Load {
            events_per_second: self.events_per_second,
            ..Load::new(&stage.contract.schema, &stage.topic)
        };
        let writers = Writers::start(&stage.database, load);
        let audience = Audience::seat(&stage.kafka, &stage.topic);
        screen.step("4 writers place orders, a relay carries them, a consumer reads them");

        let middle = Instant::now() + self.duration / 2;
        screen
            .follow(&writers, &audience, &mut relay, middle)
            .await?;
        relay.kill()?;
        screen.event(&format!(
            "SIGKILL: relay {} is dead; writers go on",
            relay.pid()
        ));
        screen
            .follow_without(&writers, &audience, Instant::now() + DEAD)
            .await;
        relay = RelayProcess::start(stage)?;
        screen.event(&format!(
            "relay {} takes over where the slot was confirmed",
            relay.pid()
        ));
        let end = middle + self.duration / 2;
        screen.follow(&writers, &audience, &mut relay, end).await?;

        let rolled_back = writers.rolled_back();
        writers.stop().await?;
        screen.event(&format!(
            "no more orders; {rolled_back} were rolled back on the way"
        ));
        let session = stage.database.connect("postbox demo").await?;
        let ledger = oracle::ledger(&session.client, &stage.contract.schema).await?;
        let patience = Instant::now() + ARRIVAL_MAX;
        while audience.distinct() < ledger.events.len() && Instant::now() < patience {
            relay.check()?;
            tokio::time::sleep(FRAME).await;
        }
        relay.stop()?;
        screen.event("SIGTERM: the relay drained, confirmed and ended with exit code 0");
        let verdict = oracle::judge(&ledger, &audience.leave()?);
        let confirmed_late = self.events_per_second.min(100_000.0) / 10.0;
        Ok((verdict, IN_FLIGHT_MAX + confirmed_late as usize))
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
