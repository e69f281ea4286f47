//! What stands in the initramfs of a node and how it is written: a tree of files is gathered from a machine (or from a
//! directory that holds one) and written as a compressed cpio archive that the kernel unpacks.
//!
//! [`build::assemble`] gathers; [`archive::write_file`] writes. The same inputs give the same bytes: entries are sorted,
//! times and owners are fixed, and nothing of the building machine (clock, host name, directory order) gets in.

pub mod archive;
pub mod base;
pub mod build;
pub mod elf;
pub mod error;
pub mod firmware;
pub mod include;
pub mod kernel;
pub mod libraries;
pub mod manifest;
pub mod modules;
pub mod programs;
pub mod root;
pub mod tree;
pub mod unpack;

pub use error::Error;
