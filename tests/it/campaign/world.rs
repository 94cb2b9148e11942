//! The servers of a campaign, each behind a proxy, and what is done to them.

use postbox::servers::Server;
use tokio::task::block_in_place;

use super::schedule::Side;
use crate::support::{Fixture, Proxy, Weather};

pub(super) struct World {
    postgres: Server,
    kafka: Server,
    postgres_proxy: Proxy,
    kafka_proxy: Proxy,
    postgres_runs: bool,
    kafka_runs: bool,
    kafka_paused: bool,
}

impl World {
    /// Brokers stamp each record when they take it, which tells what was sent
    /// after a restart.
    pub(super) async fn start() -> Self {
        let postgres_proxy = Proxy::start().await;
        let kafka_proxy = Proxy::start().await;
        let advertised = format!("advertised.listeners=PLAINTEXT://{}", kafka_proxy.address());
        let settings = [&advertised, "log.message.timestamp.type=LogAppendTime"];
        let (postgres, kafka) = block_in_place(|| {
            (
                Server::postgres(&[]).unwrap(),
                Server::kafka(&settings).unwrap(),
            )
        });
        postgres_proxy.pass_on_to(&format!("127.0.0.1:{}", postgres.fact("port")));
        kafka_proxy.pass_on_to(kafka.fact("brokers"));
        Self {
            postgres,
            kafka,
            postgres_proxy,
            kafka_proxy,
            postgres_runs: true,
            kafka_runs: true,
            kafka_paused: false,
        }
    }

    /// An empty database and a topic for one run.
    pub(super) async fn fixture(&self) -> Fixture {
        Fixture::empty_beside(&self.postgres, self.kafka_proxy.address()).await
    }

    /// Where a relay finds this fixture's database, through the proxy.
    pub(super) fn relay_url(&self, fixture: &Fixture) -> String {
        let (address, database) = (self.postgres_proxy.address(), &fixture.contract.slot);
        format!("postgresql://postgres@{address}/{database}?sslmode=disable")
    }

    pub(super) fn stop_postgres(&mut self, how: &str) {
        if std::mem::replace(&mut self.postgres_runs, false) {
            // A stop waits for the walsender, which waits for a relay that may be frozen.
            let stopped = tell(&mut self.postgres, &format!("stop {how} 20"));
            if stopped.is_err() {
                tell(&mut self.postgres, "stop kill").unwrap();
            }
        }
    }

    pub(super) fn start_postgres(&mut self) {
        if !std::mem::replace(&mut self.postgres_runs, true) {
            tell(&mut self.postgres, "start").unwrap();
        }
    }

    pub(super) fn stop_kafka(&mut self, how: &str) {
        if std::mem::replace(&mut self.kafka_runs, false) {
            self.kafka_paused = false;
            tell(&mut self.kafka, &format!("stop {how}")).unwrap();
        }
    }

    pub(super) fn start_kafka(&mut self) {
        if !std::mem::replace(&mut self.kafka_runs, true) {
            tell(&mut self.kafka, "start").unwrap();
        }
    }

    pub(super) fn pause_kafka(&mut self) {
        if self.kafka_runs && !std::mem::replace(&mut self.kafka_paused, true) {
            tell(&mut self.kafka, "pause").unwrap();
        }
    }

    pub(super) fn resume_kafka(&mut self) {
        if std::mem::replace(&mut self.kafka_paused, false) {
            tell(&mut self.kafka, "resume").unwrap();
        }
    }

    pub(super) fn proxy(&self, side: Side) -> &Proxy {
        match side {
            Side::Postgres => &self.postgres_proxy,
            Side::Kafka => &self.kafka_proxy,
        }
    }

    pub(super) fn postgres_runs(&self) -> bool {
        self.postgres_runs
    }

    /// Ends all harm.
    pub(super) fn heal(&mut self) {
        self.start_postgres();
        self.start_kafka();
        self.resume_kafka();
        for side in [Side::Postgres, Side::Kafka] {
            self.proxy(side).weather(Weather::Fair);
        }
    }
}

fn tell(server: &mut Server, command: &str) -> postbox::Result<()> {
    block_in_place(|| server.command(command))
}
