//! The only crate of Ka with `unsafe`: ioctls, signals, mounts, modules, network sockets, memory that rustix and nix do not wrap
//! safely. Each file is one kernel interface; each `unsafe` block says why it is sound.

pub mod block;
pub mod fileattr;
pub mod ifaddr;
pub mod limits;
pub mod modules;
pub mod mount;
pub mod net;
pub mod pages;
pub mod power;
pub mod process;
pub mod signals;
pub mod speed;
pub mod usage;
