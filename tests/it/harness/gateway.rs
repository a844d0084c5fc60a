//! How does a test get a gateway? From the same file that an operator would write, started in this process.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use argon2::Argon2;
use argon2::password_hash::PasswordHasher;
use cloakroom::config::changes::Changes;
use cloakroom::config::error::ConfigError;
use cloakroom::config::model::Config;
use cloakroom::events::Pace;
use cloakroom::session::store::SessionStore;
use cloakroom::{config, server};
use rustls::ClientConfig;
use tempfile::TempDir;

use super::backend::Backend;
use super::client::{Client, Response};
use super::redis::RedisServer;
use super::tls;

/// Every user's.
pub(crate) const PASSWORD: &str = "the quick brown fox 7";

/// The cheapest that the check lets pass; once per process, because it is not cheap.
static PASSWORD_HASH: LazyLock<String> =
    LazyLock::new(|| Argon2::default().hash_password(PASSWORD.as_bytes()).unwrap().to_string());

/// Where a gateway keeps its sessions.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    Memory,
    /// A URL, and whatever else stands in `[store.redis]`.
    Redis(String),
    /// One that the test brings; no reload.
    Given(Given),
}

#[derive(Clone)]
pub(crate) struct Given(pub(crate) Arc<dyn SessionStore>);

impl std::fmt::Debug for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Given")
    }
}

impl Store {
    pub(crate) fn of(redis: &RedisServer) -> Self {
        // More patience than by default: a busy machine is not what these tests are about.
        Self::Redis(format!("url = \"{}\"\nresponse_timeout = \"3s\"\nconnect_timeout = \"3s\"", redis.url()))
    }
}

/// The file that a gateway is started from; a builder.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Name, backends as TOML, and further lines.
    pools: Vec<(String, String, String)>,
    routes: Vec<String>,
    users: Vec<String>,
    store: Store,
    tls: bool,
    /// Further lines of the first listener, and files beside the configuration.
    listener: String,
    files: Vec<(String, Vec<u8>)>,
    /// Lines of `[login.password]`; none = there is no such table.
    password: Option<String>,
    rest: String,
    pace: Pace,
}

/// A running gateway, which ends with this value.
pub(crate) struct Gateway {
    setup: Mutex<Setup>,
    folder: TempDir,
    address: SocketAddr,
    running: Running,
    trust: Option<Arc<ClientConfig>>,
}

impl Gateway {
    /// One pool `app`; without a route, `/` requires a session. Users `ann` (group staff) and `bob` (no group).
    pub(crate) fn in_front_of(backends: &[&Backend]) -> Setup {
        Setup {
            pools: Vec::new(),
            routes: Vec::new(),
            users: Vec::new(),
            store: Store::Memory,
            tls: false,
            listener: String::new(),
            files: Vec::new(),
            password: Some(String::new()),
            rest: String::new(),
            pace: Pace::default(),
        }
        .pool("app", backends, "")
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Of the listeners after the first, in their order.
    pub(crate) fn further_address(&self, index: usize) -> SocketAddr {
        self.running.gateway().addresses()[index]
    }

    pub(crate) fn admin_address(&self) -> SocketAddr {
        self.running.admin_address()
    }

    /// What it was started from, for commands that read it.
    pub(crate) fn config_file(&self) -> PathBuf {
        self.folder.path().join("cloakroom.toml")
    }

    /// A client without a session.
    pub(crate) fn client(&self) -> Client {
        match &self.trust {
            Some(trust) => Client::of_tls(self.address, Arc::clone(trust)),
            None => Client::of(self.address),
        }
    }

    /// A client that has logged in through the login page.
    #[track_caller]
    pub(crate) fn log_in(&self, user: &str) -> Client {
        let client = self.client();
        let response = self.try_log_in(&client, user, PASSWORD);
        assert_eq!(response.status, 303, "{user} can log in: {}", response.text());
        client
    }

    /// Fills in the login page and sends it; the answer to that.
    #[track_caller]
    pub(crate) fn try_log_in(&self, client: &Client, user: &str, password: &str) -> Response {
        let page = client.navigate("/.cloakroom/login").send();
        assert_eq!(page.status, 200, "there is a login page: {}", page.text());
        let form = Form::on(&page.text());
        let fields = form.filled_in(&[("username", user), ("password", password)]);
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        client.post_form(form.action.as_deref().unwrap_or("/.cloakroom/login"), &fields).send()
    }

    /// Logs out through the page that asks.
    #[track_caller]
    pub(crate) fn log_out(&self, client: &Client) {
        let fields = self.log_out_form(client);
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let response = client.post_form("/.cloakroom/logout", &fields).send();
        assert_eq!(response.status, 303, "somebody can log out: {}", response.text());
    }

    /// The fields of the form that logs this client out.
    #[track_caller]
    pub(crate) fn log_out_form(&self, client: &Client) -> Vec<(String, String)> {
        Form::on(&client.navigate("/.cloakroom/logout").send().text()).fields
    }

    /// What the admin listener says under `target`.
    #[track_caller]
    pub(crate) fn admin(&self, target: &str) -> Response {
        Client::of(self.admin_address()).get(target).send()
    }

    /// The value of one metric: its name with its labels, as the text format writes them; 0 when it is not there.
    #[track_caller]
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.admin("/metrics").text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Reads a changed file, as SIGHUP does; what has changed.
    ///
    /// # Errors
    /// What it says is wrong; nothing has changed.
    pub(crate) fn reload(&self, change: impl FnOnce(Setup) -> Setup) -> Result<Changes, String> {
        let changed = change(self.setup.lock().unwrap().clone());
        std::fs::write(self.config_file(), changed.write(&self.folder)).unwrap();
        let changes = self.running.reload()?;
        *self.setup.lock().unwrap() = changed;
        Ok(changes)
    }

    /// Ends as SIGTERM does; returns when everything in flight is done.
    pub(crate) fn stop(self) {
        drop(self.running);
    }
}

impl Setup {
    /// A further pool; `keys` are lines of its table.
    pub(crate) fn pool(self, name: &str, backends: &[&Backend], keys: &str) -> Self {
        let backends: Vec<_> = backends.iter().map(|backend| format!("\"{}\"", backend.address())).collect();
        self.pool_of(name, &backends, keys)
    }

