//! What can one ask of the binary? One file per command.

pub mod hash_password;
pub mod demo_backend;
