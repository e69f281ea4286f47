//! The archive library as a program, for measurements and for trying it against other tars:
//! `ka-tar pack DIR > STREAM`, `ka-tar unpack DIR < STREAM`, `ka-tar hard-cases DIR`, `ka-tar measure DIR`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use ka_archive::{PackOptions, UnpackOptions, measure, pack, testing, unpack};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [command, root] = &arguments[..] else {
        eprintln!("usage: ka-tar pack|unpack|hard-cases|measure DIR");
        return ExitCode::from(2);
    };
    let root = PathBuf::from(root);
    let options = PackOptions { root: root.clone(), ..PackOptions::default() };
    let result: Result<String, Box<dyn std::error::Error>> = match command.as_str() {
        "pack" => pack(&options, io::stdout().lock(), &mut ()).map(|s| format!("{s:?}")).map_err(Into::into),
        "unpack" => unpack(io::stdin().lock(), &UnpackOptions { root, sync: false }, &mut ())
            .map(|s| format!("{s:?}"))
            .map_err(Into::into),
        "hard-cases" => testing::hard_cases(&root).map(|()| String::new()).map_err(Into::into),
        "measure" => measure(&options).map(|s| format!("{s:?}")).map_err(Into::into),
        other => Err(format!("unknown command {other}").into()),
    };
    match result {
        Ok(text) => {
            eprintln!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("ka-tar: {e}");
            ExitCode::FAILURE
        }
    }
}
