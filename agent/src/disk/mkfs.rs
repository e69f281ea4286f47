//! Making file systems and swap with the golden machine's own mkfs programs, and reading back what they wrote.

use super::plan::FormatPlan;
use super::{superblock, tool};
use anyhow::{Context, Result, ensure};
use ka_layout::model::Fs;
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Time for one mkfs. Discarding a slow disk takes minutes.
const LIMIT: Duration = Duration::from_secs(1800);

/// The program for `fs` and its arguments, without the device.
fn command(plan: &FormatPlan) -> (&'static str, Vec<String>) {
    let mut words: Vec<String> = Vec::new();
    let mut add = |list: &[&str]| words.extend(list.iter().map(|w| (*w).to_owned()));
    let label = plan.label.as_deref();
    let uuid = plan.uuid.as_str();
    let program = match plan.fs {
        Fs::Ext2 | Fs::Ext3 | Fs::Ext4 => {
            add(&["-t", plan.fs.name(), "-F", "-q", "-U", uuid]);
            if let Some(label) = label {
                add(&["-L", label]);
            }
            "mke2fs"
        }
        Fs::Xfs => {
            add(&["-f", "-q", "-m", &format!("uuid={uuid}")]);
            if let Some(label) = label {
                add(&["-L", label]);
            }
            "mkfs.xfs"
        }
        Fs::Btrfs => {
            add(&["-f", "-q", "-U", uuid]);
            if let Some(label) = label {
                add(&["-L", label]);
            }
            "mkfs.btrfs"
        }
        Fs::Vfat => {
            add(&["-i", &uuid.replace('-', "")]);
            if let Some(label) = label {
                add(&["-n", label]);
            }
            "mkfs.vfat"
        }
        Fs::Swap => {
            add(&["-f", "-U", uuid]);
            if let Some(label) = label {
                add(&["-L", label]);
            }
            "mkswap"
        }
    };
    words.extend(plan.options.iter().cloned());
    (program, words)
}

/// The programs that a plan needs must be there before the disk is touched.
///
/// # Errors
/// When one is missing.
pub fn check_tools<'a>(plans: impl Iterator<Item = &'a FormatPlan>) -> Result<()> {
    for plan in plans {
        tool::need(command(plan).0).with_context(|| format!("making {} is not possible", plan.fs.name()))?;
    }
    Ok(())
}

/// Makes the file system on `device` and reads kind, UUID and label back from the device.
///
/// # Errors
/// When mkfs fails (its last words are in the message) or what stands on the device is not what was asked for.
pub fn make(device: &Path, plan: &FormatPlan) -> Result<()> {
    let (program, words) = command(plan);
    let what = || format!("making {} on {}", plan.fs.name(), device.display());
    let mut all: Vec<OsString> = words.into_iter().map(OsString::from).collect();
    all.push(device.into());
    let output = ka_sys::process::run(
        Command::new(tool::need(program)?)
            .args(&all)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C"),
        LIMIT,
    )
    .with_context(what)?;
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if !words.is_empty() {
        log::debug!("{program} on {}: {words}", device.display());
    }
    verify(device, plan).with_context(what)
}

fn verify(device: &Path, plan: &FormatPlan) -> Result<()> {
    let file = File::open(device).with_context(|| format!("opening {}", device.display()))?;
    file.sync_all().context("syncing it")?;
    ka_sys::block::flush_buffers(&file).context("dropping its cache")?;
    let found =
        superblock::read(&file).context("reading it back")?.context("no file system can be read back")?;
    let ext = |fs| matches!(fs, Fs::Ext2 | Fs::Ext3 | Fs::Ext4);
    ensure!(found.fs == plan.fs || (ext(found.fs) && ext(plan.fs)), "it reads back as {}", found.fs.name());
    ensure!(
        found.uuid.eq_ignore_ascii_case(&plan.uuid),
        "its UUID reads back as {}, not {}",
        found.uuid,
        plan.uuid
    );
    ensure!(
        found.label == plan.label,
        "its label reads back as {:?}, not {:?}",
        found.label.unwrap_or_default(),
        plan.label.clone().unwrap_or_default()
    );
    Ok(())
}

/// Whether the file system on `device`, now unmounted, says that it is clean. In a rescue system another process may have
/// copied our mounts (a service or `ip netns exec` that just then began a mount namespace): the file system is in use
/// until that one has let go of it, so `patience` is how long it may stay dirty.
///
/// # Errors
/// When it cannot be read, is no longer there, or says that it was not unmounted cleanly.
pub fn check_clean(device: &Path, plan: &FormatPlan, patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        verify(device, plan)?;
        let file = File::open(device).with_context(|| format!("opening {}", device.display()))?;
        let found = superblock::read(&file).context("reading its superblock")?;
        if !found.is_some_and(|f| f.dirty) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{} is marked as not cleanly unmounted; it may still be mounted in another mount namespace",
            device.display()
        );
        std::thread::sleep(Duration::from_millis(250));
    }
}
