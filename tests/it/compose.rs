//! docker-compose.yml, Dockerfile, the throw-away servers and the code agree.

use std::collections::BTreeSet;
use std::path::Path;

use crate::support::{postbox, run};

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(path).unwrap()
}

/// What stands between `before` and `after`, at their first occurrence.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let (_, rest) = text
        .split_once(before)
        .unwrap_or_else(|| panic!("no {before}"));
    rest.split_once(after)
        .unwrap_or_else(|| panic!("no {after} after {before}"))
        .0
        .trim()
}

fn help(command: &str) -> String {
    run(&mut postbox(&[command, "--help"])).results().to_owned()
}

/// The block of a service in docker-compose.yml.
fn service(compose: &str, name: &str) -> String {
    let header = format!("  {name}:");
    let lines = compose.lines().skip_while(|line| *line != header).skip(1);
    let block: Vec<&str> = lines
        .take_while(|line| line.is_empty() || line.starts_with("    "))
        .collect();
    assert!(!block.is_empty(), "no service {name}");
    block.join("\n")
}

/// The items of a list `key:` in a block.
fn items<'a>(block: &'a str, key: &str) -> Vec<&'a str> {
    let header = format!("    {key}:");
    let lines = block.lines().skip_while(|line| *line != header).skip(1);
    lines
        .map_while(|line| line.strip_prefix("      - "))
        .collect()
}

/// `2 numbers` at the start of a version.
fn major_minor(version: &str) -> (u32, u32) {
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap_or(0))
}

#[test]
fn each_variable_in_the_compose_file_is_one_of_a_command() {
    let compose = read("docker-compose.yml");
    let variables: BTreeSet<&str> = compose
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("POSTBOX_"))
        .collect();
    assert!(variables.contains("POSTBOX_BROKERS"));
    let known = help("relay") + &help("setup");
    for variable in variables {
        let shown = ["=]", "]"]
            .iter()
            .any(|end| known.contains(&format!("[env: {variable}{end}")));
        assert!(shown, "no flag has the variable {variable}");
    }
}

#[test]
fn each_service_of_ours_runs_a_command_that_exists() {
    let compose = read("docker-compose.yml");
    let commands = run(&mut postbox(&["--help"])).stdout;
    let services: Vec<&str> = compose
        .lines()
        .skip_while(|line| *line != "services:")
        .filter(|line| line.starts_with("  ") && !line.starts_with("   ") && line.ends_with(':'))
        .map(|line| line.trim().trim_end_matches(':'))
        .filter(|name| service_is_ours(&compose, name))
        .collect();
    assert_eq!(services, ["setup", "relay"]);
    for name in services {
        let block = service(&compose, name);
        let command = between(&block, "command: [\"", "\"]");
        assert!(
            commands.contains(&format!("\n  {command} ")),
            "no command {command}"
        );
        // With its flags, if it has any.
        for flag in command.split("\", \"").skip(1) {
            assert!(help(name).contains(flag), "{name} has no flag {flag}");
        }
    }
}

fn service_is_ours(compose: &str, name: &str) -> bool {
    let header = format!("\n  {name}:\n    <<: *postbox\n");
    compose.contains(&header)
}

#[test]
fn kafka_is_the_one_of_the_tests() {
    let compose = read("docker-compose.yml");
    let image = between(&compose, "image: apache/kafka:", "\n");
    let pom = read("dev/pom.xml");
    assert_eq!(image, between(&pom, "<kafka.version>", "</kafka.version>"));
}

#[test]
fn postgres_is_the_major_version_of_the_tests_and_replicates() {
    let compose = read("docker-compose.yml");
    let postgres = service(&compose, "postgres");
    let (major, _) = major_minor(between(&postgres, "image: postgres:", "\n"));
    let default = read("dev/postgres");
    let default = between(&default, "major=${POSTBOX_POSTGRES_MAJOR:-", "}");
    assert_eq!(major.to_string(), default);
    let pom = read("dev/pom.xml");
    assert!(pom.contains(&format!("<postgres.{major}>")));
    assert!(
        postgres.contains("\"-c\", \"wal_level=logical\""),
        "{postgres}"
    );
}

