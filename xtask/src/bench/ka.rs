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

/// The two programs.
#[derive(Debug, Clone)]
pub struct Ka {
    agent: PathBuf,
    server: PathBuf,
    /// `ka-agent receive --help` and `ka-server deploy --help`.
    agent_help: String,
    server_help: String,
    layout: PathBuf,
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
        Ok(Self {
            agent: agent.to_path_buf(),
            server: server.to_path_buf(),
            agent_help: help(agent, "receive")?,
            server_help: help(server, "deploy")?,
            layout,
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
    #[must_use]
    pub fn server(
        &self,
        net: &Net,
        source: &Source,
        trust_nodes: bool,
        receivers: usize,
        dir: &Path,
    ) -> Command {
        let mut command = net.command(0, &self.server);
        command
            .args(["deploy", "--listen", &format!("{}:{PORT}", address(0))])
            .args(["--nodes", &receivers.to_string()])
            .arg("--layout")
            .arg(&self.layout)
            .arg("--state")
            .arg(dir.join("nodes.json"))
            .arg("--log-dir")
            .arg(dir.join("nodes"));
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
        command
    }

    /// Whether the server reads the stream from its standard input.
    #[must_use]
    pub fn reads_standard_input(&self, source: &Source) -> bool {
        source.tree.is_none() && knows(&self.server_help, "--source-file")
    }

    /// `ka-agent receive` at a node.
    #[must_use]
    pub fn agent(&self, net: &Net, node: usize, sink: Sink) -> Command {
        let mut command = net.command(node, &self.agent);
        command.args([
            "receive",
            "--server",
            &format!("{}:{PORT}", address(0)),
            "--name",
            &format!("n{node}"),
        ]);
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
