//! Reboot, power off, ctrl-alt-del.
