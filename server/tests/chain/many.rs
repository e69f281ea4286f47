//! Many at once on one host: ten disks that fill at the same chunk, and two deployments side by side.

use super::{Deployment, noise, root};
use ka_archive::testing::compare_with_rsync;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system on a directory, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: &Path) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(path).status();
        assert!(status.unwrap().success());
        Self(path.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // A test that fails leaves its own words; this may only follow them.
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}

/// Every clone of a lot that was bought together has the same disk, and it is full at the same chunk.
#[test]
fn ten_disks_that_fill_at_the_same_chunk_fail_and_the_good_nodes_finish_in_the_same_wave() {
    if !root() {
        return;
    }
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    noise(golden.path(), 24);
    let good = [0, 6, 12];
    let options = ["--order", "arrival", "--root", golden.path().to_str().unwrap()];
    let mut d = Deployment::start(13, &options);
    let mut small = Vec::new();
    for n in 0..13 {
        if !good.contains(&n) {
            small.push(Small::mount(&d.target(n)));
        }
        d.receiver();
    }
    let (server, agents) = d.exits();
    drop(small);
    let expected: Vec<i32> = (0..13).map(|n| i32::from(!good.contains(&n))).collect();
    assert_eq!((server, agents), (3, expected), "{}", d.everything());
    for n in good {
        let differences = compare_with_rsync(golden.path(), &d.target(n), &[]).unwrap();
        assert!(differences.is_empty(), "node {n}: {differences:?}");
    }
    let text = d.server.text();
    for n in (0..13).filter(|n| !good.contains(n)) {
        let failed = format!("n{n} FAILED in step receive: ");
        let line = text.lines().find(|line| line.contains(&failed)).unwrap_or_default();
        assert!(line.contains("No space left on device"), "node {n}: {text}");
    }
    // One start: "starting with 13 nodes", and no "starting wave 2".
    assert_eq!(text.matches("starting ").count(), 1, "{text}");
    assert!(!text.contains("wave 2") && !text.contains("lost its parent"), "{text}");
}

/// Two servers and all their nodes, at the same time on one host.
#[test]
fn two_deployments_side_by_side_on_one_host_do_not_meet() {
    let trees = [(); 2].map(|()| tempfile::tempdir_in("/var/tmp").unwrap());
    for tree in &trees {
        noise(tree.path(), 6);
    }
    let mut both: Vec<Deployment> =
        trees.iter().map(|tree| Deployment::start(2, &["--root", tree.path().to_str().unwrap()])).collect();
    assert_ne!(both[0].key, both[1].key);
    for _ in 0..2 {
        for d in &mut both {
            d.receiver();
        }
    }
    for (tree, d) in trees.iter().zip(&mut both) {
        let (server, agents) = d.exits();
        assert_eq!((server, &agents[..]), (0, &[0, 0][..]), "{}", d.everything());
        for n in 0..2 {
            assert!(compare_with_rsync(tree.path(), &d.target(n), &[]).unwrap().is_empty());
        }
    }
}
