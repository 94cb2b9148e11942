//! Copies of dead letters, for those who look into a topic and not into a table.
//!
//! A letter is the record as it would have gone out, with why it did not behind its own
//! headers; of a row that is no event, it is the row. It is owed until a broker has it, and
//! what no broker takes is kept in the table alone.

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use super::courier::Sent;
use super::queue::Queue;
use crate::envelope::{Header, Record};
use crate::error::Result;
use crate::parked::Taken;
use crate::parked::row::StoredRow;

/// How soon to try again, as others wait meanwhile; each further time after twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What is known of what is owed.
pub(super) struct Letters {
    may_be_owed: bool,
    /// Not before this.
    at: Option<Instant>,
    pause: Duration,
}

impl Letters {
    /// Some may be owed since before.
    pub(super) fn new() -> Self {
        Self {
            may_be_owed: true,
            at: None,
            pause: PAUSE_MIN,
        }
    }

    /// Some may be owed.
    pub(super) fn look(&mut self) {
        self.may_be_owed = true;
    }

    fn may_write(&mut self) -> bool {
        self.at.is_none_or(|at| at <= Instant::now()) && std::mem::take(&mut self.may_be_owed)
    }
}

impl Queue {
    /// Sends what is owed, unless its topic was refused a moment ago.
    pub(super) async fn write_letters(&mut self) -> Result<()> {
        let Some(topic) = self.sender.settings.dead_letter_topic.clone() else {
            return Ok(());
        };
        if !self.letters.may_write() {
            return Ok(());
        }
        let letters = self.sender.store.letters().await?;
        if letters.is_empty() {
            return Ok(());
        }
        // There may be more.
        self.letters.look();
        let mut waits_for = self.sender.courier.why_unknown(&topic).await?;
        let mut sent = Vec::new();
        for taken in letters {
            if waits_for.is_some() || *self.sender.rest.borrow() {
                break;
            }
            match self.write_letter(&taken, &topic).await? {
                Sent::Delivered | Sent::Early(_) => {}
                Sent::Away(why) | Sent::TopicRefused(_, why) => {
                    waits_for = Some(why);
                    continue;
                }
                Sent::Refused(why) => error!(
                    "the copy of dead letter {} cannot go out either, and is kept in the table alone: {why}",
                    taken.id
                ),
            }
            sent.push(taken.id);
        }
        self.sender.store.sent_letters(&sent).await?;
        let letters = &mut self.letters;
        match &waits_for {
            None => *letters = Letters::new(),
            Some(why) => {
                warn!("copies of dead letters wait for their topic: {why}");
                letters.at = Some(Instant::now() + letters.pause);
                letters.pause = (letters.pause * 2).min(PAUSE_MAX);
            }
        }
        Ok(())
    }

    async fn write_letter(&mut self, taken: &Taken, topic: &str) -> Result<Sent> {
        let (value, own) = match self.sender.courier.record(taken) {
            Ok(record) => (record.value.map(<[u8]>::to_vec), owned(&record.headers)),
            Err(_) => (Some(row_as_json(taken)), Vec::new()),
        };
        let header = |name: &'static str, value: Option<&str>| Header {
            name: Cow::from(name),
            value: value.map(|value| Cow::from(value.to_owned())),
        };
        let why = [
            header("postbox_error", taken.error.as_deref()),
            header("postbox_topic", taken.topic.as_deref()),
            header("postbox_event", Some(&taken.id)),
            header("postbox_attempts", Some(&taken.attempts.to_string())),
            header("postbox_relay", Some(self.sender.store.relay())),
        ];
        let record = Record {
            topic,
            key: taken.key.as_deref(),
            value: value.as_deref(),
            headers: own.into_iter().chain(why).collect(),
            timestamp_millis: None,
        };
        self.sender.courier.send_record(&record).await
    }
}

fn owned(headers: &[Header<'_>]) -> Vec<Header<'static>> {
    let owned = |text: &Cow<'_, str>| Cow::from(text.to_string());
    let headers = headers.iter();
    headers
        .map(|header| Header {
            name: owned(&header.name),
            value: header.value.as_ref().map(owned),
        })
        .collect()
}

/// A row as it was read: an object of its columns, as text.
fn row_as_json(taken: &Taken) -> Vec<u8> {
    let row = StoredRow::of(taken);
    let columns = row.columns().unwrap_or_default().into_iter();
    let object: serde_json::Map<_, _> = columns
        .map(|column| {
            let text = column.value.map(String::from_utf8_lossy);
            (column.name.to_owned(), text.into())
        })
        .collect();
    serde_json::Value::from(object).to_string().into_bytes()
}
