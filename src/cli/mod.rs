//! What was Cloakroom asked to do? One file per command.

pub mod hash_password;
