//! Where the programs under test are, and what a node must be given to be let in.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

/// `ka-server` of this build.
pub fn server_program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_ka-server"))
}

/// `ka-agent` of the same build. A test of the whole workspace has made it, for the agent's own tests; when only this
/// package is tested and it was never built, that is done here (and an old one is taken as it is).
pub fn agent_program() -> PathBuf {
    static BUILD: Once = Once::new();
    let program = server_program().with_file_name("ka-agent");
    BUILD.call_once(|| {
        if !program.exists() {
            let status =
                Command::new(env!("CARGO")).args(["build", "-q", "-p", "ka-agent"]).status().unwrap();
            assert!(status.success(), "building ka-agent");
        }
    });
    assert!(program.exists(), "{} is not there", program.display());
    program
}

/// A token for deployments whose state is in `folder`, in a file there.
pub fn make_token(folder: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = folder.join(name);
    let mut command = Command::new(server_program());
    command
        .arg("token")
        .args(options)
        .arg("--output")
        .arg(&path)
        .arg("--state")
        .arg(folder.join("nodes.json"));
    assert!(command.status().unwrap().success());
    path
}

/// The server's key in what it says at its start.
pub fn key_in(text: &str) -> String {
    let (_, after) = text.split_once("this server's key is ").unwrap();
    after.split_whitespace().next().unwrap().to_owned()
}