    /// As `pool`, with keys for each backend, e.g. `weight = 2`.
    pub(crate) fn weighted_pool(self, name: &str, backends: &[(&Backend, &str)], keys: &str) -> Self {
        let table = |(backend, keys): &(&Backend, &str)| {
            let comma = if keys.is_empty() { "" } else { ", " };
            format!("{{ address = \"{}\"{comma}{keys} }}", backend.address())
        };
        self.pool_of(name, &backends.iter().map(table).collect::<Vec<_>>(), keys)
    }

    fn pool_of(mut self, name: &str, backends: &[String], keys: &str) -> Self {
        self.pools.retain(|(n, ..)| n != name);
        self.pools.push((name.to_owned(), format!("[{}]", backends.join(", ")), keys.to_owned()));
        self
    }

    /// As `pool`, with `backends` as they stand in the file.
    pub(crate) fn pool_found(self, name: &str, backends: &[&str], keys: &str) -> Self {
        self.pool_of(name, &backends.iter().map(|&backend| backend.to_owned()).collect::<Vec<_>>(), keys)
    }

    /// For a pool `app` that is written by hand.
    pub(crate) fn without_pools(mut self) -> Self {
        self.pools.clear();
        self
    }

    /// A route; `keys` are further lines of its table, e.g. `access = "public"`. The pool is `app` unless they say.
    pub(crate) fn route(mut self, path: &str, keys: &str) -> Self {
        let pool = if keys.lines().any(|line| line.trim_start().starts_with("pool")) { "" } else { "pool = \"app\"" };
        self.routes.push(format!("[[route]]\npath = \"{path}\"\n{pool}\n{keys}\n"));
        self
    }

    /// Forgets the further users so far.
    pub(crate) fn without_users(mut self) -> Self {
        self.users.clear();
        self
    }

    /// A further user; `keys` are lines of the table, e.g. `groups = ["staff"]`.
    pub(crate) fn user(mut self, name: &str, keys: &str) -> Self {
        self.users.push(format!("[\"{name}\"]\npassword = \"{}\"\n{keys}\n", *PASSWORD_HASH));
        self
    }

    pub(crate) fn store(mut self, store: Store) -> Self {
        self.store = store;
        self
    }

    /// The listener speaks TLS, with a certificate that the clients of this gateway trust.
    pub(crate) fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Further lines of its listener.
    pub(crate) fn listener(mut self, keys: &str) -> Self {
        let _ = writeln!(self.listener, "{keys}");
        self
    }

