//! `postbox inbox` without a subcommand: the consumer.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum, value_parser};
use postbox::health::Health;
use postbox::http::{Endpoints, Exposed};
use postbox::inbox::batch::Attempts;
use postbox::inbox::handler::{Endpoint, Function, Handlers};
use postbox::inbox::lane::Order;
use postbox::inbox::message::Reading;
use postbox::inbox::position::{From, OnReset};
use postbox::inbox::strategy::{Ack, CommitOn};
use postbox::inbox::{Inbox, InboxSettings};
use postbox::metrics::InboxMetrics;
use postbox::{Error, ErrorKind};

use crate::cli::arguments::{DatabaseArguments, KafkaArguments, SchemaArguments, check_topic};
use crate::cli::quantity::{check_order, size, time};
use crate::cli::service::{Http, Service};

/// Consumes topics and has each message handled once, until it is told to stop.
///
/// Offsets, the ids of what was received, and what a handler in the database writes are committed in
/// one transaction for each batch: effects happen once for each group, topic and message id, whatever
/// crashes. A message that fails waits in postbox.inbox_message with its key, and is tried again from
/// there.
///
/// It waits for Postgres and Kafka for as long as it takes, also at the start, and ends only on errors
/// that waiting does not mend. SIGTERM and SIGINT finish the batch that is at work, and give the
/// partitions back.
///
/// A TIME is a whole number of ms, s, m, h or d; a SIZE is one of bytes, KiB, MiB or GiB.
#[derive(Debug, Args)]
pub(in crate::cli) struct ConsumeCommand {
    /// The topics, parted by commas.
    #[arg(
        long,
        env = "POSTBOX_TOPICS",
        value_delimiter = ',',
        required_unless_present = "topic_regex",
        value_name = "LIST"
    )]
    topics: Vec<String>,

    /// Topics whose whole name is this regular expression, also those that are made later; as well as, or
    /// in the place of, --topics.
    #[arg(long, env = "POSTBOX_TOPIC_REGEX", value_name = "REGEX")]
    topic_regex: Option<String>,

    /// The consumer group, whose offsets and message ids are kept in Postgres.
    #[arg(long, env = "POSTBOX_GROUP", value_name = "NAME")]
    group: String,

    /// Who handles messages: none (they wait in postbox.inbox_message for the application),
    /// sql:FUNCTION (a function that takes a postbox.message, or a postbox.message[] for a whole batch, and
    /// works in the batch's transaction), or http://… or https://… (a service that is asked for each message,
    /// as a CloudEvent; not with exactly-once).
    #[arg(
        long,
        env = "POSTBOX_HANDLER",
        default_value = "none",
        value_name = "HANDLER"
    )]
    handler: Handler,

    /// When a message counts as received: exactly-once (with what the handler writes, in one transaction),
    /// at-least-once (see --commit), or at-most-once (before it is handled).
    #[arg(
        long,
        env = "POSTBOX_ACK",
        default_value = "exactly-once",
        value_name = "STRATEGY"
    )]
    ack: AckArgument,

    /// With --ack at-least-once, what must have happened before a message counts as received: on-persist
    /// (it is in postbox.inbox_message, and is handled from there), or on-success (it is handled, or
    /// given up); on-success if it is not said.
    #[arg(long, env = "POSTBOX_COMMIT", value_name = "WHEN")]
    commit: Option<CommitArgument>,

    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    schema: SchemaArguments,

    #[command(flatten)]
    kafka: KafkaArguments,

    #[command(flatten)]
    messages: MessageArguments,

    #[command(flatten)]
    service: ServiceArguments,

    #[command(flatten)]
    failures: FailureArguments,

    #[command(flatten)]
    limits: LimitArguments,

    /// Where /metrics, /healthz and /readyz are served: ADDRESS:PORT, port 0 takes a free one; none
    /// turns them off.
    #[arg(
        long,
        env = "POSTBOX_HTTP",
        default_value = "127.0.0.1:9465",
        value_name = "ADDRESS"
    )]
    http: Http,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Messages")]
