//! Raw partitions with the real programs: the parts behind the tree, who is refused, and what an installing node writes to a
//! disk that is full of something else.

use super::{Deployment, Running, agent_program, key_in, make_token, noise, root, server_program};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const LAYOUT: &str = "version = 1\n[[disk]]\nname = \"system\"\ntable = \"mbr\"\n\
    [[partition]]\nid = \"tools\"\ntype = \"0x27\"\nsize = \"12M\"\nraw = true\n\
    [[partition]]\ntype = \"linux\"\nsize = \"fill\"\nformat = { fs = \"ext4\" }\nmount = { path = \"/\" }\n\
    [[partition]]\nnumber = 4\ntype = \"prep\"\nsize = \"8M\"\nraw = true\n";

/// A golden tree, a layout with two raw partitions, and their content: with runs of zeros, and of odd lengths.
struct Golden {
    folder: tempfile::TempDir,
    contents: [Vec<u8>; 2],
}

impl Golden {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        noise(&folder.path().join("tree"), 2);
        fs::write(folder.path().join("layout.toml"), LAYOUT).unwrap();
        let mut random = File::open("/dev/urandom").unwrap();
        let contents = [(8 << 20) + 513, (1 << 20) + 7].map(|bytes: usize| {
            let mut content = vec![0; bytes];
            for block in content.chunks_mut(300_000).step_by(3) {
                random.read_exact(block).unwrap();
            }
            content
        });
        for (name, content) in ["a", "b"].iter().zip(&contents) {
            fs::write(folder.path().join(name), content).unwrap();
        }
        Self { folder, contents }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A deployment of it to so many nodes.
    fn deploy(&self, nodes: usize, more: &[&str]) -> Deployment {
        let text = |name: &str| self.path(name).display().to_string();
        let (tree, layout) = (text("tree"), text("layout.toml"));
        let raw = [format!("tools={}", text("a")), format!("4={}", text("b"))];
        let mut options = vec!["--root", &tree, "--raw", &raw[0], "--raw", &raw[1]];
        options.extend(more);
        Deployment::start_with(nodes, Path::new(&layout), &options)
    }
}

#[test]
fn the_parts_follow_the_tree_in_the_layouts_order_and_a_directory_is_refused() {
    let golden = Golden::new();
    let mut d = golden.deploy(2, &[]);
    let token = d.folder.path().join("token");
    let target = d.target(9);
    fs::create_dir(&target).unwrap();
    let mut command = d.command("n9", &d.key, &token);
    command.args(["--target", target.to_str().unwrap()]);
    let mut refused = Running::start(command);
    assert_eq!(refused.exit(), 1, "{}", refused.text());
    assert!(refused.text().contains("the layout has raw partitions"), "{}", refused.text());
    assert!(fs::read_dir(&target).unwrap().next().is_none());
    let parts = d.folder.path().join("parts");
    fs::create_dir(&parts).unwrap();
    // Once for each part.
    d.agent(&["--sink-cmd", &format!("cd {} && cat > $(ls | wc -l)", parts.display())]);
    d.agent(&["--discard"]);
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0, 0][..]), "{}", d.everything());
    assert_eq!(fs::read_dir(&parts).unwrap().count(), 3);
    let status =
        Command::new("tar").arg("-tf").arg(parts.join("0")).stdout(std::process::Stdio::null()).status();
    assert!(status.unwrap().success());
    for (name, content) in ["1", "2"].iter().zip(&golden.contents) {
        assert!(fs::read(parts.join(name)).unwrap() == *content, "part {name} is another");
    }
}

