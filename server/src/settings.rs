//! The settings file: every option of `deploy` and `boot` may stand in it under its own name, and the command line wins. What
//! it says is put in front of the command line's own words, so that both are read and checked in one place.

use anyhow::{Context, Result};
use argh::{ArgsInfo, FlagInfo, FlagInfoKind, Optionality};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where it is unless `--config` says otherwise.
pub const PATH: &str = "/etc/ka/server.toml";
/// The longest settings file that is read, in bytes.
const LIMIT: u64 = 1 << 20;

/// Something wrong in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}, line {line}, column {column}: {message}", path.display())]
pub struct Fault {
    path: PathBuf,
    line: usize,
    column: usize,
    message: String,
}

/// The command line `words` (without the program's name) with what the settings file says put into it. Without a file,
/// and for other commands than `deploy` and `boot`, nothing changes.
///
/// # Errors
/// When the file cannot be read, or [`Fault`] when it is wrong.
pub fn with_file(words: Vec<OsString>) -> Result<Vec<OsString>> {
    let deploy = crate::deployment::command::DeployArgs::get_args_info().flags;
    let boot = crate::boot::command::BootCommand::get_args_info().flags;
    let (mine, other) = match words.first().and_then(|w| w.to_str()) {
        Some("deploy") => (deploy, boot),
        Some("boot") => (boot, deploy),
        _ => return Ok(words),
    };
    let (path, named) = match config_option(&words) {
        Some(path) => (path, true),
        None => (PathBuf::from(PATH), false),
    };
    let Some(text) = read(&path, named)? else { return Ok(words) };
    let added = options(&text, mine, other, &given(&words)).map_err(|(offset, message)| {
        let (line, column) = position(&text, offset);
        Fault { path, line, column, message }
    })?;
    let mut all = words;
    all.splice(1..1, added.into_iter().map(OsString::from));
    Ok(all)
}

fn read(path: &Path, named: bool) -> Result<Option<String>> {
    use std::io::Read;
    let reading = || format!("reading the settings file {}", path.display());
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => return Ok(None),
        Err(e) => return Err(e).with_context(reading),
    };
    let mut text = String::new();
    file.take(LIMIT).read_to_string(&mut text).with_context(reading)?;
    Ok(Some(text))
}

/// The value of `--config`, if it is there.
fn config_option(words: &[OsString]) -> Option<PathBuf> {
    words.iter().enumerate().find_map(|(i, word)| {
        let word = word.to_str()?;
        match word.strip_prefix("--config=") {
            Some(value) => Some(value.into()),
            None if word == "--config" => words.get(i + 1).map(PathBuf::from),
            None => None,
        }
    })
}

/// The names of the options that the command line gives itself.
fn given(words: &[OsString]) -> Vec<String> {
    let long = words.iter().filter_map(|w| w.to_str()?.strip_prefix("--"));
    long.map(|name| name.split('=').next().unwrap_or(name).to_owned()).collect()
}

/// What the file says, as words; an error is an offset and a message.
fn options(
    text: &str,
    mine: &'static [FlagInfo<'static>],
    other: &'static [FlagInfo<'static>],
    given: &[String],
) -> Result<Vec<String>, (usize, String)> {
    let wrong = |e: toml::de::Error| (e.span().map_or(0, |s| s.start), e.message().trim().replace('\n', " "));
    let table = DeTable::parse(text).map_err(wrong)?;
    let find = |flags: &'static [FlagInfo<'static>], name: &str| {
        flags.iter().find(|f| f.long.trim_start_matches('-') == name && !matches!(name, "help" | "config"))
    };
    let mut words = Vec::new();
    for (key, value) in table.get_ref() {
        let name: &str = key.get_ref();
        let flag = match (find(mine, name), find(other, name)) {
            (Some(flag), _) => flag,
            // An option of the other command: not ours, but no mistake either.
            (None, Some(_)) => continue,
            (None, None) => return Err((key.span().start, format!("there is no option `{name}`"))),
        };
        let found = as_words(name, flag, value)?;
        if !given.iter().any(|g| g == name) {
            words.extend(found);
        }
    }
    Ok(words)
}

