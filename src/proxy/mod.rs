//! Where is the request now? The journey of one request through the gateway.

pub mod guard;
pub mod route;
