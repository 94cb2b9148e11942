//! How a run reads its events, and what differs by that.

use crate::support::Fixture;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mode {
    /// From a slot.
    Wal,
    /// From the table, by one relay at a time.
    Poll,
    /// From the table, divided among several relays.
    Divided,
    /// From a table of omni-box, whose rows several relays claim.
    Claims,
    /// From a slot, of a table of omni-box, whose rows are marked published.
    Marks,
}

/// The fixtures' view by which the oracle writes is in the schema `postbox`.
const OMNI_BOX: [&str; 4] = ["--schema", "box", "--table-preset", "omni-box"];

impl Mode {
    pub(super) const ALL: [Self; 5] = [
        Self::Wal,
        Self::Poll,
        Self::Divided,
        Self::Claims,
        Self::Marks,
    ];

    /// Seeds that follow each other take turns.
    pub(super) fn of(seed: u64) -> Self {
        Self::ALL[(seed % Self::ALL.len() as u64) as usize]
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Wal => "wal",
            Self::Poll => "poll",
            Self::Divided => "divided",
            Self::Claims => "claims",
            Self::Marks => "marks",
        }
    }

    pub(super) fn has_slot(self) -> bool {
        matches!(self, Self::Wal | Self::Marks)
    }

    /// Whether events may wait in our own outbox.
    pub(super) fn can_park(self) -> bool {
        matches!(self, Self::Wal | Self::Poll | Self::Divided)
    }

    /// Whether several relays are at work at once.
    pub(super) fn is_shared(self) -> bool {
        matches!(self, Self::Divided | Self::Claims)
    }

    pub(super) async fn set_up(self, fixture: &Fixture) {
        match self {
            Self::Wal => fixture.set_up().await,
            Self::Poll | Self::Divided => fixture.set_up_polling().await,
            Self::Claims => fixture.make_omni_box().await,
            Self::Marks => {
                fixture.make_omni_box().await;
                fixture.setup(&OMNI_BOX).results();
            }
        }
    }

    /// `postbox recover`, so that nothing is lost; what it has said.
    pub(super) fn recover(self, fixture: &Fixture) -> String {
        let flags = match self {
            Self::Marks => [&OMNI_BOX[..], &["--resend"]].concat(),
            _ => Vec::new(),
        };
        fixture.recover(&flags).results().to_owned()
    }

    pub(super) fn flags(self, at_work_max: u64) -> Vec<String> {
        let shards = at_work_max.to_string();
        let flags: &[&str] = match self {
            Self::Wal => &[],
            Self::Poll => &["--mode", "poll"],
            Self::Divided => &["--mode", "poll", "--shards", &shards],
            Self::Claims => &["--mode", "poll", "--table-preset", "omni-box"],
            Self::Marks => &[&OMNI_BOX[..], &["--mark"]].concat(),
        };
        flags.iter().map(|&flag| flag.to_owned()).collect()
    }

    /// What a relay logs when it begins to send.
    pub(super) fn at_work(self) -> &'static str {
        match self {
            Self::Wal | Self::Marks => " INFO streaming ",
            Self::Poll => " INFO polling ",
            Self::Divided => " of 64 slices ",
            Self::Claims => " INFO polling, by claims ",
        }
    }

    /// After how many rows it says at the latest, in the table, that they are delivered.
    pub(super) fn mark_rows(self) -> usize {
        match self {
            // Of what a slot had lost.
            Self::Wal | Self::Marks => 1024,
            Self::Poll | Self::Divided => 1024,
            Self::Claims => 256,
        }
    }

    /// A point that everything lies before that is committed by now, for [`progress`](Self::progress).
    /// Nothing else may be at work on the server.
    pub(super) async fn end(self, fixture: &Fixture) -> String {
        let sql = match self.has_slot() {
            true => "SELECT pg_current_wal_insert_lsn()::text",
            false => "SELECT pg_snapshot_xmax(pg_current_snapshot())::text",
        };
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Whether everything before this point is stored to be delivered, and else how far that
    /// is, as something that changes.
    pub(super) async fn progress(self, fixture: &Fixture, end: &str) -> (bool, String) {
        let standing = "FROM (SELECT second_snapshot IS NULL \
                                     AND pg_snapshot_xmin(snapshot) >= $1::text::xid8 AS is_there FROM";
        let sql = match self {
            Self::Wal | Self::Marks => {
                "SELECT confirmed_flush_lsn >= $1::text::pg_lsn, confirmed_flush_lsn::text \
                          FROM pg_replication_slots WHERE slot_name = current_database()"
                    .to_owned()
            }
            Self::Poll => format!("SELECT is_there, '' {standing} postbox.checkpoint) AS c"),
            Self::Divided => format!(
                "SELECT coalesce(bool_and(is_there), false), (count(*) FILTER (WHERE is_there))::text \
                 {standing} postbox.slice) AS s"
            ),
            Self::Claims => "SELECT $1::text IS NOT NULL AND count(*) = 0, count(*)::text \
                             FROM outbox_events WHERE status = 'pending'"
                .to_owned(),
        };
        let row = fixture.client.query_one(&sql, &[&end]).await.unwrap();
        (row.get(0), row.get(1))
    }

    /// How many claims there are, of which orderly ends leave none. Leases run out by themselves.
    pub(super) async fn claimed(self, fixture: &Fixture) -> i64 {
        match self {
            Self::Claims => fixture.rows_that_are("locked_by IS NOT NULL").await,
            _ => 0,
        }
    }

    /// How many rows are not marked published, of which there are none once all is
    /// confirmed.
    pub(super) async fn unmarked(self, fixture: &Fixture) -> i64 {
        match self {
            Self::Marks => fixture.rows_that_are("status <> 'completed'").await,
            _ => 0,
        }
    }
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let mut modes = Self::ALL.into_iter();
        modes
            .find(|mode| mode.name() == name)
            .ok_or_else(|| format!("MODE={name} is none of wal, poll, divided, claims and marks"))
    }
}
