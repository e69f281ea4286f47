//! Where the programs under test are.

use std::path::PathBuf;
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
