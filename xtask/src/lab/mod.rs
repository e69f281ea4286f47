//! The virtual lab: a network namespace with a bridge, virtual machines on it, and a look at their disks from outside.

pub mod accel;
pub mod boot;
pub mod disk;
pub mod login;
pub mod net;
pub mod serial;
pub mod vm;
