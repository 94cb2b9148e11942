//! From parameters to a [`Database`]: defaults, limits, and what is refused.

use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{ChannelBinding, TargetSessionAttrs};

use crate::error::{Error, ErrorKind, Result};

use super::parameters::Parameters;
use super::tls::Tls;
use super::{Database, pgpass};

/// How long connecting and logging in may take. libpq's default is for ever;
/// this is what its documentation uses in its examples.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A peer that vanished is noticed after idle + retries × interval = 60 s,
/// where the system's default is over two hours.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// The same minute while something is unacknowledged, which keepalives do not
/// cover; the system's default is about a quarter of an hour.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);

/// The folders where servers put their Unix socket unless told otherwise:
/// Debian's and Red Hat's packages, then Postgres's own default.
pub(super) const SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

impl Database {
    /// Reads `url`, a `postgresql://` URL or a `key=value` string, then libpq's
    /// variables through `env`, then the password file. Without `url`, the
    /// variables alone decide.
    ///
    /// # Errors
    ///
    /// `Settings`, naming the parameter or variable, never its value where that
    /// could be a secret: for an unknown or malformed parameter, several hosts, no
    /// user, certificate files that cannot be read.
    pub fn resolve(url: Option<&str>, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let parameters = Parameters::read(url, env)?;
        let port = port(&parameters)?;
        let hostaddr = one(&parameters, "hostaddr", "is not a numeric IP address")?;
        let host = match (one::<String>(&parameters, "host", "")?, hostaddr) {
            (Some(host), _) => host,
            (None, Some(address)) => IpAddr::to_string(&address),
            (None, None) => default_host(port),
        };
        let user = user(&parameters, env)?;
        let name = parameters.get("dbname").unwrap_or(&user).to_owned();
        let password = match parameters.get("password") {
            Some(password) => Some(password.to_owned()),
            None => password_file(&parameters, env)
                .and_then(|file| pgpass::find(Path::new(&file), &host, port, &name, &user)),
        };
        let tls = Tls::resolve(&parameters, env, host.starts_with('/'))?;
        let mut database = Self {
            host,
            hostaddr: hostaddr.filter(|_| !tls.on_unix_socket()),
            port,
            user,
            password,
            name,
            options: options(&parameters)?,
            connect_timeout: connect_timeout(&parameters)?,
            tls,
            config: Config::new(),
        };
        database.fill(&parameters)?;
        // Certificate files are read at each connection, so that they can be
        // renewed; read once here, a mistake in them shows at the start.
        database.tls.connector()?;
        Ok(database)
    }

    fn fill(&mut self, parameters: &Parameters) -> Result<()> {
        let config = &mut self.config;
        config.host(&self.host).port(self.port);
        config.user(&self.user).dbname(&self.name);
        if let Some(address) = self.hostaddr {
            config.hostaddr(address);
        }
        if let Some(password) = &self.password {
            config.password(password);
        }
        if let Some(options) = &self.options {
            config.options(options);
        }
        config.ssl_mode(self.tls.ordinary_mode());
        // For each address of the host: one that does not answer leaves time
        // for the next.
        config.connect_timeout(self.connect_timeout / 2);
        fill_tcp(config, parameters)?;
        match parameters.get("target_session_attrs") {
            None | Some("any") => {}
            Some("read-write") => {
                config.target_session_attrs(TargetSessionAttrs::ReadWrite);
            }
            Some(_) => {
                return Err(parameters.refuse("target_session_attrs", "must be any or read-write"));
            }
        }
        match parameters.get("channel_binding") {
            None | Some("prefer") => {}
            Some("disable") => {
                config.channel_binding(ChannelBinding::Disable);
            }
            Some(_) => {
                let why = "must be prefer or disable: the replication session has none";
                return Err(parameters.refuse("channel_binding", why));
            }
        }
        Ok(())
    }
}

/// A parameter that libpq takes a list for.
fn one<T: FromStr>(parameters: &Parameters, key: &str, complaint: &str) -> Result<Option<T>> {
    if parameters.get(key).is_some_and(|text| text.contains(',')) {
        return Err(parameters.refuse(key, "names several; postbox takes one host for now"));
    }
    parse(parameters, key, complaint)
}

