//! A function of the database as a handler: one statement for all messages of a batch.
//!
//! It takes one `postbox.message`, or an array of them, in their order. What it raises is
//! why a message failed. One that takes one message may say more by what it returns, as text:
//! `completed` (as null and nothing do), `skipped`, `retry`, `retry 10s`, or `failed: why`.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Transaction};

use super::Outcome;
use crate::contract::Contract;
use crate::database::sort;
use crate::duration;
use crate::error::{Error, ErrorKind, Result};
use crate::inbox::columns::Columns;
use crate::inbox::message::Message;

/// The name of a function, as the user wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    name: String,
}

/// A function that is there.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    statement: String,
    takes_all: bool,
    group: String,
}

impl Function {
    /// `schema.function`, or a function that the search path finds.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// As it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Looks it up.
    ///
    /// # Errors
    /// If there is none that takes messages, or more than one, or it is not ours to call.
    pub(crate) async fn prepare(
        &self,
        client: &Client,
        contract: &Contract,
        group: &str,
    ) -> Result<Prepared> {
        let doing = || format!("look for function {}", self.name);
        let sql = "SELECT format('%I.%I', n.nspname, p.proname), p.proargtypes[0] = t.typarray, p.prorettype,
                 has_function_privilege(p.oid, 'EXECUTE'), p.proretset OR p.prokind <> 'f'
             FROM pg_proc AS p
             JOIN pg_namespace AS n ON n.oid = p.pronamespace
             JOIN pg_type AS t ON t.oid = to_regtype(format('%I.message', $2::text))
             WHERE p.oid IN (
                     SELECT p.oid FROM pg_proc AS p
                     JOIN pg_namespace AS n ON n.oid = p.pronamespace
                     WHERE p.proname = (parse_ident($1))[array_upper(parse_ident($1), 1)]
                       AND CASE array_length(parse_ident($1), 1)
                           WHEN 1 THEN pg_function_is_visible(p.oid)
                           ELSE n.nspname = (parse_ident($1))[1]
                       END
                 )
               AND p.pronargs - p.pronargdefaults <= 1
               AND p.proargtypes[0] IN (t.oid, t.typarray)";
        let names = [
            (&self.name as _, Type::TEXT),
            (&contract.schema as _, Type::TEXT),
        ];
        let rows = client
            .query_typed(sql, &names)
            .await
            .map_err(|error| sort(doing(), error))?;
        let schema = &contract.schema;
        let refuse = |kind, message: String| Err(Error::new(kind, message));
        let row = match &rows[..] {
            [] => {
                return refuse(
                    ErrorKind::Database,
                    format!(
                        "there is no function {} that takes one argument of type {schema}.message or {schema}.message[]: \
                         create it, or name another with --handler",
                        self.name
                    ),
                );
            }
            [row] => row,
            _ => {
                return refuse(
                    ErrorKind::Database,
                    format!(
                        "there are several functions {} that take messages: leave one of them, or name its schema",
                        self.name
                    ),
                );
            }
        };
        let (name, takes_all): (&str, bool) = (row.get(0), row.get(1));
        let returns = Type::from_oid(row.get(2));
        if !row.get::<_, bool>(3) {
            return refuse(
                ErrorKind::Rights,
                format!("function {name} is not ours to call: GRANT EXECUTE on it"),
            );
        }
        let result = match (takes_all, returns) {
            _ if row.get(4) => None,
            (_, Some(Type::VOID)) => Some(""),
            (false, Some(Type::TEXT)) => Some("::text"),
            _ => None,
        };
        let Some(result) = result else {
            let text = if takes_all { "" } else { " or text" };
            return refuse(
                ErrorKind::Database,
                format!("function {name} returns what nobody reads: it must return void{text}"),
            );
        };
        let group_at = Columns::COUNT + 1;
        let message = format!(
            "CAST(ROW(${group_at}::text, {}) AS :\"schema\".message)",
            Columns::MESSAGE
        );
        let from = Columns::ROWS;
        let statement = match takes_all {
            true => format!("SELECT {name}((SELECT array_agg({message} ORDER BY n) FROM {from}))"),
            // What is selected is computed in the order of the rows, as it may have effects.
            false => format!("SELECT {name}({message}){result} FROM {from} ORDER BY n"),
        };
        Ok(Prepared {
            statement: contract.sql(&statement),
            takes_all,
            group: group.to_owned(),
        })
    }
}

impl Prepared {
    /// Calls it for these.
    pub(crate) async fn call(
        &self,
        transaction: &Transaction<'_>,
        messages: &[&Message],
    ) -> std::result::Result<Vec<Outcome>, tokio_postgres::Error> {
        let columns = Columns::of(messages.iter().copied());
        let mut parameters = columns.parameters();
        parameters.push((&self.group, Type::TEXT));
        let rows = transaction
            .query_typed(&self.statement, &parameters)
            .await?;
        if self.takes_all {
            return Ok(vec![Outcome::Completed; messages.len()]);
        }
        Ok(rows
            .iter()
            .map(|row| outcome(row.try_get(0).ok().flatten()))
            .collect())
    }
}

/// What a function has said.
fn outcome(said: Option<&str>) -> Outcome {
    let said = said.unwrap_or_default().trim();
    let (word, rest) = match said.find([' ', ':']) {
        Some(at) => (&said[..at], said[at + 1..].trim()),
        None => (said, ""),
    };
    match word {
        "" | "completed" => Outcome::Completed,
        "skipped" => Outcome::Skipped,
        "failed" => Outcome::Failed(rest.to_owned()),
        "retry" => Outcome::Retry(duration::parse(rest)),
        _ => Outcome::Failed(format!("the handler returned \"{}\"", said.escape_debug())),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_function_says_what_it_made_of_a_message() {
        let failed = |why: &str| Outcome::Failed(why.to_owned());
        for (said, means) in [
            (None, Outcome::Completed),
            (Some(""), Outcome::Completed),
            (Some("completed"), Outcome::Completed),
            (Some("skipped"), Outcome::Skipped),
            (Some("retry"), Outcome::Retry(None)),
            (
                Some("retry 10s"),
                Outcome::Retry(Some(Duration::from_secs(10))),
            ),
            (Some("failed: no such order"), failed("no such order")),
            (Some("failed"), failed("")),
            (Some("done"), failed("the handler returned \"done\"")),
        ] {
            assert_eq!(outcome(said), means, "{said:?}");
        }
    }
}
