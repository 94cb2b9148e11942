//! A TCP proxy that harms what passes through it.

use std::io::Result;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) struct Proxy {
    address: String,
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct State {
    /// Where connections go, in turn.
    upstreams: Vec<String>,
    turn: usize,
    weather: Weather,
    /// Connections that are older than this many cuts are gone.
    cuts: u64,
}

/// What happens to the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weather {
    /// They pass.
    Fair,
    /// Nothing passes: no end, no error.
    Silent,
    /// Half of what was read passes, and nothing after it. A walsender that has got
    /// half a message waits for the rest of it, without looking at the time.
    Stalled,
    /// Half of what was read passes, and the rest so much later.
    Slow(Duration),
    /// What comes before these words passes, and nothing from there on.
    Before(&'static str),
}

impl Proxy {
    /// Listens on a port of its own. It refuses what comes before it knows where
    /// to pass it on to.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (state, _) = watch::channel(State {
            upstreams: Vec::new(),
            turn: 0,
            weather: Weather::Fair,
            cuts: 0,
        });
        let task = tokio::spawn(accept(listener, state.clone()));
        Self {
            address,
            state,
            task,
        }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn pass_on_to(&self, upstream: &str) {
        self.pass_on_in_turn(&[upstream]);
    }

    /// Passes each connection on to the next of these.
    pub(crate) fn pass_on_in_turn(&self, upstreams: &[&str]) {
        let upstreams = upstreams.iter().map(|upstream| upstream.to_string());
        let upstreams = upstreams.collect();
        self.state.send_modify(|state| {
            state.upstreams = upstreams;
            state.turn = 0;
        });
    }

    pub(crate) fn weather(&self, weather: Weather) {
        self.state.send_modify(|state| state.weather = weather);
    }

    pub(crate) fn is(&self, weather: Weather) -> bool {
        self.state.borrow().weather == weather
    }

    /// Cuts all connections, wherever in a message they are.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, state: watch::Sender<State>) {
    while let Ok((client, _)) = listener.accept().await {
        let mut upstream = None;
        state.send_modify(|state| {
            upstream = state.upstreams.iter().cycle().nth(state.turn).cloned();
            state.turn += 1;
        });
        if let Some(upstream) = upstream {
            tokio::spawn(connect(client, upstream, state.subscribe()));
        }
    }
}

async fn connect(
    client: TcpStream,
    upstream: String,
    mut state: watch::Receiver<State>,
) -> Result<()> {
    let cuts = state.borrow().cuts;
    let server = TcpStream::connect(upstream).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let there = carry(from_client, to_server, state.clone());
    let back = carry(from_server, to_client, state.clone());
    tokio::select! {
        done = async { tokio::try_join!(there, back) } => done.map(drop),
        _ = state.wait_for(|state| state.cuts > cuts) => Ok(()),
    }
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
) -> Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        let (now, later) = match state.borrow().weather {
            Weather::Fair => (read, Duration::ZERO),
            Weather::Silent => (0, Duration::ZERO),
            Weather::Stalled => (read / 2, Duration::ZERO),
            Weather::Slow(delay) => (read / 2, delay),
            Weather::Before(words) => (find(&buffer[..read], words), Duration::ZERO),
        };
        to.write_all(&buffer[..now]).await?;
        tokio::time::sleep(later).await;
        if now == read {
            continue;
        }
        // The sender is gone when the proxy is.
        let _ = state
            .wait_for(|state| matches!(state.weather, Weather::Fair | Weather::Slow(_)))
            .await;
        to.write_all(&buffer[now..read]).await?;
    }
}

/// Where these words begin, or all ends.
fn find(bytes: &[u8], words: &str) -> usize {
    let mut windows = bytes.windows(words.len());
    let found = windows.position(|window| window == words.as_bytes());
    found.unwrap_or(bytes.len())
}