    /// A file beside the configuration, which replaces one of that name.
    pub(crate) fn file(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.retain(|(other, _)| other != name);
        self.files.push((name.to_owned(), bytes.into()));
        self
    }

    /// Further lines of `[login.password]`.
    pub(crate) fn password(mut self, keys: &str) -> Self {
        let _ = writeln!(self.password.get_or_insert_default(), "{keys}");
        self
    }

    /// Nobody logs in with a password.
    pub(crate) fn without_passwords(mut self) -> Self {
        self.password = None;
        self
    }

    /// Whole tables, e.g. `[limits]\nhead_timeout = "1s"`.
    pub(crate) fn with(mut self, tables: &str) -> Self {
        let _ = writeln!(self.rest, "{tables}");
        self
    }

    /// Ended sessions are found within a moment, and not within a minute.
    pub(crate) fn sweeping_quickly(mut self) -> Self {
        self.pace =
            Pace { round: Duration::from_millis(500), lease: Duration::from_secs(2), retry: Duration::from_millis(20) };
        self
    }

    #[track_caller]
    pub(crate) fn start(self) -> Gateway {
        self.try_start().unwrap_or_else(|problems| panic!("the gateway starts: {problems}"))
    }

    /// # Errors
    /// What start-up says is wrong.
    pub(crate) fn try_start(self) -> Result<Gateway, String> {
        let folder = TempDir::new().unwrap();
        let running = Running::start(&self.write(&folder), &folder, &self.store, self.pace)?;
        let address = running.address();
        let trust = self.tls.then(tls::trust);
        Ok(Gateway { setup: Mutex::new(self), folder, address, running, trust })
    }

    /// Writes the files that the configuration names; the configuration itself.
    fn write(&self, folder: &TempDir) -> String {
        let mut users = self.users.join("\n");
        for (name, keys) in [
            ("ann", "name = \"Ann Archer\"\nemail = \"ann@example.org\"\ngroups = [\"staff\"]"),
            ("bob", "name = \"Bob Baker\"\nemail = \"bob@example.org\""),
        ] {
            if !users.contains(&format!("[\"{name}\"]")) {
                let _ = write!(users, "\n[\"{name}\"]\npassword = \"{}\"\n{keys}\n", *PASSWORD_HASH);
            }
        }
        let users_file = folder.path().join("users.toml");
        std::fs::write(&users_file, users).unwrap();

        let mut text = String::from("[[listener]]\naddress = \"127.0.0.1:0\"\n");
        text.push_str(&self.listener);
        if self.tls {
            let (cert, key) = tls::write_files(folder.path());
            let _ = writeln!(text, "cert = {cert:?}\nkey = {key:?}");
        }
        for (name, bytes) in &self.files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        match &self.store {
            Store::Memory | Store::Given(_) => text.push_str("[store.memory]\n"),
            Store::Redis(keys) => {
                let _ = writeln!(text, "[store.redis]\n{keys}");
            }
        }
        if let Some(keys) = &self.password {
            let _ = writeln!(text, "[login.password]\nusers_file = {users_file:?}\n{keys}");
        }
        for (table, keys) in [
            ("[server]", "threads = 2"),
            ("[admin]", "address = \"127.0.0.1:0\""),
            ("[log]", "level = \"warn\"\naccess = false"),
        ] {
            if !self.rest.contains(table) {
                let _ = writeln!(text, "{table}\n{keys}");
            }
        }
        for (name, backends, keys) in &self.pools {
            let _ = writeln!(text, "[pool.{name}]\nbackends = {backends}\n{keys}");
        }
        if self.routes.is_empty() {
            text.push_str("[[route]]\npath = \"/\"\npool = \"app\"\naccess = \"required\"\n");
        }
        text.push_str(&self.routes.concat());
        text.push_str(&self.rest);
        text
    }
}

/// The form of a page, as a browser sees it.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) action: Option<String>,
    /// Name and value of every input that has a name.
    pub(crate) fields: Vec<(String, String)>,
}

impl Form {
    /// The first form of the page.
    #[track_caller]
    pub(crate) fn on(page: &str) -> Self {
        let start = page.find("<form").unwrap_or_else(|| panic!("a page with a form: {page}"));
        let form = &page[start..page[start..].find("</form>").map_or(page.len(), |end| start + end)];
        let action = attribute(&form[..form.find('>').unwrap_or(form.len())], "action");
        let inputs = form.match_indices("<input").map(|(at, _)| &form[at..]);
        let fields = inputs.filter_map(|rest| {
            let tag = &rest[..rest.find('>').unwrap_or(rest.len())];
            Some((attribute(tag, "name")?, attribute(tag, "value").unwrap_or_default()))
        });
        Self { action, fields: fields.collect() }
    }