struct MessageArguments {
    /// The header that has a message's id. Where it is not there, it is id, message_id, event_id or
    /// ce_id, else the envelope's, else the record's place and time.
    #[arg(long, env = "POSTBOX_ID_HEADER", value_name = "NAME")]
    id_header: Option<String>,

    /// Within what an id stands for one message: topic, or group (all of its topics). Not to be changed
    /// once something was received: what was received before would be again.
    #[arg(
        long,
        env = "POSTBOX_DEDUP_SCOPE",
        default_value = "topic",
        value_name = "SCOPE"
    )]
    dedup_scope: Scope,

    /// What keeps its order: key (the messages of a key, in their partition), partition, or none.
    #[arg(
        long,
        env = "POSTBOX_ORDER",
        default_value = "key",
        value_name = "ORDER"
    )]
    order: OrderArgument,

    /// Where to begin if the group has read nothing, here or in Kafka: earliest or latest. A partition
    /// that is new is always read from its beginning.
    #[arg(
        long,
        env = "POSTBOX_FROM",
        default_value = "earliest",
        value_name = "END"
    )]
    from: FromArgument,

    /// What to do where a log is not the one that was read, as its topic was made anew or its next
    /// records are gone: stop (exit code 7), earliest or latest (go on there).
    #[arg(
        long,
        env = "POSTBOX_ON_RESET",
        default_value = "stop",
        value_name = "POLICY"
    )]
    on_reset: OnResetArgument,

    /// A name of this consumer within its group, which keeps its partitions while it restarts
    /// (group.instance.id).
    #[arg(long, env = "POSTBOX_INSTANCE", value_name = "NAME")]
    instance: Option<String>,

    /// For how long a message that is repeated is known by its id, at least; 1m to 365d. Time in which
    /// what was produced is not read yet does not count. One that is repeated later is a new message.
    #[arg(
        long,
        env = "POSTBOX_DEDUP_WINDOW",
        default_value = "7d",
        value_parser = time(Duration::from_secs(60)..=Duration::from_secs(365 * 86_400)),
        value_name = "TIME"
    )]
    dedup_window: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "A service as the handler")]
struct ServiceArguments {
    /// A header of each request, as NAME: VALUE, such as authorization: Bearer TOKEN; may be given several
    /// times. The variable keeps it out of the list of processes.
    #[arg(
        long,
        env = "POSTBOX_HANDLER_HEADER",
        hide_env_values = true,
        value_name = "HEADER"
    )]
    handler_header: Vec<String>,

    /// For how many messages the service is asked at once, of different keys; 1 to 1000. After a crash, it
    /// may be asked again for as many.
    #[arg(
        long,
        env = "POSTBOX_HANDLER_PARALLEL",
        default_value = "16",
        value_parser = value_parser!(u32).range(1..=1000),
        value_name = "MESSAGES"
    )]
    handler_parallel: u32,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Messages that fail")]