#[test]
fn the_port_of_http_is_the_default_one_everywhere() {
    let relay_help = help("relay");
    let http = &relay_help[relay_help.find("--http <ADDRESS>").unwrap()..];
    let port = between(http, "[default: 127.0.0.1:", "]");
    let compose = read("docker-compose.yml");
    let relay = service(&compose, "relay");
    assert_eq!(between(&compose, "POSTBOX_HTTP: 0.0.0.0:", "\n"), port);
    assert_eq!(items(&relay, "ports"), [format!("127.0.0.1:{port}:{port}")]);
    assert!(
        relay.contains(&format!("/dev/tcp/127.0.0.1/{port};")),
        "{relay}"
    );
    assert_eq!(between(&read("Dockerfile"), "\nEXPOSE ", "\n"), port);
}

#[test]
fn published_ports_are_open_to_this_machine_only() {
    let compose = read("docker-compose.yml");
    let mut published = 0;
    for name in ["postgres", "kafka", "setup", "relay"] {
        let block = service(&compose, name);
        let ports = items(&block, "ports");
        assert_eq!(ports.is_empty(), !block.contains("ports:"), "{name}");
        for port in ports {
            assert!(port.starts_with("127.0.0.1:"), "{name}: {port}");
            published += 1;
        }
        assert!(!block.contains("network_mode"), "{name}");
    }
    assert_eq!(published, compose.matches("\n      - 127.0.0.1:").count());
    assert_eq!(compose.matches("ports:\n").count(), 3);
}

#[test]
fn the_relay_finds_the_brokers_and_has_time_to_drain() {
    let compose = read("docker-compose.yml");
    let brokers = between(&compose, "POSTBOX_BROKERS: ", "\n");
    let advertised = between(&compose, "KAFKA_ADVERTISED_LISTENERS: ", "\n");
    assert!(
        advertised.contains(&format!("INTERNAL://{brokers},")),
        "{advertised}"
    );
    let relay_help = help("relay");
    let shutdown = &relay_help[relay_help.find("--shutdown-timeout").unwrap()..];
    let shutdown: u32 = between(shutdown, "[default: ", "s]").parse().unwrap();
    let grace: u32 = between(&compose, "stop_grace_period: ", "s\n")
        .parse()
        .unwrap();
    assert!(grace > shutdown, "{grace} s to stop, {shutdown} s to drain");
}

#[test]
fn the_image_is_built_with_a_rust_that_can_and_features_that_exist() {
    let dockerfile = read("Dockerfile");
    let manifest = read("Cargo.toml");
    let image = between(&dockerfile, "FROM rust:", " AS build");
    let needed = between(&manifest, "rust-version = \"", "\"");
    assert!(
        major_minor(image) >= major_minor(needed),
        "rust {image} for {needed}"
    );

    let features = between(&manifest, "[features]\n", "\n[dependencies]");
    let chosen = between(&dockerfile, "--features ", " ");
    for feature in chosen.split(',') {
        let exists = features
            .lines()
            .any(|line| line.starts_with(&format!("{feature} = [")));
        assert!(exists, "no feature {feature}");
    }
    // A program that is built on one Debian and run on another may miss a library.
    let (_, debian) = image.split_once('-').unwrap();
    assert_eq!(
        between(&dockerfile, "\nFROM debian:", "\n"),
        format!("{debian}-slim")
    );
}

#[test]
fn the_image_does_not_run_as_root() {
    let dockerfile = read("Dockerfile");
    let last_stage = dockerfile.rsplit("\nFROM ").next().unwrap();
    let users: Vec<&str> = last_stage
        .lines()
        .filter_map(|line| line.strip_prefix("USER "))
        .collect();
    let user: u32 = users
        .last()
        .unwrap()
        .parse()
        .expect("a number, which Kubernetes can judge");
    assert!(user >= 1000, "{user}");
    assert!(last_stage.contains(&format!("useradd --uid {user} ")));
    assert!(last_stage.trim_end().ends_with("ENTRYPOINT [\"postbox\"]"));
}
