//! `ka-server`: runs on the golden node and feeds the chain. `main` is thin; everything stands here so that tests can
//! drive it.

// Test data is made by cutting numbers down.
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod boot;
pub mod deployment;
pub mod layout_command;
pub mod logging;
pub mod nodes;
pub mod settings;
pub mod trust;
pub mod verify_command;