fn port(parameters: &Parameters) -> Result<u16> {
    match one(parameters, "port", "is not a port number")? {
        Some(0) => Err(parameters.refuse("port", "is not a port number")),
        port => Ok(port.unwrap_or(5432)),
    }
}

fn user(parameters: &Parameters, env: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let variable = |name| env(name).filter(|user| !user.is_empty());
    parameters
        .get("user")
        .map(str::to_owned)
        .or_else(|| variable("USER"))
        .or_else(|| variable("LOGNAME"))
        .ok_or_else(|| {
            let message = "no database user; name it in the database URL or in PGUSER";
            Error::new(ErrorKind::Settings, message)
        })
}

fn options(parameters: &Parameters) -> Result<Option<String>> {
    match parameters.get("options") {
        Some(options) if !are_simple(options) => {
            Err(parameters.refuse("options", "may hold \"-c name=value\" settings only"))
        }
        options => Ok(options.map(str::to_owned)),
    }
}

fn connect_timeout(parameters: &Parameters) -> Result<Duration> {
    Ok(
        match parse::<i64>(parameters, "connect_timeout", SECONDS)? {
            Some(seconds) if seconds > 0 => Duration::from_secs(seconds.unsigned_abs()),
            _ => CONNECT_TIMEOUT,
        },
    )
}

const SECONDS: &str = "is not a number of seconds";

fn fill_tcp(config: &mut Config, parameters: &Parameters) -> Result<()> {
    let seconds = |key, default| -> Result<Duration> {
        Ok(parse(parameters, key, SECONDS)?
            .filter(|seconds| *seconds > 0)
            .map_or(default, Duration::from_secs))
    };
    config.keepalives(parse::<u32>(parameters, "keepalives", "must be 0 or 1")? != Some(0));
    config.keepalives_idle(seconds("keepalives_idle", KEEPALIVE_IDLE)?);
    config.keepalives_interval(seconds("keepalives_interval", KEEPALIVE_INTERVAL)?);
    let retries = parse(parameters, "keepalives_count", "is not a number")?;
    config.keepalives_retries(retries.filter(|n| *n > 0).unwrap_or(KEEPALIVE_RETRIES));
    let milliseconds = parse(parameters, "tcp_user_timeout", "is not a number")?;
    config.tcp_user_timeout(
        milliseconds
            .filter(|n| *n > 0)
            .map_or(TCP_USER_TIMEOUT, Duration::from_millis),
    );
    Ok(())
}

fn parse<T: FromStr>(parameters: &Parameters, key: &str, complaint: &str) -> Result<Option<T>> {
    match parameters.get(key).map(|text| text.trim().parse()) {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(_)) => Err(parameters.refuse(key, complaint)),
    }
}

fn default_host(port: u16) -> String {
    SOCKET_FOLDERS
        .into_iter()
        .find(|folder| Path::new(folder).join(format!(".s.PGSQL.{port}")).exists())
        .unwrap_or("localhost")
        .to_owned()
}

fn password_file(parameters: &Parameters, env: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    match parameters.get("passfile") {
        Some(file) => Some(file.to_owned()),
        None => env("HOME")
            .filter(|home| !home.is_empty())
            .map(|home| format!("{home}/.pgpass")),
    }
}

