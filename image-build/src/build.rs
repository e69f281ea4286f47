//! `ka-image build`: gathers, writes into a directory of its own, and moves everything to its place at the end, the
//! manifest last.

use crate::{boot_files, report, trust};
use anyhow::{Context, Result, bail};
use argh::FromArgs;
use ka_initrd::archive::{self, Compression};
use ka_initrd::build::{Plan, assemble};
use ka_initrd::manifest::{self, MANIFEST, Manifest};
use ka_initrd::modules::Choice;
use ka_initrd::root::Root;
use ka_initrd::{kernel, programs};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Builds vmlinuz, initrd.img and the boot files into a directory.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "build", usage = "--output DIR [options]")]
pub struct Build {
    /// directory to write to; made if it is not there
    #[argh(option)]
    output: PathBuf,
    /// take everything from the system in this directory instead of /
    #[argh(option, default = "PathBuf::from(\"/\")")]
    root: PathBuf,
    /// kernel version (default: the newest that is not made for clouds)
    #[argh(option)]
    kernel: Option<String>,
    /// auto (default), all, or a list of modules and directories such as
    /// auto,ib_ipoib,drivers/infiniband/
    #[argh(option, default = "\"auto\".to_owned()")]
    modules: String,
    /// ka-agent, a static program (default: beside ka-image, in PATH, or
    /// /usr/lib/ka/ka-agent)
    #[argh(option)]
    agent: Option<PathBuf>,
    /// lay the content of this directory over the initramfs; may be repeated
    #[argh(option)]
    include: Vec<PathBuf>,
    /// zstd or gzip (default: zstd when the kernel unpacks it)
    #[argh(option)]
    compress: Option<String>,
    /// compression level: zstd 1 to 19 (default 19; 3 is quick), gzip 1 to 9
    #[argh(option)]
    level: Option<u32>,
    /// firmware to take at most (default 8M); the smallest files go first
    #[argh(option, default = "\"8M\".to_owned()")]
    firmware: String,
    /// bake this server's key in (as ka-server shows it): the nodes will
    /// trust no other, whatever the network that they boot from says
    #[argh(option)]
    key: Option<String>,
    /// bake in the token of this file (- is standard input), made by
    /// ka-server token --shared: for boot media that are kept in a safe
    #[argh(option)]
    token_file: Option<String>,
    /// words to add to the kernel's command line
    #[argh(option, default = "String::new()")]
    append: String,
    /// directory to look for iPXE's files in first
    #[argh(option)]
    boot_tools: Option<PathBuf>,
}

/// A [`Build`] whose words have been understood.
#[derive(Debug)]
pub struct Checked {
    build: Build,
    choice: Choice,
    compress: Option<Method>,
    firmware_budget: u64,
    trust: trust::Baked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Zstd,
    Gzip,
}

impl Build {
    /// What was typed, understood; an error is a usage error.
    pub fn check(self) -> Result<Checked> {
        let choice = Choice::parse(&self.modules)?;
        let compress = match self.compress.as_deref() {
            None => None,
            Some("zstd") => Some(Method::Zstd),
            Some("gzip") => Some(Method::Gzip),
            Some(other) => bail!("--compress {other}: zstd or gzip is expected"),
        };
        if let Some(level) = self.level {
            let most = if compress == Some(Method::Gzip) { 9 } else { 19 };
            if level == 0 || level > most {
                bail!("--level {level}: 1 to {most} is expected");
            }
        }
        let firmware_budget = ka_cli::units::parse_size(&self.firmware).context("--firmware")?;
        if self.append.contains(['\n', '\0']) {
            bail!("--append must be one line");
        }
        let trust = trust::Baked::read(self.key.as_deref(), self.token_file.as_deref())?;
        Ok(Checked { build: self, choice, compress, firmware_budget, trust })
    }
}

