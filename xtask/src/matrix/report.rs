//! The table of the matrix.

use super::life::Seen;
use super::rows::Row;
use crate::lab::vm::Board;
use anyhow::{Context, Result};
use std::path::Path;

/// What came of a row.
#[derive(Debug)]
pub struct Outcome {
    /// Its machine.
    pub board: Board,
    /// The row.
    pub row: Row,
    /// What was seen, or what was wrong.
    pub result: Result<Seen>,
}

/// What stands above the rows.
const HEAD: &str = "# The matrix

Command: `cargo xtask lab matrix --table docs/matrix.md`; `--row NAME` runs one row, and the others keep what stands here.

Each row is a deployment to a bare machine: installed by PXE, booted from its own disks to its login, every unit of
systemd started, its identity its own, then compared with the manifest of what was sent by `ka-agent verify` in the clone
itself, and asked what the row is about (`xtask/src/matrix/rows.rs`). Seconds are of software emulation beside
other machines; the last column says when a row ran, and with which commit's programs.

| row | guest | firmware, disk | layout | installed | login | verified | when |
|---|---|---|---|---:|---:|---|---|
";

/// The table in Markdown; `when`: what the last column says.
#[must_use]
pub fn table(outcomes: &[Outcome], dir: &Path, when: &str) -> String {
    let mut text = HEAD.to_owned();
    for Outcome { board, row, result } in outcomes {
        let seen = match result {
            Ok(Seen { installed, login, verified, .. }) => {
                let (installed, login) = (installed.as_secs_f64(), login.as_secs_f64());
                // What the differences are that must be there stands in the row's log.
                let verified = verified.split_once(" (").map_or(verified.as_str(), |(short, _)| short);
                format!("{installed:.0} s | {login:.0} s | {}", cell(verified))
            }
            Err(e) => {
                let cause = format!("{e:#}").replace(&dir.display().to_string(), "");
                format!("- | - | FAILED: {}", cell(&cause))
            }
        };
        let (guest, board) = (row.guest.name, board.name());
        text += &format!("| {} | {guest} | {board} | {} | {seen} | {when} |\n", row.name, row.about);
    }
    text
}

/// Writes `table` to `path`; rows of the matrix that are not in it keep the line that they have there.
///
/// # Errors
/// When the file cannot be read or written.
pub fn keep(path: &Path, table: &str) -> Result<()> {
    let old = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.with_context(|| format!("reading {}", path.display()))?,
    };
    std::fs::write(path, merged(table, &old)).with_context(|| format!("writing {}", path.display()))
}

fn merged(table: &str, old: &str) -> String {
    let line = |text: &str, name: &str| {
        let start = format!("| {name} |");
        text.lines().find(|line| line.starts_with(&start)).map(|line| format!("{line}\n"))
    };
    let rows = super::names().filter_map(|name| line(table, name).or_else(|| line(old, name)));
    std::iter::once(HEAD.to_owned()).chain(rows).collect()
}

/// One line, at most 200 characters, that ends no cell.
fn cell(text: &str) -> String {
    let line: String = text.chars().map(|c| if c == '\n' || c == '|' { ' ' } else { c }).take(200).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::rows::SERIES;
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_table_says_what_failed() {
        let seen = Seen {
            installed: Duration::from_secs(90),
            login: Duration::from_secs(30),
            verified: "clean; 3 expected differences (its own disks 3)".into(),
            captured: None,
            wrong: Vec::new(),
        };
        let row = SERIES[0].rows[0];
        let outcomes = [
            Outcome { board: Board::BiosIde, row, result: Ok(seen) },
            Outcome { board: Board::BiosIde, row, result: Err(anyhow::anyhow!("/x/y: a | b\nc")) },
        ];
        let text = table(&outcomes, Path::new("/x/"), "today");
        assert!(text.contains(" 90 s | 30 s | clean; 3 expected differences | today |\n"), "{text}");
        assert!(text.ends_with("| - | - | FAILED: y: a   b c | today |\n"), "{text}");
    }

    #[test]
    fn rows_that_did_not_run_keep_their_line() {
        let names: Vec<&str> = super::super::names().take(3).collect();
        let old = format!("| gone | x |\n| {} | old |\n| {} | old |\n", names[2], names[0]);
        let text = merged(&format!("| {} | new |\n| {} | new |\n", names[0], names[1]), &old);
        let lines = format!("| {} | new |\n| {} | new |\n| {} | old |\n", names[0], names[1], names[2]);
        assert_eq!(text, format!("{HEAD}{lines}"));
    }
}