/// Whether `options` holds settings alone: any other switch of the server
/// (`-h`, `-p`, …) has no business in a session.
fn are_simple(options: &str) -> bool {
    // A backslash keeps a space inside a word.
    let options = options.replace(r"\\", "_").replace(r"\ ", "_");
    let mut words = options.split_ascii_whitespace();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c").or_else(|| word.strip_prefix("--")) {
            Some("") => words.next(),
            setting => setting,
        };
        if !setting.is_some_and(|setting| setting.contains('=')) {
            return false;
        }
    }
    !options.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn resolve(url: Option<&str>, variables: &[(&str, &str)]) -> Result<Database> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        Database::resolve(url, &|name| variables.get(name).map(|v| (*v).to_owned()))
    }

    fn refusal(url: &str) -> String {
        let error = resolve(Some(url), &[("USER", "me")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Settings, "{error}");
        error.chain()
    }

    #[test]
    fn a_url_wins_over_variables_and_variables_over_defaults() {
        let variables = [
            ("PGHOST", "elsewhere"),
            ("PGPORT", "6000"),
            ("PGUSER", "them"),
            ("PGDATABASE", "shop"),
            ("PGPASSWORD", "theirs"),
            ("PGCONNECT_TIMEOUT", "3"),
            ("USER", "me"),
        ];
        let database = resolve(Some("postgresql://us:ours@db"), &variables).unwrap();
        assert_eq!(database.display(), "postgresql://us@db:6000/shop");
        assert_eq!(database.password.as_deref(), Some("ours"));
        assert_eq!(database.connect_timeout(), Duration::from_secs(3));

        let database = resolve(None, &variables).unwrap();
        assert_eq!(database.display(), "postgresql://them@elsewhere:6000/shop");
        assert_eq!(database.password.as_deref(), Some("theirs"));

        let database = resolve(None, &[("USER", "me"), ("PGHOST", "")]).unwrap();
        assert_eq!((database.user(), database.name()), ("me", "me"));
        assert_eq!(database.port(), 5432);
        assert_eq!(database.connect_timeout(), CONNECT_TIMEOUT);
    }

    #[test]
    fn a_url_is_decoded() {
        let url = "postgres://a%40b:p%3A%2F%40%3F%C3%A9@db.example:5433/my%20db?connect_timeout=7";
        let database = resolve(Some(url), &[]).unwrap();
        assert_eq!(database.user(), "a@b");
        assert_eq!(database.password.as_deref(), Some("p:/@?é"));
        assert_eq!((database.host(), database.port()), ("db.example", 5433));
        assert_eq!(database.name(), "my db");
        assert_eq!(database.connect_timeout(), Duration::from_secs(7));
        let shown = "postgresql://a%40b@db.example:5433/my%20db";
        assert_eq!(database.display(), shown);
    }

    #[test]
    fn a_key_value_string_is_unquoted() {
        let text = r"host = db port=5433 user='my user' password='it\'s \\ok' dbname=shop\ db";
        let database = resolve(Some(text), &[]).unwrap();
        assert_eq!(database.user(), "my user");
        assert_eq!(database.password.as_deref(), Some(r"it's \ok"));
        assert_eq!(database.name(), "shop db");
        assert_eq!((database.host(), database.port()), ("db", 5433));
    }

    #[test]
    fn a_unix_socket_is_found_in_host_or_parameter_and_has_no_tls() {
        for url in [
            "postgresql://me@%2Frun%2Fpg:5433/shop?sslmode=verify-full",
            "postgresql:///shop?host=/run/pg&port=5433&user=me&sslmode=require",
            "host=/run/pg port=5433 user=me dbname=shop sslrootcert=/none",
        ] {
            let database = resolve(Some(url), &[("PGHOSTADDR", "127.0.0.1")]).unwrap();
            let shown = "postgresql://me@/shop?host=/run/pg&port=5433";
            assert_eq!(database.display(), shown);
            let replication = database.replication("postbox", "postbox");
            assert!(replication.is_unix_socket());
            assert_eq!(replication.tls, pgwire_replication::TlsConfig::disabled());
        }
    }

    #[test]
    fn an_address_replaces_the_lookup_and_not_the_name() {
        let url = "postgresql://me@db.example/?hostaddr=127.0.0.1&sslmode=require";
        let database = resolve(Some(url), &[]).unwrap();
        assert_eq!(database.host(), "db.example");
        let replication = database.replication("postbox", "postbox");
        assert_eq!(replication.host, "127.0.0.1");
        assert_eq!(replication.tls.sni_hostname.as_deref(), Some("db.example"));

        let database = resolve(Some("user=me hostaddr=::1"), &[]).unwrap();
        assert_eq!(database.display(), "postgresql://me@[::1]:5432/me");
        let database = resolve(Some("postgresql://me@[::1]:7/x"), &[]).unwrap();
        assert_eq!((database.host(), database.port()), ("::1", 7));
    }

    #[test]
    fn replication_gets_the_same_settings_and_a_quoted_publication() {
        let url = "postgresql://me:secret@db:5433/shop?options=-c%20datestyle%3DISO";
        let config = resolve(Some(url), &[])
            .unwrap()
            .replication("s", "My \"pub\"");
        assert_eq!((config.host.as_str(), config.port), ("db", 5433));
        assert_eq!(
            (config.user.as_str(), config.password.as_str()),
            ("me", "secret")
        );
        assert_eq!(config.database, "shop");
        assert_eq!(config.publication.names(), ["\"My \"\"pub\"\"\""]);
        assert_eq!(config.options.as_deref(), Some("-c datestyle=ISO"));
    }

    #[test]
    fn several_hosts_are_refused() {
        for url in [
            "postgresql://a,b/x",
            "postgresql://a:1,b:2/x",
            "host=a,b",
            "host=a port=1,2",
            "hostaddr=127.0.0.1,127.0.0.2",
        ] {
            assert!(refusal(url).contains("one host"), "{url}");
        }
    }

    #[test]
    fn unknown_parameters_are_named() {
        for url in ["postgresql://db/?fancy=1", "host=db fancy=1"] {
            assert!(refusal(url).contains("\"fancy\""), "{url}");
        }
        assert!(refusal("postgresql://db/?service=x").contains("\"service\""));
    }

    #[test]
    fn bad_values_are_refused_naming_where_they_come_from() {
        assert!(refusal("host=db port=0").contains("\"port\""));
        assert!(refusal("host=db port=70000").contains("\"port\""));
        assert!(refusal("host=db hostaddr=db").contains("\"hostaddr\""));
        assert!(refusal("host=db connect_timeout=soon").contains("\"connect_timeout\""));
        assert!(refusal("host=db sslmode=allow").contains("prefer"));
        assert!(refusal("host=db sslmode=maybe").contains("verify-full"));
        assert!(refusal("host=db sslnegotiation=direct").contains("\"sslnegotiation\""));
        assert!(refusal("host=db channel_binding=require").contains("replication"));
        assert!(refusal("host=db options='-h x'").contains("\"options\""));
        assert!(refusal("host=db gssencmode=require").contains("\"gssencmode\""));
        let error = resolve(None, &[("PGPORT", "x"), ("PGUSER", "me")]).unwrap_err();
        assert!(error.to_string().contains("PGPORT"), "{error}");
        let error = resolve(Some("host=db"), &[]).unwrap_err();
        assert!(error.to_string().contains("PGUSER"), "{error}");
    }

    #[test]
    fn options_hold_settings_only() {
        assert!(are_simple("-c a=b --c=d -ce=f"));
        assert!(are_simple(r"-c search_path=a,\ b -c x=y"));
        assert!(!are_simple("-c search_path=a, b"));
        assert!(!are_simple("-c"));
        assert!(!are_simple("-c work_mem"));
        assert!(!are_simple("-p 1"));
    }

    #[test]
    fn no_password_is_ever_shown() {
        for url in [
            "postgresql://u:hunter2@db/x",
            "user=u password=hunter2 host=db",
            "postgresql://u@db/x?password=hunter2",
        ] {
            let database = resolve(Some(url), &[]).unwrap();
            assert_eq!(database.password.as_deref(), Some("hunter2"));
            let shown = format!("{database:?} {database:#?} {}", database.display());
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }

    #[test]
    fn a_password_that_breaks_the_url_is_not_echoed() {
        for url in [
            "postgresql://u:hunter2@more@db/x",
            "postgresql://u:hunter2/more@db/x",
            "postgresql://u:12/hunter2@db/x",
            "postgresql://u:12/a?hunter2=more@db/x",
            "postgresql://u:hunter2%zz@db/x",
            "postgresql://u:hunter2,x/db",
            "postgresql://u:hunter2",
            "postgresql://db/x?password=a&hunter2=b",
            "postgresql://db/x?hunter2",
            "mysql://u:hunter2@db/x",
            "password=a hunter2=b host=db",
            "password=a hunter2",
            "password='hunter2",
            "hunter2",
        ] {
            let message = refusal(url);
            assert!(!message.contains("hunter2"), "{url}: {message}");
        }
    }
}
