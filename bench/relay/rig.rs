//! The servers, the tables and the backlogs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use postbox::servers::Server;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls};

use crate::carrier::{Carrier, Running, Table, Wake, Way};

pub(crate) const PARTITIONS: i32 = 4;

/// Long enough for the slowest of all that is measured.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) struct Rig {
    pub(crate) postgres: Server,
    pub(crate) kafka: Server,
    pub(crate) client: Client,
    /// Of postbox' records, if not its default.
    pub(crate) format: Option<&'static str>,
    /// How postbox is set up to read.
    pub(crate) mode: &'static str,
    /// Where everything that is started may write.
    pub(crate) scratch: tempfile::TempDir,
    admin: AdminClient<DefaultClientContext>,
    watcher: BaseConsumer,
    topics: u32,
    tables: Vec<Table>,
}

/// A program that runs, and the folder of its own.
pub(crate) struct Launched {
    pub(crate) program: Running,
    _folder: tempfile::TempDir,
}

/// Rows that wait in the WAL for whoever reads from the slot `base`.
pub(crate) struct Backlog {
    pub(crate) table: Table,
    pub(crate) topic: String,
    pub(crate) rows: i64,
    pub(crate) rows_per_transaction: i64,
    /// How many rows of the table have been published before.
    published: i64,
    /// Where it ends, as an LSN.
    pub(crate) end: String,
    /// The slot that keeps it, if it is read from the WAL; the snapshot before it, if it is
    /// polled.
    base: Option<String>,
}

impl Backlog {
    pub(crate) fn name(&self) -> String {
        let Self {
            rows,
            rows_per_transaction: each,
            published,
            ..
        } = self;
        match published {
            0 => format!("{rows} rows, {each} a transaction"),
            _ => format!("{rows} rows, {each} a transaction, behind {published}"),
        }
    }
}

impl Rig {
    pub(crate) async fn start(postgres: &[&str], kafka: &[&str]) -> Self {
        let postgres = Server::postgres(postgres).unwrap();
        // What was deleted leaves the disk soon.
        let settings = [
            "log.retention.check.interval.ms=5000",
            "log.segment.delete.delay.ms=0",
            "log.segment.bytes=250000000",
        ];
        let kafka = Server::kafka(&[&settings, kafka].concat()).unwrap();
        let client = connect(&postgres.socket_url()).await;
        client
            .batch_execute(include_str!("../compare/rows.sql"))
            .await
            .unwrap();
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", kafka.fact("brokers"));
        Self {
            admin: config.create().unwrap(),
            watcher: config.create().unwrap(),
            scratch: tempfile::tempdir().unwrap(),
            topics: 0,
            format: None,
            mode: "wal",
            tables: Vec::new(),
            postgres,
            kafka,
            client,
        }
    }

    pub(crate) fn brokers(&self) -> &str {
        self.kafka.fact("brokers")
    }

    /// The database's URL, by this way.
    pub(crate) fn database_url(&self, way: Way) -> String {
        match way {
            Way::Socket => self.postgres.socket_url(),
            Way::Tcp => {
                let port = self.postgres.fact("port");
                format!("postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable")
            }
        }
    }

    /// Makes a topic, and the table that this carrier reads if it is not there yet.
    pub(crate) async fn prepare(&mut self, carrier: Carrier) -> String {
        let table = carrier.table();
        if !self.tables.contains(&table) {
            table.create(self).await;
            self.tables.push(table);
        }
        self.create_topic().await
    }

    pub(crate) async fn create_topic(&mut self) -> String {
        self.topics += 1;
        let topic = format!("bench-{}", self.topics);
        let new = NewTopic::new(&topic, PARTITIONS, TopicReplication::Fixed(1));
        let made = self.admin.create_topics([&new], &AdminOptions::new()).await;
        made.unwrap().remove(0).unwrap();
        let is_led = || {
            let metadata = self.watcher.fetch_metadata(Some(&topic), PATIENCE).unwrap();
            let mut partitions = metadata.topics()[0].partitions().iter();
            partitions.all(|partition| partition.leader() >= 0)
        };
        while !is_led() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        topic
    }

    pub(crate) async fn delete_topic(&self, topic: &str) {
        let options = AdminOptions::new();
        let deleted = self.admin.delete_topics(&[topic], &options).await;
        deleted.unwrap().remove(0).unwrap();
    }