fn as_words(
    name: &str,
    flag: &FlagInfo<'static>,
    value: &Spanned<DeValue<'_>>,
) -> Result<Vec<String>, (usize, String)> {
    let wrong = |value: &Spanned<DeValue<'_>>, what: &str| {
        Err((value.span().start, format!("`{name}` must be {what}")))
    };
    // With a `=`, so that a value that begins with dashes stays a value.
    let word = |text: &str| format!("--{name}={text}");
    let one = |value: &Spanned<DeValue<'_>>| match value.get_ref() {
        DeValue::String(text) => Ok(word(text)),
        DeValue::Integer(number) if number.radix() == 10 => Ok(word(number.as_str())),
        _ => wrong(value, "a string or a number").map(|()| String::new()),
    };
    match (&flag.kind, value.get_ref()) {
        (FlagInfoKind::Switch, DeValue::Boolean(true)) => Ok(vec![format!("--{name}")]),
        (FlagInfoKind::Switch, DeValue::Boolean(false)) => Ok(Vec::new()),
        (FlagInfoKind::Switch, _) => wrong(value, "true or false").map(|()| Vec::new()),
        (FlagInfoKind::Option { .. }, DeValue::Array(items))
            if matches!(flag.optionality, Optionality::Repeating) =>
        {
            items.iter().map(one).collect()
        }
        (FlagInfoKind::Option { .. }, _) => one(value).map(|w| vec![w]),
    }
}

/// Line and column, both from 1, of a byte offset.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(text: &str, words: &[&str]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.toml");
        std::fs::write(&path, text).unwrap();
        let mut all: Vec<OsString> = words.iter().map(OsString::from).collect();
        all.push(format!("--config={}", path.display()).into());
        let result = with_file(all).map_err(|e| format!("{e:#}").replace(path.to_str().unwrap(), "FILE"))?;
        Ok(result
            .into_iter()
            .map(|w| w.into_string().unwrap())
            .filter(|w| !w.starts_with("--config"))
            .collect())
    }

    #[test]
    fn options_are_put_in_front_and_the_command_line_wins() {
        let text = "nodes = 3\nlisten = ':0'\nexclude = ['/a', '/b']\njson = true\ndry-run = false\ninterface = 'br0'\n";
        let words = run(text, &["deploy", "--nodes=5", "--compress", "off"]).unwrap();
        assert_eq!(words[0], "deploy");
        assert_eq!(words[words.len() - 3..], ["--nodes=5", "--compress", "off"]);
        let mut added = words[1..words.len() - 3].to_vec();
        added.sort();
        assert_eq!(added, ["--exclude=/a", "--exclude=/b", "--json", "--listen=:0"]);
        assert_eq!(run(text, &["boot"]).unwrap(), ["boot", "--interface=br0"]);
        assert_eq!(run(text, &["layout"]).unwrap(), ["layout"]);
        assert_eq!(run("append = '--x=y'", &["deploy"]).unwrap(), ["deploy", "--append=--x=y"]);
    }

    #[test]
    fn mistakes_are_named_with_line_and_column() {
        for (text, error) in [
            ("nodes = 3\n  nodse = 4\n", "FILE, line 2, column 3: there is no option `nodse`"),
            ("config = 'x'", "FILE, line 1, column 1: there is no option `config`"),
            ("json = 'yes'", "FILE, line 1, column 8: `json` must be true or false"),
            ("nodes = [3]", "FILE, line 1, column 9: `nodes` must be a string or a number"),
            ("exclude = ['/a', 1.5]", "FILE, line 1, column 18: `exclude` must be a string or a number"),
        ] {
            assert_eq!(run(text, &["deploy"]).unwrap_err(), error);
        }
        assert!(run("nodes = \n", &["deploy"]).unwrap_err().starts_with("FILE, line 1, column"));
        // Also what the command line overrules must be right.
        assert!(run("json = 1", &["deploy", "--json"]).is_err());
        assert!(with_file(vec!["deploy".into(), "--config".into(), "/nowhere".into()]).is_err());
    }

    #[test]
    fn the_file_that_init_writes_is_right_with_every_line_in_use() {
        let text = include_str!("trust/server.toml");
        assert_eq!(run(text, &["deploy"]).unwrap(), ["deploy"]);
        let used: String = text
            .lines()
            .filter_map(|l| l.strip_prefix("# ").filter(|l| l.contains(" = ")))
            .map(|l| format!("{l}\n"))
            .collect();
        assert!(run(&used, &["deploy"]).unwrap().len() > 5, "{used}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z-]{0,8} ?= ?[\\[\\]'\"0-9a-z, ]{0,20}\n.{0,20}") {
            let _ = run(&text, &["deploy"]);
        }
    }
}
