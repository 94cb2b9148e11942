//! What our scripts use of psql: variables, `\gset`, `\gexec`, `\if`, and that each
//! statement is sent by itself. So that the scripts can be tested where there is
//! no psql.

use std::collections::HashMap;

use tokio_postgres::{Client, SimpleQueryMessage};

/// Runs a script in which statements end with a line, up to its first error.
pub(crate) async fn run_script(client: &Client, script: &str) -> Result<(), tokio_postgres::Error> {
    let database = client
        .query_one("SELECT quote_ident(current_database())", &[])
        .await?;
    let mut variables = HashMap::from([("\"DBNAME\"".to_owned(), database.get(0))]);
    let mut conditions = Vec::new();
    let mut statement = String::new();
    for line in script.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["\\if", condition] => conditions.push(fill(condition, &variables) == "t"),
            ["\\endif"] => assert!(conditions.pop().is_some(), "\\endif without \\if"),
            _ if conditions.contains(&false) => {}
            ["\\set", name, value] => {
                variables.insert(name.to_owned(), value.to_owned());
            }
            [word, ..] if word.starts_with('\\') => panic!("psql's {word} is not known here"),
            [] | ["--", ..] => {}
            _ => {
                let gexec = line.strip_suffix("\\gexec");
                let (text, gset) = match line.strip_suffix("\\gset").or(gexec) {
                    Some(text) => (text, true),
                    None => (line, false),
                };
                statement += text;
                statement += "\n";
                if !gset && !is_whole(&statement) {
                    continue;
                }
                let sql = fill(&std::mem::take(&mut statement), &variables);
                let answer = client.simple_query(&sql).await?;
                if gexec.is_some() {
                    execute(client, &answer).await?;
                } else if gset {
                    keep(&answer, &mut variables);
                }
            }
        }
    }
    assert_eq!(statement, "", "a statement without an end");
    assert!(conditions.is_empty(), "\\if without \\endif");
    Ok(())
}

/// Rows are statements.
async fn execute(
    client: &Client,
    answer: &[SimpleQueryMessage],
) -> Result<(), tokio_postgres::Error> {
    for message in answer {
        if let SimpleQueryMessage::Row(row) = message {
            client.simple_query(row.get(0).unwrap_or_default()).await?;
        }
    }
    Ok(())
}

fn is_whole(statement: &str) -> bool {
    statement.trim_end().ends_with(';') && statement.matches("$$").count().is_multiple_of(2)
}

fn fill(text: &str, variables: &HashMap<String, String>) -> String {
    let mut filled = text.to_owned();
    for (name, value) in variables {
        filled = filled.replace(&format!(":{name}"), value);
    }
    filled
}

/// Columns become variables.
fn keep(answer: &[SimpleQueryMessage], variables: &mut HashMap<String, String>) {
    for message in answer {
        if let SimpleQueryMessage::Row(row) = message {
            for (column, name) in row.columns().iter().enumerate() {
                let value = row.get(column).unwrap_or_default();
                variables.insert(name.name().to_owned(), value.to_owned());
            }
        }
    }
}
