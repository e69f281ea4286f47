//! Signals as values: a termination flag that loops can poll.
