//! librdkafka's properties, by flag and by variable.

use super::{assert_no_secret, relay};
use crate::support::run;

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
