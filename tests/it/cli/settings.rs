//! Settings that cannot work.

use super::{assert_no_secret, relay};
use crate::support::run;

#[test]
fn settings_that_cannot_work_are_refused_in_words() {
    let database = "POSTBOX_DATABASE_URL";
    let brokers = "POSTBOX_BROKERS";
    let property = "POSTBOX_KAFKA_PROPERTY";
    for (flags, environment, expected) in [
        // What clap knows.
        (
            &["--nope"][..],
            &[][..],
            &["unexpected argument '--nope'"][..],
        ),
        (
            &["--mode", "ask"],
            &[],
            &["invalid value 'ask' for '--mode", "wal", "poll"],
        ),
        (
            &["--poll-interval-min", "1s"],
            &[],
            &["--poll-interval-min 1s is longer than --poll-interval-max 200ms"],
        ),
        (
            &["--log-level", "loud"],
            &[],
            &["invalid value 'loud' for '--log-level", "trace"],
        ),
        (
            &["--log-format", "xml"],
            &[],
            &["invalid value 'xml' for '--log-format", "text, json"],
        ),
        (
            &["--format", "xml"],
            &[],
            &["unknown format \"xml\": use envelope, raw or versioned"],
        ),
        (
            &["--route", "{tenant}"],
            &[],
            &["unknown field \"{tenant}\": use {aggregate_type} or {event_type}"],
        ),
        (
            &["--route", "a{aggregate_type"],
            &[],
            &["has a brace that is not closed"],
        ),
        (
            &["--route", "no spaces"],
            &[],
            &["\"no spaces\" does not make a topic name"],
        ),
        // Debezium's table.
        (
            &["--table-preset", "debezium", "--mode", "poll"],
            &[],
            &["--table-preset debezium needs --mode wal: its rows say neither"],
        ),
        (
            &["--table-preset", "debezium", "--mode", "auto"],
            &[],
            &["--table-preset debezium needs --mode wal"],
        ),
        (
            &["--placement", "type:header:eventType,tenant:envelope"],
            &[],
            &["'tenant:envelope'", "use tenant:header, or leave it out"],
        ),
        (
            &["--placement", "shard:partition"],
            &[],
            &["a partition is that of the key; use shard:header, or leave it out"],
        ),
        (
            &[],
            &[("POSTBOX_PLACEMENT", "type")],
            &["a placement is COLUMN:header or COLUMN:header:NAME"],
        ),
        (
            &[
                "--table-preset",
                "spakky",
                "--mode",
                "poll",
                "--placement",
                "id:header",
            ],
            &[],
            &["--table-preset spakky fights --placement"],
        ),
        (
            &[
                "--table-preset",
                "spakky",
                "--mode",
                "poll",
                "--on-poison",
                "skip",
                "--dead-letter-topic",
                "dead",
            ],
            &[],
            &[
                "--table-preset spakky fights --on-poison, --dead-letter-topic with --mode poll: its rows are claimed",
            ],
        ),
        (
            &[
                "--table-preset",
                "omni-box",
                "--mode",
                "poll",
                "--retry-backoff-min",
                "10s",
                "--retry-backoff-max",
                "1h",
                "--parked-max",
                "100000",
                "--parked-bytes-max",
                "1GiB",
                "--max-schedule",
                "365d",
                "--scheduled-max",
                "10000000",
            ],
            &[],
            &[
                "--table-preset omni-box fights --retry-backoff-min, --retry-backoff-max, --parked-max, \
                 --parked-bytes-max, --max-schedule, --scheduled-max with --mode poll",
            ],
        ),
        (
            &["--table-preset", "omni-box", "--mode", "poll"],
            &[("POSTBOX_PARKED_MAX", "5")],
            &["--table-preset omni-box fights --parked-max with --mode poll"],
        ),
        (
            &["--retry-backoff-min", "2h"],
            &[],
            &["'2h' for '--retry-backoff-min", "out of range"],
        ),
        (
            &["--retry-backoff-max", "5s"],
            &[],
            &["--retry-backoff-min 10s is longer than --retry-backoff-max 5s"],
        ),
        // Kafka.
        (
            &[],
            &[(brokers, "")],
            &["--brokers: \"\" has no host: use host:port,host:port"],
        ),
        (&["--brokers", "a:1,,b:2"], &[], &["\"\" has no host"]),
        (&["--brokers", ":9092"], &[], &["\":9092\" has no host"]),
        (
            &["--brokers", "a:1,b:99999"],
            &[],
            &["--brokers: \"b:99999\" has no port from 1 to 65535"],
        ),
        (&["-X", "linger.ms"], &[], &["-X", "KEY=VALUE"]),
        (&["-X", "=5"], &[], &["-X", "KEY=VALUE"]),
        (
            &["-X", "acks=1"],
            &[],
            &["-X acks=1 fights acks=all", "in-sync replica"],
        ),
        (
            &["-X", "enable.idempotence=false"],
            &[],
            &["-X enable.idempotence=false fights enable.idempotence=true"],
        ),
        (
            &["-X", "bootstrap.servers=x:1"],
            &[],
            &["-X bootstrap.servers is not for you to set: use --brokers"],
        ),
        (
            &["-X", "linger.msec=5"],
            &[],
            &["-X linger.msec: no such configuration property"],
        ),
        (&["-X", "linger.ms=soon"], &[], &["-X linger.ms: "]),
        (
            &[],
            &[(property, "linger.ms=5\nacks=0\n")],
            &["-X acks=0 fights acks=all"],
        ),
        (
            &[],
            &[(property, "linger.ms=5\nnonsense\n")],
            &["KEY=VALUE"],
        ),
        // Limits.
        (
            &["--status-interval", "5s"],
            &[],
            &["--status-interval 5s fights --wal-sender-timeout 8s"],
        ),
        (
            &[],
            &[
                ("POSTBOX_WAL_SENDER_TIMEOUT", "1s"),
                ("POSTBOX_STATUS_INTERVAL", "501ms"),
            ],
            &["--status-interval 501ms fights --wal-sender-timeout 1s"],
        ),
        // Names.
        (
            &["--slot", "Upper"],
            &[],
            &["slot \"Upper\" may only have a to z, 0 to 9 and _"],
        ),
        (
            &["--slot", "x; DROP"],
            &[],
            &["slot \"x; DROP\" may only have"],
        ),
        (&["--schema", ""], &[], &["schema \"\" needs a name"]),
        (
            &["--publication", &"p".repeat(64)],
            &[],
            &["has a name of 64 bytes, longer than 63 bytes"],
        ),
        // Postgres.
        (
            &[],
            &[(database, "postgresql://app:hunter2@db/app?colour=red")],
            &["database parameter \"colour\" is not supported"],
        ),
        (
            &[],
            &[(database, "postgresql://app:hunter2@db/app?sslmode=allow")],
            &["\"sslmode\"", "prefer"],
        ),
        (
            &[],
            &[(database, "postgresql://app:hunter2@one,two/app")],
            &["names several hosts"],
        ),
        (
            &[],
            &[(database, "mysql://app:hunter2@db/app")],
            &["neither postgresql:// nor postgres://"],
        ),
        (
            &[],
            &[(database, "postgresql://app:hun%ter2@db/app")],
            &["\"%\" that no two hexadecimal digits follow"],
        ),
        (
            &[],
            &[(database, "postgresql://app:a/hunter2@db/app")],
            &["write %40 and %2F"],
        ),
        (
            &[],
            &[(database, "host=db user=app password=a hunter2 dbname=app")],
            &["key=value pairs"],
        ),
        (
            &[],
            &[(database, "host=db user=app password=a hunter2=b")],
            &["encode or quote"],
        ),
        (
            &[],
            &[(database, ""), ("PGPORT", "hunter2")],
            &["PGPORT is not a port number"],
        ),
        (
            &["--database-url", "postgresql://app@db:hunter2/app"],
            &[],
            &["is not a port number"],
        ),
        (
            &[],
            &[
                (database, "postgresql://db/app"),
                ("USER", ""),
                ("LOGNAME", ""),
            ],
            &["no database user"],
        ),
        (
            &[],
            &[("PGSSLROOTCERT", "/does/not/exist")],
            &["/does/not/exist"],
        ),
        (
            &[],
            &[("PGSSLMODE", "disable"), ("PGSSLCERT", "/c.pem")],
            &["PGSSLCERT needs sslkey beside it"],
        ),
        (
            &[],
            &[(database, "host=/run/pg user=app sslkey=/k.pem")],
            &["\"sslkey\" needs sslcert beside it"],
        ),
        // The place where http is served.
        (
            &["--http", "nowhere"],
            &[],
            &["use ADDRESS:PORT, such as 127.0.0.1:9464, or none"],
        ),
        (&["--http", "127.0.0.1"], &[], &["use ADDRESS:PORT"]),
        (
            &["--http", "203.0.113.1:9464"],
            &[],
            &["--http 203.0.113.1:9464: cannot listen there; use another address, or none"],
        ),
    ] {
        let mut command = relay(flags);
        let output = run(command.envs(environment.iter().copied()));
        let complaint = output.complaint(2);
        assert!(complaint.starts_with("error: "), "{complaint}");
        for text in expected {
            assert!(
                complaint.contains(text),
                "no \"{text}\" for {flags:?} {environment:?}: {complaint}"
            );
        }
        assert_no_secret(complaint);
    }
}
