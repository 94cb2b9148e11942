//! A database, a slot and a topic for one test.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use postbox::contract::Contract;
use postbox::database::Database;
use postbox::oracle::{self, Ledger, Load, Reader, Seen, Verdict, Writers};
use postbox::publisher::KafkaSettings;
use postbox::servers::Server;
use postbox::setup::{self, SetupOptions};
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::addresses::{Addresses, shared, with_database};
use super::{Output, PATIENCE, Proxy, Relay, postbox, run, wait_until};

pub(crate) struct Fixture {
    pub(crate) database: Database,
    pub(crate) database_url: String,
    pub(crate) brokers: String,
    pub(crate) contract: Contract,
    /// The aggregate type of the test's events, and so their topic.
    pub(crate) topic: String,
    pub(crate) client: Client,
    /// The test's own servers, if it harms them.
    pub(crate) postgres: Option<Server>,
    pub(crate) kafka: Option<Server>,
    second_broker: Option<Server>,
    admin_url: String,
    name: String,
}

impl Fixture {
    /// On the servers that all tests share, set up.
    pub(crate) async fn new() -> Self {
        let fixture = Self::on(shared(), None, None).await;
        fixture.set_up().await;
        fixture
    }

    /// On the servers that all tests share, an empty database.
    pub(crate) async fn empty() -> Self {
        Self::on(shared(), None, None).await
    }

    /// On a Postgres of its own with these settings, an empty database.
    pub(crate) async fn with_postgres(settings: &[&str]) -> Self {
        let postgres = Server::postgres(settings).unwrap();
        let addresses = Addresses {
            database_url: postgres.socket_url(),
            brokers: shared().brokers.clone(),
        };
        Self::on(&addresses, Some(postgres), None).await
    }

    /// On servers of its own with these settings, set up.
    pub(crate) async fn with_servers(postgres: &[&str], kafka: &[&str]) -> Self {
        let postgres = Server::postgres(postgres).unwrap();
        let kafka = Server::kafka(kafka).unwrap();
        let addresses = Addresses {
            database_url: postgres.socket_url(),
            brokers: kafka.fact("brokers").to_owned(),
        };
        let fixture = Self::on(&addresses, Some(postgres), Some(kafka)).await;
        fixture.set_up().await;
        fixture
    }

    /// On a Postgres of its own, set up, and the URL of its database through the proxy.
    pub(crate) async fn behind(proxy: &Proxy) -> (Self, String) {
        let fixture = Fixture::with_postgres(&[]).await;
        fixture.set_up().await;
        let url = fixture.url_behind(proxy);
        (fixture, url)
    }

    /// The URL of the database on the test's own Postgres, through the proxy.
    pub(crate) fn url_behind(&self, proxy: &Proxy) -> String {
        proxy.pass_on_to(&self.postgres_address());
        let (address, database) = (proxy.address(), &self.contract.slot);
        format!("postgresql://postgres@{address}/{database}?sslmode=disable")
    }

    /// Where the test's own Postgres listens, as `host:port`.
    pub(crate) fn postgres_address(&self) -> String {
        let postgres = self.postgres.as_ref().expect("a Postgres of its own");
        format!("127.0.0.1:{}", postgres.fact("port"))
    }

    /// On servers of its own, Kafka with two brokers, set up. `kafka` is the first of
    /// them, and their controller.
    pub(crate) async fn with_two_brokers() -> Self {
        let mut fixture = Self::with_servers(&[], &[]).await;
        let first = fixture.kafka.as_ref().expect("a Kafka of its own");
        let second = Server::second_broker(first, &[]).unwrap();
        fixture.brokers = format!("{},{}", fixture.brokers, second.fact("brokers"));
        fixture.second_broker = Some(second);
        fixture
    }

    /// On the Postgres that all tests share and these brokers, set up.
    pub(crate) async fn with_brokers(brokers: &str) -> Self {
        let addresses = Addresses {
            database_url: shared().database_url.clone(),
            brokers: brokers.to_owned(),
        };
        let fixture = Self::on(&addresses, None, None).await;
        fixture.set_up().await;
        fixture
    }

