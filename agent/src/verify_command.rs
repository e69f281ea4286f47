//! `ka-agent verify`: compares this running machine, or a clone that is mounted here, with a manifest of its golden tree. The
//! manifest is not on the clone; it comes from the golden node, as a file or on standard input.

use anyhow::{Context, Result};
use argh::FromArgs;
use ka_archive::verify::command::{Outcome, Request, run as compare};
use ka_cli::exit::Exit;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// compare this machine, or a clone that is mounted here, with a manifest of its golden tree
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "verify")]
pub struct VerifyArgs {
    /// the manifest, from the golden node; - is standard input
    #[argh(option, arg_name = "FILE")]
    manifest: PathBuf,
    /// where the clone is mounted (default /: this machine)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/\")")]
    root: PathBuf,
    /// the clone has run: what a running machine changes is expected, too (always so for /)
    #[argh(switch)]
    running: bool,
    /// what matches may differ in anything; WHAT:GLOB limits it to content, extra, missing, label (repeatable)
    #[argh(option, arg_name = "GLOB")]
    expect: Vec<String>,
    /// show expected differences, too
    #[argh(switch)]
    all: bool,
    /// print JSON lines instead of text
    #[argh(switch)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// When the manifest or the tree cannot be read.
pub fn run(args: &VerifyArgs) -> Result<Exit> {
    let manifest = if args.manifest == Path::new("-") {
        spooled(&mut io::stdin().lock()).context("keeping the manifest from standard input")?
    } else {
        File::open(&args.manifest).with_context(|| format!("opening {}", args.manifest.display()))?
    };
    let request = Request {
        root: args.root.clone(),
        clone: true,
        running: args.running,
        expect: args.expect.clone(),
        all: args.all,
        json: args.json,
    };
    let outcome = compare(&manifest, &request, io::stdout().lock())
        .with_context(|| format!("comparing {}", args.root.display()))?;
    Ok(match outcome {
        Outcome::Clean => Exit::Done,
        Outcome::Differs => Exit::Differs,
        Outcome::Usage(what) => {
            eprintln!("ka-agent: {what}");
            Exit::Usage
        }
    })
}

/// The manifest is read twice, so a pipe's content is kept in a file without a name. Nobody else may read it, not even before
/// it has lost its name: it tells of all files. Only where there are no files without names, one is made and removed, in
/// /tmp, whose time is never compared.
fn spooled(input: &mut impl io::Read) -> io::Result<File> {
    let folder = std::env::temp_dir();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    if let Ok(file) = openat(CWD, &folder, flags, Mode::RUSR | Mode::WUSR) {
        let mut file = File::from(file);
        io::copy(input, &mut file)?;
        return Ok(file);
    }
    let name = folder.join(format!("ka-manifest-{}", uuid::Uuid::new_v4()));
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&name)?;
    std::fs::remove_file(&name)?;
    io::copy(input, &mut file)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_piped_in_can_be_read_twice_and_leaves_nothing() {
        let bytes = vec![7; 300_000];
        let mut file = spooled(&mut &bytes[..]).unwrap();
        for _ in 0..2 {
            file.rewind().unwrap();
            let mut again = Vec::new();
            file.read_to_end(&mut again).unwrap();
            assert!(again == bytes);
        }
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.nlink(), metadata.mode() & 0o7777), (0, 0o600));
    }
}