    /// Its fields, with these values typed in.
    #[track_caller]
    pub(crate) fn filled_in(&self, values: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut fields = self.fields.clone();
        for (name, value) in values {
            let field = fields.iter_mut().find(|(n, _)| n == name);
            let field = field.unwrap_or_else(|| panic!("the form has a field {name}: {self:?}"));
            (*value).clone_into(&mut field.1);
        }
        fields
    }
}

/// The value of an attribute of a tag, its character references resolved.
fn attribute(tag: &str, name: &str) -> Option<String> {
    let start = tag.find(&format!(" {name}=\""))? + name.len() + 3;
    let value = &tag[start..start + tag[start..].find('"')?];
    let mut text = value.to_owned();
    for (reference, character) in
        [("&quot;", "\""), ("&#34;", "\""), ("&#39;", "'"), ("&#x27;", "'"), ("&lt;", "<"), ("&#60;", "<")]
    {
        text = text.replace(reference, character);
    }
    for (reference, character) in [("&gt;", ">"), ("&#62;", ">"), ("&#47;", "/"), ("&#38;", "&"), ("&amp;", "&")] {
        text = text.replace(reference, character);
    }
    Some(text)
}

/// The gateway in this process: the only place of the tests that names `cloakroom::server`.
struct Running(Option<server::Running>);

impl Running {
    fn start(text: &str, folder: &TempDir, store: &Store, pace: Pace) -> Result<Self, String> {
        let prepared = read(text, folder).and_then(|config| match store {
            Store::Memory | Store::Redis(_) => server::prepare(config),
            Store::Given(Given(store)) => server::prepare_with_store(config, Arc::clone(store)),
        });
        let prepared = prepared.map_err(|problems| problems.to_string())?;
        let running = server::start(prepared.with_pace(pace)).map_err(|error| error.to_string())?;
        Ok(Self(Some(running)))
    }

    fn address(&self) -> SocketAddr {
        self.gateway().addresses()[0]
    }

    fn admin_address(&self) -> SocketAddr {
        self.gateway().admin_address().expect("an admin listener")
    }

    fn reload(&self) -> Result<Changes, String> {
        self.gateway().reload().map_err(|problems| problems.to_string())
    }

    fn gateway(&self) -> &server::Running {
        self.0.as_ref().expect("it runs until it is dropped")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(running) = self.0.take() {
            running.stop();
        }
    }
}

fn read(text: &str, folder: &TempDir) -> Result<Config, ConfigError> {
    let file = folder.path().join("cloakroom.toml");
    std::fs::write(&file, text).unwrap();
    config::load(&file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_read_as_a_browser_reads_it() {
        let form = Form::on(
            r#"<p><form method="post" action="/in?a&amp;b"><input type="hidden" name="csrf" value="&#34;x&#34;">
               <input name="username" autofocus><input type="password" name="password"></form><form></form>"#,
        );
        assert_eq!(form.action.as_deref(), Some("/in?a&b"));
        assert_eq!(
            form.filled_in(&[("username", "ann")]),
            [("csrf", "\"x\""), ("username", "ann"), ("password", "")].map(|(n, v)| (n.to_owned(), v.to_owned()))
        );
    }

    #[test]
    fn the_file_of_a_setup_is_one_that_the_gateway_reads() {
        let (one, other) = (Backend::echo(), Backend::echo());
        let folder = TempDir::new().unwrap();
        let setup = Gateway::in_front_of(&[&one])
            .pool("other", &[&other], "read_timeout = \"1s\"")
            .route("/", "")
            .route("/other", "pool = \"other\"\naccess = \"public\"")
            .store(Store::Redis("url = \"redis://127.0.0.1:1\"".into()))
            .user("eve", "disabled = true")
            .tls()
            .with("[log]\nlevel = \"error\"");
        let config = read(&setup.write(&folder), &folder).unwrap();

        assert_eq!((config.pools.len(), config.routes.len()), (2, 2));
        assert!(config.store.redis.is_some() && config.listeners[0].cert.is_some());
    }
}
