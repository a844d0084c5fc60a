//! What did the operator ask for? One TOML file becomes a [`model::Config`], or a list of everything that is wrong with it.

pub mod model;
pub mod error;
pub mod value;
