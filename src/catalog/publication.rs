//! The publication.

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::identity::difference;
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// Makes the publication.
pub(crate) const PUBLICATION: &str = include_str!("../../sql/publication.sql");

const OPTIONS: &str = "publish = 'insert', publish_via_partition_root = true";

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
/// nothing else. Whether it has always done so is a question of its identity. One that
/// comes with another's slot may hold more: see `Preset::shares_publication`.
///
/// # Errors
///
/// `Publication`, with the statement that mends it.
pub async fn check_publication(client: &Client, contract: &Contract) -> Result<()> {
    match find_fault(client, contract).await? {
        None => Ok(()),
        Some(Fault { why, mend }) => {
            let mend = match mend {
                Mend::Run(statements) => statements,
                Mend::Another => {
                    "make another publication, and name it with --publication".to_owned()
                }
                Mend::Nothing => return Err(is_of_another_table(contract)),
            };
            Err(Error::new(
                ErrorKind::Publication,
                format!("publication \"{}\" {why}: {mend}", contract.publication),
            ))
        }
    }
}

/// Another relay reads it, or this one with other flags.
fn is_of_another_table(contract: &Contract) -> Error {
    let message = format!(
        "publication \"{}\" was set up for another table than {}: say --table-preset and --table as they were said \
         then, or name another --slot and --publication",
        contract.publication,
        contract.outbox.quoted()
    );
    Error::new(ErrorKind::Publication, message)
}

/// Whether there is a publication of this name.
pub(crate) async fn exists(client: &Client, contract: &Contract) -> Result<bool> {
    Ok(find(client, contract).await?.is_some())
}

/// The error of a publication that is not the one the slot was set up with, or
/// is gone: what is known of it, and how to go on.
pub(super) async fn changed(
    client: &Client,
    contract: &Contract,
    stored: &str,
    present: Option<&str>,
) -> Result<Error> {
    let difference = present.map(|present| difference(stored, present));
    let recover = "run `postbox recover`";
    let (why, mend) = match find_fault(client, contract).await? {
        Some(Fault { why, mend }) => {
            let mend = match mend {
                Mend::Run(statements) => format!("make it right: {statements}; then, {recover}"),
                Mend::Another => "set up another --slot with another --publication".to_owned(),
                Mend::Nothing => return Ok(is_of_another_table(contract)),
            };
            (Some(why), mend)
        }
        None => (None, recover.to_owned()),
    };
    let what: Vec<&str> = difference.into_iter().chain(why.as_deref()).collect();
    Ok(Error::new(
        ErrorKind::Publication,
        format!(
            "publication \"{}\" {}: the slot may skip rows committed since, which are still in the outbox; \
             {mend}",
            contract.publication,
            what.join(", and "),
        ),
    ))
}

/// What is wrong with a publication as it is now.
struct Fault {
    why: String,
    mend: Mend,
}

/// How it is mended, without harm to others that read it.
enum Mend {
    /// By statements, for one line of psql.
    Run(String),
    /// By another publication: what would mend this one may break what else reads it.
    Another,
    /// Not at all: it is right, for another table.
    Nothing,
}

async fn find_fault(client: &Client, contract: &Contract) -> Result<Option<Fault>> {
    let Some(shape) = find(client, contract).await? else {
        return Ok(Some(Fault {
            why: "does not exist".to_owned(),
            mend: Mend::Run(create_statement(contract)),
        }));
    };
    let Some(mut fault) = shape.fault(contract) else {
        return Ok(None);
    };
    if shape.holds_others() && serves_another_table(client, contract).await? {
        fault.mend = Mend::Nothing;
    }
    Ok(Some(fault))
}

