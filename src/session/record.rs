//! What the store keeps of a session: versioned MessagePack.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::identity::Identity;

/// One session at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub identity: Identity,
    pub attributes: BTreeMap<String, String>,
    /// Unix time in ms, by the store's clock.
    pub created: u64,
    /// The absolute end, Unix time in ms, by the store's clock.
    pub ends: u64,
    pub method: LoginMethod,
    pub client: ClientHints,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoginMethod {
    Password,
}

/// For the user's own list of devices; from the request that logged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientHints {
    pub address: Option<IpAddr>,
    pub user_agent: String,
}
