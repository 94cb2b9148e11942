//! `docs/safety.md` names tests and files that exist.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether this is a path of modules that ends with a function, as the test runner
/// writes one.
fn is_test(code: &str) -> bool {
    let is_part = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b':');
    code.contains("::") && code.bytes().all(is_part)
}

/// Whether its module has a function of this name, in `tests/it` or `src`.
fn test_exists(test: &str) -> bool {
    let (module, name) = test.rsplit_once("::").unwrap();
    let module = module.trim_end_matches("::tests").replace("::", "/");
    let function = format!("fn {name}(");
    let has_it = |file: &Path| fs::read_to_string(file).is_ok_and(|text| text.contains(&function));
    ["tests/it", "src"].iter().any(|folder| {
        let folder = root().join(folder);
        has_it(&folder.join(format!("{module}.rs"))) || has_it(&folder.join(&module).join("mod.rs"))
    })
}

#[test]
fn what_the_page_names_exists() {
    let page = fs::read_to_string(root().join("docs/safety.md")).unwrap();
    // What stands between backticks is every second part; a fence has three.
    let code: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    let tests: Vec<&str> = code.iter().copied().filter(|code| is_test(code)).collect();
    assert!(tests.len() > 40, "only {} tests are named", tests.len());
    for test in tests {
        assert!(test_exists(test), "there is no test `{test}`");
    }
    for file in code.iter().filter(|code| code.starts_with("src/")) {
        assert!(root().join(file).exists(), "there is no `{file}`");
    }
}
