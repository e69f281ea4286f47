//! Virtual machines: QEMU in the lab's namespace, with the serial port as their only console.

use super::net::Net;
use super::serial::{Text, TimedLog};
use crate::golden::Golden;
use crate::interrupt;
use crate::run::{self, Group};
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Debian's OVMF.
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// How the processor is emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By the host's own.
    Kvm,
    /// In software: 10 to 30 times slower, but everywhere.
    Tcg,
}

impl Accel {
    /// What a time limit made for KVM-less machines is multiplied with.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG",
        }
    }
}

/// A kind of machine: chip set, firmware, disk controller and network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// SeaBIOS, PIIX IDE disk, e1000.
    BiosIde,
    /// SeaBIOS, AHCI (SATA) disk, virtio-net.
    BiosAhci,
    /// OVMF, NVMe disk, virtio-net.
    UefiNvme,
    /// SeaBIOS, virtio disk, virtio-net.
    BiosVirtio,
    /// SeaBIOS, SCSI disk behind virtio-scsi, virtio-net.
    BiosScsi,
    /// OVMF, AHCI (SATA) disk, virtio-net.
    UefiAhci,
    /// OVMF, NVMe disk with sectors of 4096 bytes, virtio-net.
    UefiNvme4096,
}

impl Board {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BiosIde => "BIOS, IDE",
            Self::BiosAhci => "BIOS, AHCI",
            Self::UefiNvme => "UEFI, NVMe",
            Self::BiosVirtio => "BIOS, virtio",
            Self::BiosScsi => "BIOS, SCSI",
            Self::UefiAhci => "UEFI, AHCI",
            Self::UefiNvme4096 => "UEFI, NVMe 4096",
        }
    }

    fn uefi(self) -> bool {
        matches!(self, Self::UefiNvme | Self::UefiAhci | Self::UefiNvme4096)
    }
}

/// A machine to be.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name, for logs.
    pub name: String,
    /// What it is.
    pub board: Board,
    /// Memory in MiB.
    pub memory: u32,
    /// Its disks, raw files, the first to boot from first.
    pub disks: Vec<PathBuf>,
    /// A disk that is only read, on virtio, after all others.
    pub extra: Option<PathBuf>,
    /// Its network card's address, `52:54:00:...`.
    pub mac: String,
    /// Its tap.
    pub tap: String,
    /// How it is emulated.
    pub accel: Accel,
    /// Folder of its files: `NAME.serial.log`, `NAME.vars.fd`, `NAME.qemu.log`.
    pub dir: PathBuf,
    /// Boot this tree's kernel with the disk as its root, instead of what the firmware finds.
    pub kernel: Option<Golden>,
}

impl Spec {
    /// The log of its serial port.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.dir.join(format!("{}.serial.log", self.name))
    }

    fn arguments(&self) -> Result<Vec<String>> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |line: &str| words.extend(line.split_whitespace().map(str::to_owned));
        match self.accel {
            Accel::Kvm => add("-accel kvm -cpu host"),
            // All instructions there are: without AES and SSSE3 opening the chunks takes ten times as long.
            Accel::Tcg => add("-accel tcg -cpu max,la57=off"),
        }
        add("-display none -monitor none -nodefaults -no-reboot");
        add("-chardev stdio,id=serial,signal=off -serial chardev:serial");
        add(&format!("-m {} -smp 1", self.memory));
        let chip_set = match self.board {
            Board::BiosIde => "pc",
            _ => "q35",
        };
        add(&format!("-M {chip_set},graphics=off"));
        if self.board.uefi() {
            let vars = self.dir.join(format!("{}.vars.fd", self.name));
            if !vars.exists() {
                std::fs::copy(OVMF_VARS, &vars).with_context(|| format!("copying {OVMF_VARS}"))?;
            }
            add(&format!("-drive if=pflash,format=raw,readonly=on,file={OVMF_CODE}"));
            add(&format!("-drive if=pflash,format=raw,file={}", vars.display()));
        }
        let card = match self.board {
            Board::BiosIde => "e1000",
            _ => "virtio-net-pci",
        };
        add(&format!("-netdev tap,id=net0,ifname={},script=no,downscript=no", self.tap));
        // Without QEMU's own iPXE a UEFI machine boots as real ones do: EDK2's PXE loads snponly.efi by TFTP. (That ROM
        // also has no room for kernel and initramfs in a machine of 512 MiB: `Could not boot: Not enough space`.)
        let rom = if self.board.uefi() { ",romfile=" } else { "" };
        add(&format!("-device {card},netdev=net0,mac={},bootindex=1{rom}", self.mac));
        add("-object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0");
        match self.board {
            Board::BiosAhci | Board::UefiAhci => add("-device ahci,id=ahci0"),
            Board::BiosScsi => add("-device virtio-scsi-pci,id=scsi0"),
            _ => {}
        }
        for (i, disk) in self.disks.iter().enumerate() {
            add(&format!(
                "-drive if=none,id=disk{i},format=raw,cache=unsafe,discard=unmap,file={}",
                disk.display()
            ));
            let serial = format!("{}-{i}", self.name);
            let boot = i + 2;
            add(&match self.board {
                Board::BiosIde => {
                    format!("-device ide-hd,drive=disk{i},serial={serial},bus=ide.{i},bootindex={boot}")
                }
                Board::BiosAhci | Board::UefiAhci => {
                    format!("-device ide-hd,drive=disk{i},serial={serial},bus=ahci0.{i},bootindex={boot}")
                }
                Board::UefiNvme => format!("-device nvme,drive=disk{i},serial={serial},bootindex={boot}"),
                Board::BiosVirtio => {
                    format!("-device virtio-blk-pci,drive=disk{i},serial={serial},bootindex={boot}")
                }
                Board::BiosScsi => {
                    format!("-device scsi-hd,drive=disk{i},serial={serial},bus=scsi0.0,bootindex={boot}")
                }
                Board::UefiNvme4096 => format!(
                    "-device nvme,drive=disk{i},serial={serial},bootindex={boot},logical_block_size=4096,\
                     physical_block_size=4096"
                ),
            });
        }
        if let Some(extra) = &self.extra {
            add(&format!("-drive if=none,id=extra,format=raw,readonly=on,file={}", extra.display()));
            add("-device virtio-blk-pci,drive=extra");
        }
        if let Some(golden) = &self.kernel {
            words.extend(["-kernel".into(), golden.vmlinuz().display().to_string()]);
            words.extend(["-initrd".into(), golden.initrd().display().to_string()]);
            words.extend(["-append".into(), format!("root=UUID={} console=ttyS0", crate::golden::ROOT_UUID)]);
        }
        Ok(words)
    }
}

