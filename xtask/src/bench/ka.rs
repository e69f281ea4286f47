//! Ka in a benchmark: the two command lines, and what this version's programs know. An option that is not there yet is
//! left out or replaced, so that older programs can be measured too (`KA_LAB_BINARIES`).

use crate::bench::contender::Contender;
use crate::bench::net::{Net, address};
use crate::bench::source::Source;
use crate::golden;
use crate::run;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// TCP port of the server, for control and data.
pub const PORT: u16 = 5757;
/// What the server writes when the wave begins.
pub const BEGINS: &str = "starting with";

/// Names of files in a run's folder; tokens are kept beside the state.
const STATE_FILE: &str = "nodes.json";
const TOKEN_FILE: &str = "token";
/// What `ka-server init` calls the secret key.
const KEY_FILE: &str = "server.key";

/// The two programs.
#[derive(Debug, Clone)]
pub struct Ka {
    agent: PathBuf,
    server: PathBuf,
    /// `ka-agent receive --help` and `ka-server deploy --help`.
    agent_help: String,
    server_help: String,
    layout: PathBuf,
    /// The server's key pair, unless this version knows none.
    keys: Option<Keys>,
}

/// Where the server's key is, and what the nodes must know of it.
#[derive(Debug, Clone)]
struct Keys {
    file: PathBuf,
    public: String,
}

/// What a node does with the stream.
#[derive(Debug, Clone, Copy)]
pub enum Sink<'a> {
    /// Verifies and drops it.
    Discard,
    /// Gives it to this command.
    Command(&'a str),
}

impl Ka {
    /// These programs; `dir` is for files that they need.
    ///
    /// # Errors
    /// When they do not run.
    pub fn new(agent: &Path, server: &Path, dir: &Path) -> Result<Self> {
        let help = |program: &Path, command: &str| {
            run::output(&program.to_string_lossy(), &[command, "--help"]).context("asking Ka for its options")
        };
        let layout = dir.join("layout.toml");
        std::fs::write(&layout, golden::LAYOUT).with_context(|| format!("writing {}", layout.display()))?;
        let server_help = help(server, "deploy")?;
        let keys = if knows(&server_help, "--key-file") {
            let folder = dir.join("keys");
            let words = ["init", "--force", "--dir", &folder.to_string_lossy()];
            let public = run::output(&server.to_string_lossy(), &words).context("making the server's key")?;
            Some(Keys { file: folder.join(KEY_FILE), public: public.trim().to_owned() })
        } else {
            None
        };
        Ok(Self {
            agent: agent.to_path_buf(),
            server: server.to_path_buf(),
            agent_help: help(agent, "receive")?,
            server_help,
            layout,
            keys,
        })
    }

    /// Whether this version can take part as `contender`.
    #[must_use]
    pub fn can(&self, contender: Contender) -> bool {
        contender != Contender::KaTrustNodes || knows(&self.server_help, "--trust-nodes")
    }

    /// What the report says about how the stream comes and goes.
    #[must_use]
    pub fn about(&self) -> String {
        format!(
            "source: {}; sink: {}",
            if knows(&self.server_help, "--source-file") { "--source-file -" } else { "--source-cmd cat" },
            if knows(&self.agent_help, "--discard") { "--discard" } else { "--sink-cmd cat" }
        )
    }

    /// `ka-server deploy` at the head, its files in `dir`; `trust_nodes` as the option.
    ///
    /// # Errors
    /// When no token can be made for the nodes.
    pub fn server(
        &self,
        net: &Net,
        source: &Source,
        trust_nodes: bool,
        receivers: usize,
        dir: &Path,
    ) -> Result<Command> {
        let mut command = net.command(0, &self.server);
        command
            .args(["deploy", "--listen", &format!("{}:{PORT}", address(0))])
            .args(["--nodes", &receivers.to_string()])
            .arg("--layout")
            .arg(&self.layout)
            .arg("--state")
            .arg(dir.join(STATE_FILE))
            .arg("--log-dir")
            .arg(dir.join("nodes"));
        if let Some(keys) = &self.keys {
            command.arg("--key-file").arg(&keys.file);
            let mut token = Command::new(&self.server);
            token.args(["token", "--shared", "--output"]).arg(dir.join(TOKEN_FILE));
            token.arg("--state").arg(dir.join(STATE_FILE));
            let status = token.status().context("starting ka-server token")?;
            anyhow::ensure!(status.success(), "ka-server token ended with {status}");
        }
        match &source.tree {
            Some(tree) => {
                command.arg("--root").arg(tree);
            }
            // The file is standard input, as for the peers.
            None if knows(&self.server_help, "--source-file") => {
                command.args(["--source-file", "-"]);
            }
            None => {
                command.arg("--source-cmd").arg(format!("cat {}", source.file.display()));
            }
        }
        if trust_nodes {
            command.arg("--trust-nodes");
        }
        Ok(command)
    }

    /// Whether the server reads the stream from its standard input.
    #[must_use]
    pub fn reads_standard_input(&self, source: &Source) -> bool {
        source.tree.is_none() && knows(&self.server_help, "--source-file")
    }

    /// `ka-agent receive` at a node, with the token that [`Ka::server`] left in `dir`.
    #[must_use]
    pub fn agent(&self, net: &Net, node: usize, sink: Sink, dir: &Path) -> Command {
        let mut command = net.command(node, &self.agent);
        command.args([
            "receive",
            "--server",
            &format!("{}:{PORT}", address(0)),
            "--name",
            &format!("n{node}"),
        ]);
        if let Some(keys) = &self.keys {
            command.args(["--key", &keys.public, "--token-file"]).arg(dir.join(TOKEN_FILE));
        }
        match sink {
            Sink::Discard if knows(&self.agent_help, "--discard") => command.arg("--discard"),
            Sink::Discard => command.args(["--sink-cmd", "exec cat >/dev/null"]),
            Sink::Command(sink) => command.args(["--sink-cmd", sink]),
        };
        command
    }
}

/// Whether a help text has an option.
fn knows(help: &str, option: &str) -> bool {
    help.split(|c: char| c.is_whitespace() || matches!(c, '[' | ']' | ',')).any(|word| word == option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_whole_words() {
        let help =
            "Usage: ka-server deploy [--nodes N] [--source-cmd COMMAND]\n  --trust-nodes  leave them out\n";
        assert!(knows(help, "--nodes") && knows(help, "--trust-nodes"));
        assert!(!knows(help, "--source") && !knows(help, "--trust"));
    }
}
