//! What PID 1 must do before and after the installation: console, mounts, modules, network, reaping, reboot.

pub mod mac;
