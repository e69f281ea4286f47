//! The operator's hooks, in the order of their names, inside the clone or beside it. What they print goes to the log
//! line by line; one that fails or takes too long fails the node.

use super::{Change, Context};
use anyhow::{Context as _, Result, bail};
use ka_layout::order::{Firmware, Hook, HookPlace};
use ka_sys::process::command_in;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The name by which policy skips the hooks.
pub const NAME: &str = "hooks";
/// How long one hook may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Where hooks that run beside the clone are put.
const HOST_DIR: &str = "/run/ka/hooks";
/// The longest line that is logged in one piece.
const LINE_LIMIT: usize = 4096;
/// Bytes of standard error that an error quotes.
const TAIL: usize = 1024;

/// Runs all hooks.
///
/// # Errors
/// When one cannot be started, fails or takes longer than 600 s.
pub fn run_all(context: &Context) -> Result<Vec<Change>> {
    let mut hooks: Vec<&Hook> = context.order.hooks.iter().collect();
    hooks.sort_by(|a, b| a.name.cmp(&b.name));
    let mut changes = Vec::new();
    for hook in hooks {
        let start = Instant::now();
        log::info!("hook {}: running", hook.name);
        run(context, hook, LIMIT).with_context(|| format!("running hook {}", hook.name))?;
        let seconds = start.elapsed().as_secs_f64();
        changes.push(Change::new(NAME, &hook.name, format!("ran {seconds:.1} s")));
    }
    Ok(changes)
}

/// The variables that every hook gets; an unknown one is empty.
pub fn variables(context: &Context) -> Vec<(&'static str, String)> {
    let node = &context.order.node;
    let nic = context.network;
    let root = context.mounted_at("/");
    let mac = node.mac.clone().or_else(|| nic.map(|n| n.mac.clone()));
    let os = &context.order.golden.os_release;
    vec![
        ("KA_NODE", node.name.clone()),
        ("KA_HOSTNAME", node.name.split('.').next().unwrap_or_default().to_owned()),
        ("KA_INDEX", node.index.to_string()),
        ("KA_MAC", mac.unwrap_or_default()),
        ("KA_IP", nic.and_then(|n| n.address.clone()).unwrap_or_default()),
        ("KA_INTERFACE", nic.map(|n| n.interface.clone()).unwrap_or_default()),
        ("KA_GROUP", node.group.clone().unwrap_or_default()),
        ("KA_TARGET", context.target.to_string_lossy().into_owned()),
        ("KA_ROOT_DEVICE", root.map(|v| v.device.clone()).unwrap_or_default()),
        ("KA_DISK", root.map(|v| v.disk.clone()).unwrap_or_default()),
        ("KA_FIRMWARE", if context.firmware == Firmware::Uefi { "uefi" } else { "bios" }.to_owned()),
        ("KA_DEPLOYMENT", context.order.deployment.clone()),
        ("KA_OS_ID", os.get("ID").cloned().unwrap_or_default()),
    ]
}

fn run(context: &Context, hook: &Hook, limit: Duration) -> Result<()> {
    // The name comes over the network and becomes part of a path.
    if hook.name.is_empty() || hook.name.len() > 200 || hook.name.contains('/') || hook.name.starts_with('.')
    {
        bail!("{:?} is no name for a hook", hook.name);
    }
    let (dir, mut command) = match hook.place {
        HookPlace::Target => {
            let dir = context.root.real_dir("/run")?.join("ka-hooks");
            (dir, command_in(context.target, &format!("/run/ka-hooks/{}", hook.name)))
        }
        HookPlace::Host => {
            let mut command = Command::new(Path::new(HOST_DIR).join(&hook.name));
            // The same in the initramfs, where PID 1 has a bare environment, as in a rescue system.
            command
                .env_clear()
                .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .env("LC_ALL", "C")
                .env("HOME", "/root")
                .current_dir("/");
            (PathBuf::from(HOST_DIR), command)
        }
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let file = dir.join(&hook.name);
    write_program(&file, &hook.program).with_context(|| format!("writing {}", file.display()))?;
    command.envs(variables(context));
    if hook.place == HookPlace::Target {
        // There the clone is the root.
        command.env("KA_TARGET", "/");
    }
    let result = supervise(command, &hook.name, limit);
    std::fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
    result
}

fn write_program(file: &Path, program: &[u8]) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut new = options.write(true).create(true).truncate(true).mode(0o700).open(file)?;
    std::io::Write::write_all(&mut new, program)?;
    new.set_permissions(std::fs::Permissions::from_mode(0o700))
}

/// Runs the program in a process group of its own and logs what it prints, until it ends or its time is over; then the
/// whole group is killed.
fn supervise(mut command: Command, name: &str, limit: Duration) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = spawn(&mut command)?;
    let deadline = Instant::now() + limit;
    let mut stdout = Stream::new(child.stdout.take().map(Into::into), name)?;
    let mut stderr = Stream::new(child.stderr.take().map(Into::into), name)?;
    let status = loop {
        stdout.pump()?;
        stderr.pump()?;
        match child.try_wait().context("waiting for it")? {
            Some(status) => break Some(status),
            None if Instant::now() >= deadline => break None,
            None => wait_for_output(&stdout, &stderr)?,
        }
    };
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        // Children that it left behind would keep the clone busy. There are none as a rule.
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    if status.is_none() {
        child.wait().context("waiting for it")?;
    }
    // What it printed last, without waiting for those who still hold the pipes.
    stdout.pump()?;
    stderr.pump()?;
    stdout.end();
    stderr.end();
    let tail = stderr.tail();
    match status {
        None => bail!("it did not end within {} s and was killed{tail}", limit.as_secs()),
        Some(status) if !status.success() => bail!("it {}{tail}", ended(status)),
        Some(_) => Ok(()),
    }
}