    /// On these servers, set up. They outlive the fixture.
    pub(crate) async fn beside(postgres: &Server, brokers: &str) -> Self {
        let fixture = Self::empty_beside(postgres, brokers).await;
        fixture.set_up().await;
        fixture
    }

    /// On these servers, an empty database. They outlive the fixture.
    pub(crate) async fn empty_beside(postgres: &Server, brokers: &str) -> Self {
        let addresses = Addresses {
            database_url: postgres.socket_url(),
            brokers: brokers.to_owned(),
        };
        Self::on(&addresses, None, None).await
    }

    async fn on(addresses: &Addresses, postgres: Option<Server>, kafka: Option<Server>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("it_{}_{number}", std::process::id());
        let admin = connect(&addresses.database_url).await;
        let create = format!("CREATE DATABASE {name}");
        admin.batch_execute(&create).await.unwrap();
        let database_url = with_database(&addresses.database_url, &name);
        Self {
            database: resolve(&database_url),
            client: connect(&database_url).await,
            database_url,
            brokers: addresses.brokers.clone(),
            contract: Contract::new("postbox", &name, "postbox").unwrap(),
            topic: format!("it-{}-{number}", std::process::id()),
            postgres,
            kafka,
            second_broker: None,
            admin_url: addresses.database_url.clone(),
            name,
        }
    }

    /// `postbox setup`, and the oracle's tables.
    pub(crate) async fn set_up(&self) {
        setup::setup(&self.database, &self.contract, &SetupOptions::default())
            .await
            .unwrap();
        oracle::prepare(&self.client, &self.contract.schema)
            .await
            .unwrap();
    }

    /// `postbox setup` as a process, with these flags.
    pub(crate) fn setup(&self, flags: &[&str]) -> Output {
        self.setup_as(&self.database_url, flags)
    }

    /// The same, by the role of this URL.
    pub(crate) fn setup_as(&self, database_url: &str, flags: &[&str]) -> Output {
        self.run("setup", database_url, flags)
    }

    /// `postbox recover` as a process, with these flags.
    pub(crate) fn recover(&self, flags: &[&str]) -> Output {
        self.recover_as(&self.database_url, flags)
    }

    /// The same, by the role of this URL.
    pub(crate) fn recover_as(&self, database_url: &str, flags: &[&str]) -> Output {
        self.run("recover", database_url, flags)
    }

    /// `postbox parked` as a process, with these flags.
    pub(crate) fn parked(&self, flags: &[&str]) -> Output {
        self.parked_as(&self.database_url, flags)
    }

    /// The same, by the role of this URL.
    pub(crate) fn parked_as(&self, database_url: &str, flags: &[&str]) -> Output {
        self.run("parked", database_url, flags)
    }

    /// The same, not started.
    pub(crate) fn parked_command(&self, flags: &[&str]) -> Command {
        self.command("parked", &self.database_url, flags)
    }

    /// `postbox inbox` as a process, about messages that are stored, by the role of this URL.
    pub(crate) fn inbox_as(&self, database_url: &str, flags: &[&str]) -> Output {
        self.run("inbox", database_url, flags)
    }

    /// `postbox cancel` as a process, by the role of this URL.
    pub(crate) fn cancel_as(&self, database_url: &str, flags: &[&str]) -> Output {
        self.run("cancel", database_url, flags)
    }

    /// `postbox cleanup` as a process, with these flags.
    pub(crate) fn cleanup(&self, flags: &[&str]) -> Output {
        self.cleanup_as(&self.database_url, flags)
    }

    /// The same, by the role of this URL.
    pub(crate) fn cleanup_as(&self, database_url: &str, flags: &[&str]) -> Output {
        self.run("cleanup", database_url, flags)
    }

    /// `postbox cleanup` as a process that ends at this failpoint.
    pub(crate) fn cleanup_until(&self, step: &str, flags: &[&str]) -> Output {
        let mut command = self.command("cleanup", &self.database_url, flags);
        run(command.env("FAILPOINTS", format!("{step}=panic")))
    }

