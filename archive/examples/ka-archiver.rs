//! Ka's archive as a program of its own, for measuring it beside other archivers (`cargo xtask bench archive`):
//! `ka-archiver pack DIRECTORY FILE` and `ka-archiver unpack FILE DIRECTORY`, with the code and the options of server and agent.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use ka_archive::{PackOptions, UnpackOptions, pack, unpack};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["pack", from, to] => pack_to(Path::new(from), Path::new(to)),
        ["unpack", from, to] => unpack_to(Path::new(from), Path::new(to)),
        ["--version"] => Ok(format!("ka-archiver {}", env!("CARGO_PKG_VERSION"))),
        _ => Err("usage: ka-archiver pack DIRECTORY FILE | ka-archiver unpack FILE DIRECTORY".to_owned()),
    };
    match done {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("ka-archiver: {e}");
            ExitCode::FAILURE
        }
    }
}

fn pack_to(from: &Path, to: &Path) -> Result<String, String> {
    let file = File::create(to).map_err(|e| format!("making {}: {e}", to.display()))?;
    let options = PackOptions { root: from.to_owned(), ..PackOptions::default() };
    let summary = pack(&options, file, &mut ()).map_err(|e| e.to_string())?;
    Ok(format!("{} files, {} bytes", summary.files, summary.archive_bytes))
}

fn unpack_to(from: &Path, to: &Path) -> Result<String, String> {
    let file = File::open(from).map_err(|e| format!("opening {}: {e}", from.display()))?;
    let options = UnpackOptions { root: to.to_owned(), sync: true };
    let summary = unpack(file, &options, &mut ()).map_err(|e| e.to_string())?;
    Ok(format!("{} files, {} bytes", summary.files, summary.archive_bytes))
}
