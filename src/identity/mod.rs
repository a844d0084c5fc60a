//! What may the backend know? Who a user is, and the header names and values that say so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub mod headers;
pub mod presets;

/// What a backend may know of a user. Values are as the login gave them: any Unicode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub user: String,
    pub name: Option<String>,
    pub email: Option<String>,
    pub groups: Vec<String>,
    pub claims: BTreeMap<String, String>,
}