    /// Starts the carrier at the end of the WAL, and waits until it carries.
    pub(crate) async fn launch(&mut self, carrier: Carrier, topic: &str) -> Launched {
        self.begin(carrier).await;
        let folder = tempfile::tempdir_in(&self.scratch).unwrap();
        let mut program = carrier.start(self, folder.path(), None);
        let before = self.records(topic);
        // A number that no event has which is measured.
        let insert = format!("SELECT {}($1, -1, -1)", carrier.table().insert());
        self.client.execute(&insert, &[&topic]).await.unwrap();
        while self.records(topic) == before {
            program.check();
            assert!(program.began.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Launched {
            program,
            _folder: folder,
        }
    }

    /// A slot at the end of the WAL, for this carrier.
    pub(crate) async fn begin(&self, carrier: Carrier) {
        if carrier.table() == Table::OmniBox {
            let empty = "TRUNCATE outbox_events";
            self.client.batch_execute(empty).await.unwrap();
        }
        if let Some(slot) = carrier.slot() {
            self.drop_slot(slot).await;
            self.create_slot(slot).await;
            self.put_back_checkpoint(slot).await;
        } else if let Carrier::Polling(wake) = carrier {
            let now = self.snapshot().await;
            self.poll_from(wake, &now).await;
        }
    }

    /// The backlog, as if nobody had read it, for this carrier.
    pub(crate) async fn begin_at(&self, carrier: Carrier, backlog: &Backlog) {
        if let (Some(slot), Some(base)) = (carrier.slot(), &backlog.base) {
            self.drop_slot(slot).await;
            let copy = "SELECT pg_copy_logical_replication_slot($1::text, $2::text)";
            self.client.execute(copy, &[base, &slot]).await.unwrap();
            self.put_back_checkpoint(slot).await;
        } else if let (Carrier::Polling(wake), Some(base)) = (carrier, &backlog.base) {
            self.poll_from(wake, base).await;
        } else {
            self.begin(carrier).await;
            self.write(
                backlog.table,
                &backlog.topic,
                backlog.rows,
                backlog.rows_per_transaction,
            )
            .await;
            self.client
                .batch_execute("VACUUM ANALYZE outbox_events")
                .await
                .unwrap();
        }
    }

    /// Writes a backlog. Nothing else may be written until it is drained.
    pub(crate) async fn load(
        &mut self,
        carrier: Carrier,
        rows: i64,
        rows_per_transaction: i64,
    ) -> Backlog {
        let topic = self.prepare(carrier).await;
        let table = carrier.table();
        let mut backlog = Backlog {
            table,
            topic,
            rows,
            rows_per_transaction,
            published: 0,
            end: String::new(),
            base: None,
        };
        match carrier {
            Carrier::OmniBox | Carrier::Claiming | Carrier::Tracked(_) => return backlog,
            Carrier::Polling(_) => {
                let count = "SELECT count(*) FROM postbox.outbox";
                backlog.published = self.client.query_one(count, &[]).await.unwrap().get(0);
                backlog.base = Some(self.snapshot().await);
            }
            _ => {
                let base = format!("base_{}_{rows}_{rows_per_transaction}", table.name());
                self.create_slot(&base).await;
                backlog.base = Some(base);
            }
        }
        let began = Instant::now();
        self.write(table, &backlog.topic, rows, rows_per_transaction)
            .await;
        let end = "SELECT pg_current_wal_insert_lsn()::text";
        backlog.end = self.client.query_one(end, &[]).await.unwrap().get(0);
        // So that the server has something to say behind the end.
        let message = "SELECT pg_logical_emit_message(true, 'bench', 'end')";
        self.client.execute(message, &[]).await.unwrap();
        self.client
            .batch_execute("VACUUM (FREEZE, ANALYZE)")
            .await
            .unwrap();
        self.client.batch_execute("CHECKPOINT").await.unwrap();
        let (name, seconds) = (table.name(), began.elapsed().as_secs_f64());
        eprintln!(
            "{rows} rows for {name}, {rows_per_transaction} a transaction, in {seconds:.0} s"
        );
        backlog
    }

    pub(crate) async fn write(
        &self,
        table: Table,
        topic: &str,
        rows: i64,
        rows_per_transaction: i64,
    ) {
        let load = "CALL bench_load($1, $2, $3, $4)";
        let insert = table.insert();
        let parameters: [&(dyn ToSql + Sync); 4] = [&insert, &topic, &rows, &rows_per_transaction];
        self.client.execute(load, &parameters).await.unwrap();
    }

    async fn snapshot(&self) -> String {
        let now = "SELECT pg_current_snapshot()::text";
        self.client.query_one(now, &[]).await.unwrap().get(0)
    }

    /// Has a relay that polls begin with what this snapshot does not see.
    async fn poll_from(&self, wake: Wake, snapshot: &str) {
        let sql = format!(
            "UPDATE postbox.checkpoint \
             SET snapshot = '{snapshot}', second_snapshot = NULL, seq = NULL, epoch = epoch + 1, owner = NULL, \
                 expires_at = NULL; \
             ALTER TABLE postbox.outbox {} TRIGGER notify_relay",
            match wake {
                Wake::Interval => "DISABLE",
                Wake::Notification => "ENABLE",
            }
        );
        self.client.batch_execute(&sql).await.unwrap();
    }

    /// Ends what a carrier was given of a backlog, and the backlog.
    pub(crate) async fn forget(&self, carrier: Carrier, backlog: &Backlog) {
        let Some(slot) = carrier.slot() else { return };
        for slot in [Some(slot), backlog.base.as_deref()].into_iter().flatten() {
            self.drop_slot(slot).await;
        }
    }

    /// How many records each partition has had, over all time.
    pub(crate) fn ends(&self, topic: &str) -> Vec<i64> {
        let deadline = Instant::now() + Duration::from_secs(10);
        // One request for all of them: what looks on must not cost the broker much.
        let wanted = all_partitions(topic, Offset::End);
        loop {
            let found = self.watcher.offsets_for_times(wanted.clone(), PATIENCE);
            let found = found.map(|found| {
                let offsets = found.elements();
                let offsets = offsets.iter().map(|element| match element.offset() {
                    Offset::Offset(end) => Some(end),
                    _ => None,
                });
                offsets.collect::<Option<Vec<_>>>()
            });
            match found {
                Ok(Some(ends)) => return ends,
                // A leader does not know at once that it leads a new partition.
                _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                found => panic!("{topic}: {found:?}"),
            }
        }
    }

    /// How many records the topic has had, over all time.
    pub(crate) fn records(&self, topic: &str) -> i64 {
        self.ends(topic).iter().sum()
    }

    /// A consumer of what comes from now on.
    pub(crate) fn consumer(&self, topic: &str) -> BaseConsumer {
        let mut assignment = TopicPartitionList::new();
        for (partition, end) in (0..).zip(self.ends(topic)) {
            assignment
                .add_partition_offset(topic, partition, Offset::Offset(end))
                .unwrap();
        }
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.brokers())
            .set("group.id", "bench")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "500")
            .create()
            .unwrap();
        consumer.assign(&assignment).unwrap();
        consumer
    }

