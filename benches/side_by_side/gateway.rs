//! What does Cloakroom cost? A gateway as it is shipped, its store filled with sessions as logins would fill it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::PasswordHasher;
use cloakroom::config::model::Config;
use cloakroom::identity::Identity;
use cloakroom::server;
use cloakroom::session::attributes::Changes;
use cloakroom::session::cookie::SessionCookie;
use cloakroom::session::record::{ClientHints, LoginMethod};
use cloakroom::session::store::memory::MemoryStore;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{SessionStore, StoreOptions};
use cloakroom::session::{Lifetime, Newcomer, Sessions, Started};

use super::{THREADS, process};

/// They share the sessions.
const USERS: usize = 10_000;
/// Logins at a time, while the store is filled.
const LOGINS: usize = 256;

/// `store` is `memory`, `public` (memory, and nobody is asked for a session), or the URL of a Redis, `#`, and what its
/// `cache` is.
/// It begins with so many `sessions`.
pub(crate) fn run(store: &str, sessions: usize, ready: &Path, backends: &[SocketAddr]) {
    let folder = tempfile::tempdir().unwrap();
    let users = folder.path().join("users.toml");
    let hash = Argon2::default().hash_password(b"not used by the load").unwrap();
    // A session counts only as long as its user is in the file.
    let tables = (0..USERS).map(|number| {
        let Identity { user, name, email, groups, .. } = user(number);
        let (name, email) = (name.unwrap(), email.unwrap());
        format!("[{user}]\npassword = \"{hash}\"\nname = {name:?}\nemail = {email:?}\ngroups = {groups:?}\n")
    });
    std::fs::write(&users, tables.collect::<String>()).unwrap();
    let access = if store == "public" { "public" } else { "required" };
    let store_table = match store.split_once('#') {
        None => "[store.memory]".into(),
        // A machine that is busy with other things must not end the run.
        Some((url, cache)) => {
            format!(
                "[store.redis]\nurl = {url:?}\ncache = {cache:?}\nresponse_timeout = \"10s\"\nconnect_timeout = \"10s\""
            )
        }
    };
    let backends: Vec<String> = backends.iter().map(ToString::to_string).collect();
    let text = format!(
        "[server]\nthreads = {THREADS}\n[[listener]]\naddress = \"127.0.0.1:0\"\n{store_table}\n\
         [login.password]\nusers_file = {users:?}\n[admin]\nenabled = false\n\
         [pool.app]\nbackends = {backends:?}\n[[route]]\npath = \"/\"\npool = \"app\"\naccess = {access:?}\n"
    );
    let config = {
        let file = folder.path().join("cloakroom.toml");
        std::fs::write(&file, text).unwrap();
        cloakroom::config::load(&file).unwrap()
    };
    let cookie = SessionCookie::new(config.session.cookie.get_ref(), false, cookie::SameSite::Lax);

    let (prepared, cookies) = match &config.store.redis {
        Some(redis) => {
            let cookies = fill(
                Arc::new(RedisStore::new(redis.get_ref(), StoreOptions::default()).unwrap()),
                sessions,
                &config,
                &cookie,
            );
            (server::prepare(config), cookies)
        }
        None => {
            let store = Arc::new(MemoryStore::new(sessions * 2));
            let cookies = fill(Arc::clone(&store) as _, sessions, &config, &cookie);
            (server::prepare_with_store(config, store), cookies)
        }
    };
    let running = server::start(prepared.unwrap()).unwrap();
    process::announce(ready, running.addresses()[0], &cookies);
    process::wait_for_end_of_parent();
    running.stop();
}

/// Starts the sessions that the load will use; their cookies, as a browser sends them.
fn fill(store: Arc<dyn SessionStore>, count: usize, config: &Config, cookie: &SessionCookie) -> Vec<String> {
    let sessions = Sessions::new(store, Lifetime::of(&config.session));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut cookies = Vec::with_capacity(count);
        for first in (0..count).step_by(LOGINS) {
            let mut logins = tokio::task::JoinSet::new();
            for number in first..count.min(first + LOGINS) {
                let sessions = sessions.clone();
                logins.spawn(async move {
                    let client = ClientHints {
                        address: Some(std::net::Ipv4Addr::LOCALHOST.into()),
                        user_agent: "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0".into(),
                    };
                    let (identity, method) = (user(number % USERS), LoginMethod::Password);
                    let (secrets, attributes) = (BTreeMap::new(), BTreeMap::new());
                    let newcomer = Newcomer { identity, method, client, secrets, attributes, login: None };
                    sessions.start(newcomer, None, &Changes::default()).await.unwrap()
                });
            }
            for started in logins.join_all().await {
                let Started::Begun { id, .. } = started else { panic!("no limit is set") };
                cookies.push(format!("{}={}", cookie.name(), id.to_cookie_value()));
            }
        }
        cookies
    })
}

fn user(number: usize) -> Identity {
    Identity {
        user: format!("user-{number}"),
        name: Some(format!("User Number {number}")),
        email: Some(format!("user-{number}@example.org")),
        groups: vec!["staff".into(), "editors".into()],
        ..Identity::default()
    }
}
