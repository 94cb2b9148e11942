//! `docs/safety.md` names tests and files that exist.

use std::fs;
use std::path::PathBuf;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether this is a path of modules that ends with a function, as the test runner
/// writes one.
fn is_test(code: &str) -> bool {
    let is_part = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b':');
    code.contains("::") && code.bytes().all(is_part)
}

/// What stands in the file of its module, in `tests/it` or `src`, between the end of
/// the function before this one and its name.
fn attributes(test: &str) -> Option<String> {
    let (module, name) = test.rsplit_once("::").unwrap();
    let module = module.trim_end_matches("::tests").replace("::", "/");
    let function = format!("fn {name}(");
    let before = |file: PathBuf| {
        let text = fs::read_to_string(file).ok()?;
        let (before, _) = text.split_once(&function)?;
        let since = before.rfind("}\n").map_or(0, |end| end + 2);
        Some(before[since..].to_owned())
    };
    ["tests/it", "src"].iter().find_map(|folder| {
        let folder = root().join(folder);
        before(folder.join(format!("{module}.rs")))
            .or_else(|| before(folder.join(&module).join("mod.rs")))
    })
}

/// Why nothing is proven by naming it so, if it is not.
fn objection(test: &str) -> Option<&'static str> {
    let Some(attributes) = attributes(test) else {
        return Some("does not exist");
    };
    let has = |attribute: &str| {
        attributes
            .lines()
            .any(|line| line.trim().starts_with(attribute))
    };
    if !has("#[test]") && !has("#[tokio::test") && !attributes.contains("proptest!") {
        return Some("is no test");
    }
    has("#[ignore").then_some("only runs when it is asked for")
}

#[test]
fn what_is_no_test_or_does_not_run_is_refused() {
    let refused = [
        ("takeover::nobody_wrote_this", "does not exist"),
        ("takeover::take_over", "is no test"),
        (
            "takeover::trials_of_takeover",
            "only runs when it is asked for",
        ),
    ];
    for (test, why) in refused {
        assert_eq!(objection(test), Some(why), "{test}");
    }
}

#[test]
fn what_the_page_names_exists() {
    let page = fs::read_to_string(root().join("docs/safety.md")).unwrap();
    // What stands between backticks is every second part; a fence has three.
    let code: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    let tests: Vec<&str> = code.iter().copied().filter(|code| is_test(code)).collect();
    assert!(tests.len() > 40, "only {} tests are named", tests.len());
    for test in tests {
        assert_eq!(objection(test), None, "`{test}`");
    }
    for file in code.iter().filter(|code| code.starts_with("src/")) {
        assert!(root().join(file).exists(), "there is no `{file}`");
    }
}
