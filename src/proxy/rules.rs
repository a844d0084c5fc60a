//! What a reload replaces, as one piece: a request sees the old rules or the new ones, never a mixture.

use std::collections::HashMap;
use std::sync::Arc;

use crate::backend::Pool;
use crate::config::error::ConfigError;
use crate::config::model::Config;
use crate::identity::headers::IdentityHeaders;
use crate::login::Login;

use super::route::Routes;
use super::transport::Transport;

/// Routes, pools, identity headers and the login with its users.
#[derive(Debug)]
pub struct Rules {
    pub routes: Routes,
    pub pools: HashMap<String, Arc<Pool>>,
    /// Of each pool.
    pub transports: HashMap<String, Transport>,
    pub identity: IdentityHeaders,
    pub login: Login,
}

impl Rules {
    /// Pools that are as in `previous` are taken over, with their turn and what they know of their backends.
    pub fn build(config: &Config, login: Login, previous: Option<&Self>) -> Result<Self, ConfigError> {
        let pools = config.pools.iter().map(|(name, pool)| {
            let pool = Pool::new(name, pool);
            let same = previous.and_then(|rules| rules.pools.get(name)).filter(|old| old.is_as_configured(&pool));
            (name.clone(), same.map_or_else(|| Arc::new(pool), Arc::clone))
        });
        let transports = config.pools.iter().map(|(name, pool)| Ok((name.clone(), Transport::load(pool)?)));
        Ok(Self {
            routes: Routes::build(&config.routes, config.limits.body_bytes),
            pools: pools.collect(),
            transports: transports.collect::<Result<_, ConfigError>>()?,
            identity: IdentityHeaders::compile(&config.identity).reserving(access_token_fields(config)),
            login,
        })
    }
}

/// A field that carries an access token somewhere is nobody else's to send anywhere. `Authorization` is: where it carries
/// none it is the client's own.
fn access_token_fields(config: &Config) -> impl Iterator<Item = &str> {
    let fields = config.routes.iter().filter_map(|route| route.access_token.as_ref());
    fields.map(|name| name.get_ref().as_str()).filter(|name| !name.eq_ignore_ascii_case("authorization"))
}
