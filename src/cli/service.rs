//! What runs until it is told to stop: with http endpoints, and signals that stop it.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context;
use postbox::http::{self, Endpoints};
use postbox::{Error, ErrorKind};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

/// Where http is served.
#[derive(Debug, Clone, Copy)]
pub(super) enum Http {
    Off,
    At(SocketAddr),
}

impl FromStr for Http {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::Off),
            _ => text
                .parse()
                .map(Self::At)
                .map_err(|_| "use ADDRESS:PORT, such as 127.0.0.1:9464, or none".to_owned()),
        }
    }
}

/// What runs.
pub(super) struct Service {
    /// Of its thread.
    pub(super) name: &'static str,
    /// What a stop that is not waited for costs.
    pub(super) repeats: &'static str,
    pub(super) http: Http,
}

impl Service {
    /// Serves http and waits for signals, while what runs has a thread and a runtime of its own.
    pub(super) fn run<F>(
        &self,
        endpoints: Endpoints,
        run: impl FnOnce(watch::Receiver<bool>) -> F + Send + 'static,
    ) -> anyhow::Result<()>
    where
        F: Future<Output = postbox::Result<()>>,
    {
        runtime()?.block_on(self.supervise(endpoints, run))
    }

    async fn supervise<F>(
        &self,
        endpoints: Endpoints,
        run: impl FnOnce(watch::Receiver<bool>) -> F + Send + 'static,
    ) -> anyhow::Result<()>
    where
        F: Future<Output = postbox::Result<()>>,
    {
        let mut signals = Signals::new().context("listen for signals")?;
        if let Http::At(address) = self.http {
            let listener = listen(address).await?;
            info!(address = %listener.local_addr()?, "serving http");
            tokio::spawn(http::serve(listener, endpoints));
        }
        let (stop, stopped) = watch::channel(false);
        let mut result = self.spawn(|| run(stopped))?;
        let mut first_signal = None;
        loop {
            tokio::select! {
                result = &mut result => {
                    let result = result.with_context(|| format!("the {}'s thread panicked", self.name))?;
                    return Ok(result?);
                }
                name = signals.next() => {
                    let first = *first_signal.get_or_insert_with(Instant::now);
                    if first.elapsed() > ONE_SIGNAL {
                        let message = format!("stopped by a second signal: {}", self.repeats);
                        return Err(Error::new(ErrorKind::NotDrained, message).into());
                    }
                    info!(signal = name, "stopping: drain and confirm");
                    stop.send_replace(true);
                }
            }
        }
    }

    fn spawn<F>(
        &self,
        run: impl FnOnce() -> F + Send + 'static,
    ) -> anyhow::Result<oneshot::Receiver<postbox::Result<()>>>
    where
        F: Future<Output = postbox::Result<()>>,
    {
        let runtime = runtime()?;
        let (sender, result) = oneshot::channel();
        std::thread::Builder::new()
            .name(self.name.to_owned())
            .spawn(move || {
                let result = runtime.block_on(run());
                if sender.send(result).is_err() {
                    warn!("nobody waits for the result");
                }
            })?;
        Ok(result)
    }
}

/// Signals within this time are one: some supervisors signal a process and then
/// its group.
const ONE_SIGNAL: Duration = Duration::from_millis(500);

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("start a runtime")
}

async fn listen(address: SocketAddr) -> postbox::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let message =
            format!("--http {address}: cannot listen there; use another address, or none");
        Error::new(ErrorKind::Settings, message).caused_by(error)
    })
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
