//! The publication.

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// The publication's identity, which changes whenever it, its tables or its
/// options do; `None` if there is no such publication.
pub async fn publication_identity(client: &Client, contract: &Contract) -> Result<Option<String>> {
    let sql = contract.sql("SELECT :\"schema\".publication_identity($1::text::name)");
    let rows = client
        .query_typed(&sql, &[(&contract.publication, Type::TEXT)])
        .await
        .map_err(|error| sort(doing(contract), error))?;
    Ok(rows.first().and_then(|row| row.get(0)))
}

/// Checks that the publication holds the inserts of the outbox, whole, and
/// nothing else. Whether it has always done so is a question of its identity.
///
/// # Errors
///
/// `Publication`, with the statement that mends it.
pub async fn check_publication(client: &Client, contract: &Contract) -> Result<()> {
    match find(client, contract).await? {
        Some(shape) => shape.check(contract),
        None => Err(Error::new(
            ErrorKind::Publication,
            format!(
                "publication \"{}\" does not exist: run `postbox setup`",
                contract.publication
            ),
        )),
    }
}

/// Whether there is a publication of this name.
pub(crate) async fn exists(client: &Client, contract: &Contract) -> Result<bool> {
    Ok(find(client, contract).await?.is_some())
}

struct Shape {
    all_tables: bool,
    insert: bool,
    others: bool,
    via_root: bool,
    holds_outbox: bool,
    filtered: bool,
    other_tables: Option<String>,
    schemas: Option<String>,
}

async fn find(client: &Client, contract: &Contract) -> Result<Option<Shape>> {
    // to_jsonb: row filters and column lists came with Postgres 15.
    let sql = "SELECT p.puballtables, p.pubinsert, p.pubupdate OR p.pubdelete OR p.pubtruncate, p.pubviaroot, \
                      coalesce(bool_or(r.prrelid = outbox), false), \
                      coalesce(bool_or(num_nonnulls(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') > 0), false), \
                      string_agg(r.prrelid::regclass::text, ', ') FILTER (WHERE r.prrelid IS DISTINCT FROM outbox), \
                      p.oid \
               FROM to_regclass($2) AS outbox, pg_publication AS p \
               LEFT JOIN pg_publication_rel AS r ON r.prpubid = p.oid \
               WHERE p.pubname = $1::text::name GROUP BY p.oid";
    let outbox = contract.table("outbox");
    let parameters = [
        (&contract.publication as _, Type::TEXT),
        (&outbox as _, Type::TEXT),
    ];
    let rows = client
        .query_typed(sql, &parameters)
        .await
        .map_err(|error| sort(doing(contract), error))?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    Ok(Some(Shape {
        all_tables: row.get(0),
        insert: row.get(1),
        others: row.get(2),
        via_root: row.get(3),
        holds_outbox: row.get(4),
        filtered: row.get(5),
        other_tables: row.get(6),
        schemas: schemas(client, contract, row.get(7)).await?,
    }))
}

/// Whole schemas in the publication, from Postgres 15 on.
async fn schemas(client: &Client, contract: &Contract, publication: u32) -> Result<Option<String>> {
    let catalogue = "SELECT to_regclass('pg_catalog.pg_publication_namespace') IS NOT NULL";
    let sql = "SELECT string_agg(pnnspid::regnamespace::text, ', ') \
               FROM pg_catalog.pg_publication_namespace WHERE pnpubid = $1";
    let read = async {
        if !client.query_one(catalogue, &[]).await?.get::<_, bool>(0) {
            return Ok(None);
        }
        let rows = client
            .query_typed(sql, &[(&publication, Type::OID)])
            .await?;
        Ok(rows.first().and_then(|row| row.get(0)))
    };
    read.await.map_err(|error| sort(doing(contract), error))
}

impl Shape {
    fn check(&self, contract: &Contract) -> Result<()> {
        let name = escape_identifier(&contract.publication);
        let outbox = contract.table("outbox");
        let alter = |change: &str| format!("ALTER PUBLICATION {name} {change}");
        let again = || format!("DROP PUBLICATION {name}; then run `postbox setup`");
        let only_outbox = || alter(&format!("SET TABLE {outbox}"));
        let (why, mend) = if self.all_tables {
            ("is FOR ALL TABLES".to_owned(), again())
        } else if let Some(schemas) = &self.schemas {
            (format!("publishes all tables of {schemas}"), again())
        } else if let Some(tables) = &self.other_tables {
            (format!("publishes {tables} too"), only_outbox())
        } else if !self.holds_outbox {
            (
                format!("does not publish {outbox}"),
                alter(&format!("ADD TABLE {outbox}")),
            )
        } else if self.filtered {
            (
                format!("has a row filter or a column list for {outbox}"),
                only_outbox(),
            )
        } else if !self.insert || self.others {
            (
                "must publish inserts and nothing else".to_owned(),
                alter("SET (publish = 'insert')"),
            )
        } else if !self.via_root {
            (
                "does not publish partitions under the name of their table".to_owned(),
                alter("SET (publish_via_partition_root = true)"),
            )
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Publication,
            format!("publication \"{}\" {why}: {mend}", contract.publication),
        ))
    }
}

fn doing(contract: &Contract) -> String {
    format!("read publication \"{}\"", contract.publication)
}
