//! Arguments that several commands share.

use std::env::VarError;

use clap::{Args, ValueEnum, value_parser};
use postbox::catalog::Mode;
use postbox::contract::Contract;
use postbox::database::Database;
use postbox::envelope::is_topic_name;
use postbox::publisher::KafkaSettings;
use postbox::table::{Preset, Table};
use postbox::{Error, ErrorKind};

#[derive(Debug, Args)]
#[command(next_help_heading = "Postgres")]
pub(super) struct DatabaseArguments {
    /// Where the database is: postgresql://user@host:5432/app, or libpq's key=value form.
    ///
    /// A host that is a folder is a Unix socket, which halves what small transactions cost a
    /// Postgres beside the relay: postgresql://user@/app?host=/var/run/postgresql. TLS as in
    /// libpq: sslmode (disable, prefer, require, verify-ca, verify-full), sslrootcert, sslcert,
    /// sslkey. Without it:
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
pub(super) struct SchemaArguments {
    /// The schema that holds the outbox; 1 to 63 bytes.
    #[arg(
        long,
        env = "POSTBOX_SCHEMA",
        default_value = "postbox",
        value_name = "NAME"
    )]
    schema: String,
}

impl SchemaArguments {
    /// A contract of which only the schema counts.
    pub(super) fn resolve(&self) -> postbox::Result<Contract> {
        let any = Contract::default();
        Contract::new(&self.schema, any.slot, any.publication)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Names")]
pub(super) struct ContractArguments {
    #[command(flatten)]
    schema: SchemaArguments,

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

    #[command(flatten)]
    table: TableArguments,
}

impl ContractArguments {
    pub(super) fn resolve(&self) -> postbox::Result<Contract> {
        let schema = &self.schema.schema;
        let table = self.table.resolve(schema)?;
        Contract::new(schema, &self.slot, &self.publication)?.reading(table)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Tables of others")]
pub(super) struct TableArguments {
    /// Whose table is read: postbox, omni-box (outbox_events), spakky (spakky_event_outbox) or debezium
    /// (outbox).
    ///
    /// Records are then what its own relay would send: format, route and headers that are not said are its
    /// own, and they are not compressed unless -X compression.codec=lz4 says so, which not all of its
    /// consumers can read. With --mode poll, rows of omni-box's and spakky's tables are claimed, sent and
    /// completed as their own workers do, beside them if need be, and nothing has to be set up for that.
    /// With --mode wal they are read from a slot, in commit order and without touching them unless --mark
    /// says so, and no other worker may send them. debezium, the table of its Outbox Event Router, needs
    /// --mode wal; its publication may be of other tables too.
    #[arg(
        long,
        env = "POSTBOX_TABLE_PRESET",
        default_value = "postbox",
        value_name = "PRESET"
    )]
    table_preset: Preset,

    /// Another name of that table: NAME or SCHEMA.NAME. Its schema is public, unless it is named.
    #[arg(long, env = "POSTBOX_TABLE", value_name = "TABLE")]
    table: Option<String>,

    /// Another name of one of its columns, such as payload=body. Repeatable; in the variable they are
    /// parted by commas.
    #[arg(
        long = "column",
        env = "POSTBOX_COLUMN",
        value_delimiter = ',',
        value_parser = named_column,
        value_name = "FIELD=COLUMN"
    )]
    columns: Vec<(String, String)>,

    /// How often an event that cannot go out is tried before it is given up, where its table does not
    /// say; 1 to 1000. That a server is away never counts. Of spakky's table, set-up and recovery do not
    /// have an event sent that was tried as often.
    ///
    /// [default: 6; for spakky 5]
    // Not a default of clap's, as it is that of the preset.
    #[arg(
        long,
        env = "POSTBOX_MAX_ATTEMPTS",
        value_parser = value_parser!(u32).range(1..=1000),
        value_name = "NUMBER"
    )]
    max_attempts: Option<u32>,
}

impl ContractArguments {
    /// How often an event is tried, if that was said.
    pub(super) fn max_attempts(&self) -> Option<u32> {
        self.table.max_attempts
    }
}

impl TableArguments {
    pub(super) fn resolve(&self, schema: &str) -> postbox::Result<Table> {
        let name = self.table.as_deref();
        let mut table = Table::new(self.table_preset, schema, name, &self.columns)?;
        if let Some(max) = self.max_attempts {
            table.attempts_max = max;
        }
        Ok(table)
    }
}

