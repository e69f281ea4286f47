//! The kernel command line: one table of the keys that the agent knows.