/// Builds the image.
pub fn run(checked: &Checked) -> Result<()> {
    let build = &checked.build;
    let start = Instant::now();
    let root = Root::new(&build.root);
    let kernel = kernel::find(&root, build.kernel.as_deref())?;
    let compression = compression(&root, &kernel.version, checked)?;
    let agent = find_agent(&root, build.agent.as_deref())?;
    println!("kernel {} of {}, agent {}", kernel.version, build.root.display(), agent.display());

    let plan = Plan {
        root: root.clone(),
        kernel: kernel.version.clone(),
        modules: checked.choice.clone(),
        agent,
        include: build.include.clone(),
        firmware_budget: checked.firmware_budget,
    };
    let mut assembled = assemble(&plan).context("gathering the initramfs")?;
    println!(
        "{} of {} modules, {} programs, {} firmware files ({:.1} s)",
        assembled.module_count,
        assembled.modules_of_kernel,
        assembled.programs.len(),
        assembled.firmware.taken.len(),
        start.elapsed().as_secs_f64()
    );
    checked.trust.place(&mut assembled.tree)?;
    let mut warnings = assembled.warnings;
    warnings.extend(checked.trust.warning());
    if kernel::is_cloud(&kernel.version) {
        warnings.push(format!(
            "kernel {} is made for clouds: it has no ahci, e1000e, igb or r8169",
            kernel.version
        ));
    }
    if !programs::has_shell(&assembled.tree) {
        warnings.push("there is no /bin/sh in the initramfs: ka.on-failure=shell cannot work".to_owned());
    }

    fs::create_dir_all(&build.output).with_context(|| format!("creating {}", build.output.display()))?;
    // In the output directory itself, so that a rename is all that is left to do; removed when anything fails.
    let stage = tempfile::Builder::new()
        .prefix(".ka-image-")
        .tempdir_in(&build.output)
        .with_context(|| format!("creating a directory in {}", build.output.display()))?;
    let image = root.resolve(&kernel.image).with_context(|| format!("finding {}", kernel.image))?;
    copy(&image, &stage.path().join(manifest::KERNEL))?;
    println!("packing the initramfs ({})", describe(compression));
    let packing = Instant::now();
    let initrd = stage.path().join(manifest::INITRD);
    let written = archive::write_file(&assembled.tree, &initrd, compression)?;
    checked.trust.protect(&initrd)?;
    println!(
        "initrd.img: {} from {} in {:.1} s",
        ka_cli::units::show_size(written.packed),
        ka_cli::units::show_size(written.plain),
        packing.elapsed().as_secs_f64()
    );
    warnings.extend(boot_files::place(stage.path(), &root, build.boot_tools.as_deref())?);

    let manifest = Manifest {
        format: manifest::FORMAT,
        ka_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: kernel.version,
        append: build.append.clone(),
        compress: describe(compression),
        initrd_unpacked: written.plain,
        modules: checked.choice.text(),
        module_count: assembled.module_count,
        programs: assembled.programs,
        firmware: assembled.firmware.taken,
        firmware_left_out: assembled.firmware.left_out,
        firmware_missing: assembled.firmware.missing,
        files: report::digests(stage.path())?,
        warnings,
    };
    let text = serde_json::to_string_pretty(&manifest).context("writing the manifest")? + "\n";
    let path = stage.path().join(MANIFEST);
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    publish(stage.path(), &build.output, &manifest)?;
    stage.close().context("removing the temporary directory")?;

    print!("{}", report::table(&assembled.tree.sizes(), written, &manifest));
    for warning in &manifest.warnings {
        eprintln!("warning: {warning}");
    }
    println!("{}: complete in {:.1} s", build.output.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// Moves the files of `stage` to `output`, the manifest last, and removes boot files of an earlier image that this one
/// does not have.
fn publish(stage: &Path, output: &Path, manifest: &Manifest) -> Result<()> {
    let names = manifest.files.keys().map(String::as_str).chain([MANIFEST]);
    for name in names {
        let to = output.join(name);
        fs::rename(stage.join(name), &to).with_context(|| format!("moving {}", to.display()))?;
    }
    for name in boot_files::NAMES {
        if !manifest.files.contains_key(name) {
            let old = output.join(name);
            match fs::remove_file(&old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("removing {}", old.display()));
                }
                _ => {}
            }
        }
    }
    fs::File::open(output)
        .and_then(|dir| dir.sync_all())
        .with_context(|| format!("syncing {}", output.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    // The server that hands it out need not be root; Debian's kernel images are readable by root only on some systems.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(to, mode).with_context(|| format!("setting the mode of {}", to.display()))
}

fn compression(root: &Root, version: &str, checked: &Checked) -> Result<Compression> {
    let zstd = kernel::unpacks_zstd(root, version)?;
    let method = match (checked.compress, zstd) {
        (Some(Method::Zstd), Some(false)) => bail!("kernel {version} cannot unpack zstd (CONFIG_RD_ZSTD)"),
        (Some(method), _) => method,
        (None, Some(true)) => Method::Zstd,
        (None, Some(false) | None) => Method::Gzip,
    };
    Ok(match method {
        Method::Zstd => Compression::Zstd(i32::try_from(checked.build.level.unwrap_or(19)).unwrap_or(19)),
        Method::Gzip => Compression::Gzip(checked.build.level.unwrap_or(9).min(9)),
    })
}

fn describe(compression: Compression) -> String {
    match compression {
        Compression::Zstd(level) => format!("zstd -{level}"),
        Compression::Gzip(level) => format!("gzip -{level}"),
    }
}

/// Where ka-agent is.
fn find_agent(root: &Root, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        if !path.is_file() {
            bail!("--agent {}: there is no such file", path.display());
        }
        return Ok(path.to_path_buf());
    }
    let beside = std::env::current_exe().context("finding this program")?.with_file_name("ka-agent");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join("ka-agent"));
    let mut tried = Vec::new();
    let places = [beside].into_iter().chain(in_path).chain(root.file("/usr/lib/ka/ka-agent"));
    for place in places.chain([PathBuf::from("/usr/lib/ka/ka-agent")]) {
        // One that is not static may be a build for this machine; the next place may have the right one.
        let is_static = fs::read(&place)
            .is_ok_and(|bytes| ka_initrd::elf::dynamic(&bytes).is_ok_and(|d| d.interpreter.is_none()));
        if is_static {
            return Ok(place);
        }
        tried.push(place.display().to_string());
    }
    bail!("no static ka-agent found (looked at {}); name it with --agent", tried.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &[&str]) -> Result<Checked> {
        let words: Vec<&str> = ["--output", "/nowhere"].iter().chain(words).copied().collect();
        Build::from_args(&["build"], &words).unwrap().check()
    }

    #[test]
    fn wrong_words_are_usage_errors() {
        for (words, text) in [
            (&["--compress", "xz"][..], "--compress xz: zstd or gzip is expected"),
            (&["--level", "20"], "--level 20: 1 to 19 is expected"),
            (&["--level", "10", "--compress", "gzip"], "--level 10: 1 to 9 is expected"),
            (&["--level", "0"], "--level 0: 1 to 19 is expected"),
            (&["--append", "a\nb"], "--append must be one line"),
        ] {
            assert_eq!(check(words).unwrap_err().to_string(), text);
        }
        assert!(check(&["--firmware", "x"]).is_err());
        assert!(check(&["--modules", ","]).is_err());
        assert!(check(&[]).is_ok());
    }

    #[test]
    fn compression_follows_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("boot")).unwrap();
        fs::write(dir.path().join("boot/config-new"), "CONFIG_RD_ZSTD=y\n").unwrap();
        fs::write(dir.path().join("boot/config-old"), "CONFIG_RD_GZIP=y\n").unwrap();
        let root = Root::new(dir.path());
        let got = |version: &str, words: &[&str]| compression(&root, version, &check(words).unwrap());
        assert_eq!(got("new", &[]).unwrap(), Compression::Zstd(19));
        assert_eq!(got("new", &["--level", "3"]).unwrap(), Compression::Zstd(3));
        assert_eq!(got("new", &["--compress", "gzip"]).unwrap(), Compression::Gzip(9));
        assert_eq!(got("old", &["--level", "12"]).unwrap(), Compression::Gzip(9));
        assert_eq!(got("unknown", &[]).unwrap(), Compression::Gzip(9));
        assert!(got("old", &["--compress", "zstd"]).unwrap_err().to_string().contains("CONFIG_RD_ZSTD"));
    }
}
