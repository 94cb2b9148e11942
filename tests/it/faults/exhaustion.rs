//! Files, memory and disk that run out.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::poison::create_topic;
use crate::support::{Fixture, Relay, SERVER_WINDOW, SMALL_WINDOW, WINDOW, wait_until};

/// Runs a program; whether it did what it was told.
fn done(command: &[&str]) -> bool {
    let output = Command::new(command[0]).args(&command[1..]).output();
    output.is_ok_and(|output| output.status.success())
}

/// Says so, past the capture of a test's output.
fn skip(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// Sets a soft limit of a running process, as `prlimit` of util-linux does.
fn limit(relay: &Relay, limit: &str) -> bool {
    done(&["prlimit", "--pid", &relay.pid().to_string(), limit])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_cannot_open_a_file_waits_until_it_can() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
    let writers = fixture.writers(fixture.steady_load());
    fixture.outgrow(&relay, WINDOW).await;
    if !limit(&relay, "--nofile=5:") {
        return skip("no prlimit to take a process' files away");
    }
    fixture.terminate_walsender().await;
    relay.wait_for_log("Too many open files").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(limit(&relay, "--nofile=1024:"));
    writers.stop().await.unwrap();
    fixture.assert_repeats_at_most(WINDOW, relay).await;
}

/// Each of these limits is met at another point of the start. Without it, the relay
/// that met it goes on, if it has not ended, and else the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_starts_with_too_few_files_says_so_and_loses_nothing() {
    const SAID: &str = "Too many open files";
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.steady_load());
    let (mut ended, mut tried, mut said) = (0, 0, 0);
    for files in [4, 6, 8, 10, 12, 15, 16, 18, 20, 24, 32] {
        let mut relay = Relay::limited(&fixture, &format!("ulimit -S -n {files}"), &SMALL_WINDOW);
        wait_until("it has ended, works, or tries again", || {
            let log = relay.log();
            let is_settled =
                !relay.is_running() || log.contains(" streaming ") || log.contains("trying again");
            async move { is_settled }
        })
        .await;
        if !relay.is_running() {
            assert_eq!(relay.exit_code().await, 1, "{files}: {}", relay.log());
            assert!(relay.log().contains(SAID), "{files}: {}", relay.log());
            ended += 1;
            continue;
        }
        if !limit(&relay, "--nofile=1024:") {
            return skip("no prlimit to give a process more files");
        }
        relay.wait_for_log(" streaming ").await;
        fixture.wait_for_confirmation().await;
        tried += usize::from(relay.log().contains("trying again"));
        said += usize::from(relay.log().contains(SAID));
        relay.drain().await;
    }
    assert!(
        ended > 0 && tried > 0 && said > 0,
        "{ended} ended, {said} of {tried} said why"
    );
    let relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
    fixture.outgrow(&relay, WINDOW).await;
    writers.stop().await.unwrap();
    fixture.assert_repeats_at_most(0, relay).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_without_memory_ends_and_the_next_loses_nothing() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "100000000").await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid()));
    let size = status.ok().and_then(|status| {
        let line = status
            .lines()
            .find(|line| line.starts_with("VmSize:"))?
            .to_owned();
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    let room = |kibibytes: u64| limit(&relay, &format!("--as={}:", (kibibytes << 10) + (4 << 20)));
    if !size.is_some_and(room) {
        return skip("no prlimit and /proc to take a process' memory away");
    }
    // More than the allocator may still have in its arenas, of 64 MiB each.
    let large = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
                 SELECT $1, 'a', 'changed', to_json(repeat('0123456789', 9000000))";
    fixture
        .client
        .execute(large, &[&fixture.topic])
        .await
        .unwrap();
    fixture.enter_in_ledger().await;
    assert_eq!(relay.exit_code().await, -1, "{}", relay.log());
    assert!(
        relay.log().contains("memory allocation of"),
        "{}",
        relay.log()
    );
    let relay = Relay::streaming(&fixture, &[]).await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// A file system in memory in the place of a folder, with what is in the folder.
struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Only root may. The server must be stopped.
    fn mount(folder: &str, megabytes: u32) -> Option<Self> {
        let aside = format!("{folder}.aside");
        std::fs::rename(folder, &aside).unwrap();
        std::fs::create_dir(folder).unwrap();
        let size = format!("size={megabytes}m");
        if !done(&["mount", "-t", "tmpfs", "-o", &size, "tmpfs", folder]) {
            return None;
        }
        let disk = Self {
            folder: folder.into(),
        };
        assert!(done(&["cp", "-a", &format!("{aside}/."), folder]));
        Some(disk)
    }

    fn ballast(&self) -> PathBuf {
        self.folder.join("ballast")
    }

    /// Writes until nothing more can be written.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.ballast()).unwrap();
        while file.write_all(&[0; 1 << 16]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    /// At once, as the server still runs.
    fn drop(&mut self) {
        done(&["umount", "-l", &self.folder.to_string_lossy()]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_postgres_is_waited_for() {
    let mut fixture = Fixture::with_servers(&["max_wal_size=64MB", "min_wal_size=32MB"], &[]).await;
    fixture.postgres("stop fast");
    let folder = fixture
        .postgres
        .as_ref()
        .unwrap()
        .fact("data_dir")
        .to_owned();
    let Some(disk) = SmallDisk::mount(&folder, 300) else {
        return skip("only root can mount a small disk");
    };
    fixture.postgres("start");
    fixture.reconnect().await;
    let relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
    let writers = fixture.writers(fixture.steady_load());
    fixture.outgrow(&relay, SERVER_WINDOW).await;
    let published = || relay.published(&fixture.topic);
    let before = published();
    disk.fill();
    // Tables and temporary files it can do without for a while, but not its WAL.
    let fill = "SELECT pg_logical_emit_message(false, 'fill', repeat('x', 1000000))";
    let full = loop {
        if let Err(full) = fixture.client.batch_execute(fill).await {
            break full;
        }
    };
    // A position is stored no sooner than the disk lets it.
    let bound = SERVER_WINDOW + published() - before;
    wait_until("readiness is red and says why", || async {
        let (status, body) = relay.get("/readyz");
        status == 503 && body.contains("postgres: connect to ")
    })
    .await;
    wait_until(&format!("the log says so: {full:?}"), || async {
        let log = relay.log();
        let mut lines = log.lines().filter(|line| line.contains(" WARN "));
        lines.any(|line| line.contains("trying again in ") && line.contains("connect to postgres"))
    })
    .await;
    disk.make_room();
    // Without room for its WAL, Postgres ends, and may not come back by itself.
    let _ = fixture.postgres.as_mut().unwrap().command("start");
    fixture.reconnect().await;
    wait_until("readiness is green again", || async {
        relay.get("/readyz").0 == 200
    })
    .await;
    fixture.outgrow(&relay, bound).await;
    writers.stop().await.unwrap();
    fixture.assert_repeats_at_most(bound, relay).await;
    drop(disk);
}
