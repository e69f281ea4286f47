//! The manifest of a real deployment, and the commands that compare with it: exit codes, text and JSON.

use super::{Deployment, agent_program, root, server_program};
use ka_archive::testing::hard_cases;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs `ka-server verify` or `ka-agent verify`; its exit code, what it printed, and its errors.
fn verify(program: &Path, words: &[&str], input: Option<&Path>) -> (i32, String, String) {
    let mut command = Command::new(program);
    command.arg("verify").args(words);
    command.stdin(input.map_or(Stdio::null(), |path| File::open(path).unwrap().into()));
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

#[test]
fn a_clone_is_verified_by_the_server_and_by_itself() {
    if !root() {
        return;
    }
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    let tree = golden.path().join("tree");
    fs::create_dir_all(&tree).unwrap();
    hard_cases(&tree).unwrap();
    fs::create_dir(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/hostname"), "golden\n").unwrap();
    fs::write(tree.join("etc/passwd"), "root\n").unwrap();
    let mut d = Deployment::start(1, &["--root", tree.to_str().unwrap()]);
    d.receiver();
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0][..]), "{}", d.everything());
    let logs = d.folder.path().join("log");
    let logs = logs.to_str().unwrap();
    let clone = d.target(0);
    let root = clone.to_str().unwrap();

    // Where it is.
    let (code, listed, _) = verify(&server_program(), &["--list", "--log-dir", logs], None);
    let manifest = listed.trim().rsplit_once(": ").unwrap().1.to_owned();
    assert_eq!((code, listed.lines().count()), (0, 1), "{listed}");
    assert!(manifest.ends_with("/manifest-1.mtree.zst") && d.server.text().contains(&manifest), "{listed}");
    assert_eq!(fs::metadata(&manifest).unwrap().permissions().mode() & 0o7777, 0o600);

    // Clean, from every side.
    let piped = Path::new(&manifest);
    for (program, words, input) in [
        (server_program(), &["--log-dir", logs][..], None),
        (server_program(), &["--log-dir", logs, "--root", root], None),
        (server_program(), &["--manifest", &manifest, "--root", root], None),
        (agent_program(), &["--manifest", &manifest, "--root", root], None),
        (agent_program(), &["--manifest", "-", "--root", root], Some(piped)),
    ] {
        let (code, out, err) = verify(&program, words, input);
        assert_eq!(code, 0, "{words:?}: {out}{err}");
        assert!(out.lines().count() == 1 && out.contains(" compared: clean"), "{words:?}: {out}");
    }

    // What a clone must have of its own, and what not.
    fs::write(clone.join("etc/hostname"), "n0\n").unwrap();
    let words = ["--manifest", &manifest, "--root", root];
    let (code, out, _) = verify(&agent_program(), &words, None);
    assert!(code == 0 && out.contains("(its own name 2)"), "{out}");
    fs::write(clone.join("etc/passwd"), "evil\n").unwrap();
    fs::set_permissions(clone.join("etc/hostname"), fs::Permissions::from_mode(0o666)).unwrap();
    let (code, out, _) = verify(&agent_program(), &words, None);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((code, lines.len()), (6, 4), "{out}");
    assert!(lines.contains(&"mode       /etc/hostname: golden 0644, here 0666"), "{out}");
    assert!(lines.contains(&"content    /etc/passwd"), "{out}");
    assert!(lines[3].contains("3 differences; 2 expected differences"), "{out}");
    let json = ["--log-dir", logs, "--root", root, "--json", "--all"];
    let (code, out, _) = verify(&server_program(), &json, None);
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((code, lines.len()), (6, 6), "{out}");
    assert!(
        lines
            .iter()
            .any(|l| l["path"] == "/etc/hostname" && l["what"] == "size" && l["expected"] == "its own name"),
        "{out}"
    );
    assert_eq!((&lines[5]["clean"], &lines[5]["differences"]), (&false.into(), &3.into()));
    let (code, out, _) =
        verify(&server_program(), &["--log-dir", logs, "--root", root, "--expect", "/etc/*"], None);
    assert!(code == 0 && out.contains("--expect"), "{out}");
    // The golden tree may not differ in what a clone may.
    fs::write(tree.join("etc/hostname"), "other\n").unwrap();
    assert_eq!(verify(&server_program(), &["--log-dir", logs], None).0, 6);

    // Nothing was compared.
    for (words, expected, cause) in [
        (&["--log-dir", logs, "no-such"][..], 1, "there is no manifest of deployment no-such"),
        (&["--log-dir", logs, "--wave", "2"], 1, "of wave 2"),
        (&["--manifest", "/etc/passwd"], 1, "no manifest of Ka"),
        (&["--log-dir", logs, "--root", "/no/such"], 1, "/no/such: No such file"),
        (&["--log-dir", logs, "--expect", "/a["], 2, "--expect: the glob `/a[`: a `[` without"),
        (&["--nonsense"], 2, "--nonsense"),
    ] {
        let (code, out, err) = verify(&server_program(), words, None);
        assert!(code == expected && out.is_empty() && err.contains(cause), "{words:?}: {code} {out}{err}");
    }
    let bytes = fs::read(&manifest).unwrap();
    fs::write(&manifest, &bytes[..bytes.len() - 9]).unwrap();
    let (code, out, err) = verify(&agent_program(), &words, None);
    assert!(code == 1 && out.is_empty() && err.contains("breaks off"), "{code} {out}{err}");
}

#[test]
fn a_manifest_that_cannot_be_written_holds_no_deployment_up() {
    if !root() {
        return;
    }
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::write(golden.path().join("file"), "x").unwrap();
    let mut d = Deployment::start(1, &["--root", golden.path().to_str().unwrap()]);
    // The deployment's folder is there already; the disk is full for the manifest alone.
    let folder = fs::read_dir(d.folder.path().join("log")).unwrap().next().unwrap().unwrap().path();
    std::os::unix::fs::symlink("/dev/full", folder.join("manifest-1.mtree.zst.unfinished")).unwrap();
    d.receiver();
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0][..]), "{}", d.everything());
    let text = d.server.text();
    assert!(text.contains("warning: this wave has no manifest") && text.contains("No space left"), "{text}");
    assert!(!folder.join("manifest-1.mtree.zst").exists());
}