    /// Frees the disk of what the topic has, but for segments that are not full.
    pub(crate) async fn empty(&self, topic: &str) {
        let until = all_partitions(topic, Offset::End);
        let options = AdminOptions::new();
        self.admin.delete_records(&until, &options).await.unwrap();
    }

    /// Ends what [`prepare`](Self::prepare) and [`begin`](Self::begin) made.
    pub(crate) async fn end(&self, carrier: Carrier, topic: &str) {
        if let Some(slot) = carrier.slot() {
            self.drop_slot(slot).await;
        }
        self.delete_topic(topic).await;
    }

    /// The process that sends what the carrier's slot has, if somebody reads it.
    pub(crate) async fn walsender(&self, carrier: Carrier) -> Option<u32> {
        let slot = carrier.slot()?;
        let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        let row = self.client.query_opt(sql, &[&slot]).await.unwrap();
        let pid: Option<i32> = row.and_then(|row| row.get(0));
        pid.map(i32::unsigned_abs)
    }

    async fn create_slot(&self, slot: &str) {
        let sql = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')";
        self.client.execute(sql, &[&slot]).await.unwrap();
    }

    async fn drop_slot(&self, slot: &str) {
        let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                   WHERE slot_name = $1";
        // Whoever read it a moment ago may not have let go of it.
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(error) = self.client.execute(sql, &[&slot]).await {
            assert!(Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where the slot is, if it is the relay's: it begins at the later of the two.
    async fn put_back_checkpoint(&self, slot: &str) {
        let sql = "UPDATE postbox.checkpoint SET lsn = confirmed_flush_lsn \
                   FROM pg_replication_slots WHERE name = $1 AND slot_name = $1";
        if self.tables.contains(&Table::Postbox) || self.tables.contains(&Table::OmniBox) {
            self.client.execute(sql, &[&slot]).await.unwrap();
        }
    }
}

fn all_partitions(topic: &str, offset: Offset) -> TopicPartitionList {
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let added = partitions.add_partition_offset(topic, partition, offset);
        added.unwrap();
    }
    partitions
}

/// A session, on this runtime.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The folder of the sources.
pub(crate) fn home() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The program that is measured: `POSTBOX`, else what `cargo build --release` makes.
pub(crate) fn postbox() -> PathBuf {
    let built = || home().join("target/release/postbox");
    let program = std::env::var_os("POSTBOX").map_or_else(built, PathBuf::from);
    assert!(
        program.exists(),
        "no {}: run `make bench`",
        program.display()
    );
    program
}

/// Whether it was fetched: it needs a newer Python than some have.
pub(crate) fn has_omni_box() -> bool {
    let cache = std::fs::read_dir(home().join("dev/.cache"));
    cache.is_ok_and(|mut entries| {
        entries.any(|entry| {
            let name = entry.map(|entry| entry.file_name());
            name.is_ok_and(|name| name.to_string_lossy().starts_with("omni-box-"))
        })
    })
}

/// `PG_RECVLOGICAL`, else the newest that is installed, if any.
pub(crate) fn pg_recvlogical() -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("PG_RECVLOGICAL") {
        return Some(program.into());
    }
    let found = "ls /usr/lib/postgresql/*/bin/pg_recvlogical 2>/dev/null | sort -V | tail -n 1; \
                 command -v pg_recvlogical";
    let output = Command::new("sh").args(["-c", found]).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    output.lines().next().map(PathBuf::from)
}
