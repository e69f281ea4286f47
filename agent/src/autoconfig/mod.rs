//! What makes a clone itself: one file per concern.
