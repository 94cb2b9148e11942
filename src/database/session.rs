//! An ordinary session and the task that drives it.

use tokio::sync::watch;
use tokio_postgres::Client;
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
}

impl Session {
    pub(super) async fn open(
        config: &tokio_postgres::Config,
        tls: MakeRustlsConnect,
    ) -> Result<Self, tokio_postgres::Error> {
        let (client, connection) = config.connect(tls).await?;
        let name = config.get_application_name().unwrap_or_default();
        let doing = format!("database session \"{name}\" ended");
        let (sender, end) = watch::channel(None);
        tokio::spawn(async move {
            let reason = match connection.await {
                Ok(()) => Error::new(ErrorKind::DatabaseAway, doing),
                Err(error) => sort(doing, error),
            };
            sender.send_replace(Some((reason.kind(), reason.chain())));
        });
        client.batch_execute(SYNCHRONOUS_COMMIT).await?;
        Ok(Self { client, end })
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

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = self.end.borrow();
        f.debug_struct("Session").field("end", &*end).finish()
    }
}