struct FailureArguments {
    /// After how many attempts a message is given up, as a dead letter in postbox.inbox_message; 1 to
    /// 1000. Deadlocks and serialization failures do not count.
    #[arg(
        long,
        env = "POSTBOX_MAX_ATTEMPTS",
        default_value = "6",
        value_parser = value_parser!(u32).range(1..=1000),
        value_name = "NUMBER"
    )]
    max_attempts: u32,

    /// A topic to which a copy of each dead letter is sent, with its error and its origin in headers.
    #[arg(long, env = "POSTBOX_DEAD_LETTER_TOPIC", value_name = "TOPIC")]
    dead_letter_topic: Option<String>,

    /// How long a message that failed waits for its second attempt; twice as long for each further
    /// one; 10ms to 1h.
    #[arg(
        long,
        env = "POSTBOX_RETRY_BACKOFF_MIN",
        default_value = "1s",
        value_parser = time(Duration::from_millis(10)..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    retry_backoff_min: Duration,

    /// How long it waits at most; 10ms to 1d.
    #[arg(
        long,
        env = "POSTBOX_RETRY_BACKOFF_MAX",
        default_value = "1h",
        value_parser = time(Duration::from_millis(10)..=Duration::from_secs(86_400)),
        value_name = "TIME"
    )]
    retry_backoff_max: Duration,

    /// How long a statement of the handler may take, after which it is cancelled, or a service to answer;
    /// 10ms to 1h.
    #[arg(
        long,
        env = "POSTBOX_HANDLER_TIMEOUT",
        default_value = "30s",
        value_parser = time(Duration::from_millis(10)..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    handler_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArguments {
    /// The most messages of a transaction; 1 to 100000.
    #[arg(
        long,
        env = "POSTBOX_BATCH_MAX",
        default_value = "1000",
        value_parser = value_parser!(u32).range(1..=100_000),
        value_name = "MESSAGES"
    )]
    batch_max: u32,

    /// The most bytes of them; 1 to 1GiB. One larger message passes alone.
    #[arg(
        long,
        env = "POSTBOX_BATCH_BYTES_MAX",
        default_value = "4MiB",
        value_parser = size(1..=1 << 30),
        value_name = "SIZE"
    )]
    batch_bytes_max: u32,

    /// How many bytes may be fetched and not handled yet; 1KiB to 1GiB.
    #[arg(
        long,
        env = "POSTBOX_FETCH_BYTES_MAX",
        default_value = "16MiB",
        value_parser = size(1024..=1 << 30),
        value_name = "SIZE"
    )]
    fetch_bytes_max: u32,

    /// How many messages may wait in the table to be tried, of the partitions that are this consumer's, before
    /// no more are read; 1 to 100000000. A batch may come on top.
    #[arg(
        long,
        env = "POSTBOX_WAITING_MAX",
        default_value = "100000",
        value_parser = value_parser!(u32).range(1..=100_000_000),
        value_name = "MESSAGES"
    )]
    waiting_max: u32,

    /// How long a stop may wait for a handler; 0ms to 1h. If it is not enough, the exit code is 9, and
    /// what it did is rolled back.
    #[arg(
        long,
        env = "POSTBOX_SHUTDOWN_TIMEOUT",
        default_value = "30s",
        value_parser = time(Duration::ZERO..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    shutdown_timeout: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Handler {
    None,
    Sql(String),
    Http(String),
}

impl FromStr for Handler {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("sql", function)) if !function.is_empty() => Ok(Self::Sql(function.to_owned())),
            Some(("http" | "https", _)) => Ok(Self::Http(text.to_owned())),
            _ => Err("use none, sql:SCHEMA.FUNCTION, or http://HOST or https://HOST".to_owned()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(
    clippy::enum_variant_names,
    reason = "these are what the field calls them"
)]
enum AckArgument {
    AtMostOnce,
    AtLeastOnce,
    ExactlyOnce,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CommitArgument {
    OnPersist,
    OnSuccess,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scope {
    Topic,
    Group,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OrderArgument {
    Key,
    Partition,
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FromArgument {
    Earliest,
    Latest,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnResetArgument {
    Stop,
    Earliest,
    Latest,
}

impl ConsumeCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let settings = self.resolve()?;
        let metrics = Arc::new(InboxMetrics::default());
        let health = Arc::new(Health::default());
        let endpoints = Endpoints {
            metrics: Exposed::Inbox(metrics.clone()),
            health: health.clone(),
        };
        let inbox = Inbox::new(settings, metrics, health);
        let service = Service {
            name: "inbox",
            repeats: "the batch that was at work is rolled back, and done again",
            http: self.http,
        };
        service.run(endpoints, |stopped| inbox.run(stopped))
    }

    fn ack(&self) -> postbox::Result<Ack> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::Settings, message));
        let ack = match (self.ack, self.commit) {
            (AckArgument::AtLeastOnce, Some(CommitArgument::OnPersist)) => {
                Ack::AtLeastOnce(CommitOn::Persist)
            }
            (AckArgument::AtLeastOnce, _) => Ack::AtLeastOnce(CommitOn::Success),
            (_, Some(_)) => {
                return refuse(
                    "--commit says what at-least-once means: use it with --ack at-least-once",
                );
            }
            (AckArgument::AtMostOnce, None) => Ack::AtMostOnce,
            (AckArgument::ExactlyOnce, None) => Ack::ExactlyOnce,
        };
        if matches!(self.handler, Handler::Http(_)) && ack == Ack::ExactlyOnce {
            return refuse(
                "what a service does is not rolled back with our transaction, so exactly-once is not to be had: \
                 use --ack at-least-once, or at-most-once",
            );
        }
        if !matches!(self.handler, Handler::Http(_)) && !self.service.handler_header.is_empty() {
            return refuse("--handler-header is for a service: name one with --handler http://…");
        }
        let is_stored = [Ack::ExactlyOnce, Ack::AtLeastOnce(CommitOn::Persist)].contains(&ack);
        if self.handler == Handler::None && !is_stored {
            return refuse(
                "--handler none stores messages for the application, which is done once and for all: use --ack \
                 exactly-once, or name a handler",
            );
        }
        Ok(ack)
    }

    fn resolve(&self) -> postbox::Result<InboxSettings> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Settings, message));
        let FailureArguments {
            max_attempts: max,
            ref dead_letter_topic,
            retry_backoff_min: backoff_min,
            retry_backoff_max: backoff_max,
            handler_timeout,
        } = self.failures;
        check_order(
            ("--retry-backoff-min", backoff_min),
            ("--retry-backoff-max", backoff_max),
        )?;
        check_topic("--dead-letter-topic", dead_letter_topic.as_deref())?;
        if self.group.is_empty() {
            return refuse("--group needs a name".to_owned());
        }
        if let Some(topic) = self.topics.iter().find(|topic| topic.starts_with('^')) {
            return refuse(format!(
                "--topics {topic} is a regular expression: use --topic-regex"
            ));
        }
        let regex = self.topic_regex.as_ref().map(|regex| {
            let regex = regex.trim_start_matches('^').trim_end_matches('$');
            format!("^({regex})$")
        });
        Ok(InboxSettings {
            dead_letter_topic: dead_letter_topic.clone(),
            database: self.database.resolve()?,
            contract: self.schema.resolve()?,
            kafka: self.kafka.resolve()?,
            topics: self.topics.iter().cloned().chain(regex).collect(),
            group: self.group.clone(),
            instance: self.messages.instance.clone(),
            ack: self.ack()?,
            handlers: match &self.handler {
                Handler::None => Handlers::Application,
                Handler::Sql(name) => Handlers::Sql(Function::new(name)),
                Handler::Http(address) => {
                    let ServiceArguments {
                        handler_header,
                        handler_parallel,
                    } = &self.service;
                    let parallel = *handler_parallel as usize;
                    Handlers::Http(Endpoint::new(address, handler_header, parallel)?)
                }
            },
            reading: Reading {
                id_header: self.messages.id_header.clone(),
            },
            shares_ids: self.messages.dedup_scope == Scope::Group,
            order: match self.messages.order {
                OrderArgument::Key => Order::Key,
                OrderArgument::Partition => Order::Partition,
                OrderArgument::None => Order::None,
            },
            from: match self.messages.from {
                FromArgument::Earliest => From::Earliest,
                FromArgument::Latest => From::Latest,
            },
            on_reset: match self.messages.on_reset {
                OnResetArgument::Stop => OnReset::Stop,
                OnResetArgument::Earliest => OnReset::Earliest,
                OnResetArgument::Latest => OnReset::Latest,
            },
            attempts: Attempts {
                max,
                backoff_min,
                backoff_max,
            },
            handler_timeout,
            batch_max: self.limits.batch_max as usize,
            batch_bytes_max: self.limits.batch_bytes_max as usize,
            fetch_bytes_max: self.limits.fetch_bytes_max as usize,
            waiting_max: self.limits.waiting_max as usize,
            dedup_window: self.messages.dedup_window,
            shutdown_timeout: self.limits.shutdown_timeout,
        })
    }
}
