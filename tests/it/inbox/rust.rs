//! Handlers in Rust, in a process of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use postbox::contract::Contract;
use postbox::database::Database;
use postbox::health::Health;
use postbox::inbox::batch::Attempts;
use postbox::inbox::handler::{Handler, Handlers, Handling, Outcome};
use postbox::inbox::lane::Order;
use postbox::inbox::message::{Message, Reading};
use postbox::inbox::position::{From, OnReset};
use postbox::inbox::router::{Kind, Router};
use postbox::inbox::strategy::Ack;
use postbox::inbox::{Inbox, InboxSettings};
use postbox::metrics::InboxMetrics;
use postbox::publisher::KafkaSettings;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::Transaction;

use super::{Event, Stage};
use crate::support::wait_until;

/// Notes what it handles, and does with some of it what their ids say, at first.
#[derive(Default)]
struct Noting {
    calls: AtomicUsize,
}

impl Handler for Noting {
    fn handle<'a>(
        &'a self,
        message: &'a Message,
        transaction: &'a Transaction<'a>,
    ) -> Handling<'a> {
        Box::pin(async move {
            let call = self.calls.fetch_add(1, Ordering::Relaxed);
            let payload: serde_json::Value =
                serde_json::from_str(message.payload.as_deref().unwrap_or("{}"))?;
            let version = payload["version"].as_i64().unwrap_or_default() as i32;
            let sql = "INSERT INTO effect (message_id, key, version) VALUES ($1, $2, $3)";
            transaction
                .execute(sql, &[&message.id.text, &message.key, &version])
                .await?;
            match &*message.id.text {
                "skipped-3" => Ok(Outcome::Skipped),
                "failed-3" => Ok(Outcome::Failed("never".to_owned())),
                "retry-3" if call < 40 => Ok(Outcome::Retry(Some(Duration::from_millis(50)))),
                "panics-3" if call < 40 => panic!("as told"),
                "error-3" if call < 40 => Err("as told".into()),
                "hangs-3" if call < 40 => std::future::pending().await,
                "breaks-3" if call < 40 => {
                    transaction.batch_execute("SELECT 1 / 0").await?;
                    Ok(Outcome::Completed)
                }
                // A statement that failed and is let pass: nothing of it may be taken for done.
                "hides-3" if call < 40 => {
                    let _ = transaction.batch_execute("SELECT 1 / 0").await;
                    Ok(Outcome::Completed)
                }
                _ => Ok(Outcome::Completed),
            }
        })
    }
}

struct Running {
    stop: watch::Sender<bool>,
    inbox: JoinHandle<postbox::Result<()>>,
}

impl Running {
    fn start(stage: &Stage, ack: Ack, handler: impl Handler + 'static) -> Self {
        let environment = |_: &str| None;
        let fixture = &stage.fixture;
        let settings = InboxSettings {
            database: Database::resolve(Some(&fixture.database_url), &environment).unwrap(),
            contract: Contract::new(&fixture.contract.schema, "slot", "publication").unwrap(),
            kafka: KafkaSettings {
                brokers: fixture.brokers.clone(),
                properties: Vec::new(),
            },
            topics: vec![stage.topic.clone()],
            group: stage.group().to_owned(),
            instance: None,
            ack,
            handlers: Handlers::Rust(Arc::new(handler)),
            reading: Reading::default(),
            shares_ids: false,
            order: Order::Key,
            from: From::Earliest,
            on_reset: OnReset::Stop,
            attempts: Attempts {
                max: 6,
                backoff_min: Duration::from_millis(50),
                backoff_max: Duration::from_secs(1),
            },
            handler_timeout: Duration::from_millis(500),
            batch_max: 1000,
            batch_bytes_max: 4 << 20,
            fetch_bytes_max: 4 << 20,
            waiting_max: 1000,
            dead_letter_topic: None,
            dedup_window: Duration::from_secs(3600),
            shutdown_timeout: Duration::from_secs(10),
        };
        let (stop, stopped) = watch::channel(false);
        let inbox = Inbox::new(
            settings,
            Arc::new(InboxMetrics::default()),
            Arc::new(Health::default()),
        );
        Self {
            stop,
            inbox: tokio::spawn(inbox.run(stopped)),
        }
    }

    async fn drain(self) {
        self.stop.send(true).unwrap();
        self.inbox.await.unwrap().unwrap();
    }
}

const KEYS: [&str; 8] = [
    "skipped", "failed", "retry", "panics", "error", "hangs", "breaks", "hides",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_handler_does_costs_itself_and_its_effects_happen_once() {
    let stage = Stage::new(2).await;
    let events: Vec<Event> = (0..6)
        .flat_map(|version| KEYS.map(|key| Event::of(key, version)))
        .collect();
    stage.produce(&events);
    let inbox = Running::start(&stage, Ack::ExactlyOnce, Noting::default());
    stage.wait_for_effects(47).await;
    wait_until("none waits", async || {
        let waiting = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'waiting'";
        stage.count(waiting).await == 0
    })
    .await;
    inbox.drain().await;
    let handled: Vec<Event> = (events.into_iter())
        .filter(|event| event.id.as_deref() != Some("failed-3"))
        .collect();
    stage.assert_once_and_in_order(&handled).await;
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND message_id = 'failed-3' AND error = 'never'";
    assert_eq!(stage.count(dead).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_gives_each_message_to_whoever_takes_its_kind() {
    let stage = Stage::new(1).await;
    let of = |version: usize, headers| Event {
        headers,
        ..Event::of("k", version)
    };
    stage.produce(&[
        of(0, &[("event_type", b"paid"), ("schema_version", b"2.1")]),
        of(1, &[("event_type", b"paid"), ("schema_version", b"1")]),
        of(2, &[("event_type", b"shipped")]),
        of(3, &[("event_type", b"paid"), ("schema_version", b"bad")]),
    ]);
    let router = Router::new()
        .on(Kind::of("paid").version("2"), Noting::default())
        .migrate("paid", "1", "2", |mut payload| {
            payload["version"] = 17.into();
            Ok(payload)
        })
        .migrate("paid", "bad", "2", |_| Err("it has no amount".into()));
    let inbox = Running::start(&stage, Ack::ExactlyOnce, router);
    wait_until("two are dead", async || {
        let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead'";
        stage.count(dead).await == 2
    })
    .await;
    inbox.drain().await;
    let effects = stage.effects().await;
    let versions: Vec<Option<i32>> = effects.iter().map(|(.., version)| *version).collect();
    assert_eq!(versions, [Some(0), Some(17)]);
    let errors =
        "SELECT string_agg(error || ' ' || attempts, '|' ORDER BY seq) FROM postbox.inbox_message";
    let errors = errors.replace(
        "postbox.",
        &format!("\"{}\".", stage.fixture.contract.schema),
    );
    let errors: String = stage
        .fixture
        .client
        .query_one(&errors, &[])
        .await
        .unwrap()
        .get(0);
    let nobody = format!(
        "no handler takes \"shipped\" of topic \"{}\" 1",
        stage.topic
    );
    assert_eq!(errors, format!("{nobody}|it has no amount 6"));
}
