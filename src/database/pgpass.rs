//! The password file: `host:port:database:user:password`, one per line.
//!
//! `*` stands for anything, `\` escapes `:` and itself, `#` starts a comment. The
//! first line that fits wins. <https://www.postgresql.org/docs/current/libpq-pgpass.html>

use std::fs;
use std::path::Path;

use tracing::warn;

use super::settings::SOCKET_FOLDERS;

/// The password in `file` for this login. A file that others can read is not
/// used, nor one that is missing.
pub(super) fn find(file: &Path, host: &str, port: u16, name: &str, user: &str) -> Option<String> {
    if !fs::metadata(file).ok().as_ref().is_some_and(is_private) {
        if file.exists() {
            let file = file.display();
            warn!(%file, "password file ignored: it must be a plain file with mode 0600");
        }
        return None;
    }
    let text = fs::read(file).ok()?;
    // A server's own socket folder counts as "localhost".
    let host = match host {
        folder if SOCKET_FOLDERS.contains(&folder) => "localhost",
        host => host,
    };
    let wanted = [host, &port.to_string(), name, user];
    String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| password(line, wanted))
}

#[cfg(unix)]
fn is_private(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt;
    metadata.is_file() && metadata.permissions().mode() & 0o077 == 0
}

#[cfg(not(unix))]
fn is_private(metadata: &fs::Metadata) -> bool {
    metadata.is_file()
}

/// The password of `line`, if the line is about `wanted`.
fn password(line: &str, wanted: [&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut rest = line;
    for wanted in wanted {
        let (field, is_any, after) = take_field(rest);
        if !is_any && field != wanted {
            return None;
        }
        rest = after?;
    }
    let (password, ..) = take_field(rest);
    Some(password).filter(|password| !password.is_empty())
}

/// One field without its escapes, whether it is a bare `*`, and what follows.
fn take_field(text: &str) -> (String, bool, Option<&str>) {
    let mut field = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            ':' => return (field, &text[..at] == "*", Some(&text[at + 1..])),
            '\\' => field.push(characters.next().map_or('\\', |(_, escaped)| escaped)),
            _ => field.push(character),
        }
    }
    (field, text == "*", None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGIN: [&str; 4] = ["db", "5432", "shop", "me"];

    #[test]
    fn fields_match_exactly_or_by_star() {
        assert_eq!(password("db:5432:shop:me:pw", LOGIN).as_deref(), Some("pw"));
        assert_eq!(password("*:*:*:me:pw", LOGIN).as_deref(), Some("pw"));
        assert_eq!(password("db:5432:shop:you:pw", LOGIN), None);
        assert_eq!(password("d*:*:*:*:pw", LOGIN), None);
        assert_eq!(password(r"\*:*:*:*:pw", LOGIN), None);
        assert_eq!(password("# *:*:*:*:pw", LOGIN), None);
        assert_eq!(password("db:5432:shop", LOGIN), None);
        assert_eq!(password("*:*:*:*:", LOGIN), None);
        assert_eq!(password("", LOGIN), None);
    }

    #[test]
    fn escapes_are_undone() {
        let login = ["::1", "5432", r"a\b", "me"];
        let line = r"\:\:1:*:a\\b:me:p\:w\\x";
        assert_eq!(password(line, login).as_deref(), Some(r"p:w\x"));
    }

    #[test]
    #[cfg(unix)]
    fn a_file_that_others_can_read_is_ignored() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "x:1:y:z:no\nlocalhost:5432:shop:me:yes\r\n").unwrap();
        let find = |host| find(file.path(), host, 5432, "shop", "me");
        assert_eq!(find("localhost").as_deref(), Some("yes"));
        assert_eq!(find("/tmp").as_deref(), Some("yes"));
        assert_eq!(find("/srv/pg"), None);
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(find("localhost"), None);
    }
}
