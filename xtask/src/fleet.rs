//! Several bare machines on one network, with the files that a deployment to them needs.

use crate::lab::net::Net;
use crate::lab::vm::{self, Accel, Board, Spec};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// MiB of memory of a node: the smallest that the project promises.
pub const MEMORY: u32 = 512;
/// Bytes of a node's disk.
pub const DISK: u64 = 3 << 30;

/// A machine to be: its name, what it is, and the sizes of its disks.
#[derive(Debug, Clone, Copy)]
pub struct Bare {
    /// Its name, also after installation.
    pub name: &'static str,
    /// What it is.
    pub board: Board,
    /// Bytes of each disk.
    pub disks: &'static [u64],
}

/// The machines, not switched on yet.
#[derive(Debug)]
pub struct Fleet {
    /// Their network.
    pub net: Net,
    /// What they are.
    pub specs: Vec<Spec>,
    nodes_file: PathBuf,
    layout_file: PathBuf,
}

impl Fleet {
    /// Makes network, empty disks, nodes file and layout file in `dir`.
    ///
    /// # Errors
    /// When the kernel or a file refuses.
    pub fn new(dir: &Path, bare: &[Bare], layout: &str, accel: Accel) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let net = Net::new(true)?;
        let mut specs = Vec::new();
        let mut nodes = String::new();
        for (i, machine) in bare.iter().enumerate() {
            let mac = format!("52:54:00:6b:61:{:02x}", i + 1);
            writeln!(nodes, "{mac} {}", machine.name)?;
            let mut disks = Vec::new();
            for (j, size) in machine.disks.iter().enumerate() {
                let path = dir.join(format!("{}.disk{j}", machine.name));
                vm::empty_disk(&path, *size)?;
                disks.push(path);
            }
            specs.push(Spec {
                name: machine.name.into(),
                board: machine.board,
                memory: MEMORY,
                disks,
                extra: None,
                mac,
                tap: net.tap()?,
                accel,
                dir: dir.to_path_buf(),
                kernel: None,
            });
        }
        let (nodes_file, layout_file) = (dir.join("nodes.txt"), dir.join("layout.toml"));
        std::fs::write(&nodes_file, nodes).with_context(|| format!("writing {}", nodes_file.display()))?;
        std::fs::write(&layout_file, layout).with_context(|| format!("writing {}", layout_file.display()))?;
        Ok(Self { net, specs, nodes_file, layout_file })
    }

    /// The words of `ka-server deploy` that name tree, layout and nodes.
    #[must_use]
    pub fn words(&self, root: &Path) -> Vec<String> {
        let path = |p: &Path| p.display().to_string();
        vec![
            "--root".into(),
            path(root),
            "--layout".into(),
            path(&self.layout_file),
            "--nodes-file".into(),
            path(&self.nodes_file),
        ]
    }
}
