//! What librdkafka calls back.

use std::sync::Mutex;

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::ProducerContext;
use tracing::{debug, warn};

use super::refusals::refusal;
use crate::error::{Error, Result};
use crate::lock::lock;

/// What became of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The number it was sent with.
    pub sequence: u64,
    /// `None`: the brokers have it, on all in-sync replicas.
    pub error: Option<RDKafkaErrorCode>,
}

/// What it called back with, until that is taken.
#[derive(Default)]
pub(super) struct Context(Mutex<Arrived>);

#[derive(Default)]
struct Arrived {
    reports: Vec<Report>,
    refused: Option<Error>,
    complaint: Option<String>,
}

impl Context {
    fn with<T>(&self, change: impl FnOnce(&mut Arrived) -> T) -> T {
        change(&mut lock(&self.0))
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

    /// What librdkafka last complained of since this was asked.
    pub(super) fn take_complaint(&self) -> Option<String> {
        self.with(|arrived| arrived.complaint.take())
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
        let report = Report {
            sequence: sequence as u64,
            error,
        };
        self.with(|arrived| arrived.reports.push(report));
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
            self.with(|arrived| arrived.refused = Some(refusal));
            return;
        }
        // That all are down says less than why each is.
        if code != Some(RDKafkaErrorCode::AllBrokersDown) {
            self.with(|arrived| arrived.complaint = Some(reason.to_owned()));
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
