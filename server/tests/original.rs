//! How the original failed and Ka does not: the rows of docs/failures-of-the-original.md that no other test shows, with the
//! real programs; and that every test which the page names is there. Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use lab::{Lab, Program, possible};
use programs::{agent_program, key_in, make_token, server_program};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A machine of the lab as Debian's installer leaves it: its own name leads to 127.0.1.1. `golden` is the server; the
/// server's own machine knows it by the loopback address only.
struct Debian<'a> {
    lab: &'a Lab,
    machine: usize,
}

impl Debian<'_> {
    fn run(&self, program: &Path, args: &[&str]) -> Program {
        let name = if self.machine == 0 { "golden".to_owned() } else { format!("machine{}", self.machine) };
        let hosts = self.lab.folder.path().join(format!("hosts{}", self.machine));
        let mut text = format!("127.0.0.1 localhost\n127.0.1.1 {name}.example {name}\n");
        if self.machine != 0 {
            text.push_str("10.77.0.1 golden\n");
        }
        std::fs::write(&hosts, text).unwrap();
        let script = "hostname \"$1\"; mount --bind \"$2\" /etc/hosts; shift 2; exec \"$@\"";
        let mut command = self.lab.inside(self.machine, Path::new("unshare"));
        command
            .args(["--mount", "--uts", "sh", "-ec", script, "sh", &name])
            .arg(hosts)
            .arg(program)
            .args(args);
        Program::start(command)
    }
}

fn text_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The first client of the original dialled what the server's name led to, and so itself. Here that client even runs on the
/// server's host, and feeds the others.
#[test]
fn a_host_name_that_leads_to_127_0_1_1_misleads_nobody() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(2);
    let folder = lab.folder.path().to_owned();
    let layout = folder.join("layout.toml");
    let text = "version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n[[partition]]\ntype = \"linux\"\n\
                size = \"fill\"\nformat = { fs = \"ext4\" }\nmount = { path = \"/\" }\n";
    std::fs::write(&layout, text).unwrap();
    let token = make_token(&folder, "token", &["--shared"]);
    let source = lab.source();
    let (state, log) = (lab.state(), folder.join("log"));
    let mut options = vec!["deploy", "--listen", ":5757", "--nodes", "3", "--order", "arrival"];
    options.extend(["--layout", text_of(&layout), "--source-cmd", &source]);
    options.extend(["--state", text_of(&state), "--log-dir", text_of(&log)]);
    let server = Debian { lab: &lab, machine: 0 }.run(&server_program(), &options);
    server.wait_for("listening on TCP port");
    server.wait_for("this server's key is ");
    let key = key_in(&server.text());
    let mut nodes = Vec::new();
    for (n, machine) in [(1, 0), (2, 1), (3, 2)] {
        let (name, sink) = (format!("n{n}"), format!("sha256sum > {}", lab.sum_of(n).display()));
        let mut options = vec!["receive", "--server", "golden:5757", "--name", &name, "--key", &key];
        options.extend(["--token-file", text_of(&token), "--sink-cmd", &sink]);
        nodes.push(Debian { lab: &lab, machine }.run(&agent_program(), &options));
        server.wait_for(&format!("{name} is ready"));
    }
    lab.server = Some(server);
    lab.nodes = nodes;
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0; 3][..]), "{}", lab.everything());
    lab.check_sums(3, &[]);
    let text = lab.everything();
    // So it was as it should be tested: the first node came over the loopback address of the server's own name.
    let registered = text.lines().find(|line| line.contains("n1 registered from")).unwrap();
    assert!(registered.contains("127.0."), "{registered}");
    assert!(text.contains("starting with 3 nodes: n1 n2 n3"), "{text}");
    assert!(!text.contains("lost its parent"), "{text}");
}

