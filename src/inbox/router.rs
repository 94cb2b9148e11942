//! A handler that gives each message to whoever takes its kind.
//!
//! A kind is an event type, and as much more of what the message says as whoever takes it cares for:
//! its topic, and its schema version or the beginning of one. `1` takes `1`, `1.2` and `1.2.3`; `1.2`
//! takes the last two, and is asked first, as it is nearer; and a topic is nearer than a version.
//!
//! A message of a version that nobody takes is migrated to one that somebody does, on the shortest
//! way of the [migrations](Router::migrate) that there are. One that cannot be, goes to whoever takes
//! any version; and what nobody takes is a dead letter, unless
//! [somebody takes the rest](Router::otherwise).
//!
//! ```no_run
//! # use postbox::inbox::handler::{Handler, Handlers, Handling, Outcome};
//! # use postbox::inbox::message::Message;
//! # use postbox::inbox::router::{Kind, Router};
//! # use tokio_postgres::Transaction;
//! struct Paid;
//!
//! impl Handler for Paid {
//!     fn handle<'a>(&'a self, message: &'a Message, transaction: &'a Transaction<'a>) -> Handling<'a> {
//!         Box::pin(async move {
//!             let sql = "UPDATE orders SET is_paid = true WHERE id = $1";
//!             transaction.execute(sql, &[&message.key]).await?;
//!             Ok(Outcome::Completed)
//!         })
//!     }
//! }
//!
//! let router = Router::new()
//!     .on(Kind::of("order_paid").version("2"), Paid)
//!     .migrate("order_paid", "1", "2", |mut payload| {
//!         payload["currency"] = "EUR".into();
//!         Ok(payload)
//!     });
//! let handlers = Handlers::Rust(std::sync::Arc::new(router));
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use serde_json::Value;
use tokio_postgres::Transaction;

use super::handler::{Handler, HandlerError, Handling, Outcome};
use super::message::Message;

/// Which messages a handler takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kind {
    event_type: String,
    topic: Option<String>,
    version: Option<String>,
}

impl Kind {
    /// All of an event type.
    pub fn of(event_type: impl Into<String>) -> Self {
        Self {
            event_type: event_type.into(),
            topic: None,
            version: None,
        }
    }

    /// Of this topic alone.
    #[must_use]
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Of this schema version, or of those that begin with it and a dot.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.event_type)?;
        if let Some(topic) = &self.topic {
            write!(f, " of topic \"{topic}\"")?;
        }
        match &self.version {
            Some(version) => write!(f, " in version \"{version}\""),
            None => Ok(()),
        }
    }
}

/// What makes a payload of one version one of another.
type Migrate = Box<dyn Fn(Value) -> Result<Value, HandlerError> + Send + Sync>;

struct Migration {
    to: String,
    migrate: Migrate,
}

/// Gives messages to handlers.
#[derive(Default)]
pub struct Router {
    handlers: HashMap<Kind, Arc<dyn Handler>>,
    /// By event type, and version.
    migrations: HashMap<(String, String), Vec<Migration>>,
    rest: Option<Arc<dyn Handler>>,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.handlers.keys()).finish()
    }
}

/// Who takes a message, and what is done with it before.
struct Found<'r> {
    handler: &'r dyn Handler,
    way: Vec<&'r Migration>,
}

impl Router {
    /// One that nobody takes anything of yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Who takes messages of a kind.
    ///
    /// # Panics
    /// If somebody does already.
    #[must_use]
    pub fn on(mut self, kind: Kind, handler: impl Handler + 'static) -> Self {
        let name = kind.to_string();
        let before = self.handlers.insert(kind, Arc::new(handler));
        assert!(before.is_none(), "two handlers take {name}");
        self
    }

    /// Who takes what nobody else does.
    #[must_use]
    pub fn otherwise(mut self, handler: impl Handler + 'static) -> Self {
        self.rest = Some(Arc::new(handler));
        self
    }

    /// How payloads of a version, or of those that begin with it and a dot, become such of another. What
    /// it cannot do is an attempt that failed.
    #[must_use]
    pub fn migrate(
        mut self,
        event_type: impl Into<String>,
        from: impl Into<String>,
        to: impl Into<String>,
        migrate: impl Fn(Value) -> Result<Value, HandlerError> + Send + Sync + 'static,
    ) -> Self {
        let known = self.migrations.entry((event_type.into(), from.into()));
        known.or_default().push(Migration {
            to: to.into(),
            migrate: Box::new(migrate),
        });
        self
    }