/// A running machine; it is switched off when this is dropped.
#[derive(Debug)]
pub struct Vm {
    spec: Spec,
    group: Group,
    stdin: ChildStdin,
    text: Arc<Mutex<Text>>,
    reader: Option<std::thread::JoinHandle<()>>,
    /// How far the text was looked at.
    position: usize,
}

impl Vm {
    /// Switches a machine on.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start(spec: &Spec, net: &Net) -> Result<Self> {
        let mut command = net.command("qemu-system-x86_64");
        command.args(spec.arguments()?);
        let mut qemu_log = run::append(&spec.dir.join(format!("{}.qemu.log", spec.name)))?;
        writeln!(qemu_log, "$ {}", ka_sys::process::command_line(&command)).context("writing QEMU's log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(qemu_log);
        let mut log = TimedLog::new(run::append(&spec.serial_log())?);
        log.write(b"---- power on ----\n").context("writing the serial log")?;
        let mut group = Group::spawn(&mut command)?;
        let stdin = group.child().stdin.take().context("QEMU has no standard input")?;
        let mut stdout = group.child().stdout.take().context("QEMU has no standard output")?;
        let text = Arc::new(Mutex::new(Text::default()));
        let (shared, name) = (Arc::clone(&text), spec.name.clone());
        let reader = std::thread::Builder::new().name(format!("serial {name}")).spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            loop {
                match stdout.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(n) => {
                        let plain = lock(&shared).add(&buffer[..n]);
                        if let Err(e) = log.write(&plain) {
                            eprintln!("{name}: cannot write the serial log: {e}");
                        }
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        eprintln!("{name}: reading the serial port: {e}");
                        return;
                    }
                }
            }
        })?;
        Ok(Self { spec: spec.clone(), group, stdin, text, reader: Some(reader), position: 0 })
    }

    /// Waits until one of `patterns` was written after what was last waited for; which one.
    ///
    /// # Errors
    /// When `limit` is over, the machine went off, or its kernel panicked; the error quotes its last lines.
    pub fn wait_for(&mut self, patterns: &[&str], limit: Duration) -> Result<usize> {
        const PANIC: &str = "Kernel panic -";
        let mut all = patterns.to_vec();
        all.push(PANIC);
        let start = Instant::now();
        let found = interrupt::poll(limit, || {
            let off = self.off()?.is_some();
            let found = lock(&self.text).find(self.position, &all);
            match found {
                None if off => bail!(
                    "{}: went off while `{}` was awaited{}",
                    self.spec.name,
                    patterns.join("` or `"),
                    self.tail()
                ),
                found => Ok(found),
            }
        })?;
        match found {
            Some((which, _)) if which == patterns.len() => {
                bail!("{}: its kernel panicked{}", self.spec.name, self.tail())
            }
            Some((which, position)) => {
                self.position = position;
                Ok(which)
            }
            None => bail!(
                "{}: did not write `{}` within {:.0} s{}",
                self.spec.name,
                patterns.join("` or `"),
                start.elapsed().as_secs_f64(),
                self.tail()
            ),
        }
    }

    /// Whether it is off, and how QEMU ended.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn off(&mut self) -> Result<Option<ExitStatus>> {
        let ended = self.group.try_wait()?;
        if ended.is_some()
            && let Some(reader) = self.reader.take()
        {
            // What it wrote last is in the text once its reader has ended; a panic of it was printed already.
            let _ = reader.join();
        }
        Ok(ended)
    }

    /// Waits until it has switched itself off (or wanted to start again), and no longer than until it wrote `bad`.
    ///
    /// # Errors
    /// When it wrote that, is not off within `limit`, or QEMU ended badly.
    pub fn wait_off_unless(&mut self, bad: Option<&str>, limit: Duration) -> Result<()> {
        let ended = interrupt::poll(limit, || {
            let off = self.off()?;
            match bad.and_then(|bad| lock(&self.text).find(self.position, &[bad])) {
                Some(_) => bail!("{}: wrote `{}`{}", self.spec.name, bad.unwrap_or_default(), self.tail()),
                None => Ok(off),
            }
        })?;
        match ended {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{}: QEMU ended with {status}{}", self.spec.name, self.tail()),
            None => bail!("{}: still running after {} s{}", self.spec.name, limit.as_secs(), self.tail()),
        }
    }

    /// [`Vm::wait_off_unless`] without anything that must not be written.
    ///
    /// # Errors
    /// As said there.
    pub fn wait_off(&mut self, limit: Duration) -> Result<()> {
        self.wait_off_unless(None, limit)
    }

    /// Types on the serial port.
    ///
    /// # Errors
    /// When QEMU has gone.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let name = &self.spec.name;
        self.stdin
            .write_all(text.as_bytes())
            .and_then(|()| self.stdin.flush())
            .with_context(|| format!("typing to {name}"))
    }

    /// Logs in as root at the prompt of a machine that calls itself `host`.
    ///
    /// # Errors
    /// When no prompt comes within `limit`, or root is not let in.
    pub fn login(&mut self, host: &str, password: &str, limit: Duration) -> Result<()> {
        self.wait_for(&[&format!("{host} login:")], limit)?;
        self.send("root\n")?;
        self.wait_for(&["Password:"], limit)?;
        self.send(&format!("{password}\n"))?;
        if self.wait_for(&["~# ", "Login incorrect"], limit)? == 1 {
            bail!("{}: root's password is not taken", self.spec.name);
        }
        // A plain prompt, no echo and no line editing: what comes back is what commands write.
        self.send("stty -echo; PS1=; PS2=; export TERM=dumb; bind 'set enable-bracketed-paste off'; echo ka-'ready'\n")?;
        self.wait_for(&["ka-ready"], limit)?;
        Ok(())
    }

    /// Runs a shell command after [`Vm::login`]; its status and what it wrote.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn shell(&mut self, command: &str, limit: Duration) -> Result<(i32, String)> {
        let start = self.position;
        self.send(&with_status(command))?;
        self.wait_for(&["ka-end:"], limit).with_context(|| format!("running `{command}`"))?;
        let output_end = self.position;
        self.wait_for(&[":"], limit)?;
        let text = lock(&self.text).since(start);
        let (output, rest) = text.split_at(output_end.saturating_sub(start).min(text.len()));
        let output = output.strip_suffix("ka-end:").unwrap_or(output);
        let status = rest.split(':').next().unwrap_or_default().trim();
        let status = status.parse().with_context(|| format!("`{command}`: odd status `{status}`"))?;
        Ok((status, output.trim().to_owned()))
    }

    /// [`Vm::shell`]; a status other than 0 is an error.
    ///
    /// # Errors
    /// As said.
    pub fn shell_ok(&mut self, command: &str, limit: Duration) -> Result<String> {
        let (status, output) = self.shell(command, limit)?;
        if status != 0 {
            bail!("{}: `{command}` ended with {status}:\n{output}", self.spec.name);
        }
        Ok(output)
    }

    /// Everything it wrote.
    #[must_use]
    pub fn text(&self) -> String {
        lock(&self.text).since(0)
    }

    fn tail(&self) -> String {
        format!(
            "; the end of {}:\n{}",
            self.spec.serial_log().display(),
            run::last_lines(&self.spec.serial_log(), 12)
        )
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Its disks are thrown away or were written to their end: nobody needs a clean shutdown.
        self.group.stop(Duration::from_millis(500));
        if let Some(reader) = self.reader.take() {
            // As in `off`.
            let _ = reader.join();
        }
    }
}

/// A command, and a line with its status. Nothing that it writes can look like the line.
fn with_status(command: &str) -> String {
    format!("{command}\nka_status=$?; echo; echo ka-'end':$ka_status:\n")
}

fn lock(text: &Mutex<Text>) -> MutexGuard<'_, Text> {
    text.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty sparse disk of `size` bytes; an old one is replaced.
///
/// # Errors
/// When it cannot be made.
pub fn empty_disk(path: &Path, size: u64) -> Result<()> {
    let make = || -> std::io::Result<()> {
        let file = std::fs::File::create(path)?;
        file.set_len(size)
    };
    make().with_context(|| format!("making the disk {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_is_seen_to_fail() {
        for (command, wanted) in [("true", "ka-end:0:"), ("false", "ka-end:1:"), ("(exit 6)", "ka-end:6:")] {
            let shell =
                std::process::Command::new("sh").args(["-c", &with_status(command)]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&shell.stdout).trim(), wanted, "{command}");
        }
    }
}