    /// `postbox recover` as a process that ends at this failpoint.
    pub(crate) fn recover_until(&self, step: &str) -> Output {
        let mut command = self.command("recover", &self.database_url, &[]);
        run(command.env("FAILPOINTS", format!("{step}=panic")))
    }

    /// The same with `postbox setup`.
    pub(crate) fn setup_until(&self, step: &str, flags: &[&str]) -> Output {
        self.setup_with(&format!("{step}=panic"), flags)
    }

    /// `postbox setup` as a process with these failpoints.
    pub(crate) fn setup_with(&self, failpoints: &str, flags: &[&str]) -> Output {
        let mut command = self.command("setup", &self.database_url, flags);
        run(command.env("FAILPOINTS", failpoints))
    }

    fn run(&self, command: &str, database_url: &str, flags: &[&str]) -> Output {
        run(&mut self.command(command, database_url, flags))
    }

    fn command(&self, command: &str, database_url: &str, flags: &[&str]) -> Command {
        let mut command = postbox(&[command]);
        command
            .args(flags)
            .env("POSTBOX_SCHEMA", &self.contract.schema)
            .env("POSTBOX_SLOT", &self.contract.slot)
            .env("POSTBOX_PUBLICATION", &self.contract.publication)
            .env("POSTBOX_DATABASE_URL", database_url);
        command
    }

    /// Ends the walsender that reads the slot, if there is one.
    pub(crate) async fn terminate_walsender(&self) {
        let sql = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
                   WHERE slot_name = $1 AND active";
        let ended = self.client.execute(sql, &[&self.contract.slot]).await;
        ended.unwrap();
    }

    /// The process id of the walsender that reads the slot.
    pub(crate) async fn walsender(&self) -> u32 {
        let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        let row = self.client.query_one(sql, &[&self.contract.slot]).await;
        row.unwrap().get::<_, i32>(0).unsigned_abs()
    }

    /// Waits until somebody reads the slot.
    pub(crate) async fn wait_for_reader(&self) {
        let sql = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
        wait_until("somebody reads the slot", async || {
            let row = self.client.query_one(sql, &[&self.contract.slot]).await;
            row.unwrap().get(0)
        })
        .await;
    }

    /// Drops the slot, whoever reads it.
    pub(crate) async fn drop_slot(&self) {
        let slot = &self.contract.slot;
        let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
        wait_until("the slot is dropped", async || {
            self.terminate_walsender().await;
            self.client.batch_execute(&drop).await.is_ok()
        })
        .await;
    }

    /// Writes WAL until the server has given the slot up.
    pub(crate) async fn outrun_slot(&self) {
        let lost = "SELECT wal_status = 'lost' FROM pg_replication_slots";
        wait_until("the slot is lost", async || {
            for _ in 0..3 {
                let fill = "SELECT pg_logical_emit_message(false, 'fill', 'x'), pg_switch_wal()";
                self.client.batch_execute(fill).await.unwrap();
            }
            let checkpoint = self.client.batch_execute("CHECKPOINT");
            let done = tokio::time::timeout(PATIENCE, checkpoint).await;
            done.expect("a checkpoint waits for the slot").unwrap();
            self.client.query_one(lost, &[]).await.unwrap().get(0)
        })
        .await;
    }

    /// The keys of the records, in their own order.
    pub(crate) async fn keys(&self) -> Vec<String> {
        let records = self.records().await;
        let mut keys: Vec<String> = records.into_iter().map(|seen| seen.key).collect();
        keys.sort_unstable();
        keys
    }

    /// Makes a role that may log in and nothing else: its name and its URL.
    pub(crate) async fn role(&self, name: &str) -> (String, String) {
        let role = format!("{}_{name}", self.name);
        let create = format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'hunter2'");
        self.client.batch_execute(&create).await.unwrap();
        let (scheme, rest) = self.database_url.split_once("://").unwrap();
        let slash = rest.find('/').unwrap();
        let server = rest[..slash].rfind('@').map_or(rest, |at| &rest[at + 1..]);
        (role.clone(), format!("{scheme}://{role}:hunter2@{server}"))
    }

