//! Arguments that several commands share.

use clap::Args;
use postbox::contract::Contract;
use postbox::database::Database;
use postbox::publisher::KafkaSettings;
use postbox::{Error, ErrorKind};

#[derive(Debug, Args)]
#[command(next_help_heading = "Postgres")]
pub(super) struct DatabaseArguments {
    /// Where the database is: postgresql://user@host:5432/app, or libpq's key=value form.
    ///
    /// A host that is a folder is a Unix socket, which doubles the limit of a relay beside its
    /// Postgres: postgresql://user@/app?host=/var/run/postgresql. TLS as in libpq: sslmode (disable,
    /// prefer, require, verify-ca, verify-full), sslrootcert, sslcert, sslkey. Without it:
    /// DATABASE_URL, else libpq's PG* variables; the password may be in ~/.pgpass. Prefer the
    /// variable to the flag: other users of the machine can read flags.
    #[arg(
        long,
        env = "POSTBOX_DATABASE_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    database_url: Option<String>,
}

impl DatabaseArguments {
    pub(super) fn resolve(&self) -> postbox::Result<Database> {
        let environment = |name: &str| std::env::var(name).ok();
        let url = self.database_url.clone();
        let url = url.or_else(|| environment("DATABASE_URL"));
        Database::resolve(url.as_deref(), &environment)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Names")]
pub(super) struct ContractArguments {
    /// The schema that holds the outbox; 1 to 63 bytes.
    #[arg(
        long,
        env = "POSTBOX_SCHEMA",
        default_value = "postbox",
        value_name = "NAME"
    )]
    schema: String,

    /// The replication slot, which is also the relay's name: 1 to 63 of a-z, 0-9 and _.
    #[arg(
        long,
        env = "POSTBOX_SLOT",
        default_value = "postbox",
        value_name = "NAME"
    )]
    slot: String,

    /// The publication of the outbox; 1 to 63 bytes.
    #[arg(
        long,
        env = "POSTBOX_PUBLICATION",
        default_value = "postbox",
        value_name = "NAME"
    )]
    publication: String,
}

impl ContractArguments {
    pub(super) fn resolve(&self) -> postbox::Result<Contract> {
        Contract::new(&self.schema, &self.slot, &self.publication)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Kafka")]
pub(super) struct KafkaArguments {
    /// Brokers to ask first: host:port,host:port. A port is 1 to 65535, and 9092 if it is left out; an
    /// IPv6 address stands in brackets.
    #[arg(long, env = "POSTBOX_BROKERS", value_name = "LIST")]
    brokers: String,

    /// A librdkafka property, such as -X security.protocol=SASL_SSL. Repeatable.
    ///
    /// In the variable: one a line. Properties that carry a promise (acks, enable.idempotence,
    /// message.timeout.ms, …) cannot be weakened.
    #[arg(
        short = 'X',
        long = "kafka-property",
        env = "POSTBOX_KAFKA_PROPERTY",
        hide_env_values = true,
        value_name = "KEY=VALUE",
        value_delimiter = '\n'
    )]
    properties: Vec<String>,
}

impl KafkaArguments {
    pub(super) fn resolve(&self) -> postbox::Result<KafkaSettings> {
        // A block of text in a variable has an end of line at its end.
        let lines = self
            .properties
            .iter()
            .filter(|line| !line.trim().is_empty());
        let settings = KafkaSettings {
            brokers: self.brokers.clone(),
            properties: lines.map(|line| property(line)).collect::<Result<_, _>>()?,
        };
        settings.check()?;
        Ok(settings)
    }
}

/// Not a parser of clap's: that would quote what it refuses, and the text may
/// hold a secret.
fn property(text: &str) -> postbox::Result<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok((key.trim().to_owned(), value.to_owned()))
        }
        _ => {
            let message = "-X: a property is KEY=VALUE, such as -X security.protocol=SASL_SSL";
            Err(Error::new(ErrorKind::Settings, message))
        }
    }
}
