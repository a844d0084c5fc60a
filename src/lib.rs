//! Cloakroom: a reverse proxy and load balancer that takes sessions out of the web servers behind it.

pub mod cli;
pub mod proxy;
pub mod session;
pub mod login;
pub mod identity;
pub mod config;
pub mod metrics;
