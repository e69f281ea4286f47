//! Loading kernel modules.