#[test]
fn a_source_that_is_missing_or_in_use_or_goes_away_is_told_and_nothing_looks_like_success() {
    let golden = Golden::new();
    let run = |options: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(server_program());
        command.args(["deploy", "--dry-run", "--nodes", "1", "--state"]).arg(folder.path().join("state"));
        command
            .arg("--root")
            .arg(golden.path("tree"))
            .arg("--layout")
            .arg(golden.path("layout.toml"))
            .args(options);
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
    };
    let (a, b) = (
        format!("--raw=tools={}", golden.path("a").display()),
        format!("--raw=4={}", golden.path("b").display()),
    );
    let (code, text) = run(&[&a, &b]);
    let shown =
        format!("# [[partition]] #1 (0x27): 8.00 MiB block for block from {}", golden.path("a").display());
    assert!(
        code == 0 && text.contains(&shown) && text.contains("# [[partition]] #3 (prep): 1.00 MiB"),
        "{text}"
    );
    let (code, text) = run(&[&a]);
    assert!(
        code == 1 && text.contains("#3 (prep): raw: the golden tree is not this running machine"),
        "{text}"
    );
    let (code, text) = run(&["--source-cmd", "true"]);
    assert!(
        code == 1 && text.contains("#1 (0x27) is raw, but a command or file gives one tar stream"),
        "{text}"
    );
    let settings = golden.path("server.toml");
    fs::write(&settings, format!("raw = [\"{}\", \"{}\"]\n", &a[6..], &b[6..])).unwrap();
    let (code, text) = run(&["--config", settings.to_str().unwrap()]);
    assert!(code == 0 && text.contains(&shown), "{text}");

    // It is shorter when its turn comes.
    let mut d = golden.deploy(1, &[]);
    File::options().write(true).open(golden.path("b")).unwrap().set_len(1000).unwrap();
    d.agent(&["--discard"]);
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (1, &[1][..]), "{}", d.everything());
    let reason = "sending [[partition]] #3 (prep): ";
    assert!(d.server.text().contains(reason) && d.agents[0].text().contains(reason), "{}", d.everything());
    assert!(d.server.text().contains("has 1000 bytes, but had 1048583"), "{}", d.everything());
}

/// A network of its own with one interface, for a node that installs is known by the MAC address of its own; gone when dropped.
struct Network(String);

