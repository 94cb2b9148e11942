//! An ordinary session and the task that drives it.

use std::future::poll_fn;
use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, ErrorKind};

use super::sort;

/// `on`, `remote_write` and `remote_apply` stay: each waits for at least our own
/// disk, or for a standby that the operator chose to trust.
const SYNCHRONOUS_COMMIT: &str = "SELECT set_config('synchronous_commit', 'on', false) \
     WHERE current_setting('synchronous_commit') IN ('off', 'local')";

/// An open session. It ends when `client` is dropped.
pub struct Session {
    /// Runs the statements; they may be sent one behind another.
    pub client: Client,
    /// Why the connection is gone, once it is.
    end: watch::Receiver<Option<(ErrorKind, String)>>,
    notified: Arc<Notify>,
}

impl Session {
    pub(super) async fn open(
        config: &tokio_postgres::Config,
        tls: MakeRustlsConnect,
    ) -> Result<Self, tokio_postgres::Error> {
        let (client, mut connection) = config.connect(tls).await?;
        let name = config.get_application_name().unwrap_or_default();
        let doing = format!("database session \"{name}\" ended");
        let (sender, end) = watch::channel(None);
        let notified = Arc::new(Notify::new());
        let notify = Arc::clone(&notified);
        tokio::spawn(async move {
            let reason = loop {
                match poll_fn(|context| connection.poll_message(context)).await {
                    Some(Ok(AsyncMessage::Notification(_))) => notify.notify_one(),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break sort(doing, error),
                    None => break Error::new(ErrorKind::DatabaseAway, doing),
                }
            };
            sender.send_replace(Some((reason.kind(), reason.chain())));
        });
        Ok(Self {
            client,
            end,
            notified,
        })
    }

    /// Whether the session began with these settings, whatever their values: the server knows
    /// where each of them comes from.
    pub(super) async fn holds(
        &self,
        settings: &[(&str, &str)],
    ) -> Result<bool, tokio_postgres::Error> {
        if settings.is_empty() {
            return Ok(true);
        }
        let names: Vec<&str> = settings.iter().map(|(name, _)| *name).collect();
        let sql = "SELECT count(*) FROM pg_settings WHERE name = ANY ($1) AND source = 'client'";
        let names = [(&names as _, Type::TEXT_ARRAY)];
        let held: i64 = self.client.query_typed_one(sql, &names).await?.get(0);
        Ok(usize::try_from(held) == Ok(settings.len()))
    }

    /// Sets what our commits need.
    pub(super) async fn strengthen(&self) -> Result<(), tokio_postgres::Error> {
        self.client.batch_execute(SYNCHRONOUS_COMMIT).await
    }

    /// Waits for a notification that came since the last was waited for. Cancel-safe.
    pub async fn notified(&self) {
        self.notified.notified().await;
    }

    /// Waits until the connection is gone, and says why.
    ///
    /// Cancel-safe, and can be called again: it keeps no progress of its own.
    pub async fn ended(&self) -> Error {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some((kind, message))) => Error::new(*kind, message.as_str()),
            // The task was dropped with its runtime.
            _ => Error::new(ErrorKind::DatabaseAway, "database session ended"),
        }
    }
}

/// Runs one statement in a transaction of its own, after `begin`, which opens it with
/// settings that end with it. One round trip; cancelled, it is run all the same.
///
/// # Errors
/// The first that the server tells.
pub async fn query_after(
    begin: &str,
    client: &Client,
    sql: &str,
    parameters: &[(&(dyn ToSql + Sync), Type)],
) -> Result<Vec<Row>, tokio_postgres::Error> {
    let (begun, rows, ended) = tokio::join!(
        client.batch_execute(begin),
        client.query_typed(sql, parameters),
        client.batch_execute("COMMIT"),
    );
    begun?;
    let rows = rows?;
    ended?;
    Ok(rows)
}

/// Runs a statement again for as long as it ends in a deadlock: somebody else writes the same
/// rows, in another order.
///
/// # Errors
/// Any other of the statement's.
pub async fn despite_deadlocks<T, F>(mut run: impl FnMut() -> F) -> Result<T, tokio_postgres::Error>
where
    F: Future<Output = Result<T, tokio_postgres::Error>>,
{
    loop {
        match run().await {
            Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => {}
            done => return done,
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = self.end.borrow();
        f.debug_struct("Session").field("end", &*end).finish()
    }
}