fn named_column(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((field, column)) => Ok((field.to_owned(), column.to_owned())),
        None => Err("a column is FIELD=COLUMN, such as payload=body".to_owned()),
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ModeArgument {
    /// From a logical replication slot, in commit order.
    Wal,
    /// From the table, for servers and roles without replication, and through poolers.
    Poll,
    /// As it was set up; set-up takes a slot, if there can be one, and says why not.
    Auto,
}

impl From<ModeArgument> for Option<Mode> {
    fn from(mode: ModeArgument) -> Self {
        match mode {
            ModeArgument::Wal => Some(Mode::Wal),
            ModeArgument::Poll => Some(Mode::Poll),
            ModeArgument::Auto => None,
        }
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
    /// In the variable: one a line, and a PEM block goes on to its -----END line. Certificates and
    /// keys can stay in files: ssl.ca.location, ssl.certificate.location, ssl.key.location. Flags
    /// replace the variable as a whole. Properties that carry a promise (acks, enable.idempotence,
    /// message.timeout.ms, …) cannot be weakened.
    ///
    /// [env: POSTBOX_KAFKA_PROPERTY]
    // Not a variable of clap's, which cannot tell a line of it from a flag's value.
    #[arg(short = 'X', long = "kafka-property", value_name = "KEY=VALUE")]
    properties: Vec<String>,
}

const PROPERTIES: &str = "POSTBOX_KAFKA_PROPERTY";

impl KafkaArguments {
    pub(super) fn resolve(&self) -> postbox::Result<KafkaSettings> {
        let properties = match std::env::var(PROPERTIES) {
            _ if !self.properties.is_empty() => self.properties.clone(),
            Ok(text) => lines(&text)?,
            Err(VarError::NotPresent) => Vec::new(),
            Err(VarError::NotUnicode(_)) => {
                return Err(settings(format!("{PROPERTIES} is not UTF-8")));
            }
        };
        let properties = properties.iter().map(|text| property(text));
        let settings = KafkaSettings {
            brokers: self.brokers.clone(),
            properties: properties.collect::<Result<_, _>>()?,
        };
        settings.check()?;
        Ok(settings)
    }
}

/// The properties of a text: one a line, but for PEM blocks, whose lines belong to
/// the property before them.
fn lines(text: &str) -> postbox::Result<Vec<String>> {
    let mut properties: Vec<String> = Vec::new();
    let mut in_block = false;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let begins = line.contains("-----BEGIN ");
        match properties.last_mut() {
            Some(property) if in_block || line.starts_with("-----BEGIN ") => {
                property.push('\n');
                property.push_str(line);
            }
            _ => properties.push(line.to_owned()),
        }
        in_block = (in_block || begins) && !line.contains("-----END ");
    }
    if in_block {
        let message = format!("{PROPERTIES} has a PEM block without its -----END line");
        return Err(settings(message));
    }
    Ok(properties)
}

/// Not a parser of clap's: that would quote what it refuses, and the text may
/// hold a secret.
fn property(text: &str) -> postbox::Result<(String, String)> {
    let (key, value) = text.split_once('=').unwrap_or_default();
    match key.trim() {
        // Part of a PEM block, if it was cut off from its property.
        key if key.is_empty() || key.contains(char::is_whitespace) => {
            let message = "-X: a property is KEY=VALUE, such as -X security.protocol=SASL_SSL";
            Err(settings(message))
        }
        key => Ok((key.to_owned(), value.to_owned())),
    }
}

fn settings(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Settings, message)
}

/// Refuses what is no topic, naming the flag.
pub(super) fn check_topic(flag: &str, topic: Option<&str>) -> postbox::Result<()> {
    let Some(topic) = topic.filter(|topic| !is_topic_name(topic)) else {
        return Ok(());
    };
    let message = format!(
        "{flag} \"{}\" is not a topic name: Kafka allows 1 to 249 of the characters a-z A-Z 0-9 . _ - and neither \
         \".\" nor \"..\"",
        topic.escape_debug()
    );
    Err(Error::new(ErrorKind::Settings, message))
}

#[cfg(test)]
mod tests {
    use super::lines;

    #[test]
    fn a_property_is_a_line_and_the_pem_blocks_that_follow() {
        let chain = "ssl.ca.pem=-----BEGIN A-----\nMII=\n-----END A-----\n-----BEGIN B-----\nx=\n-----END B-----";
        let text = format!("\nlinger.ms=5\r\n\n{chain}\nsecurity.protocol=SSL\n");
        let expected = ["linger.ms=5", chain, "security.protocol=SSL"];
        assert_eq!(lines(&text).unwrap(), expected);
        assert_eq!(lines(" \n").unwrap(), [""; 0]);
        let one_line = "ssl.key.pem=-----BEGIN K----- x -----END K-----\nacks=all";
        assert_eq!(lines(one_line).unwrap().len(), 2);
        for open in [
            "ssl.ca.pem=-----BEGIN A-----\nhunter2\nacks=all",
            "-----BEGIN A-----",
        ] {
            let error = lines(open).unwrap_err().to_string();
            assert_eq!(
                error,
                "POSTBOX_KAFKA_PROPERTY has a PEM block without its -----END line"
            );
        }
    }
}
