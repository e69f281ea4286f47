//! The table of the matrix.

use super::life::Seen;
use super::rows::Row;
use crate::lab::vm::Board;
use anyhow::Result;
use ka_cli::units::show_time;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

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

/// The table in Markdown.
///
/// # Errors
/// None that can happen: text is written into memory.
pub fn table(outcomes: &[Outcome], dir: &Path, took: Duration) -> Result<String> {
    let passed = outcomes.iter().filter(|outcome| outcome.result.is_ok()).count();
    let mut text = format!(
        "# The matrix\n\n\
         Command: `cargo xtask lab matrix --table docs/matrix.md`. {passed} of {} rows passed in {}.\n\n\
         Each row is a deployment to a bare machine: installed by PXE, booted from its own disks to its login, every unit of \
         systemd started, its identity its own, then compared with the manifest of what was sent by `ka-agent verify` in the clone \
         itself, and asked what the row is about (`xtask/src/matrix/rows.rs`). Seconds are of software emulation beside \
         other machines.\n\n\
         | row | guest | firmware, disk | layout | installed | login | verified |\n|---|---|---|---|---:|---:|---|\n",
        outcomes.len(),
        show_time(took),
    );
    for Outcome { board, row, result } in outcomes {
        let (guest, board) = (row.guest.name, board.name());
        write!(text, "| {} | {guest} | {board} | {} | ", row.name, row.about)?;
        match result {
            Ok(Seen { installed, login, verified, .. }) => writeln!(
                text,
                "{:.0} s | {:.0} s | {} |",
                installed.as_secs_f64(),
                login.as_secs_f64(),
                cell(verified)
            )?,
            Err(e) => writeln!(
                text,
                "- | - | FAILED: {} |",
                cell(&format!("{e:#}").replace(&dir.display().to_string(), ""))
            )?,
        }
    }
    Ok(text)
}

/// One line, at most 200 characters, that ends no cell.
fn cell(text: &str) -> String {
    let line: String = text.chars().map(|c| if c == '\n' || c == '|' { ' ' } else { c }).take(200).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::rows::CHAINS;
    use super::*;

    #[test]
    fn the_table_says_what_failed() {
        let seen = Seen {
            installed: Duration::from_secs(90),
            login: Duration::from_secs(30),
            verified: "clean".into(),
            captured: None,
            wrong: Vec::new(),
        };
        let row = CHAINS[0].rows[0];
        let outcomes = [
            Outcome { board: Board::BiosIde, row, result: Ok(seen) },
            Outcome { board: Board::BiosIde, row, result: Err(anyhow::anyhow!("/x/y: a | b\nc")) },
        ];
        let text = table(&outcomes, Path::new("/x/"), Duration::from_secs(60)).unwrap();
        assert!(text.contains("1 of 2 rows passed"), "{text}");
        assert!(text.contains(" 90 s | 30 s | clean |\n"), "{text}");
        assert!(text.ends_with("| - | - | FAILED: y: a   b c |\n"), "{text}");
    }
}
