//! The packages themselves, from the Python index, at work on the tables that they make:
//! in scripts beside this file, which `dev/python` runs.

mod omni_box;
mod spakky;

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::{Fixture, Relay, run};

/// A package, and the script that uses it.
struct Package {
    name: &'static str,
    script: &'static str,
}

impl Package {
    /// Whether it is there, or was to be had. Where it is not, the tests say so, also when
    /// they pass.
    fn is_there(&self) -> bool {
        use std::io::Write;

        let home = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let fetched = Command::new(home.join("dev/fetch")).arg(self.name).status();
        let is_there = fetched.is_ok_and(|status| status.success());
        if !is_there {
            let _ = writeln!(
                std::io::stderr(),
                "not tested: there is no {} here",
                self.name
            );
        }
        is_there
    }

    /// A run of its script.
    fn command(&self, fixture: &Fixture, arguments: &[&str]) -> Command {
        let home = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(home.join("dev/python"));
        command
            .arg(self.name)
            .arg(home.join("tests/it/claim/packages").join(self.script))
            .args(arguments)
            .env("DATABASE_URL", &fixture.database_url)
            .env("BROKERS", &fixture.brokers);
        command
    }

    /// What a run of its script answers.
    fn ask(&self, fixture: &Fixture, arguments: &[&str]) -> Value {
        let output = run(&mut self.command(fixture, arguments));
        assert_eq!(output.code, 0, "{arguments:?}: {}", output.stderr);
        serde_json::from_str(&output.stdout).unwrap()
    }

    /// A run of its script that goes on until it is ended, and says this once it is at
    /// work.
    async fn start(&self, fixture: &Fixture, arguments: &[&str], says: &str) -> Relay {
        let mut running = Relay::spawn(&mut self.command(fixture, arguments));
        running.wait_for_log(says).await;
        running
    }
}
