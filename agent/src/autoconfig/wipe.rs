//! What the operator asks to be removed by name (`policy.wipe`). Without being asked a clone keeps all of it: on a cluster
//! the nodes are to be the golden node's equals, not strangers.

use super::{Change, Context, Piece};
use anyhow::{Result, bail};

/// What is done with a path.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// A file, or a directory with all that is in it, goes.
    Remove(&'static str),
    /// All in a directory goes, the directory stays.
    Empty(&'static str),
    /// The files in a directory whose names begin and end so go.
    Set(&'static str, &'static str, &'static str),
    /// A log stays with nothing in it: who writes it may not be able to make it.
    Truncate(&'static str),
    /// So for every file below a directory.
    TruncateAll(&'static str),
    /// The same path in root's home and in every home.
    Home(&'static str),
}
use Act::{Empty, Home, Remove, Set, Truncate, TruncateAll};

/// By name, what goes.
const WIPES: &[(&str, &[Act])] = &[
    (
        "logs",
        &[
            Set("/var/log", "", ".gz"),
            Set("/var/log", "", ".xz"),
            Set("/var/log", "", ".old"),
            Set("/var/log", "", ".1"),
            Truncate("/var/log/wtmp"),
            Truncate("/var/log/btmp"),
            Truncate("/var/log/lastlog"),
            Truncate("/var/log/tallylog"),
            Truncate("/var/log/faillog"),
            Remove("/var/lib/lastlog/lastlog2.db"),
            Remove("/var/lib/wtmpdb/wtmp.db"),
            TruncateAll("/var/log"),
        ],
    ),
    ("journal", &[Empty("/var/log/journal")]),
    (
        "histories",
        &[
            Home(".bash_history"),
            Home(".zsh_history"),
            Home(".ash_history"),
            Home(".local/share/fish/fish_history"),
            Home(".python_history"),
            Home(".lesshst"),
            Home(".viminfo"),
            Home(".mysql_history"),
            Home(".psql_history"),
            Home(".sqlite_history"),
        ],
    ),
    ("tmp", &[Empty("/tmp"), Empty("/var/tmp")]),
    (
        "crash",
        &[
            Empty("/var/crash"),
            Empty("/var/lib/systemd/coredump"),
            Empty("/var/lib/kdump"),
            Empty("/var/lib/systemd/pstore"),
        ],
    ),
    (
        "package-cache",
        &[
            Set("/var/cache/apt/archives", "", ".deb"),
            Set("/var/cache/apt", "", ".bin"),
            Empty("/var/cache/dnf"),
            Empty("/var/cache/libdnf5"),
            Empty("/var/cache/yum"),
            Empty("/var/cache/zypp"),
            Empty("/var/cache/pacman/pkg"),
        ],
    ),
    ("mail", &[Empty("/var/spool/mail"), Empty("/var/mail")]),
    (
        "cloud-init",
        &[
            Empty("/var/lib/cloud"),
            Remove("/etc/cloud/cloud-init.disabled"),
            Set("/var/log", "cloud-init", ".log"),
        ],
    ),
    (
        "subscription",
        &[
            // Red Hat's subscription manager and its predecessor, and DNF's weekly count.
            Empty("/etc/pki/consumer"),
            Empty("/etc/pki/entitlement"),
            Remove("/etc/sysconfig/rhn/systemid"),
            Remove("/etc/sysconfig/rhn/osad-auth.conf"),
            Empty("/var/lib/rhsm/facts"),
            Remove("/var/lib/dnf/repos"),
            Remove("/etc/insights-client/machine-id"),
            // SUSE Customer Center.
            Remove("/etc/SUSEConnect"),
            Remove("/etc/zypp/credentials.d/SCCcredentials"),
            Remove("/var/lib/zypp/AnonymousUniqueId"),
            // Ubuntu Pro, Landscape.
            Remove("/var/lib/ubuntu-advantage/private"),
            Remove("/etc/machine-token.json"),
            Empty("/var/lib/landscape/client"),
        ],
    ),
    ("popcon", &[Remove("/etc/popularity-contest.conf")]),
    (
        "puppet",
        &[
            Remove("/etc/puppetlabs/puppet/ssl"),
            Remove("/etc/puppet/ssl"),
            Remove("/var/lib/puppet/ssl"),
            Remove("/opt/puppetlabs/puppet/cache/state"),
        ],
    ),
    (
        "salt",
        &[
            Remove("/etc/salt/minion_id"),
            Remove("/etc/salt/pki/minion"),
            Remove("/etc/venv-salt-minion/minion_id"),
            Remove("/etc/venv-salt-minion/pki/minion"),
        ],
    ),
    ("chef", &[Remove("/etc/chef/client.pem"), Set("/etc/chef", "", ".pem"), Empty("/var/chef/cache")]),
    ("krb5", &[Remove("/etc/krb5.keytab")]),
    (
        "directory",
        &[
            Empty("/var/lib/sss/db"),
            Empty("/var/lib/sss/mc"),
            Remove("/var/lib/samba/private/secrets.tdb"),
            Remove("/etc/samba/secrets.tdb"),
            Remove("/etc/ipa/default.conf"),
            Empty("/var/lib/ipa-client/sysrestore"),
            Remove("/etc/krb5.keytab"),
        ],
    ),
    (
        "docker",
        &[
            Remove("/var/lib/docker/engine-id"),
            Remove("/etc/docker/key.json"),
            Remove("/var/lib/docker/swarm"),
        ],
    ),
    (
        "kubernetes",
        &[
            Remove("/var/lib/kubelet/pki"),
            Remove("/var/lib/kubelet/cpu_manager_state"),
            Remove("/var/lib/kubelet/memory_manager_state"),
            Remove("/etc/kubernetes/kubelet.conf"),
            Remove("/etc/kubernetes/bootstrap-kubelet.conf"),
            Empty("/var/lib/etcd"),
            Remove("/etc/rancher/node"),
        ],
    ),
    ("tailscale", &[Remove("/var/lib/tailscale/tailscaled.state")]),
    ("zabbix", &[Remove("/etc/zabbix/zabbix_agentd.psk"), Remove("/etc/zabbix/zabbix_agent2.psk")]),
    ("abrt", &[Empty("/var/spool/abrt"), Empty("/var/tmp/abrt")]),
];

/// The piece.
pub struct Wipe;

impl Piece for Wipe {
    fn name(&self) -> &'static str {
        "wipe"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for name in &context.order.policy.wipe {
            let Some((_, acts)) = WIPES.iter().find(|(known, _)| known == name) else {
                bail!("wiping {name}: this agent knows no such thing");
            };
            for act in *acts {
                apply(context, name, *act, &mut changes)?;
            }
        }
        Ok(changes)
    }
}

fn apply(context: &Context, name: &str, act: Act, changes: &mut Vec<Change>) -> Result<()> {
    let root = &context.root;
    let mut done =
        |path: String, what: &str| changes.push(Change::new("wipe", path, format!("{what} ({name})")));
    match act {
        Remove(path) => {
            if root.remove_tree(path)? {
                done(path.to_owned(), "deleted");
            }
        }
        Empty(dir) => {
            for entry in root.matching(dir, "", "")? {
                // What stands for the directory itself in a package stays.
                if root.remove_tree(&entry)? {
                    done(entry.to_string_lossy().into_owned(), "deleted");
                }
            }
        }
        Set(dir, prefix, suffix) => {
            for entry in root.matching(dir, prefix, suffix)? {
                if root.remove(&entry)? {
                    done(entry.to_string_lossy().into_owned(), "deleted");
                }
            }
        }
        Truncate(path) => {
            if root.size(path).is_some_and(|size| size > 0) && root.write(path, b"", 0o640)? {
                done(path.to_owned(), "emptied");
            }
        }
        TruncateAll(dir) => {
            // Logs lie two directories deep at most; the journal is another matter.
            let mut dirs = vec![(dir.to_owned(), 0)];
            while let Some((dir, depth)) = dirs.pop() {
                for entry in root.matching(&dir, "", "")? {
                    let path = entry.to_string_lossy().into_owned();
                    if root.link(&entry).is_some() || path.starts_with("/var/log/journal") {
                        continue;
                    }
                    if root.is_dir(&entry) {
                        if depth < 3 {
                            dirs.push((path, depth + 1));
                        }
                    } else if root.size(&entry).is_some_and(|size| size > 0) && root.truncate(&entry)? {
                        done(path, "emptied");
                    }
                }
            }
        }
        Home(path) => {
            let mut homes = vec!["/root".to_owned()];
            homes.extend(
                root.matching("/home", "", "")?.into_iter().map(|p| p.to_string_lossy().into_owned()),
            );
            for home in homes {
                let path = format!("{home}/{path}");
                if root.remove(&path)? {
                    done(path, "deleted");
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn the_names_are_those_that_the_server_takes() {
        let names: Vec<&str> = WIPES.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ka_layout::pieces::WIPES);
    }

    #[test]
    fn nothing_goes_unasked() {
        let lab = Lab::new();
        lab.file("/root/.bash_history", "x").file("/var/log/syslog", "x").file("/etc/krb5.keytab", "x");
        assert!(Wipe.apply(&lab.context()).unwrap().is_empty());
        assert!(lab.exists("/root/.bash_history") && lab.exists("/etc/krb5.keytab"));
    }

    /// Each name, a file that goes and one that stays.
    #[test]
    fn each_name_removes_its_own_and_no_more() {
        let cases = [
            ("logs", "/var/log/syslog.2.gz", "/var/log/journal/0/system.journal"),
            ("journal", "/var/log/journal/0/system.journal", "/var/log/dmesg.0"),
            ("histories", "/home/ann/.bash_history", "/home/ann/.ssh/authorized_keys"),
            ("tmp", "/tmp/x/y", "/etc/tmpfiles.d/x.conf"),
            ("crash", "/var/crash/127.0.0.1/vmcore", "/etc/kdump.conf"),
            ("package-cache", "/var/cache/zypp/packages/x.rpm", "/var/cache/man/index.db"),
            ("mail", "/var/spool/mail/root", "/var/spool/cron/root"),
            ("cloud-init", "/var/lib/cloud/instance/id", "/etc/cloud/cloud.cfg"),
            ("subscription", "/etc/pki/consumer/cert.pem", "/etc/pki/tls/certs/ca.pem"),
            ("popcon", "/etc/popularity-contest.conf", "/etc/cron.daily/popularity-contest"),
            ("puppet", "/etc/puppetlabs/puppet/ssl/private_keys/n.pem", "/etc/puppetlabs/puppet/puppet.conf"),
            ("salt", "/etc/salt/pki/minion/minion.pem", "/etc/salt/minion"),
            ("chef", "/etc/chef/client.pem", "/etc/chef/client.rb"),
            ("krb5", "/etc/krb5.keytab", "/etc/krb5.conf"),
            ("directory", "/var/lib/sss/db/cache_x.ldb", "/etc/sssd/sssd.conf"),
            ("docker", "/var/lib/docker/engine-id", "/var/lib/docker/image/x"),
            ("kubernetes", "/var/lib/kubelet/pki/kubelet.crt", "/etc/kubernetes/pki/ca.crt"),
            ("tailscale", "/var/lib/tailscale/tailscaled.state", "/etc/default/tailscaled"),
            ("zabbix", "/etc/zabbix/zabbix_agentd.psk", "/etc/zabbix/zabbix_agentd.conf"),
            ("abrt", "/var/spool/abrt/ccpp-1/core", "/etc/abrt/abrt.conf"),
        ];
        assert_eq!(cases.map(|(name, ..)| name), ka_layout::pieces::WIPES, "every name has a case");
        for (name, goes, stays) in cases {
            let mut lab = Lab::new();
            lab.file(goes, "x").file(stays, "x");
            lab.order.policy.wipe = vec![name.to_owned()];
            assert!(!Wipe.apply(&lab.context()).unwrap().is_empty(), "{name}");
            assert!(!lab.exists(goes) && lab.exists(stays), "{name}");
        }
    }

    #[test]
    fn logs_are_emptied_where_they_stand_and_kept_paths_stay() {
        let mut lab = Lab::new();
        lab.order.policy.wipe = vec!["logs".into(), "subscription".into()];
        lab.order.policy.keep = vec!["/var/log/audit".into(), "/etc/pki/entitlement/mine.pem".into()];
        lab.file("/var/log/wtmp", "x")
            .file("/var/log/nginx/access.log", "x")
            .file("/var/log/audit/audit.log", "x");
        lab.file("/etc/pki/entitlement/mine.pem", "x").file("/etc/pki/entitlement/other.pem", "x");
        Wipe.apply(&lab.context()).unwrap();
        assert_eq!(
            (lab.read("/var/log/wtmp"), lab.read("/var/log/nginx/access.log")),
            (String::new(), String::new())
        );
        assert_eq!(lab.read("/var/log/audit/audit.log"), "x");
        assert!(lab.exists("/etc/pki/entitlement/mine.pem") && !lab.exists("/etc/pki/entitlement/other.pem"));
    }

    #[test]
    fn no_link_leads_out_and_unknown_names_are_refused() {
        let mut lab = Lab::new();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("precious"), "x").unwrap();
        lab.file("/var/tmp/x", "");
        std::os::unix::fs::symlink(outside.path(), lab.target.join("var/mail")).unwrap();
        std::os::unix::fs::symlink(outside.path(), lab.target.join("var/tmp/link")).unwrap();
        lab.order.policy.wipe = vec!["tmp".into(), "mail".into()];
        Wipe.apply(&lab.context()).unwrap();
        assert!(outside.path().join("precious").exists() && !lab.exists("/var/tmp/link"));
        lab.order.policy.wipe = vec!["everything".into()];
        assert!(Wipe.apply(&lab.context()).unwrap_err().to_string().contains("everything"));
    }
}
