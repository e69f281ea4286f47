//! The layout file: what it says ([`model`]), whether it makes sense ([`check`]), where its partitions come to lie on a
//! disk of a given size ([`fit`]), how it is read ([`parse`]) and written ([`write`]), and how one is taken from a running
//! machine ([`capture`]). What an installation is ordered to do stands in [`order`].

pub mod capture;
mod capture_disk;
mod capture_facts;
mod capture_sizes;
mod capture_stack;
pub mod check;
pub mod facts;
pub mod fit;
pub mod glob;
mod machine;
pub mod model;
pub mod order;
pub mod parse;
pub mod pieces;
pub mod size;
pub mod stack;
pub mod types;
pub mod write;

pub use capture::{CaptureError, Captured, Stacked, capture};
pub use fit::{Extent, FitError, Fitted, Geometry, Kept, fit, fit_keeping};
pub use parse::{ParseError, parse};
pub use write::to_toml;