/// Whether a slot was set up with this publication when it did not hold the outbox: an
/// identity has the oid of each table that it held by name. Where a publication is shared it
/// may have held the outbox otherwise.
async fn serves_another_table(client: &Client, contract: &Contract) -> Result<bool> {
    let sql = contract.sql(
        "SELECT EXISTS (SELECT FROM :\"schema\".checkpoint WHERE publication = $1 \
             AND publication_identity !~ format(' table [0-9]+@[0-9]+:%s( |$)', to_regclass($2)::oid) \
             AND NOT ($3 AND publication_identity ~ '\"puballtables\": true| schema [0-9]+@'))",
    );
    let outbox = contract.outbox.quoted();
    let is_shared = contract.outbox.preset.shares_publication();
    let parameters = [
        (&contract.publication as _, Type::TEXT),
        (&outbox as _, Type::TEXT),
        (&is_shared as _, Type::BOOL),
    ];
    let rows = client.query_typed(&sql, &parameters).await;
    let rows = rows.map_err(|error| sort(doing(contract), error))?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

/// Whether a publication of this identity gave the outbox: it held it by name, or, where it
/// may be shared, otherwise.
pub(super) async fn held_outbox(
    client: &Client,
    contract: &Contract,
    identity: &str,
) -> Result<bool> {
    let sql = "SELECT $1 ~ format(' table [0-9]+@[0-9]+:%s( |$)', to_regclass($2)::oid) \
                   OR ($3 AND $1 ~ '\"puballtables\": true| schema [0-9]+@')";
    let outbox = contract.outbox.quoted();
    let is_shared = contract.outbox.preset.shares_publication();
    let parameters = [
        (&identity as _, Type::TEXT),
        (&outbox as _, Type::TEXT),
        (&is_shared as _, Type::BOOL),
    ];
    let row = client.query_typed_one(sql, &parameters).await;
    let row = row.map_err(|error| sort(doing(contract), error))?;
    Ok(row.get::<_, Option<bool>>(0).unwrap_or(false))
}

/// The first statement of `sql/publication.sql`, in one line.
fn create_statement(contract: &Contract) -> String {
    let lines = PUBLICATION.lines().filter(|line| !line.starts_with("--"));
    let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
    let words = words.join(" ");
    contract.sql(words.split(';').next().unwrap_or_default())
}

struct Shape {
    /// Whether the outbox is published, by whatever way, under its own name.
    gives_outbox: bool,
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
                      coalesce(bool_or(num_nonnulls(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') > 0) \
                               FILTER (WHERE r.prrelid = outbox), false), \
                      string_agg(r.prrelid::regclass::text, ', ') FILTER (WHERE r.prrelid IS DISTINCT FROM outbox), \
                      p.oid, \
                      EXISTS (SELECT FROM pg_publication_tables AS t, pg_class AS c \
                              JOIN pg_namespace AS n ON n.oid = c.relnamespace \
                              WHERE t.pubname = p.pubname AND c.oid = outbox AND t.tablename = c.relname \
                                AND t.schemaname = n.nspname) \
               FROM to_regclass($2) AS outbox, pg_publication AS p \
               LEFT JOIN pg_publication_rel AS r ON r.prpubid = p.oid \
               WHERE p.pubname = $1::text::name GROUP BY p.oid, outbox";
    let outbox = contract.outbox.quoted();
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
        gives_outbox: row.get(8),
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
    fn fault(&self, contract: &Contract) -> Option<Fault> {
        let is_shared = contract.outbox.preset.shares_publication();
        let (tables, options) = match is_shared {
            true => (self.is_lacking(contract), self.lacks_inserts()),
            false => (self.wrong_tables(contract), self.wrong_options()),
        };
        let mend = match is_shared {
            true => self.mend_shared(contract, options.is_some()),
            false => self.mend_own(contract, tables.is_some(), options.is_some()),
        };
        let why: Vec<String> = tables.into_iter().chain(options).collect();
        (!why.is_empty()).then(|| Fault {
            why: why.join(", and "),
            mend,
        })
    }

    fn mend_own(&self, contract: &Contract, tables: bool, options: bool) -> Mend {
        let name = escape_identifier(&contract.publication);
        let mut mend = Vec::new();
        if self.all_tables {
            mend.push(format!("DROP PUBLICATION {name}"));
            mend.push(create_statement(contract));
        } else {
            if tables {
                let outbox = contract.outbox.quoted();
                mend.push(format!("ALTER PUBLICATION {name} SET TABLE {outbox}"));
            }
            if options {
                mend.push(format!("ALTER PUBLICATION {name} SET ({OPTIONS})"));
            }
        }
        Mend::Run(mend.join("; "))
    }

    /// A table more harms nobody.
    fn mend_shared(&self, contract: &Contract, options: bool) -> Mend {
        if self.all_tables || self.holds_outbox || options {
            return Mend::Another;
        }
        let name = escape_identifier(&contract.publication);
        let outbox = contract.outbox.quoted();
        Mend::Run(format!("ALTER PUBLICATION {name} ADD TABLE {outbox}"))
    }

    fn holds_others(&self) -> bool {
        self.all_tables || self.other_tables.is_some() || self.schemas.is_some()
    }

    fn wrong_tables(&self, contract: &Contract) -> Option<String> {
        let outbox = contract.outbox.quoted();
        if self.all_tables {
            Some("is FOR ALL TABLES".to_owned())
        } else if let Some(schemas) = &self.schemas {
            Some(format!("publishes all tables of {schemas}"))
        } else if let Some(tables) = &self.other_tables {
            Some(format!("publishes {tables} too"))
        } else if !self.holds_outbox {
            Some(format!("does not publish {outbox}"))
        } else if self.filtered {
            Some(format!("has a row filter or a column list for {outbox}"))
        } else {
            None
        }
    }

    /// What is wrong with the tables of a publication that may hold others.
    fn is_lacking(&self, contract: &Contract) -> Option<String> {
        let outbox = contract.outbox.quoted();
        if self.filtered {
            Some(format!("has a row filter or a column list for {outbox}"))
        } else if !self.gives_outbox {
            Some(format!("does not publish {outbox} under its own name"))
        } else {
            None
        }
    }

    fn lacks_inserts(&self) -> Option<String> {
        (!self.insert).then(|| "must publish inserts".to_owned())
    }

    fn wrong_options(&self) -> Option<String> {
        if !self.insert || self.others {
            Some("must publish inserts and nothing else".to_owned())
        } else if !self.via_root {
            let why = "does not publish partitions under the name of their table";
            Some(why.to_owned())
        } else {
            None
        }
    }
}

fn doing(contract: &Contract) -> String {
    format!("read publication \"{}\"", contract.publication)
}
