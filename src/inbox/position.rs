//! Where a partition is read on. Pure.
//!
//! Postgres knows the offset of the next record, and what the record before it is called. An
//! offset alone says little: retention removes records, and a topic may be deleted and made
//! again, or be that of another cluster, and counts anew then. So reading begins at the last
//! record that was dealt with, which must still be the same.

use super::consumer::Assigned;

/// Where a group begins that has read nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum From {
    /// At the first record that is there.
    #[default]
    Earliest,
    /// After the last.
    Latest,
}

/// What is done where the log is no longer the one that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnReset {
    /// The consumer ends, and says so.
    #[default]
    Stop,
    /// It reads on at the first record that is there.
    Earliest,
    /// It reads on after the last.
    Latest,
}

/// What Postgres knows of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) next_offset: i64,
    pub(super) last: Option<Last>,
    pub(super) cluster_id: Option<String>,
}

/// What tells a record from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Last {
    pub(super) id: String,
    /// Milliseconds since 1970.
    pub(super) timestamp: Option<i64>,
}

/// Where to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Start {
    /// The first record that is new.
    pub(super) next_offset: i64,
    /// What the one before it must be.
    pub(super) witness: Option<Last>,
}

impl Start {
    /// The offset that is asked for.
    pub(super) fn offset(&self) -> i64 {
        self.next_offset - i64::from(self.witness.is_some())
    }

    /// At one end of what is there.
    pub(super) fn end(assigned: &Assigned, from: From) -> Self {
        Self {
            next_offset: match from {
                From::Earliest => assigned.low,
                From::Latest => assigned.high,
            },
            witness: None,
        }
    }

    /// Of a partition that is known; why not, if the log is another.
    pub(super) fn known(
        assigned: &Assigned,
        stored: &Stored,
        cluster_id: Option<&str>,
    ) -> Result<Self, String> {
        if let (Some(then), Some(now)) = (&stored.cluster_id, cluster_id)
            && then != now
        {
            return Err(format!("it was of cluster {then}, and this is {now}"));
        }
        let next_offset = stored.next_offset;
        Self::within(assigned, next_offset)?;
        let witness = stored.last.clone();
        Ok(Self {
            next_offset,
            // The record before the first that is there is gone.
            witness: witness.filter(|_| next_offset > assigned.low),
        })
    }

    /// Of one that the group has read without us.
    pub(super) fn committed(assigned: &Assigned, next_offset: i64) -> Result<Self, String> {
        Self::within(assigned, next_offset)?;
        Ok(Self {
            next_offset,
            witness: None,
        })
    }

    fn within(assigned: &Assigned, next_offset: i64) -> Result<(), String> {
        let Assigned { low, high, .. } = assigned;
        if next_offset < *low {
            let gone = low - next_offset;
            return Err(format!(
                "it was read up to offset {next_offset}, and now begins at {low}: {gone} offsets are gone"
            ));
        }
        if next_offset > *high {
            return Err(format!(
                "it was read up to offset {next_offset}, and now ends at {high}: the topic was made anew, or its log cut"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::consumer::Place;
    use super::*;

    fn assigned(low: i64, high: i64) -> Assigned {
        Assigned {
            place: Place {
                topic: "order".into(),
                partition: 0,
            },
            assignment: 1,
            partitions: 1,
            low,
            high,
            committed: None,
        }
    }

    fn stored(next_offset: i64) -> Stored {
        let last = Last {
            id: "a".to_owned(),
            timestamp: Some(1),
        };
        Stored {
            next_offset,
            last: Some(last),
            cluster_id: Some("one".to_owned()),
        }
    }

    #[test]
    fn reading_goes_on_at_the_record_before_the_first_new_one() {
        let start = Start::known(&assigned(3, 9), &stored(7), Some("one")).expect("the same log");
        assert_eq!((start.next_offset, start.offset()), (7, 6));
        // Nothing new, and the last is still there.
        let start = Start::known(&assigned(3, 7), &stored(7), None).expect("the same log");
        assert_eq!(start.offset(), 6);
        // Retention has removed all that was read, and nothing more.
        let start = Start::known(&assigned(7, 9), &stored(7), Some("one")).expect("the same log");
        assert_eq!((start.offset(), start.witness), (7, None));
    }

    #[test]
    fn a_log_that_is_another_is_told() {
        for (low, high, cluster, says) in [
            (8, 9, "one", "1 offsets are gone"),
            (0, 6, "one", "now ends at 6"),
            (3, 9, "two", "of cluster one, and this is two"),
        ] {
            let why = Start::known(&assigned(low, high), &stored(7), Some(cluster));
            let why = why.expect_err("another log");
            assert!(why.contains(says), "{why}");
        }
    }
}
