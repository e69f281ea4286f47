//! `ka-server`: runs on the golden node and feeds the chain. `main` is thin; everything stands here so that tests can
//! drive it.

pub mod boot;
pub mod deployment;
pub mod layout_command;
pub mod logging;
pub mod nodes;
