//! `ka-server` in the lab: its output is shown line by line, kept in a log, and searched.

use crate::binaries::Binaries;
use crate::interrupt;
use crate::lab::net::Net;
use crate::run::{self, Group};
use crate::say;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A running `ka-server deploy`; it is ended when this is dropped.
#[derive(Debug)]
pub struct Server {
    group: Group,
    readers: Vec<JoinHandle<()>>,
    text: Arc<Mutex<String>>,
    log: PathBuf,
}

impl Server {
    /// Starts `command` with its output in `log`, and on our own standard output if `show`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, log: &Path, show: bool) -> Result<Self> {
        let mut file = run::append(log)?;
        writeln!(file, "$ {}", ka_sys::process::command_line(&command))
            .context("writing the server's log")?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut group = Group::spawn(&mut command)?;
        let text = Arc::new(Mutex::new(String::new()));
        let out = group.child().stdout.take().context("ka-server has no standard output")?;
        let err = group.child().stderr.take().context("ka-server has no standard error")?;
        let readers = vec![
            follow(out, Arc::clone(&text), file.try_clone()?, show),
            follow(err, Arc::clone(&text), file, show),
        ];
        Ok(Self { group, readers, text, log: log.to_path_buf() })
    }

    /// `ka-server deploy` of a tree in the lab, with the PXE service as the only DHCP server there.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn deploy(net: &Net, deploy: &Deploy, binaries: &Binaries, show: bool) -> Result<Self> {
        let dir = &deploy.dir;
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let mut command = net.command(&binaries.server);
        command
            .args(["deploy", "--pxe", crate::lab::net::BRIDGE, "--dhcp", "auto"])
            .args(["--nodes", &deploy.nodes.to_string(), "--linger", LINGER])
            .arg("--boot-dir")
            .arg(&deploy.boot_dir)
            .arg("--state")
            .arg(dir.join("nodes.json"))
            .arg("--log-dir")
            .arg(dir.join("nodes"))
            // A machine of the lab is seen by its serial port only. On a busy host its kernel would mistrust the emulated
            // time stamp counter and go over to a clock that is far slower to read.
            .arg("--append")
            .arg(format!("console=ttyS0 tsc=reliable mitigations=off {}", deploy.append).trim())
            .args(&deploy.more);
        Self::start(command, &dir.join("server.log"), show)
    }

    /// Waits until a line of its output contains one of the `patterns`; which one.
    ///
    /// # Errors
    /// When it ends before, or `limit` is over.
    pub fn wait_for(&mut self, patterns: &[&str], limit: Duration) -> Result<usize> {
        let found = interrupt::poll(limit, || {
            let ended = self.ended()?;
            let found = {
                let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
                patterns.iter().position(|pattern| text.contains(pattern))
            };
            if found.is_none() && ended.is_some() {
                bail!("ka-server ended before it wrote `{}`{}", patterns.join("` or `"), self.tail());
            }
            Ok(found)
        })?;
        found.with_context(|| {
            format!(
                "ka-server did not write `{}` in {} s{}",
                patterns.join("` or `"),
                limit.as_secs(),
                self.tail()
            )
        })
    }

    /// Its exit status, when it has ended.
    ///
    /// # Errors
    /// When it was killed by a signal.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        let Some(status) = self.group.try_wait()? else { return Ok(None) };
        for reader in self.readers.drain(..) {
            // A panic of it was printed already.
            let _ = reader.join();
        }
        status.code().map(Some).with_context(|| format!("ka-server ended with {status}{}", self.tail()))
    }

    /// Waits for its end; its exit status.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        interrupt::poll(limit, || self.ended())?
            .with_context(|| format!("ka-server did not end within {} s{}", limit.as_secs(), self.tail()))
    }

    /// Ends it as an operator's ^C does.
    pub fn interrupt(&mut self) {
        self.group.signal(nix::sys::signal::Signal::SIGINT);
    }

    /// Kills it, as a power cut of the golden node does.
    pub fn kill(&mut self) {
        self.group.signal(nix::sys::signal::Signal::SIGKILL);
    }

    /// Everything it wrote so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The error for an exit status that should have been 0, with every line that says why.
    #[must_use]
    pub fn failure(&self, code: i32) -> anyhow::Error {
        let text = self.text();
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("FAILED") || l.contains("ALARM")).collect();
        anyhow::anyhow!("ka-server ended with exit status {code}: {}", lines.join("; "))
    }

    fn tail(&self) -> String {
        format!("; the end of {}:\n{}", self.log.display(), run::last_lines(&self.log, 12))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It ends its dnsmasq when it is asked to end.
        self.group.stop(Duration::from_secs(3));
    }
}

/// What it says when nodes may be switched on.
pub const LISTENING: &str = "waiting for nodes:";
/// How long the PXE service sends installed nodes to their disks after the deployment; long enough for a loaded machine.
const LINGER: &str = "15m";

/// What [`Server::deploy`] is to do.
#[derive(Debug)]
pub struct Deploy {
    /// Its files go here: `server.log`, `nodes.json`, `nodes/`.
    pub dir: PathBuf,
    /// What ka-image made.
    pub boot_dir: PathBuf,
    /// How many nodes.
    pub nodes: usize,
    /// More words for the nodes' kernel command line.
    pub append: &'static str,
    /// More words for the server's command line.
    pub more: Vec<String>,
}

fn follow(
    pipe: impl std::io::Read + Send + 'static,
    text: Arc<Mutex<String>>,
    mut log: std::fs::File,
    show: bool,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        loop {
            line.clear();
            match pipe.read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(_) => {
                    let words = String::from_utf8_lossy(&line).into_owned();
                    if let Err(e) = log.write_all(&line) {
                        eprintln!("cannot write the server's log: {e}");
                    }
                    if show {
                        say!("server", "{}", words.trim_end());
                    }
                    text.lock().unwrap_or_else(PoisonError::into_inner).push_str(&words);
                }
                Err(e) => {
                    eprintln!("reading ka-server's output: {e}");
                    return;
                }
            }
        }
    })
}

/// Builds kernel, initramfs and boot files from a golden tree.
///
/// # Errors
/// When `ka-image` fails.
pub fn build_image(binaries: &Binaries, root: &Path, output: &Path, log: &Path) -> Result<()> {
    let time = run::logged(
        Command::new(&binaries.image)
            .arg("build")
            .arg("--output")
            .arg(output)
            .arg("--root")
            .arg(root)
            .arg("--agent")
            .arg(&binaries.agent)
            .args(["--compress", "zstd", "--level", "3"]),
        log,
        Duration::from_secs(300),
    )
    .context("building the boot image")?;
    let initrd = output.join("initrd.img");
    let size = std::fs::metadata(&initrd).with_context(|| format!("looking at {}", initrd.display()))?.len();
    say!("image", "built in {:.0} s; initrd.img has {}", time.as_secs_f64(), ka_cli::units::show_size(size));
    Ok(())
}
