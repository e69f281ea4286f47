//! Differences as people and programs read them: a line each, and a line that sums up.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::{Difference, VerifySummary};
use crate::shown;

/// Writes differences and the summary. The first error of writing is kept to the end.
#[derive(Debug)]
pub struct Report<W> {
    out: W,
    json: bool,
    all: bool,
    fault: Option<io::Error>,
}

#[derive(serde::Serialize)]
struct Line<'a> {
    path: String,
    what: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    golden: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    here: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<&'a str>,
}

#[derive(serde::Serialize)]
struct Sum<'a> {
    clean: bool,
    entries: u64,
    bytes: u64,
    differences: u64,
    below: u64,
    expected: &'a BTreeMap<String, u64>,
}

impl<W: Write> Report<W> {
    /// As text, or as JSON lines; `all` shows what was to be expected, too.
    pub fn new(out: W, json: bool, all: bool) -> Self {
        Self { out, json, all, fault: None }
    }

    /// Shows one difference.
    pub fn difference(&mut self, difference: &Difference) {
        if difference.expected.is_some() && !self.all {
            return;
        }
        let path = shown(&difference.path);
        let (golden, here) = (difference.golden.as_deref(), difference.here.as_deref());
        let line = if self.json {
            let what = difference.what.word();
            json(&Line { path, what, golden, here, expected: difference.expected.as_deref() })
        } else {
            let detail = match (golden, here) {
                (None, None) => String::new(),
                (Some(golden), None) => format!(": {golden}"),
                (None, Some(here)) => format!(": {here}"),
                (Some(golden), Some(here)) => format!(": golden {golden}, here {here}"),
            };
            let why =
                difference.expected.as_ref().map(|why| format!(" (expected: {why})")).unwrap_or_default();
            Ok(format!("{:<10} {path}{detail}{why}", difference.what.word()))
        };
        self.put(line);
    }

    /// Shows the summary.
    ///
    /// # Errors
    /// When this or anything before it could not be written.
    pub fn finish(mut self, summary: &VerifySummary) -> io::Result<()> {
        let line = if self.json {
            json(&Sum {
                clean: summary.is_clean(),
                entries: summary.entries,
                bytes: summary.bytes,
                differences: summary.differences,
                below: summary.below,
                expected: &summary.expected,
            })
        } else {
            Ok(text(summary))
        };
        self.put(line);
        match self.fault.take() {
            Some(fault) => Err(fault),
            None => self.out.flush(),
        }
    }

    fn put(&mut self, line: io::Result<String>) {
        if self.fault.is_none() {
            self.fault = line.and_then(|line| writeln!(self.out, "{line}")).err();
        }
    }
}

fn json(value: &impl serde::Serialize) -> io::Result<String> {
    serde_json::to_string(value).map_err(io::Error::other)
}

fn text(summary: &VerifySummary) -> String {
    let mut text = format!("{} entries, {} bytes of content compared: ", summary.entries, summary.bytes);
    let many = |n: u64, one: &str, more: &str| format!("{n} {}", if n == 1 { one } else { more });
    match summary.differences {
        0 => text.push_str("clean"),
        n => text.push_str(&many(n, "difference", "differences")),
    }
    if summary.below > 0 {
        text.push_str(&format!(", and {} below them", many(summary.below, "thing", "things")));
    }
    let expected: u64 = summary.expected.values().sum();
    if expected > 0 {
        let reasons: Vec<String> = summary.expected.iter().map(|(why, n)| format!("{why} {n}")).collect();
        let differ = many(expected, "expected difference", "expected differences");
        text.push_str(&format!("; {differ} ({})", reasons.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::What;

    fn report(json: bool, all: bool) -> String {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, json, all);
        let mut difference = Difference {
            path: b"etc/x\ny".to_vec(),
            what: What::Mode,
            golden: Some("0644".to_owned()),
            here: Some("0600".to_owned()),
            expected: None,
        };
        report.difference(&difference);
        difference.expected = Some("its own name".to_owned());
        report.difference(&difference);
        let summary = VerifySummary {
            entries: 3,
            bytes: 5,
            differences: 1,
            expected: [("its own name".to_owned(), 1)].into(),
            below: 0,
        };
        report.finish(&summary).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_is_one_line_each() {
        assert_eq!(
            report(false, true),
            "mode       /etc/x\\ny: golden 0644, here 0600\n\
             mode       /etc/x\\ny: golden 0644, here 0600 (expected: its own name)\n\
             3 entries, 5 bytes of content compared: 1 difference; 1 expected difference (its own name 1)\n"
        );
        assert_eq!(report(false, false).lines().count(), 2);
    }

    #[test]
    fn json_is_one_object_each() {
        let text = report(true, true);
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["path"], "/etc/x\\ny");
        assert_eq!((&lines[0]["what"], &lines[0]["golden"]), (&"mode".into(), &"0644".into()));
        assert_eq!(lines[1]["expected"], "its own name");
        assert_eq!((&lines[2]["clean"], &lines[2]["differences"]), (&false.into(), &1.into()));
        assert_eq!(lines[2]["expected"]["its own name"], 1);
    }

    #[test]
    fn a_pipe_that_breaks_is_an_error() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(Report::new(Broken, false, false).finish(&VerifySummary::default()).is_err());
    }
}
