//! `postbox cancel`.

use clap::Args;
use postbox::contract::Contract;
use postbox::database::sort;
use postbox::{Error, ErrorKind, outbox};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::arguments::{DatabaseArguments, SchemaArguments};

/// Takes scheduled events back before their time.
///
/// An event that was written with scheduled_at, and whose time has not come by the server's clock, is
/// never sent, whether a relay has read it yet or not. All of them in one transaction; exit code 0 only
/// if all were cancelled, also if some of them were before. In a program: postbox.cancel(id) in SQL, or
/// outbox::cancel, in a transaction of its own.
#[derive(Debug, Args)]
pub(super) struct CancelCommand {
    /// The events' ids.
    #[arg(required = true, value_name = "ID")]
    ids: Vec<Uuid>,

    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    schema: SchemaArguments,
}

impl CancelCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let contract = self.schema.resolve()?;
        let database = self.database.resolve()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let outcomes = runtime.block_on(async {
            let mut session = database.connect_pooled("postbox cancel").await?;
            let cancelled = cancel(&mut session.client, &contract, &self.ids).await?;
            let mut outcomes = Vec::with_capacity(cancelled.len());
            for (id, is_cancelled) in self.ids.iter().zip(cancelled) {
                outcomes.push(match is_cancelled {
                    true => Outcome::Cancelled,
                    false => look_after(&session.client, &contract, *id).await?,
                });
            }
            Ok::<_, Error>(outcomes)
        })?;
        for (id, outcome) in self.ids.iter().zip(&outcomes) {
            match outcome {
                Outcome::Cancelled => println!("{id}: cancelled"),
                Outcome::CancelledBefore => println!("{id}: cancelled before"),
                Outcome::Not(why) => println!("{id}: not cancelled: {why}"),
            }
        }
        let left = outcomes.iter().filter(|is| matches!(is, Outcome::Not(_)));
        match left.count() {
            0 => Ok(()),
            left => {
                let message = format!("{left} of {} events were not cancelled", outcomes.len());
                Err(Error::new(ErrorKind::Database, message).into())
            }
        }
    }
}

/// What became of an event.
enum Outcome {
    Cancelled,
    /// In time; its time has come since.
    CancelledBefore,
    Not(String),
}

async fn cancel(
    client: &mut Client,
    contract: &Contract,
    ids: &[Uuid],
) -> postbox::Result<Vec<bool>> {
    let doing = || format!("cancel events of \"{}.outbox\"", contract.schema);
    let transaction = client.transaction().await;
    let transaction = transaction.map_err(|error| sort(doing(), error))?;
    // A cancellation that a crash of the server forgets would be sent.
    let durable = "SELECT set_config('synchronous_commit', 'on', true) \
                   WHERE current_setting('synchronous_commit') IN ('off', 'local')";
    let set = transaction.batch_execute(durable).await;
    set.map_err(|error| sort(doing(), error))?;
    let mut cancelled = Vec::with_capacity(ids.len());
    for id in ids {
        cancelled.push(outbox::cancel_in(&contract.schema, &transaction, *id).await?);
    }
    let committed = transaction.commit().await;
    committed.map_err(|error| sort(doing(), error))?;
    Ok(cancelled)
}

/// What there is of an event that cannot be cancelled, as far as the role may see. By ids that
/// have an index: an event that was not scheduled is not looked for among all of them.
async fn look_after(client: &Client, contract: &Contract, id: Uuid) -> postbox::Result<Outcome> {
    let sql = format!(
        "SELECT EXISTS (SELECT FROM {} AS c WHERE c.id = $1::uuid::text), \
                EXISTS (SELECT FROM {} AS o WHERE o.id = $1 AND o.scheduled_at IS NOT NULL), \
                (SELECT p.status FROM {} AS p WHERE p.id = $1::uuid::text ORDER BY p.status LIMIT 1)",
        contract.table("cancellation"),
        contract.table("outbox"),
        contract.table("parked")
    );
    let row = match client
        .query_typed_one(&sql, &[(&id as _, Type::UUID)])
        .await
    {
        Ok(row) => row,
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            let why = "its time has come, or no scheduled event has this id";
            return Ok(Outcome::Not(why.to_owned()));
        }
        Err(error) => return Err(sort(format!("read event {id}"), error)),
    };
    if row.get(0) {
        return Ok(Outcome::CancelledBefore);
    }
    let status: Option<String> = row.get(2);
    Ok(Outcome::Not(match (row.get(1), status.as_deref()) {
        (_, Some(status @ ("waiting" | "dead"))) => {
            format!("its time has come, and it is {status}: `postbox parked skip` gives it up")
        }
        (_, Some("skipped")) => "its time has come, and it is skipped".to_owned(),
        (true, _) | (_, Some(_)) => "its time has come".to_owned(),
        (false, None) => "no scheduled event has this id".to_owned(),
    }))
}
