//! The pre-pass before argh: it has no `--name=value`, no `--version`, and ends with 1 on usage errors.

use crate::exit::Exit;
use argh::TopLevelCommand;
use std::ffi::OsString;

/// Parses this program's command line, or prints what is to be printed and exits: help and version on standard output
/// with 0, a usage error on standard error with 2.
#[must_use]
pub fn parse<T: TopLevelCommand>(program: &str, version: &str) -> T {
    parse_words(program, version, std::env::args_os().skip(1))
}

/// [`parse`] of other words than this program's own.
#[must_use]
pub fn parse_words<T: TopLevelCommand>(
    program: &str,
    version: &str,
    words: impl Iterator<Item = OsString>,
) -> T {
    match parse_from(program, version, words) {
        Ok(parsed) => parsed,
        Err(Early { text, error: false }) => {
            println!("{}", text.trim_end());
            std::process::exit(Exit::Done.code().into());
        }
        Err(Early { text, error: true }) => {
            eprintln!("{}", text.trim_end());
            std::process::exit(Exit::Usage.code().into());
        }
    }
}

/// Why there is nothing to run: help or version to be shown, or a usage error.
#[derive(Debug, PartialEq, Eq)]
pub struct Early {
    /// What to print.
    pub text: String,
    /// Whether it is an error.
    pub error: bool,
}

/// [`parse`] without its effects.
///
/// # Errors
/// [`Early`], when there is nothing to run.
pub fn parse_from<T: TopLevelCommand>(
    program: &str,
    version: &str,
    args: impl Iterator<Item = OsString>,
) -> Result<T, Early> {
    let usage =
        |text: String| Early { text: format!("{}\nTry '{program} --help'.", text.trim_end()), error: true };
    let mut words = Vec::new();
    let mut plain = false;
    for arg in args {
        let arg = arg
            .into_string()
            .map_err(|arg| usage(format!("{program}: not valid UTF-8: {}", arg.to_string_lossy())))?;
        match arg.as_str() {
            _ if plain => words.push(arg),
            "--" => {
                plain = true;
                words.push(arg);
            }
            "--version" | "-V" if words.is_empty() => {
                return Err(Early { text: format!("{program} {version}"), error: false });
            }
            "-h" => words.push("--help".to_owned()),
            _ => match arg.strip_prefix("--").and_then(|rest| rest.split_once('=')) {
                Some((name, value)) if !name.is_empty() => {
                    words.push(format!("--{name}"));
                    words.push(value.to_owned());
                }
                _ => words.push(arg),
            },
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    T::from_args(&[program], &words).map_err(|early| match early.status {
        Ok(()) => Early { text: early.output, error: false },
        Err(()) => usage(format!("{program}: {}", early.output)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use argh::FromArgs;

    /// a test command
    #[derive(FromArgs, Debug, PartialEq)]
    struct Test {
        /// how many
        #[argh(option)]
        count: u32,
        /// a place
        #[argh(positional)]
        place: Option<String>,
    }

    fn parse(words: &[&str]) -> Result<Test, Early> {
        parse_from("test", "1.2.3", words.iter().map(OsString::from))
    }

    #[test]
    fn equals_sign_and_space_mean_the_same() {
        assert_eq!(parse(&["--count=3", "here"]), parse(&["--count", "3", "here"]));
        assert_eq!(parse(&["--count=3"]).unwrap(), Test { count: 3, place: None });
    }

    #[test]
    fn help_and_version_are_no_errors() {
        assert!(!parse(&["-h"]).unwrap_err().error);
        assert_eq!(parse(&["--version"]).unwrap_err(), Early { text: "test 1.2.3".into(), error: false });
    }

    #[test]
    fn usage_errors_are_errors() {
        for words in [&["--count=x"][..], &["--nonsense"], &[]] {
            let early = parse(words).unwrap_err();
            assert!(early.error && early.text.ends_with("Try 'test --help'."), "{early:?}");
        }
    }
}
