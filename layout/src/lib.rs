//! The layout file: what it says ([`model`]), what an installation is ordered to do ([`order`]).

pub mod model;
pub mod order;
