//! docs/testing.md promises tests by name: every one of them is there.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::Path;

/// The words between backticks.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[test]
fn every_test_that_the_inventory_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/testing.md")).unwrap();
    let mut files = BTreeMap::new();
    let (mut named, mut missing) = (0, Vec::new());
    for line in text.lines().filter(|line| line.starts_with('|')) {
        let mut file = None;
        for word in quoted(line) {
            if word.ends_with(".rs") {
                let source = std::fs::read_to_string(root.join(word));
                files.insert(word, source.unwrap_or_else(|e| panic!("{word}: {e}")));
                file = Some(word);
            } else if let Some(file) = file {
                named += 1;
                if !files[file].contains(&format!("fn {word}(")) {
                    missing.push(format!("{file}: {word}"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "docs/testing.md names {missing:#?}");
    assert!(named > 100, "only {named} tests were found in it");
}
