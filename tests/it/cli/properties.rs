//! librdkafka's properties, by flag and by variable.

use super::{assert_no_secret, relay};
use crate::support::{Relay, run};

/// A certificate that signed itself, for a hundred years.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----
MIIBejCCASGgAwIBAgIUO0Kig/hr98IRsRxIPYRFfrxH3u4wCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHcG9zdGJveDAgFw0yNjExMjExNDQzNDNaGA8yMTI2MTAyODE0
NDM0M1owEjEQMA4GA1UEAwwHcG9zdGJveDBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABNQH2kOHV7jpZXv5Yl1gsI9+YD/avVU2hniAQ3g9DkWFIF9KtqFqsx04c9+A
LeFOCxS1KxfCN9ueWcxaDntN2s6jUzBRMB0GA1UdDgQWBBQwjnq67Ga8r0K84BFM
4bnuwz6gDTAfBgNVHSMEGDAWgBQwjnq67Ga8r0K84BFM4bnuwz6gDTAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0cAMEQCICU+us07cSeFblLzBZxOoGJqrmn1
yjos/+mcllyN7CBrAiBgERf8E/7Wk4Iz8WfMUQyY22DndD0HHRj5G6ePamfRBA==
-----END CERTIFICATE-----";

/// A value may have several lines: what librdkafka makes of them shows that it was
/// given all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_in_a_property_is_taken_whole() {
    let whole = format!("ssl.ca.pem={CERTIFICATE}");
    let flags = ["-X", &whole, "-X", "security.protocol=SSL"];
    let mut by_flag = Relay::spawn(&mut relay(&flags));
    by_flag.wait_for_log("trying again").await;
    assert_eq!(by_flag.stop().await, 0);

    let block = format!("security.protocol=SSL\n{whole}\nlinger.ms=20\n");
    let mut by_variable = Relay::spawn(relay(&[]).env("POSTBOX_KAFKA_PROPERTY", &block));
    by_variable.wait_for_log("trying again").await;
    assert_eq!(by_variable.stop().await, 0);

    let (cut, _) = CERTIFICATE.split_once("\n-----END").unwrap();
    let cut = format!("ssl.ca.pem={cut}");
    let output = run(&mut relay(&["-X", &cut, "-X", "security.protocol=SSL"]));
    assert!(output.complaint(2).contains("ssl.ca.pem"), "{output:?}");
    let output = run(relay(&[]).env("POSTBOX_KAFKA_PROPERTY", &cut));
    assert!(output.complaint(2).contains("-----END"), "{output:?}");

    // By flag a line is not a property of its own.
    let output = run(&mut relay(&["-X", "compression.type=lz4\nacks=0"]));
    assert!(
        output.complaint(2).contains("-X compression.type: "),
        "{output:?}"
    );
}

/// It may be a password that was written in another way.
#[test]
fn a_property_that_is_no_property_is_not_quoted() {
    for flags in [
        &["-X", "sasl.password:hunter2"][..],
        &["-Xhunter2"],
        &["--kafka-property", "=hunter2"],
    ] {
        assert_no_secret(run(&mut relay(flags)).complaint(2));
    }
    for value in [
        "hunter2",
        "sasl.username=app\nhunter2",
        "=hunter2\n",
        "-----BEGIN PRIVATE KEY-----\nhunter2==\n-----END PRIVATE KEY-----",
    ] {
        let output = run(relay(&[]).env("POSTBOX_KAFKA_PROPERTY", value));
        assert_no_secret(output.complaint(2));
    }
}
