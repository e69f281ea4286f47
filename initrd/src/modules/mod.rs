//! The kernel's modules: reading what depmod wrote about them, choosing which ones a node needs, and putting them into the
//! image uncompressed, with lists trimmed to what is there.

pub mod choose;
pub mod index;
pub mod place;

pub use choose::{Choice, Chosen};
pub use index::Index;
