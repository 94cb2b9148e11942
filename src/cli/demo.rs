//! `postbox demo`.

use std::time::Duration;

use clap::{Args, value_parser};
use postbox::demo::Demo;

use super::quantity::time;

/// Shows the whole thing and proves that nothing is lost.
///
/// Starts a throw-away Postgres and Kafka, or uses the servers of DATABASE_URL and KAFKA_BROKERS,
/// where it makes names of its own and removes them at the end, but for the topic. Writers place orders
/// and roll some back; the relay, and the inbox that has each order handled, are killed with SIGKILL and
/// started again. Exit code 0 if nothing was lost, reordered or invented, and each order was handled
/// once, else 1.
///
/// A TIME is a whole number of ms, s, m, h or d.
#[derive(Debug, Args)]
pub(super) struct DemoCommand {
    /// A database of your own instead of a throw-away one. Its role must be allowed to create schemas,
    /// publications and slots.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,

    /// Brokers of your own instead of a throw-away one, reached without encryption: host:port,host:port.
    #[arg(long, env = "KAFKA_BROKERS", value_name = "LIST")]
    brokers: Option<String>,

    /// How long orders are placed; 1s to 10m.
    #[arg(
        long,
        env = "POSTBOX_DURATION",
        default_value = "20s",
        value_parser = time(Duration::from_secs(1)..=Duration::from_secs(600)),
        value_name = "TIME"
    )]
    duration: Duration,

    /// How many orders a second are placed, if the servers can; 1 to 100000.
    #[arg(
        long,
        env = "POSTBOX_RATE",
        default_value_t = 2000,
        value_parser = value_parser!(u32).range(1..=100_000),
        value_name = "ORDERS"
    )]
    rate: u32,
}

impl DemoCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let demo = Demo {
            database_url: self.database_url.clone(),
            brokers: self.brokers.clone(),
            duration: self.duration,
            events_per_second: self.rate.into(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?;
        Ok(runtime.block_on(demo.run())?)
    }
}
