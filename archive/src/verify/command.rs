//! What `ka-agent verify` and `ka-server verify` share: from the words of the command line to the report and the verdict.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::report::Report;
use super::{VerifyError, VerifyOptions, verify};
use crate::expected::{Allows, Expectations, Expected};

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// As [`VerifyOptions::root`].
    pub root: PathBuf,
    /// As [`VerifyOptions::clone`].
    pub clone: bool,
    /// As [`VerifyOptions::running`], which is always so for `/`.
    pub running: bool,
    /// Globs of what may differ in anything.
    pub expect: Vec<String>,
    /// Expected differences are shown, too.
    pub all: bool,
    /// JSON lines instead of text.
    pub json: bool,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing differs but what must.
    Clean,
    /// There are differences.
    Differs,
    /// The command line is wrong, and nothing was compared.
    Usage(String),
}

/// Compares the tree with `manifest` and writes the report to `out`.
///
/// # Errors
/// See [`VerifyError`].
pub fn run(manifest: &File, request: &Request, out: impl Write) -> Result<Outcome, VerifyError> {
    let expected: Vec<Expected> = request
        .expect
        .iter()
        .map(|glob| Expected { allows: Allows::ALL, glob: glob.clone(), why: "--expect".to_owned() })
        .collect();
    // The manifest has globs, too, and those are no fault of the command line.
    if let Err(e) = Expectations::new(expected.clone()) {
        return Ok(Outcome::Usage(format!("--expect: {e}")));
    }
    let root = request.root.clone();
    // A root that is not there is told by the walk.
    let whole = root.canonicalize().is_ok_and(|root| root == Path::new("/"));
    let running = request.running || whole;
    let options = VerifyOptions { root, clone: request.clone, running, expected, threads: 0 };
    let mut report = Report::new(out, request.json, request.all);
    let summary = verify(manifest, &options, &mut |difference| report.difference(difference))?;
    report.finish(&summary).map_err(VerifyError::Report)?;
    Ok(if summary.is_clean() { Outcome::Clean } else { Outcome::Differs })
}
