//! `/metrics`, `/healthz` and `/readyz`, as probes and scrapers see them.

mod backlog;
mod scrape;
mod stalls;

#[cfg(target_os = "linux")]
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::support::{Fixture, Relay, wait_until};
use scrape::Scrape;

/// Every metric of `src/metrics.rs`, with its type. One more comes with the first
/// failure: `postbox_delivery_failures_total`, which `poison.rs` provokes.
const METRICS: &[(&str, &str)] = &[
    ("postbox_events_published_total", "counter"),
    ("postbox_bytes_published_total", "counter"),
    ("postbox_publish_seconds", "histogram"),
    ("postbox_commit_to_delivery_seconds", "histogram"),
    ("postbox_in_flight_events", "gauge"),
    ("postbox_in_flight_bytes", "gauge"),
    ("postbox_received_lsn", "gauge"),
    ("postbox_confirmed_lsn", "gauge"),
    ("postbox_slot_lag_bytes", "gauge"),
    ("postbox_retained_wal_bytes", "gauge"),
    ("postbox_slot_wal_status", "gauge"),
    ("postbox_slices", "gauge"),
    ("postbox_put_off_events_total", "counter"),
    ("postbox_parked_events", "gauge"),
    ("postbox_parked_bytes", "gauge"),
    ("postbox_parked_oldest_seconds", "gauge"),
    ("postbox_parked_refused_total", "counter"),
    ("postbox_parked_behind_total", "counter"),
    ("postbox_parked_scheduled_total", "counter"),
    ("postbox_parked_sent_total", "counter"),
    ("postbox_parked_cancelled_total", "counter"),
    ("postbox_dead_letters_total", "counter"),
    ("postbox_cleaned_rows_total", "counter"),
    ("postbox_pending_events", "gauge"),
    ("postbox_oldest_pending_seconds", "gauge"),
    ("postbox_topic_pending_events", "gauge"),
    ("postbox_seconds_since_progress", "gauge"),
    ("postbox_ready", "gauge"),
    ("postbox_reconnects_total", "counter"),
    ("postbox_build_info", "gauge"),
    #[cfg(target_os = "linux")]
    ("process_resident_memory_bytes", "gauge"),
    #[cfg(target_os = "linux")]
    ("process_open_fds", "gauge"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_prometheus_text_and_tell_what_was_sent() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--format", "raw"]).await;
    let payload = format!("\"{}\"", "x".repeat(998));
    for _ in 0..50 {
        fixture.insert("key", &payload).await;
    }
    let end = u64::from(fixture.wal_end().await);
    #[expect(clippy::cast_precision_loss, reason = "below 2^53 in a test")]
    let end = end as f64;
    wait_until("everything is confirmed", async || {
        relay.metric("postbox_confirmed_lsn") >= end
    })
    .await;
    wait_until("the backlog is known", async || {
        let (_, text) = relay.get("/metrics");
        text.contains("postbox_topic_pending_events")
            && text.contains("\npostbox_pending_events 0\n")
    })
    .await;

    let (status, head, text) = relay.ask("GET /metrics HTTP/1.0\r\n\r\n");
    assert_eq!(status, 200);
    let head = head.to_lowercase();
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    let scrape = Scrape::parse(&text);
    for &(name, kind) in METRICS {
        assert_eq!(
            scrape.types.get(name).map(String::as_str),
            Some(kind),
            "{name} in {text}"
        );
    }
    let ours = scrape
        .types
        .keys()
        .filter(|name| name.starts_with("postbox_"));
    let listed = METRICS
        .iter()
        .filter(|(name, _)| name.starts_with("postbox_"));
    assert_eq!(
        ours.count(),
        listed.count(),
        "a metric that is not listed here: {text}"
    );

    let topic = &fixture.topic;
    assert_eq!(
        scrape.value(&format!(
            "postbox_events_published_total{{topic=\"{topic}\"}}"
        )),
        50.0
    );
    // The payload, the key, and the headers id and event_type.
    let record = 1000 + 3 + (2 + 36) + (10 + 7);
    let bytes = scrape.value(&format!(
        "postbox_bytes_published_total{{topic=\"{topic}\"}}"
    ));
    assert_eq!(bytes, f64::from(50 * record));
    for histogram in [
        "postbox_publish_seconds",
        "postbox_commit_to_delivery_seconds",
    ] {
        assert_eq!(scrape.check_histogram(histogram), 50.0);
    }
    assert_eq!(scrape.value("postbox_in_flight_events"), 0.0);
    assert_eq!(scrape.value("postbox_in_flight_bytes"), 0.0);
    let (received, confirmed) = (
        scrape.value("postbox_received_lsn"),
        scrape.value("postbox_confirmed_lsn"),
    );
    assert!(
        received >= confirmed && confirmed >= end,
        "{received} {confirmed} {end}"
    );
    assert!(received - confirmed < 1e6, "{received} {confirmed}");
    assert_eq!(
        scrape.value("postbox_slot_wal_status{status=\"reserved\"}"),
        1.0
    );
    assert_eq!(scrape.value("postbox_ready"), 1.0);
    assert_eq!(scrape.value("postbox_seconds_since_progress"), 0.0);
    assert_eq!(
        scrape.value("postbox_reconnects_total{reason=\"database_away\"}"),
        0.0
    );
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        scrape.value(&format!("postbox_build_info{{version=\"{version}\"}}")),
        1.0
    );

    fixture.terminate_walsender().await;
    wait_until("the reconnect is counted", async || {
        let scrape = Scrape::parse(&relay.get("/metrics").1);
        scrape.value("postbox_reconnects_total{reason=\"database_away\"}") == 1.0
    })
    .await;
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slots_lag_is_seen_while_nothing_can_be_delivered() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(relay.get("/healthz"), (200, "alive\n".to_owned()));
    assert_eq!(relay.get("/readyz"), (200, "ready\n".to_owned()));

    fixture
        .kafka
        .as_mut()
        .unwrap()
        .command("stop immediate")
        .unwrap();
    // Until a large transaction commits, a keepalive may be confirmed that lies within
    // its WAL. Behind an event that waits, all of it counts.
    fixture.insert("a", "{}").await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               SELECT $1, 'a', 'changed', to_json(array(SELECT md5(random()::text) FROM generate_series(1, 1000))) \
               FROM generate_series(1, 20)";
    fixture
        .client
        .execute(sql, &[&fixture.topic])
        .await
        .unwrap();
    wait_until("the relay says that Kafka is away", async || {
        let (status, body) = relay.get("/readyz");
        status == 503 && body.lines().any(|line| line.starts_with("kafka: "))
    })
    .await;
    wait_until("the lag is seen", async || {
        let scrape = Scrape::parse(&relay.get("/metrics").1);
        scrape.value("postbox_slot_lag_bytes") > 1e5
            && scrape.value("postbox_retained_wal_bytes") > 1e5
    })
    .await;
    let scrape = Scrape::parse(&relay.get("/metrics").1);
    assert_eq!(scrape.value("postbox_ready"), 0.0);
    assert_eq!(relay.get("/healthz").0, 200);
    fixture.kafka.as_mut().unwrap().command("start").unwrap();
    wait_until("the relay is ready again", async || {
        relay.get("/readyz").0 == 200
    })
    .await;

    fixture
        .postgres
        .as_mut()
        .unwrap()
        .command("stop fast")
        .unwrap();
    wait_until("the relay says that Postgres is away", async || {
        let (status, body) = relay.get("/readyz");
        status == 503 && body.lines().any(|line| line.starts_with("postgres: "))
    })
    .await;
    assert_eq!(relay.get("/healthz").0, 200);
    fixture.postgres.as_mut().unwrap().command("start").unwrap();
    wait_until("the relay is ready again", async || {
        relay.get("/readyz").0 == 200
    })
    .await;
    fixture.reconnect().await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 22);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_has_never_reached_its_servers_is_alive_and_not_ready() {
    let fixture = Fixture::new().await;
    for (flag, address, reason) in [
        (
            "--database-url",
            "postgresql://app@127.0.0.1:1/app",
            "postgres: connect to postgresql://app@127.0.0.1:1/app: ",
        ),
        ("--brokers", "127.0.0.1:1", "kafka: "),
    ] {
        let mut relay = Relay::start(&fixture, &[flag, address]);
        relay.wait_for_log("trying again").await;
        assert_eq!(relay.get("/healthz"), (200, "alive\n".to_owned()));
        let (status, body) = relay.get("/readyz");
        assert_eq!(status, 503);
        let said = body
            .lines()
            .any(|line| line.starts_with(reason) && line.len() > reason.len());
        assert!(said, "{body}");
        assert!(!body.contains("hunter2"), "{body}");
        assert_eq!(relay.metric("postbox_ready"), 0.0);
        assert_eq!(relay.stop().await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_paths_and_other_methods_are_refused() {
    let fixture = Fixture::empty().await;
    let mut relay = Relay::start(
        &fixture,
        &["--database-url", "postgresql://app@127.0.0.1:1/app"],
    );
    relay.wait_for_log("serving http").await;
    for path in ["/", "/metric", "/metrics/", "/healthz/x", "/../metrics"] {
        assert_eq!(relay.get(path).0, 404, "{path}");
    }
    for path in ["/metrics", "/healthz", "/readyz"] {
        let (status, ..) = relay.ask(&format!(
            "POST {path} HTTP/1.0\r\nContent-Length: 0\r\n\r\n"
        ));
        assert_eq!(status, 405, "{path}");
        let (status, _, body) = relay.ask(&format!("HEAD {path} HTTP/1.0\r\n\r\n"));
        assert_ne!(status, 405, "{path}");
        assert_eq!(body, "", "{path}");
        assert_ne!(relay.get(&format!("{path}?x=y")).0, 404, "{path}");
    }
}

/// The sockets on which a process listens.
#[cfg(target_os = "linux")]
fn listening(pid: u32) -> usize {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = links.filter_map(|link| std::fs::read_link(link.ok()?.path()).ok());
    let sockets: BTreeSet<String> = links
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let tables =
        ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")));
    let tables: String = tables.into_iter().filter_map(Result::ok).collect();
    let lines = tables
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    // 0A is LISTEN; the tenth column is the inode.
    lines
        .filter(|line| line.get(3) == Some(&"0A"))
        .filter(|line| {
            line.get(9)
                .is_some_and(|inode| sockets.contains(&format!("socket:[{inode}]")))
        })
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_http_none_nothing_is_served() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--http", "none"]).await;
    assert!(!relay.log().contains("serving http"), "{}", relay.log());
    #[cfg(target_os = "linux")]
    {
        assert_eq!(listening(relay.pid()), 0);
        let served = Relay::start(&fixture, &[]);
        wait_until("http is served", async || listening(served.pid()) == 1).await;
    }
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
}

/// Sends bytes and reads what comes back until the other side closes, or for a
/// while.
fn send(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    // It may be closed before we are done.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_requests_and_silent_clients_stop_neither_http_nor_the_relay() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let address = relay.address();
    let silent: Vec<TcpStream> = (0..100)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    let half: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ")
                .unwrap();
            stream
        })
        .collect();
    let garbage: Vec<u8> = (0..100_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let line = "x".repeat(10 << 20);
    let many: String = (0..10_000).map(|n| format!("X-{n}: y\r\n")).collect();
    for request in [
        &garbage[..],
        b"\0\0\0\0\r\n\r\n",
        b"\r\n\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        format!("GET /{line} HTTP/1.1\r\n\r\n").as_bytes(),
        format!("GET /metrics HTTP/1.1\r\nX: {line}\r\n\r\n").as_bytes(),
        format!("GET /metrics HTTP/1.1\r\n{many}\r\n").as_bytes(),
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
    ] {
        let answer = send(&address, request);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{:?}", request.get(..100));
        assert_eq!(relay.get("/readyz"), (200, "ready\n".to_owned()));
    }
    let memory = relay.memory();
    assert!(memory < 200 << 20, "{} MiB", memory >> 20);
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    // More than are served at a time: the others wait until the silent are hung up.
    let flood: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    assert_eq!(relay.get("/healthz").0, 200);
    wait_until("silent clients are hung up", async || {
        silent.iter().chain(&half).chain(&flood).all(is_hung_up)
    })
    .await;
    // Open connections do not hold a stop up.
    let open = TcpStream::connect(&address).unwrap();
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);
    drop(open);
}

/// As many as are served at a time, of each kind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_finish_or_never_read_do_not_shut_others_out() {
    let fixture = Fixture::empty().await;
    let mut relay = Relay::start(
        &fixture,
        &["--database-url", "postgresql://app@127.0.0.1:1/app"],
    );
    relay.wait_for_log("serving http").await;
    let address = relay.address();
    // More answers than the system's buffers take.
    let requests = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2000);
    let deaf: Vec<TcpStream> = (0..256)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.set_nonblocking(true).unwrap();
            let _ = stream.write(requests.as_bytes());
            stream
        })
        .collect();
    assert_eq!(relay.get("/healthz").0, 200);
    let slow: Vec<TcpStream> = (0..256)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    let dripping = std::thread::spawn(move || {
        let still_served = |mut stream: &TcpStream| stream.write_all(b"G").is_ok();
        while slow.iter().filter(|stream| still_served(stream)).count() > 0 {
            std::thread::sleep(Duration::from_millis(500));
        }
    });
    assert_eq!(relay.get("/healthz").0, 200);
    wait_until("those that drip are hung up", async || {
        dripping.is_finished()
    })
    .await;
    drop(deaf);
    assert_eq!(relay.stop().await, 0);
}

fn is_hung_up(mut stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut rest = [0; 1024];
    loop {
        match stream.read(&mut rest) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}