    fn find(&self, message: &Message) -> Option<Found<'_>> {
        let version = message.schema_version.as_deref();
        let directly = version.and_then(|version| {
            let handler = self.taker(message, version)?;
            let way = Vec::new();
            Some(Found { handler, way })
        });
        let found = directly.or_else(|| self.find_way(message, version?));
        found.or_else(|| {
            let handler = self.exactly(message, None).or(self.rest.as_deref())?;
            let way = Vec::new();
            Some(Found { handler, way })
        })
    }

    /// Who takes this version, the nearest first.
    fn taker(&self, message: &Message, version: &str) -> Option<&dyn Handler> {
        beginnings(version).find_map(|version| self.exactly(message, Some(version)))
    }

    fn exactly(&self, message: &Message, version: Option<&str>) -> Option<&dyn Handler> {
        let takes = |topic: Option<&str>| {
            let kind = Kind {
                event_type: message.event_type.clone(),
                topic: topic.map(str::to_owned),
                version: version.map(str::to_owned),
            };
            self.handlers.get(&kind).map(|handler| &**handler)
        };
        takes(Some(&message.topic)).or_else(|| takes(None))
    }

    /// The shortest way to a version that somebody takes.
    fn find_way(&self, message: &Message, version: &str) -> Option<Found<'_>> {
        let mut seen = HashSet::from([version]);
        let mut ways = VecDeque::from([(version, Vec::new())]);
        while let Some((version, way)) = ways.pop_front() {
            if let Some(handler) = self.taker(message, version) {
                return Some(Found { handler, way });
            }
            for from in beginnings(version) {
                let key = (message.event_type.clone(), from.to_owned());
                for migration in self.migrations.get(&key).into_iter().flatten() {
                    if seen.insert(&migration.to) {
                        let way = way.iter().copied().chain([migration]).collect();
                        ways.push_back((&migration.to, way));
                    }
                }
            }
        }
        None
    }
}

/// A version, and what it begins with, the longest first.
fn beginnings(version: &str) -> impl Iterator<Item = &str> {
    let parts = version.rmatch_indices('.').map(|(dot, _)| &version[..dot]);
    std::iter::once(version).chain(parts)
}

/// The message in the version to which this leads.
fn migrated(message: &Message, way: &[&Migration]) -> Result<Message, HandlerError> {
    if way.is_empty() {
        return Ok(message.clone());
    }
    let payload = message.payload.as_deref().unwrap_or("null");
    let mut payload: Value = serde_json::from_str(payload)?;
    for migration in way {
        payload = (migration.migrate)(payload)?;
    }
    Ok(Message {
        payload: Some(payload.to_string()),
        body: None,
        schema_version: way.last().map(|migration| migration.to.clone()),
        ..message.clone()
    })
}

