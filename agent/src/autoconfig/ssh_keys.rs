//! ssh host keys: new ones on every node, made by the clone's own `ssh-keygen`, for Debian makes them only when the
//! package is installed and no unit makes missing ones. Their fingerprints go into the report.

use super::{Change, Context, Piece};
use anyhow::{Context as _, Result, bail};
use ka_layout::order;
use std::time::Duration;

const DIR: &str = "/etc/ssh";
/// RSA keys take long on slow machines with little entropy.
const LIMIT: Duration = Duration::from_secs(300);

/// The piece.
pub struct SshKeys;

impl Piece for SshKeys {
    fn name(&self) -> &'static str {
        "ssh-keys"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        if context.order.policy.ssh_keys == order::SshKeys::Keep {
            return Ok(vec![Change::warning(
                "ssh-keys",
                DIR,
                "the golden node's host keys are kept, by policy",
            )]);
        }
        let mut changes = Vec::new();
        for key in root.matching(DIR, "ssh_host_", "")? {
            let name = key.to_string_lossy().into_owned();
            if (name.ends_with("_key") || name.ends_with("_key.pub")) && root.remove(&key)? {
                changes.push(Change::new("ssh-keys", name, "the golden node's removed"));
            }
        }
        if !root.exists("/usr/sbin/sshd") {
            return Ok(changes);
        }
        if !root.exists("/usr/bin/ssh-keygen") {
            bail!("making ssh host keys: the clone has sshd but no ssh-keygen; install openssh-client there");
        }
        context.run("ssh-keygen", &["-A"], LIMIT).context("making ssh host keys")?;
        if context.is_dry() {
            return Ok(changes);
        }
        // The comment that ssh-keygen writes is the name of the machine on which it ran.
        let node = context.order.node.name.clone();
        let made = root.matching(DIR, "ssh_host_", "_key.pub")?;
        if made.is_empty() {
            bail!("making ssh host keys: ssh-keygen -A made none in {DIR}");
        }
        for key in made {
            if let Some(text) = root.read_text(&key)? {
                let words: Vec<&str> = text.split_ascii_whitespace().collect();
                if let [kind, data, ..] = words[..] {
                    root.write_text(&key, &format!("{kind} {data} root@{node}\n"), 0o644)?;
                }
            }
            let name = key.to_string_lossy().into_owned();
            let print = context
                .ask("ssh-keygen", &["-l", "-f", &name], LIMIT)
                .with_context(|| format!("reading the fingerprint of {name}"))?;
            changes.push(Change::new("ssh-keys", name, format!("new: {}", print.text().trim())));
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn without_sshd_old_keys_only_go() {
        let lab = Lab::new();
        lab.file("/etc/ssh/ssh_host_rsa_key", "x").file("/etc/ssh/ssh_host_rsa_key.pub", "x");
        lab.file("/etc/ssh/ssh_config", "x");
        assert_eq!(SshKeys.apply(&lab.context()).unwrap().len(), 2);
        assert!(!lab.exists("/etc/ssh/ssh_host_rsa_key") && lab.exists("/etc/ssh/ssh_config"));
    }

    #[test]
    fn keys_are_kept_by_policy_with_a_warning() {
        let mut lab = Lab::new();
        lab.order.policy.ssh_keys = order::SshKeys::Keep;
        lab.file("/etc/ssh/ssh_host_rsa_key", "x");
        let changes = SshKeys.apply(&lab.context()).unwrap();
        assert!(changes.len() == 1 && changes[0].warning && lab.exists("/etc/ssh/ssh_host_rsa_key"));
    }

    #[test]
    fn sshd_without_keygen_is_an_error() {
        let lab = Lab::new();
        lab.file("/usr/sbin/sshd", "");
        let error = SshKeys.apply(&lab.context()).unwrap_err().to_string();
        assert!(error.contains("no ssh-keygen"), "{error}");
    }
}
