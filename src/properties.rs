//! What holds for any bytes that come from a slot. `fuzz/` looks for bytes for
//! which it does not; the test below tries those in `fuzz/corpus`.

// A property fails by panicking.
#![allow(clippy::unwrap_used)]

mod encode;
mod event;
mod stream;

pub use event::event;
pub use stream::stream;

use crate::pgoutput::{self, Message};

/// A message that was decoded is what it says: encoded again, it decodes to itself.
pub fn message(bytes: &[u8]) {
    let Ok(message) = pgoutput::decode(bytes) else {
        return;
    };
    if let Some(again) = encode::encode(&message) {
        assert_eq!(pgoutput::decode(&again).as_ref(), Ok(&message));
        // Nothing of a row is lost on the way.
        assert!(!matches!(message, Message::Insert(_)) || again == bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    #[test]
    fn hold_for_the_corpus() {
        for (target, property) in [
            ("message", super::message as fn(&[u8])),
            ("stream", super::stream),
            ("event", super::event),
        ] {
            let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                .join("fuzz/corpus")
                .join(target);
            let mut tried = 0;
            for file in folder.read_dir().unwrap() {
                let path = file.unwrap().path();
                // The test's output, should it fail.
                println!("{}", path.display());
                property(&std::fs::read(path).unwrap());
                tried += 1;
            }
            assert!(tried > 0, "no corpus in {}", folder.display());
        }
    }
}
