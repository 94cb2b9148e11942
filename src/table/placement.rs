//! Columns that become headers, besides those that are fields of an event.

use std::str::FromStr;

use crate::contract::check_name;

/// A column that becomes a header: `COLUMN:header` or `COLUMN:header:NAME`, as in the option
/// `table.fields.additional.placement` of Debezium's Outbox Event Router.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Placement {
    /// The column.
    pub column: String,
    /// The header's name: the column's, unless another is given.
    pub header: String,
}

impl FromStr for Placement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').map(str::trim).collect();
        let (column, place, header) = match parts[..] {
            [column, place] => (column, place, column),
            [column, place, header] if !header.is_empty() => (column, place, header),
            _ => ("", "", ""),
        };
        let place = place.to_ascii_lowercase();
        check_name("column", column).map_err(|_| EXPECTED.to_owned())?;
        match place.as_str() {
            "header" => Ok(Self {
                column: column.to_owned(),
                header: header.to_owned(),
            }),
            "envelope" | "partition" => Err(format!(
                "a column cannot be placed in the {place}: a value is made of the payload, and a partition is that \
                 of the key; use {column}:header, or leave it out"
            )),
            _ => Err(EXPECTED.to_owned()),
        }
    }
}

const EXPECTED: &str =
    "a placement is COLUMN:header or COLUMN:header:NAME, such as type:header:eventType";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_what_the_router_takes() {
        for (text, column, header) in [
            ("type:header:eventType", "type", "eventType"),
            ("tenant:header", "tenant", "tenant"),
            (" Tenant : HEADER : t ", "Tenant", "t"),
        ] {
            let placement: Placement = text.parse().unwrap();
            assert_eq!((&*placement.column, &*placement.header), (column, header));
        }
    }

    #[test]
    fn only_headers_are_made_of_columns() {
        for (text, why) in [
            ("type:envelope", "use type:header"),
            ("shard:partition:p", "use shard:header"),
            ("type:footer", "COLUMN:header:NAME"),
            ("type", "COLUMN:header:NAME"),
            ("", "COLUMN:header:NAME"),
            (":header", "COLUMN:header:NAME"),
            ("type:header:", "COLUMN:header:NAME"),
            ("a:header:b:c", "COLUMN:header:NAME"),
        ] {
            let refused = text.parse::<Placement>().unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }
}
