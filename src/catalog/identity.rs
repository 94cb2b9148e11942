//! What can be told from two identities of a publication.
//!
//! The text is made by `publication_identity()` in `sql/0001_outbox.sql`:
//!
//! ```text
//! publication 16500@745 {"pubinsert": true, …} table 16501@745:16400 schema 16502@746:2200
//!             oid   xmin options                     oid   xmin table       oid   xmin schema
//! ```

/// How the publication `present` differs from `stored`, as it is said of it.
pub(super) fn difference(stored: &str, present: &str) -> &'static str {
    const CHANGED: &str = "is not what it was when the slot was set up";
    let (Some(stored), Some(present)) = (Identity::read(stored), Identity::read(present)) else {
        return CHANGED;
    };
    if stored.oid != present.oid {
        "was dropped and made again after the slot was set up"
    } else if stored.holds() != present.holds() {
        "does not hold the tables that it held when the slot was set up"
    } else if stored.members != present.members {
        "had its tables taken out and put back after the slot was set up"
    } else if stored.options != present.options {
        "has other options than when the slot was set up"
    } else {
        // Its row was written again: changed and changed back, or another owner.
        "was altered after the slot was set up"
    }
}

struct Identity<'t> {
    oid: &'t str,
    options: &'t str,
    members: &'t str,
}

impl<'t> Identity<'t> {
    fn read(text: &'t str) -> Option<Self> {
        let (row, rest) = text.strip_prefix("publication ")?.split_once(" {")?;
        let (options, members) = rest.rsplit_once('}')?;
        let (oid, _xmin) = row.split_once('@')?;
        Some(Self {
            oid,
            options,
            members,
        })
    }

    /// The tables and schemas themselves, whenever they were added.
    fn holds(&self) -> Vec<(&str, &str)> {
        let words: Vec<&str> = self.members.split(' ').skip(1).collect();
        let member = |pair: &[&'t str]| Some((*pair.first()?, pair.get(1)?.rsplit(':').next()?));
        let mut held: Vec<_> = words.chunks(2).filter_map(member).collect();
        held.sort_unstable();
        held
    }
}

#[cfg(test)]
mod tests {
    use super::difference;

    const STORED: &str = "publication 9@5 {\"pubinsert\": true} table 20@5:100 table 21@5:101";

    #[test]
    fn each_change_is_told_from_the_others() {
        for (present, expected) in [
            (
                "publication 10@6 {\"pubinsert\": true} table 30@6:100 table 31@6:101",
                "was dropped and made again",
            ),
            (
                "publication 9@5 {\"pubinsert\": true} table 20@5:100",
                "does not hold the tables",
            ),
            (
                "publication 9@5 {\"pubinsert\": true}",
                "does not hold the tables",
            ),
            (
                "publication 9@5 {\"pubinsert\": true} table 20@5:100 schema 21@5:101",
                "does not hold the tables",
            ),
            (
                "publication 9@5 {\"pubinsert\": true} table 21@5:101 table 22@7:100",
                "had its tables taken out",
            ),
            (
                "publication 9@6 {\"pubinsert\": false} table 20@5:100 table 21@5:101",
                "has other options",
            ),
            (
                "publication 9@6 {\"pubinsert\": true} table 20@5:100 table 21@5:101",
                "was altered",
            ),
            ("nonsense", "is not what it was"),
        ] {
            let found = difference(STORED, present);
            assert!(found.starts_with(expected), "{present}: {found}");
        }
    }
}
