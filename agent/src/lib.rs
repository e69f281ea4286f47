//! `ka-agent`: installs a node. As PID 1 of the initramfs it does so from power-on to reboot; elsewhere it is an ordinary
//! program. `main` is thin; everything stands here so that tests can drive it.

pub mod autoconfig;
pub mod cmdline;
pub mod commands;
pub mod disk;
pub mod dry_run;
pub mod init;
pub mod install;
pub mod reception;
pub mod session;
pub mod target;
pub mod trust;
pub mod verify_command;