fn spawn(command: &mut Command) -> Result<Child> {
    // ETXTBSY: another thread forked while we still wrote the file, and its child has not yet run exec.
    for _ in 0..50 {
        match command.spawn() {
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(e).context("starting it (is the interpreter that its first line names there?)");
            }
            other => return other.context("starting it"),
        }
    }
    bail!("starting it: its file stays busy");
}

fn wait_for_output(stdout: &Stream, stderr: &Stream) -> Result<()> {
    let pause = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let pipes = [stdout, stderr].into_iter().filter_map(|s| s.pipe.as_ref());
    let mut fds: Vec<PollFd> = pipes.map(|p| PollFd::new(p, PollFlags::IN)).collect();
    match poll(&mut fds, Some(&pause)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e).context("waiting for its output"),
    }
}

fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// One output stream of a hook, cut into lines for the log.
struct Stream<'a> {
    pipe: Option<std::fs::File>,
    name: &'a str,
    line: Vec<u8>,
    last: Vec<u8>,
}

impl<'a> Stream<'a> {
    fn new(pipe: Option<std::os::fd::OwnedFd>, name: &'a str) -> Result<Self> {
        if let Some(pipe) = &pipe {
            rustix::io::ioctl_fionbio(pipe, true).context("preparing to read its output")?;
        }
        Ok(Self { pipe: pipe.map(Into::into), name, line: Vec::new(), last: Vec::new() })
    }

    /// Logs what has come, without waiting for more. At most 1 MiB, so that one that never stops cannot keep us here.
    fn pump(&mut self) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        for _ in 0..64 {
            let Some(pipe) = &mut self.pipe else { return Ok(()) };
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(n) => self.take(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("reading its output"),
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) {
        self.last.extend_from_slice(bytes);
        let excess = self.last.len().saturating_sub(TAIL);
        self.last.drain(..excess);
        for part in bytes.split_inclusive(|&b| b == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") || self.line.len() >= LINE_LIMIT {
                self.end();
            }
        }
    }

    /// Logs the line begun.
    fn end(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        if !text.trim().is_empty() {
            log::info!("hook {}: {}", self.name, text.trim_end());
        }
        self.line.clear();
    }

    fn tail(&self) -> String {
        let text = String::from_utf8_lossy(&self.last);
        if text.trim().is_empty() { String::new() } else { format!(": {}", text.trim()) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    fn lab(place: HookPlace, program: &[u8]) -> Lab {
        let mut lab = Lab::new();
        lab.order.hooks.push(Hook {
            name: format!("50-test-{}", uuid::Uuid::new_v4()),
            program: program.into(),
            place,
        });
        lab
    }

    #[test]
    fn hooks_beside_the_clone_get_the_variables() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: /run/ka is root's");
            return;
        }
        let script = b"#!/bin/sh\nset -eu\nenv | grep ^KA_ | sort > $KA_TARGET/seen\necho said\n";
        let mut lab = lab(HookPlace::Host, script);
        lab.nic = Some(super::super::Nic {
            interface: "eth0".into(),
            mac: "52:54:00:00:00:99".into(),
            address: Some("10.0.0.7".into()),
        });
        let changes = run_all(&lab.context()).unwrap();
        assert_eq!(changes.len(), 1);
        let target = lab.target.to_string_lossy().into_owned();
        let wanted = [
            "KA_DEPLOYMENT=d1",
            "KA_DISK=/dev/nvme0n1",
            "KA_FIRMWARE=uefi",
            "KA_GROUP=blue",
            "KA_HOSTNAME=node7",
            "KA_INDEX=7",
            "KA_INTERFACE=eth0",
            "KA_IP=10.0.0.7",
            "KA_MAC=52:54:00:12:34:56",
            "KA_NODE=node7",
            "KA_OS_ID=debian",
            "KA_ROOT_DEVICE=/dev/nvme0n1p3",
            &format!("KA_TARGET={target}"),
        ];
        assert_eq!(lab.read("/seen").lines().collect::<Vec<_>>(), wanted);
        assert!(!Path::new(HOST_DIR).join(&lab.order.hooks[0].name).exists());
    }

    #[test]
    fn a_failure_is_named_with_status_and_stderr() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: /run/ka is root's");
            return;
        }
        let lab = lab(HookPlace::Host, b"#!/bin/sh\necho no luck >&2\nexit 3\n");
        let error = format!("{:#}", run_all(&lab.context()).unwrap_err());
        assert!(error.starts_with("running hook 50-test-"), "{error}");
        assert!(error.ends_with("it ended with exit status 3: no luck"), "{error}");
        let lab = self::lab(HookPlace::Host, b"#!/no/such/interpreter\n");
        let error = format!("{:#}", run_all(&lab.context()).unwrap_err());
        assert!(error.contains("interpreter"), "{error}");
    }

    #[test]
    fn a_hook_that_hangs_or_floods_ends_in_time_and_so_do_its_children() {
        let start = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & sleep 1001"]);
        let error = supervise(command, "x", Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.contains("did not end within"), "{error}");
        let mut command = Command::new("sh");
        command.args(["-c", "yes"]);
        supervise(command, "x", Duration::from_millis(300)).unwrap_err();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1002 & echo done"]);
        supervise(command, "x", Duration::from_secs(100)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }

    #[test]
    fn names_cannot_leave_their_directory() {
        for name in ["../x", "/etc/x", ".x", ""] {
            let mut lab = lab(HookPlace::Host, b"#!/bin/sh\n");
            lab.order.hooks[0].name = name.into();
            let error = format!("{:#}", run_all(&lab.context()).unwrap_err());
            assert!(error.contains("no name for a hook"), "{error}");
        }
    }
}