    /// Tells the test's own Postgres, such as `stop immediate`.
    pub(crate) fn postgres(&mut self, command: &str) {
        tell(&mut self.postgres, command);
    }

    /// Tells the test's own Kafka, such as `pause`.
    pub(crate) fn kafka(&mut self, command: &str) {
        tell(&mut self.kafka, command);
    }

    /// Tells the second of the test's own brokers.
    pub(crate) fn second_broker(&mut self, command: &str) {
        tell(&mut self.second_broker, command);
    }

    /// Stops the test's own Postgres and starts it again.
    pub(crate) async fn restart_postgres(&mut self) {
        self.postgres("stop fast");
        self.postgres("start");
        self.reconnect().await;
    }

    /// Connects again, after the server was stopped.
    pub(crate) async fn reconnect(&mut self) {
        self.client = connect(&self.database_url).await;
    }

    pub(crate) fn kafka_settings(&self) -> KafkaSettings {
        KafkaSettings {
            brokers: self.brokers.clone(),
            properties: Vec::new(),
        }
    }

    pub(crate) fn load(&self) -> Load {
        Load::new(&self.contract.schema, &self.topic)
    }

    pub(crate) fn writers(&self, load: Load) -> Writers {
        Writers::start(&self.database, load)
    }

    pub(crate) async fn ledger(&self) -> Ledger {
        oracle::ledger(&self.client, &self.contract.schema)
            .await
            .unwrap()
    }

    /// Inserts one event with this payload.
    pub(crate) async fn insert(&self, key: &str, payload: &str) {
        self.insert_many(key, payload, 1).await;
    }

    /// Inserts so many of them in one transaction.
    pub(crate) async fn insert_many(&self, key: &str, payload: &str, events: i32) {
        let sql = format!(
            "INSERT INTO {} (aggregate_type, aggregate_id, event_type, payload) \
             SELECT $1, $2, 'changed', $3::text::json FROM generate_series(1, $4)",
            self.contract.table("outbox")
        );
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
            [&self.topic, &key, &payload, &events];
        self.client.execute(&sql, &parameters).await.unwrap();
    }

    /// A session that keeps relays from storing anything until it rolls back or goes.
    pub(crate) async fn lock_checkpoint(&self) -> Client {
        let session = connect(&self.database_url).await;
        let table = self.contract.table("checkpoint");
        let lock = format!("BEGIN; SELECT * FROM {table} FOR UPDATE");
        session.batch_execute(&lock).await.unwrap();
        session
    }

    /// Of sessions that begin from now on and wait for each other, the server ends one of
    /// those that have not said how long to wait before it looks. They have long enough to
    /// come to that.
    pub(crate) async fn end_others_at_deadlocks(&self) {
        let name = &self.name;
        let patient = format!("ALTER DATABASE {name} SET deadlock_timeout = '10s'");
        self.client.batch_execute(&patient).await.unwrap();
    }

    /// Waits until a session waits for a lock.
    pub(crate) async fn wait_for_lock(&self) {
        let sql = "SELECT count(*) FROM pg_stat_activity \
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
        wait_until("somebody waits for a lock", async || {
            let row = self.client.query_one(sql, &[]).await.unwrap();
            row.get::<_, i64>(0) > 0
        })
        .await;
    }

    /// The slot's confirmed position.
    pub(crate) async fn confirmed(&self) -> PgLsn {
        let sql = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = $1";
        let row = self.client.query_one(sql, &[&self.contract.slot]).await;
        row.unwrap().get(0)
    }

    /// The position in the checkpoint.
    pub(crate) async fn stored(&self) -> PgLsn {
        let table = self.contract.table("checkpoint");
        let sql = format!("SELECT lsn FROM {table} WHERE name = $1");
        let row = self.client.query_one(&sql, &[&self.contract.slot]).await;
        row.unwrap().get(0)
    }

