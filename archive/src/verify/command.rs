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
    /// Globs of what may differ in anything; or in what [`Allows`] names, if that and a colon stand in front.
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
        .map(|text| {
            let named = text.split_once(':').and_then(|(what, glob)| Some((what.parse().ok()?, glob)));
            let (allows, glob) = named.unwrap_or((Allows::ALL, text));
            Expected { allows, glob: glob.to_owned(), why: "--expect".to_owned() }
        })
        .collect();
    // The manifest has globs, too, and those are no fault of the command line.
    if let Err(e) = Expectations::new(expected.clone()) {
        return Ok(Outcome::Usage(format!("--expect: {e}")));
    }
    let root = request.root.clone();
    let running = request.running || is_this_machine(&root);
    let options = VerifyOptions { root, clone: request.clone, running, expected, threads: 0 };
    let mut report = Report::new(out, request.json, request.all);
    let summary = verify(manifest, &options, &mut |difference| report.difference(difference))?;
    report.finish(&summary).map_err(VerifyError::Report)?;
    Ok(if summary.is_clean() { Outcome::Clean } else { Outcome::Differs })
}

/// Whether `root` is `/`, however it is written. One that is not there is told by the walk.
fn is_this_machine(root: &Path) -> bool {
    root.canonicalize().is_ok_and(|root| root == Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_has_many_names() {
        for (root, is) in [("/", true), ("//", true), ("/usr/..", true), ("/usr", false), ("/no/such", false)]
        {
            assert_eq!(is_this_machine(Path::new(root)), is, "{root}");
        }
    }

    #[test]
    fn a_bad_glob_is_the_fault_of_the_command_line_only_where_it_stands_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest");
        let text = |glob: &str| {
            format!(
                "#mtree\n#ka-manifest 1\n#expect all {glob} why\n. type=dir mode=0755 uid=0 gid=0 \
                 time=0.000000000\n#end 1\n"
            )
        };
        let run = |glob: &str, expect: &str| {
            std::fs::write(&path, text(glob)).unwrap();
            let root = folder.path().join("root");
            std::fs::create_dir_all(&root).unwrap();
            let request =
                Request { root, clone: true, expect: vec![expect.to_owned()], ..Request::default() };
            super::run(&File::open(&path).unwrap(), &request, std::io::sink())
        };
        assert!(
            matches!(run("/a", "/b[").unwrap(), Outcome::Usage(text) if text.contains("--expect: the glob `/b[`"))
        );
        assert!(matches!(run("/a\\133", "/b"), Err(VerifyError::Pattern(_))));
        assert_eq!(run("/x/a", "/x/b").unwrap(), Outcome::Differs);
        assert_eq!(run("/x/a", "/").unwrap(), Outcome::Clean);
        assert_eq!(run("/x/a", "content:/").unwrap(), Outcome::Clean);
        assert_eq!(run("/x/a", "extra,label:/").unwrap(), Outcome::Differs);
    }
}
