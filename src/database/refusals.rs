//! What Postgres refuses, and what is done about it.

use crate::error::ErrorKind;

/// How a refusal is sorted.
#[derive(Debug)]
pub struct Rule {
    /// A SQLSTATE, or the class that it begins with; empty: any.
    pub sqlstate: &'static str,
    /// What the message must contain, where one state covers several objects.
    pub words: &'static str,
    /// What it stands for.
    pub meaning: &'static str,
    /// What is done about it.
    pub kind: ErrorKind,
    /// What a person does about it; empty where waiting is all.
    pub next_step: &'static str,
}

const fn rule(
    (sqlstate, words): (&'static str, &'static str),
    meaning: &'static str,
    kind: ErrorKind,
    next_step: &'static str,
) -> Rule {
    Rule {
        sqlstate,
        words,
        meaning,
        kind,
        next_step,
    }
}

const RUN_SETUP: &str = "run `postbox setup`";
const CORRECT_OPTIONS: &str = "correct options in the database URL or PGOPTIONS, or what was set for the role or the database";
/// What is deleted is not found again in the table, from which a recovery sends.
pub(super) const DELETE_ROW: &str =
    "delete the largest rows since the slot's position from the outbox, and run `postbox recover`";

/// The first that fits counts. Postgres translates its messages, so words that we
/// do not recognise must leave the milder reading: what is not listed may pass.
///
/// Source: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
pub static RULES: &[Rule] = {
    use ErrorKind::*;
    &[
        rule(
            ("28P01", ""),
            "a wrong password",
            Rights,
            "set the right password in the database URL, PGPASSWORD or ~/.pgpass",
        ),
        rule(
            ("28", "client certificate"),
            "the server asks for a client certificate",
            Rights,
            "set sslcert and sslkey",
        ),
        rule(
            ("28", "no encryption"),
            "the server lets nobody in without TLS",
            Rights,
            "if it is let in with TLS, set sslmode=verify-full",
        ),
        rule(
            ("28", ""),
            "no such role, or no line in `pg_hba.conf`",
            Rights,
            "correct the user, or let pg_hba.conf admit it, for replication too",
        ),
        rule(
            ("42501", "row-level security"),
            "a policy hides rows of the table",
            Rights,
            "let the role see all of them, by ALTER ROLE … BYPASSRLS or ALTER TABLE … DISABLE ROW LEVEL SECURITY",
        ),
        rule(
            ("42501", ""),
            "a right is missing",
            Rights,
            "`postbox setup --grant-to ROLE`, run by the owner, gives a relay's role what it needs",
        ),
        rule(
            ("3D000", ""),
            "no such database",
            Database,
            "correct the database's name",
        ),
        rule(("3F000", ""), "no such schema", Database, RUN_SETUP),
        rule(("42P01", ""), "no such table", Database, RUN_SETUP),
        rule(("42883", ""), "no such function", Database, RUN_SETUP),
        rule(("42703", ""), "no such column", Database, RUN_SETUP),
        rule(
            ("42704", "replication slot"),
            "no such replication slot: it was dropped while it was read",
            Slot,
            "the next start says how to go on",
        ),
        rule(
            ("42704", "publication"),
            "no such publication at this point of the WAL, before Postgres 18",
            Publication,
            "there was none at this point of the WAL, which the slot cannot pass: run `postbox recover`",
        ),
        rule(
            ("42704", "configuration parameter"),
            "the session's settings name one that there is not",
            Settings,
            CORRECT_OPTIONS,
        ),
        rule(
            ("42704", ""),
            "no such object of another kind",
            Database,
            RUN_SETUP,
        ),
        rule(
            ("22023", "invalid value for parameter"),
            "the session's settings have a value that the server does not take",
            Settings,
            CORRECT_OPTIONS,
        ),
        rule(
            ("55P02", ""),
            "the session's settings name one that is the server's own",
            Settings,
            CORRECT_OPTIONS,
        ),
        rule(
            ("55006", ""),
            "the slot is in use by another process",
            SlotInUse,
            "",
        ),
        rule(
            ("53400", "temp_file_limit"),
            "a temporary file would be too large",
            Database,
            "raise the role's temp_file_limit",
        ),
        rule(
            ("53400", ""),
            "no replication slot is free",
            Slot,
            "raise max_replication_slots or drop a slot that is not used",
        ),
        rule(
            ("55000", "specified in parameter"),
            "a standby that the server waits for is away",
            DatabaseAway,
            "look at synchronized_standby_slots",
        ),
        rule(
            ("55000", "replication slot"),
            "the slot was invalidated, is physical, or belongs to another database or plugin",
            Slot,
            "the next start says how to go on",
        ),
        rule(
            ("58P01", "WAL segment"),
            "the WAL that the slot needs is gone",
            Slot,
            "drop the slot, and run `postbox recover`",
        ),
        rule(
            ("55000", "wal_level"),
            "the server does not replicate",
            Database,
            "set wal_level = logical and restart the server",
        ),
        rule(
            ("54000", "out of memory"),
            "a row is too large for the server to send",
            Event,
            DELETE_ROW,
        ),
        rule(
            ("54000", "string buffer"),
            "a row is too large for the server to send, in later versions' words",
            Event,
            DELETE_ROW,
        ),
        rule(
            ("54000", ""),
            "a limit of the server, such as transaction ids that have run out",
            DatabaseAway,
            "look at the server's log; where it says wraparound, VACUUM",
        ),
        rule(
            ("08P01", "startup parameter"),
            "a connection pooler is between us and the server",
            Database,
            "connect to Postgres itself, or read with --mode poll and leave options out of the database URL",
        ),
        rule(
            ("26000", ""),
            "a connection pooler hands our session to others",
            DatabaseAway,
            "connect to Postgres itself, or read with --mode poll",
        ),
        rule(
            ("42P05", ""),
            "a connection pooler hands our session to others",
            DatabaseAway,
            "connect to Postgres itself, or read with --mode poll",
        ),
        rule(
            ("25006", ""),
            "the server is a standby, or default_transaction_read_only is on",
            DatabaseAway,
            "if it stays so, connect to the primary, or let the role write",
        ),
        rule(
            ("0A000", ""),
            "the server is a standby, or lacks what is asked of it",
            DatabaseAway,
            "if it stays so, connect to the primary, which must be Postgres itself",
        ),
        rule(
            ("53100", ""),
            "the server's disk is full",
            DatabaseAway,
            "make room on the server's disk",
        ),
        rule(
            ("53300", ""),
            "too many sessions or WAL senders",
            DatabaseAway,
            "raise max_connections or max_wal_senders, or end what is not needed",
        ),
        rule(
            ("53", ""),
            "the server lacks memory or another resource",
            DatabaseAway,
            "",
        ),
        rule(("08", ""), "the connection broke", DatabaseAway, ""),
        rule(
            ("40", ""),
            "a deadlock or a serialization failure",
            DatabaseAway,
            "",
        ),
        rule(
            ("57P04", ""),
            "the database was dropped",
            DatabaseAway,
            "the next start says whether there is another",
        ),
        rule(
            ("57", ""),
            "the server starts, stops, or ended the session",
            DatabaseAway,
            "",
        ),
        rule(
            ("58", ""),
            "the server cannot read or write its files",
            DatabaseAway,
            "look at the server's log and disk",
        ),
        rule(
            ("XX001", ""),
            "the server's data is damaged",
            DatabaseAway,
            "look at the server's log",
        ),
        rule(
            ("XX002", ""),
            "an index is damaged",
            DatabaseAway,
            "run REINDEX on the index that the message names",
        ),
        rule(
            ("XX", ""),
            "the server failed, by a defect of its own or of an extension",
            DatabaseAway,
            "look at the server's log",
        ),
        rule(("", ""), "anything else", DatabaseAway, ""),
    ]
};

/// The rule for a refusal.
pub(super) fn find(sqlstate: &str, message: &str) -> &'static Rule {
    let fits = |rule: &&Rule| sqlstate.starts_with(rule.sqlstate) && message.contains(rule.words);
    RULES.iter().find(fits).expect("the last rule takes any")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_can_be_reached() {
        for rule in RULES {
            let found = find(rule.sqlstate, rule.words);
            assert!(std::ptr::eq(found, rule), "{rule:?} is behind {found:?}");
        }
    }

    #[test]
    fn whoever_stops_says_what_to_do() {
        for rule in RULES {
            assert!(
                rule.kind.is_transient() || !rule.next_step.is_empty(),
                "{rule:?}"
            );
        }
    }
}
