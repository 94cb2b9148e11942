//! Kafka's access control lists, which librdkafka's binding cannot change.
//!
//! A request is its length, a header and its fields; the first versions that
//! brokers still take have fields of fixed form.
//! <https://kafka.apache.org/protocol.html#The_Messages_CreateAcls>

use std::io::{Read, Write};
use std::net::TcpStream;

/// Whether a user may do something to a topic.
#[derive(Clone, Copy)]
pub(super) struct Acl<'a> {
    pub(super) user: &'a str,
    pub(super) topic: &'a str,
    pub(super) operation: Operation,
    pub(super) permission: Permission,
}

#[derive(Clone, Copy)]
pub(super) enum Operation {
    Write = 4,
    Describe = 8,
}

#[derive(Clone, Copy)]
pub(super) enum Permission {
    Deny = 2,
    Allow = 3,
}

impl Acl<'_> {
    /// Adds it, in the name of whoever comes over this listener.
    pub(super) fn create(self, broker: &str) {
        self.send(broker, 30);
    }

    /// Removes it.
    pub(super) fn delete(self, broker: &str) {
        self.send(broker, 31);
    }

    /// What to create and what to look for to delete look the same, and so does
    /// the beginning of both answers.
    fn send(self, broker: &str, api_key: i16) {
        const TOPIC: u8 = 2;
        const LITERAL: u8 = 3;
        let mut request = Vec::new();
        let (version, correlation, no_client_id, one) = (1i16, 7i32, -1i16, 1i32);
        request.extend(api_key.to_be_bytes());
        request.extend(version.to_be_bytes());
        request.extend(correlation.to_be_bytes());
        request.extend(no_client_id.to_be_bytes());
        request.extend(one.to_be_bytes());
        request.push(TOPIC);
        push_string(&mut request, self.topic);
        request.push(LITERAL);
        push_string(&mut request, &format!("User:{}", self.user));
        push_string(&mut request, "*");
        request.extend([self.operation as u8, self.permission as u8]);

        let mut stream = TcpStream::connect(broker).unwrap();
        let length = i32::try_from(request.len()).unwrap();
        stream.write_all(&length.to_be_bytes()).unwrap();
        stream.write_all(&request).unwrap();
        // Length, correlation, throttle time, count, and the first error's code.
        let mut answer = [0; 4 + 4 + 4 + 4 + 2];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0, 0, 0, 1, 0, 0], "{answer:?}");
    }
}

fn push_string(request: &mut Vec<u8>, text: &str) {
    request.extend(i16::try_from(text.len()).unwrap().to_be_bytes());
    request.extend(text.as_bytes());
}