impl Handler for Router {
    fn handle<'a>(
        &'a self,
        message: &'a Message,
        transaction: &'a Transaction<'a>,
    ) -> Handling<'a> {
        Box::pin(async move {
            let Some(Found { handler, way }) = self.find(message) else {
                let kind = Kind {
                    event_type: message.event_type.clone(),
                    topic: Some(message.topic.to_string()),
                    version: message.schema_version.clone(),
                };
                return Ok(Outcome::Failed(format!("no handler takes {kind}")));
            };
            if way.is_empty() {
                return handler.handle(message, transaction).await;
            }
            let message = migrated(message, &way)?;
            handler.handle(&message, transaction).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::message::Id;

    /// One that is known by its address.
    struct Named;

    impl Handler for Named {
        fn handle<'a>(&'a self, _: &'a Message, _: &'a Transaction<'a>) -> Handling<'a> {
            Box::pin(async { Ok(Outcome::Completed) })
        }
    }

    fn message(topic: &str, version: Option<&str>) -> Message {
        Message {
            id: Id::new(b"1"),
            topic: Arc::from(topic),
            partition: 0,
            offset: 0,
            produced_at: None,
            key: None,
            event_type: "paid".to_owned(),
            schema_version: version.map(str::to_owned),
            headers: "{}".to_owned(),
            payload: Some(r#"{"a":1}"#.to_owned()),
            body: None,
        }
    }

    fn kind(topic: Option<&str>, version: Option<&str>) -> Kind {
        Kind {
            event_type: "paid".to_owned(),
            topic: topic.map(str::to_owned),
            version: version.map(str::to_owned),
        }
    }

    /// Which kind's handler takes it, and in which version.
    fn taken(
        router: &Router,
        topic: &str,
        version: Option<&str>,
    ) -> Option<(Option<Kind>, Option<String>)> {
        let message = message(topic, version);
        let found = router.find(&message)?;
        let mut kinds = router.handlers.iter();
        let kind =
            kinds.find(|(_, handler)| std::ptr::addr_eq(&raw const ***handler, found.handler));
        let version = migrated(&message, &found.way).unwrap().schema_version;
        Some((kind.map(|(kind, _)| kind.clone()), version))
    }

    #[test]
    fn the_nearest_kind_takes_a_message() {
        let kinds = [
            kind(None, None),
            kind(None, Some("1")),
            kind(None, Some("1.2")),
            kind(Some("shop"), Some("1")),
        ];
        let mut router = Router::new();
        for kind in kinds.clone() {
            router = router.on(kind, Named);
        }
        let [any, first, second, of_shop] = kinds;
        for (topic, version, expected) in [
            ("bank", None, &any),
            ("bank", Some("2"), &any),
            ("bank", Some("12"), &any),
            ("bank", Some("1"), &first),
            ("bank", Some("1.3"), &first),
            ("bank", Some("1.2"), &second),
            ("bank", Some("1.2.3"), &second),
            ("shop", Some("1.3"), &of_shop),
        ] {
            let expected = (Some(expected.clone()), version.map(str::to_owned));
            assert_eq!(
                taken(&router, topic, version),
                Some(expected),
                "{topic} {version:?}"
            );
        }
        // A topic is no reason to take what is further away.
        let taken = taken(&router, "shop", Some("1.2")).unwrap();
        assert_eq!(taken.0, Some(second));
    }

    #[test]
    fn a_message_is_migrated_on_the_shortest_way_to_a_version_that_is_taken() {
        let add = |name: &'static str| {
            move |mut payload: Value| {
                payload[name] = true.into();
                Ok(payload)
            }
        };
        let router = Router::new()
            .on(kind(None, Some("4")), Named)
            .on(kind(None, None), Named)
            .migrate("paid", "1", "2", add("two"))
            .migrate("paid", "2", "1", add("back"))
            .migrate("paid", "2", "3", add("three"))
            .migrate("paid", "3", "4", add("four"))
            .migrate("paid", "2", "4.1", add("short"));
        let four = Some(kind(None, Some("4")));
        let migrated_to = |version: &str| Some((four.clone(), Some(version.to_owned())));
        assert_eq!(taken(&router, "shop", Some("1")), migrated_to("4.1"));
        assert_eq!(taken(&router, "shop", Some("1.7")), migrated_to("4.1"));
        assert_eq!(taken(&router, "shop", Some("3")), migrated_to("4"));
        let any = (Some(kind(None, None)), Some("5".to_owned()));
        assert_eq!(taken(&router, "shop", Some("5")), Some(any));
        let message = message("shop", Some("1"));
        let found = router.find(&message).unwrap();
        let payload = migrated(&message, &found.way).unwrap().payload.unwrap();
        assert_eq!(payload, r#"{"a":1,"short":true,"two":true}"#);
    }

    #[test]
    fn what_nobody_takes_is_for_the_rest_or_for_nobody() {
        let router = Router::new().on(kind(None, Some("1")), Named);
        assert_eq!(taken(&router, "shop", Some("2")), None);
        assert_eq!(taken(&router, "shop", None), None);
        let router = router.otherwise(Named);
        assert_eq!(
            taken(&router, "shop", Some("2")),
            Some((None, Some("2".to_owned())))
        );
    }

    #[test]
    #[should_panic(expected = "two handlers take \"paid\" of topic \"shop\"")]
    fn a_kind_has_one_handler() {
        let shop = kind(Some("shop"), None);
        drop(Router::new().on(shop.clone(), Named).on(shop, Named));
    }
}
