//! Where the servers are.

use std::sync::OnceLock;

use postbox::servers::Server;

/// A Postgres and a Kafka.
#[derive(Debug, Clone)]
pub(super) struct Addresses {
    /// Of the database that new ones are made from.
    pub(super) database_url: String,
    pub(super) brokers: String,
}

/// The servers that all tests share. They end with the process.
pub(super) fn shared() -> &'static Addresses {
    static SERVERS: OnceLock<(Addresses, Option<Server>, Option<Server>)> = OnceLock::new();
    let (addresses, ..) = SERVERS.get_or_init(|| {
        let postgres = match std::env::var("DATABASE_URL") {
            Ok(_) => None,
            Err(_) => Some(Server::postgres(&[]).unwrap()),
        };
        let kafka = match std::env::var("KAFKA_BROKERS") {
            Ok(_) => None,
            Err(_) => Some(Server::kafka(&[]).unwrap()),
        };
        let addresses = Addresses {
            database_url: match &postgres {
                Some(server) => server.socket_url(),
                None => std::env::var("DATABASE_URL").unwrap(),
            },
            brokers: match &kafka {
                Some(server) => server.fact("brokers").to_owned(),
                None => std::env::var("KAFKA_BROKERS").unwrap(),
            },
        };
        (addresses, postgres, kafka)
    });
    addresses
}

/// The brokers of the Kafka that all tests share.
pub(crate) fn shared_brokers() -> String {
    shared().brokers.clone()
}

/// The same server, another database.
pub(super) fn with_database(url: &str, name: &str) -> String {
    let (address, parameters) = url.split_once('?').unwrap_or((url, ""));
    let scheme_end = address.find("://").map_or(0, |at| at + 3);
    let path = address[scheme_end..].find('/').map(|at| at + scheme_end);
    let server = path.map_or(address, |path| &address[..path]);
    format!("{server}/{name}?{parameters}")
}