impl Network {
    fn new() -> Self {
        let name = format!("karaw{}", std::process::id());
        let run = |words: &str| {
            assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
        };
        run(&format!("netns add {name}"));
        let network = Self(name);
        for words in [
            "link set lo up",
            "link add v0 type veth peer name v1",
            "addr add 10.78.0.1/24 dev v0",
            "link set v0 up",
        ] {
            run(&format!("-n {} {words}", network.0));
        }
        network
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// A loop device on a file; gone with its partitions when dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path) -> Self {
        let output =
            Command::new("losetup").args(["--find", "--show", "--partscan"]).arg(image).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(String::from_utf8_lossy(&output.stdout).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(disk) = File::open(&self.0) {
            for number in 1..=4 {
                // Those that are there.
                let _ = ka_sys::block::delete_partition(&disk, number);
            }
        }
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// `ka-agent deploy` as in a rescue system. Its tree is noise, so that it fails when it is configured; by then all blocks are
/// on the disk.
#[test]
fn an_installing_node_writes_the_blocks_over_what_was_there_and_a_source_that_is_mounted_is_refused() {
    if !root() {
        return;
    }
    if Path::new("/sys/firmware/efi").exists() {
        eprintln!("SKIPPED: booted by UEFI, for which this layout has no ESP");
        return;
    }
    let golden = Golden::new();
    let image = golden.path("disk");
    let mut file = File::create(&image).unwrap();
    for _ in 0..96 {
        file.write_all(&vec![0xa5; 1 << 20]).unwrap();
    }
    file.sync_all().unwrap();
    let disk = Loop::new(&image);
    let network = Network::new();
    let token = make_token(golden.folder.path(), "token", &[]);
    let mut command = network.command(&server_program());
    command.args(["deploy", "--listen", "10.78.0.1:0", "--nodes", "1", "--root"]).arg(golden.path("tree"));
    command.arg("--layout").arg(golden.path("layout.toml")).arg("--log-dir").arg(golden.path("log"));
    command.arg("--state").arg(golden.path("nodes.json"));
    command.arg(format!("--raw=tools={}", golden.path("a").display()));
    command.arg(format!("--raw=4={}", golden.path("b").display()));
    let mut server = Running::start(command);
    let line = server.wait_line("listening on TCP port");
    let port = line.split("port ").nth(1).unwrap().split(' ').next().unwrap();
    let key = key_in(&server.wait_line("this server's key is"));
    let script = "mkdir -p /target /run/ka && mount -t tmpfs tmpfs /run/ka && exec \"$@\"";
    let (target, run) = (Path::new("/target"), Path::new("/run/ka"));
    let made: Vec<&Path> = [target, run].into_iter().filter(|path| !path.exists()).collect();
    let mut command = network.command(Path::new("unshare"));
    command.args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh"]).arg(agent_program());
    command.args(["deploy", "--yes", "--key", &key, "--server", &format!("10.78.0.1:{port}"), "--disk"]);
    command.arg(&disk.0).arg("--token-file").arg(token);
    let mut agent = Running::start(command);
    // A node that never gets through would be waited for.
    let code = agent.exit();
    assert!(agent.text().contains("step receive"), "{}{}", agent.text(), server.text());
    let codes = (server.exit(), code);
    for path in made {
        let _ = fs::remove_dir(path);
    }
    let text = format!("{}{}", server.text(), agent.text());
    assert_eq!(codes, (1, 1), "{text}");
    assert!(text.contains("raw: 8.00 MiB from the stream"), "{text}");
    for (part, number, bytes) in [("#1 (0x27)", 1, (8 << 20) + 513), ("#3 (prep)", 4, (1 << 20) + 7)] {
        let line = format!("wrote {bytes} bytes of [[partition]] {part} to {}p{number}", disk.0.display());
        assert!(text.contains(&line), "{line}\n{text}");
    }
    assert!(text.contains("step configure") && !text.contains("FAILED in step receive"), "{text}");
    let on_disk = |start: u64, bytes: usize| {
        let mut now = vec![0; bytes];
        File::open(&image).unwrap().read_exact_at(&mut now, start).unwrap();
        now
    };
    let [a, b] = &golden.contents;
    assert!(on_disk(1 << 20, a.len()) == *a, "the first content is another");
    // Behind it, up to the wiped end, all is as it was.
    let behind = on_disk((1 << 20) + a.len() as u64, (10 << 20) - a.len());
    assert!(behind.iter().all(|b| *b == 0xa5));
    // The last partition ends with the disk's last MiB before the end, whatever the table needs there.
    let last = (1..95).rev().map(|mib| mib << 20).find(|start| on_disk(*start, b.len()) == *b);
    assert!(last.is_some(), "the second content is nowhere");

    // The same disk as a source: an ext4 that is mounted, first for writing, then not.
    let status =
        Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&disk.0).arg("8M").status().unwrap();
    assert!(status.success());
    let place = golden.path("place");
    fs::create_dir(&place).unwrap();
    let dry = |source: &Path| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(server_program());
        command.args(["deploy", "--dry-run", "--nodes", "1", "--state"]).arg(folder.path().join("state"));
        command.arg("--root").arg(golden.path("tree")).arg("--layout").arg(golden.path("layout.toml"));
        command.arg(format!("--raw=tools={}", golden.path("a").display()));
        command.arg(format!("--raw=4={}", source.display()));
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let too_big = "has 96.0 MiB, but the layout gives it 8.00 MiB at most";
    assert!(dry(&disk.0).contains(too_big), "{}", dry(&disk.0));
    for (options, source, refused) in
        [("rw", &disk.0, true), ("rw", &image, true), ("ro", &disk.0, false), ("ro", &image, false)]
    {
        assert!(
            Command::new("mount").args(["-o", options]).arg(&disk.0).arg(&place).status().unwrap().success()
        );
        let text = dry(source);
        assert!(Command::new("umount").arg(&place).status().unwrap().success());
        let mounted = format!("{} is mounted at {} and can be written", source.display(), place.display());
        assert!(text.contains(&mounted) == refused && text.contains(too_big) != refused, "{options}: {text}");
    }
}
