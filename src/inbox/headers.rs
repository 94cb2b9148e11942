//! The headers of a record, as bytes.
//!
//! The bindings of librdkafka have them, too, but panic at a name that is no UTF-8, which
//! the protocol allows: anybody who may produce could end us.

use std::ffi::CStr;
use std::ptr;

use rdkafka::bindings;
use rdkafka::message::BorrowedMessage;

/// All of them, in their order, with names that may come twice.
#[allow(unsafe_code)]
pub(super) fn headers<'a>(record: &'a BorrowedMessage<'_>) -> Vec<(&'a [u8], Option<&'a [u8]>)> {
    let mut headers = Vec::new();
    let mut list = ptr::null_mut();
    // SAFETY: the record is there for as long as it is borrowed, and its headers with it. Names
    // end with a NUL, and values, if there are any, have the size that is told.
    unsafe {
        let failed = bindings::rd_kafka_message_headers(record.ptr(), &raw mut list);
        if failed != bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return headers;
        }
        loop {
            let (mut name, mut value, mut size) = (ptr::null(), ptr::null(), 0);
            let failed = bindings::rd_kafka_header_get_all(
                list,
                headers.len(),
                &raw mut name,
                &raw mut value,
                &raw mut size,
            );
            if failed != bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
                return headers;
            }
            let name = CStr::from_ptr(name).to_bytes();
            let value =
                (!value.is_null()).then(|| std::slice::from_raw_parts(value.cast::<u8>(), size));
            headers.push((name, value));
        }
    }
}
