//! Every row of docs/identity.md and docs/pains.md names tests that are there, or says why it is not covered.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

use std::path::Path;

/// What is wrong with the page; `read` gives the text of a file of this tree.
fn wrong(page: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for row in page.lines().filter(|l| l.starts_with("| ")).skip(1) {
        let last = row.trim_end_matches(['|', ' ']).rsplit(" | ").next().unwrap_or_default();
        if let Some(reason) = last.strip_prefix("not covered: ") {
            if reason.split_ascii_whitespace().count() < 4 {
                wrong.push(format!("no reason: {row}"));
            }
            continue;
        }
        let mut tests = 0;
        for (file, name) in last.split('`').filter_map(|word| word.split_once(".rs::")) {
            tests += 1;
            let text = read(&format!("{file}.rs")).unwrap_or_default();
            let is_test = text.match_indices(&format!("fn {name}(")).any(|(at, _)| {
                let above = text[..at].lines().rev().map(str::trim).take(6);
                above.take_while(|line| *line != "}").any(|line| line == "#[test]")
            });
            if !is_test {
                wrong.push(format!("there is no test {file}.rs::{name}"));
            }
        }
        if tests == 0 {
            wrong.push(format!("neither tests nor a reason: {row}"));
        }
    }
    wrong
}

#[test]
fn every_row_names_tests_that_are_there_or_a_reason() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let read = |path: &str| std::fs::read_to_string(workspace.join(path)).ok();
    for (name, rows) in [("docs/identity.md", 50), ("docs/pains.md", 26)] {
        let page = read(name).unwrap();
        let wrong = wrong(&page, read);
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        assert!(page.lines().filter(|l| l.starts_with("| ")).count() > rows, "{name}: rows are missing");
    }
}

#[test]
fn a_row_without_either_is_found() {
    let read = |path: &str| (path == "a.rs").then(|| "#[test]\nfn one() {\n}\nfn helper() {\n}\n".to_owned());
    let page = |cell: &str| format!("| Item | Tests |\n|---|---|\n| x | {cell} |\n");
    assert_eq!(wrong(&page("`a.rs::one`"), read), [""; 0]);
    assert_eq!(wrong(&page("not covered: nobody has one here"), read), [""; 0]);
    for cell in ["`a.rs::two`", "`a.rs::helper`", "`b.rs::one`", "one", "", "not covered: later"] {
        assert_eq!(wrong(&page(cell), read).len(), 1, "{cell}");
    }
}