/// Clients of the original gave up after 10 s, and one that came after the start was left out.
#[test]
fn nodes_that_are_early_wait_and_nodes_that_are_late_are_served() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(3);
    let source = lab.source();
    lab.start_server(&source, &["--nodes", "2"]);
    // The nodes know the server's key, and no server is there for longer than the original's clients waited.
    let first = lab.server.take().unwrap();
    let key = first.text();
    drop(first);
    lab.server = Some(Program::start({
        let mut echo = Command::new("sh");
        echo.args(["-c", "echo \"$1\" >&2", "sh", &key]);
        echo
    }));
    lab.server.as_ref().unwrap().wait_for("this server's key is ");
    for n in 1..=2 {
        lab.start_node(n, None);
    }
    std::thread::sleep(Duration::from_secs(12));
    lab.start_server(&source, &["--nodes", "2"]);
    lab.server.as_ref().unwrap().wait_for("starting with 2 nodes");
    std::thread::sleep(Duration::from_secs(1));
    lab.start_node(3, None);
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0; 3][..]), "{}", lab.everything());
    lab.check_sums(3, &[]);
    let text = lab.everything();
    assert!(
        text.contains("for the next wave") && text.contains("starting wave 2, with 1 nodes: n3"),
        "{text}"
    );
}

/// The original's client ended with 0 and what tar said went to /dev/null.
#[test]
fn a_sink_command_that_fails_is_heard_in_its_own_words() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(2);
    let source = lab.source();
    lab.start_server(&source, &["--nodes", "2"]);
    // It reads everything, and fails only then.
    lab.start_node(1, Some("cat > /dev/null; echo the tape is torn >&2; exit 7"));
    lab.start_node(2, None);
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (3, &[1, 0][..]), "{}", lab.everything());
    lab.check_sums(2, &[1]);
    assert!(lab.nodes[0].text().contains("the tape is torn"), "{}", lab.everything());
    let said = lab.server.as_ref().unwrap().text();
    assert!(said.contains("n1 FAILED in step receive") && said.contains("exit status 7"), "{said}");
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The words between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// What is wrong with a page that names tests: `file.rs::name` must be a test of that file, `xtask test: name` one with
/// virtual machines, and every row of its table must name one.
fn check(page: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    let rows: Vec<&str> = page.lines().filter(|l| l.starts_with('|')).skip(2).collect();
    if rows.is_empty() {
        wrong.push("no table".to_owned());
    }
    for row in rows {
        let mut tests = 0;
        for word in quoted(row) {
            let found = if let Some(name) = word.strip_prefix("xtask test: ") {
                read("xtask/src/test/mod.rs").is_some_and(|text| text.contains(&format!("\"{name}\"")))
            } else if let Some((file, name)) = word.split_once(".rs::") {
                let text = read(&format!("{file}.rs")).unwrap_or_default();
                // A function, and an attribute of a test not far above it.
                text.match_indices(&format!("fn {name}(")).any(|(at, _)| {
                    let above = text[..at].lines().rev().take(12).map(str::trim);
                    above
                        .take_while(|line| *line != "}")
                        .any(|line| line == "#[test]" || line == "proptest! {")
                })
            } else {
                continue;
            };
            tests += 1;
            if !found {
                wrong.push(format!("there is no test `{word}`"));
            }
        }
        if tests == 0 {
            wrong.push(format!("no test in the row {row}"));
        }
    }
    wrong
}

#[test]
fn every_test_that_the_page_names_is_there() {
    let read = |path: &str| std::fs::read_to_string(workspace().join(path)).ok();
    let page = read("docs/failures-of-the-original.md").unwrap();
    let wrong = check(&page, read);
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(page.lines().filter(|l| l.starts_with('|')).count() >= 10, "rows are missing");
}

#[test]
fn a_page_that_names_what_is_not_there_is_found() {
    let read = |path: &str| (path == "a.rs").then(|| "#[test]\nfn one() {\n}\nfn helper() {\n}\n".to_owned());
    let page = |cell: &str| format!("| row | tests |\n|---|---|\n| it failed | {cell} |\n");
    assert_eq!(check(&page("`a.rs::one`"), read), [""; 0]);
    for cell in ["`a.rs::two`", "`a.rs::helper`", "`b.rs::one`", "`xtask test: one`", "nothing", "`one`"] {
        assert_eq!(check(&page(cell), read).len(), 1, "{cell}");
    }
    assert_eq!(check("no table at all", read).len(), 1);
}
