//! Which rows of a table are meant that people look at, and decide about: `postbox.parked`, and
//! `postbox.inbox_message`.

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use crate::contract::Contract;
use crate::database::sort_with;
use crate::error::Error;

/// Where a table has what its rows are chosen by, in SQL.
pub(crate) struct Columns {
    pub(crate) id: String,
    /// Whose row it is: a relay's, or a group's.
    pub(crate) owner: String,
    pub(crate) status: String,
    pub(crate) topic: String,
    pub(crate) key: String,
    pub(crate) event_type: String,
    pub(crate) error: String,
    /// Since when it is there.
    pub(crate) since: String,
}

impl Columns {
    /// The condition on a row; its parameters are the first eight.
    pub(crate) fn condition(&self) -> String {
        let Self {
            id,
            owner,
            status,
            topic,
            key,
            event_type,
            error,
            since,
        } = self;
        format!(
            "($1::text[] IS NULL OR {id} = ANY ($1)) \
             AND ($2::text IS NULL OR {owner} = $2) \
             AND {status} = ANY ($3::text[]) \
             AND ($4::text IS NULL OR {topic} = $4) \
             AND ($5::text IS NULL OR {key} = $5) \
             AND ($6::text IS NULL OR {event_type} = $6) \
             AND ($7::text IS NULL OR strpos({error}, $7) > 0) \
             AND ($8::float8 IS NULL OR {since} <= clock_timestamp() - make_interval(secs => $8))"
        )
    }
}

/// Its parameters.
pub(crate) struct Parameters<'a> {
    pub(crate) ids: Option<&'a Vec<String>>,
    pub(crate) owner: Option<&'a str>,
    pub(crate) statuses: Vec<&'static str>,
    pub(crate) topic: Option<&'a str>,
    pub(crate) key: Option<&'a str>,
    pub(crate) event_type: Option<&'a str>,
    pub(crate) error: Option<&'a str>,
    pub(crate) seconds: Option<f64>,
}

impl Parameters<'_> {
    pub(crate) fn typed(&self) -> [(&(dyn ToSql + Sync), Type); 8] {
        [
            (&self.ids, Type::TEXT_ARRAY),
            (&self.owner, Type::TEXT),
            (&self.statuses, Type::TEXT_ARRAY),
            (&self.topic, Type::TEXT),
            (&self.key, Type::TEXT),
            (&self.event_type, Type::TEXT),
            (&self.error, Type::TEXT),
            (&self.seconds, Type::FLOAT8),
        ]
    }
}

/// Of these statuses; if none is said, of those that need somebody, and where ids are said of any.
pub(crate) fn statuses(
    said: &[&'static str],
    has_ids: bool,
    all: &[&'static str],
) -> Vec<&'static str> {
    match (said, has_ids) {
        ([], false) => vec!["waiting", "dead"],
        ([], true) => all.to_vec(),
        (said, _) => said.to_vec(),
    }
}

/// The first of the ids that no row has which fits, and in words how many others there are.
/// `rows` is what stands behind FROM.
pub(crate) async fn missing(
    client: &Client,
    contract: &Contract,
    rows: &str,
    columns: &Columns,
    parameters: &Parameters<'_>,
) -> Result<Option<(String, String)>, tokio_postgres::Error> {
    if parameters.ids.is_none() {
        return Ok(None);
    }
    let (id, condition) = (&columns.id, columns.condition());
    let sql = contract.sql(&format!(
        "SELECT given.id FROM unnest($1::text[]) AS given (id) \
         WHERE NOT EXISTS (SELECT FROM {rows} WHERE {id} = given.id AND {condition})"
    ));
    let missing = client.query_typed(&sql, &parameters.typed()).await?;
    let Some(first) = missing.first() else {
        return Ok(None);
    };
    let others = match missing.len() - 1 {
        0 => String::new(),
        others => format!(", nor with {others} others of the ids"),
    };
    Ok(Some((first.try_get(0)?, others)))
}

/// Sorts an error of a statement on such a table.
pub(crate) fn refused(doing: String, error: tokio_postgres::Error) -> Error {
    sort_with(doing, error, |sqlstate, _| {
        let next_step =
            "`postbox setup --grant-operator-to ROLE`, run by the owner, gives the right to";
        (sqlstate == "42501").then(|| next_step.to_owned())
    })
}

/// How the transaction of a decision begins: decisions are let into a schema one by one, and one that
/// a crash of the server forgets would be taken twice.
pub(crate) const BEGIN: &str = "SET LOCAL lock_timeout = '60s'; \
     SELECT set_config('synchronous_commit', 'on', true) \
     WHERE current_setting('synchronous_commit') IN ('off', 'local'); \
     SELECT pg_advisory_xact_lock(hashtextextended('decide about ' || :'schema', 0))";