    /// Where the WAL ends now.
    pub(crate) async fn wal_end(&self) -> PgLsn {
        let sql = "SELECT pg_current_wal_insert_lsn()";
        self.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Waits until the slot has confirmed everything up to now.
    pub(crate) async fn wait_for_confirmation(&self) {
        let end = self.wal_end().await;
        let what = format!("the slot confirms {end}");
        wait_until(&what, || async move { self.confirmed().await >= end }).await;
    }

    /// All records of the test's topic.
    pub(crate) async fn records(&self) -> Vec<Seen> {
        let (kafka, topic) = (self.kafka_settings(), self.topic.clone());
        let read = tokio::task::spawn_blocking(move || {
            let reader = Reader::open(&kafka, &topic, Instant::now() + PATIENCE)?;
            reader.read_to_end()
        });
        read.await.unwrap().unwrap()
    }

    /// Enters what was inserted by hand, in that order, into the oracle's ledger.
    pub(crate) async fn enter_in_ledger(&self) {
        let sql = "INSERT INTO postbox_oracle.ledger SELECT id, aggregate_id, seq FROM postbox.outbox AS o \
                   WHERE NOT EXISTS (SELECT FROM postbox_oracle.ledger AS l WHERE l.id = o.id)";
        self.client.batch_execute(sql).await.unwrap();
    }

    /// Waits until all is confirmed, stops the relay, and asks the oracle.
    pub(crate) async fn judge(&self, relay: Relay) -> Verdict {
        self.wait_for_confirmation().await;
        self.wait_for_untried().await;
        relay.drain().await;
        self.verdict().await
    }

    /// Waits until nothing waits but what was refused, and is behind that. Brokers that have much
    /// to do may take longer to create a topic than the stream waits for it.
    pub(crate) async fn wait_for_untried(&self) {
        let schema = &self.contract.schema;
        let sql = format!(
            "SELECT count(*) = 0 OR bool_or(attempts > 0) FROM {schema}.parked WHERE status = 'waiting'"
        );
        wait_until("what was never tried is sent", async || {
            self.client.query_one(&sql, &[]).await.unwrap().get(0)
        })
        .await;
    }

    /// What the oracle finds in the topic.
    pub(crate) async fn verdict(&self) -> Verdict {
        oracle::judge(&self.ledger().await, &self.records().await)
    }
}

impl Drop for Fixture {
    /// Slots are few and keep WAL, so they go with the test, and so do roles; a
    /// server that is the test's own goes as a whole.
    fn drop(&mut self) {
        if self.postgres.is_some() {
            return;
        }
        let (url, name) = (self.admin_url.clone(), self.name.clone());
        // A runtime cannot wait inside another.
        let cleaner = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
            runtime.block_on(async {
                let admin = connect(&url).await;
                let end_readers = format!(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{name}'"
                );
                let drop_slot = format!(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{name}'"
                );
                let drop_database = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
                let _ = admin.batch_execute(&end_readers).await;
                for _ in 0..100 {
                    if admin.batch_execute(&drop_slot).await.is_ok() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                let _ = admin.batch_execute(&drop_database).await;
                let roles = format!("SELECT format('DROP ROLE %I', rolname) FROM pg_roles WHERE starts_with(rolname, '{name}_')");
                for row in admin.query(&roles, &[]).await.unwrap_or_default() {
                    let _ = admin.batch_execute(row.get(0)).await;
                }
            });
        });
        let _ = cleaner.join();
    }
}

fn tell(server: &mut Option<Server>, command: &str) {
    let server = server.as_mut().expect("a server of the test's own");
    server.command(command).unwrap();
}

fn resolve(url: &str) -> Database {
    Database::resolve(Some(url), &|name| std::env::var(name).ok()).unwrap()
}

pub(crate) async fn connect(url: &str) -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match resolve(url).connect("postbox test").await {
            Ok(session) => return session.client,
            Err(error) => assert!(Instant::now() < deadline, "{}", error.chain()),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
