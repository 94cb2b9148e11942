//! Delivery reports, from the thread that polls to the relay's.

use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::ProducerContext;
use tokio::sync::Notify;
use tracing::{debug, warn};

use super::refusals::refusal;
use crate::error::{Error, Result};

/// What became of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The number it was sent with.
    pub sequence: u64,
    /// `None`: the brokers have it, on all in-sync replicas.
    pub error: Option<RDKafkaErrorCode>,
}

/// Reports that wait to be taken.
#[derive(Default)]
pub(super) struct Reports {
    arrived: Mutex<Arrived>,
    notify: Notify,
}

#[derive(Default)]
struct Arrived {
    reports: Vec<Report>,
    refused: Option<Error>,
    complaint: Option<String>,
}

impl Reports {
    fn with<T>(&self, change: impl FnOnce(&mut Arrived) -> T) -> T {
        // A panic while the lock is held cannot leave it half changed.
        change(&mut self.arrived.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, report: Report) {
        let first = self.with(|arrived| {
            arrived.reports.push(report);
            arrived.reports.len() == 1
        });
        // One wake-up for a batch: the taker takes all.
        if first {
            self.notify.notify_one();
        }
    }

    fn refuse(&self, error: Error) {
        self.with(|arrived| arrived.refused = Some(error));
        self.notify.notify_one();
    }

    fn complain(&self, reason: &str) {
        self.with(|arrived| arrived.complaint = Some(reason.to_owned()));
    }

    pub(super) async fn arrived(&self) {
        self.notify.notified().await;
    }

    pub(super) fn take(&self, into: &mut Vec<Report>) -> Result<()> {
        let refused = self.with(|arrived| {
            if into.is_empty() {
                std::mem::swap(&mut arrived.reports, into);
            } else {
                into.append(&mut arrived.reports);
            }
            arrived.refused.take()
        });
        refused.map_or(Ok(()), Err)
    }
}

/// Receives what librdkafka calls back.
pub(super) struct Context {
    reports: Arc<Reports>,
}

impl Context {
    pub(super) fn new(reports: Arc<Reports>) -> Self {
        Self { reports }
    }

    /// What librdkafka last complained of since this was asked.
    pub(super) fn take_complaint(&self) -> Option<String> {
        self.reports.with(|arrived| arrived.complaint.take())
    }
}

impl ProducerContext for Context {
    /// The sequence number.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, sequence: usize) {
        failpoint!("reported");
        let error = match result {
            Ok(_) => None,
            Err((error, _)) => Some(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)),
        };
        self.reports.push(Report {
            sequence: sequence as u64,
            error,
        });
    }
}

impl ClientContext for Context {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters arrives as an error too; these lines say the same once
        // for each broker and attempt.
        debug!(target: "librdkafka", facility, "{message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let code = error.rdkafka_error_code();
        if let Some(refusal) = code.and_then(|code| refusal(code, reason)) {
            self.reports.refuse(refusal);
            return;
        }
        // That all are down says less than why each is.
        if code != Some(RDKafkaErrorCode::AllBrokersDown) {
            self.reports.complain(reason);
        }
        match code {
            // Called twice for each event, and again for each attempt. What follows
            // from it is logged once, where it is handled.
            Some(
                RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::GaplessGuarantee
                | RDKafkaErrorCode::Fatal,
            ) => debug!(%error, reason, "librdkafka reports an error"),
            _ => warn!(%error, reason, "librdkafka reports an error"),
        }
    }
}
