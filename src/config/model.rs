//! Every key of the file, with its type and its default. Nothing here decides anything.
//!
//! The text of each key (what it does, why one would change it) is in `conf/cloakroom.toml`;
//! a test keeps that file and these defaults equal.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::value::{self, Bytes, Cidr, Duration, Percent, Secret, Statuses, Template};

/// The whole file.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where it was read from.
    #[serde(skip)]
    pub file: PathBuf,
    #[serde(default)]
    pub server: Server,
    /// At least one.
    #[serde(default, rename = "listener")]
    pub listeners: Vec<Listener>,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub store: Store,
    #[serde(default)]
    pub session: Session,
    #[serde(default)]
    pub login: Login,
    #[serde(default)]
    pub identity: Identity,
    /// `[pool.NAME]`
    #[serde(default, rename = "pool")]
    pub pools: BTreeMap<String, Pool>,
    /// `[split.NAME]`
    #[serde(default, rename = "split")]
    pub splits: BTreeMap<String, Split>,
    #[serde(default)]
    pub dns: Dns,
    #[serde(default, rename = "route")]
    pub routes: Vec<Route>,
    #[serde(default)]
    pub events: Events,
    #[serde(default)]
    pub admin: Admin,
    #[serde(default)]
    pub log: Log,
    #[serde(default)]
    pub tracing: Tracing,
}

/// `[server]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Worker threads; 0 = one per core.
    pub threads: usize,
    /// Open client connections at a time, and requests on HTTP/2 connections beyond the first of each; further connections
    /// wait in the kernel's backlog.
    pub connections_max: usize,
    /// After SIGTERM, how long requests in flight may take before they are cut.
    pub drain_timeout: Duration,
    /// After SIGTERM, how long all goes on as ever while readiness already says no; none: the drain begins at once.
    pub lame_duck: Option<Duration>,
    /// Networks whose `X-Forwarded-*` and `X-Request-Id` are believed.
    pub trusted_proxies: Vec<Cidr>,
}

/// `[[listener]]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    #[serde(deserialize_with = "value::socket_address")]
    pub address: Spanned<SocketAddr>,
    /// PEM chain; with `key` the listener speaks TLS.
    pub cert: Option<Spanned<PathBuf>>,
    /// PEM private key.
    pub key: Option<Spanned<PathBuf>>,
    /// Further ones; the name that a client asks for (SNI) chooses.
    #[serde(default)]
    pub certificates: Vec<CertificateFiles>,
    /// Whether TLS clients may speak HTTP/2 (ALPN).
    #[serde(default = "Listener::default_http2")]
    pub http2: bool,
    /// PEM of the authorities that sign the certificates of clients; absent = clients are not asked for any.
    pub client_ca: Option<Spanned<PathBuf>>,
    #[serde(default)]
    pub client_certificates: ClientCertificates,
    /// `Strict-Transport-Security`
    pub hsts: Option<Spanned<Hsts>>,
    /// Every request is sent to https at this port.
    pub redirect_to_port: Option<Spanned<u16>>,
    /// The scheme that browsers see, when a proxy in front terminates TLS: "https".
    pub scheme: Option<Spanned<Scheme>>,
    /// Networks of the balancers that announce each client by the PROXY protocol, version 2; nobody else may connect.
    pub proxy_protocol: Option<Spanned<Vec<Cidr>>>,
    /// Allow plain HTTP (and a cookie without `Secure`) on an address other than loopback.
    #[serde(default)]
    pub insecure: bool,
}

impl Listener {
    const fn default_http2() -> bool {
        true
    }

    /// Whether it speaks TLS itself.
    pub fn has_certificate(&self) -> bool {
        self.cert.is_some() || self.key.is_some()
    }
}

/// One of `listener.certificates`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    pub cert: Spanned<PathBuf>,
    pub key: Spanned<PathBuf>,
}

/// What is asked of a client, with `client_ca`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// Who has none is let in all the same.
    Optional,
    #[default]
    Required,
}

/// `listener.hsts` (RFC 6797)
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hsts {
    pub max_age: Duration,
    #[serde(default)]
    pub subdomains: bool,
    #[serde(default)]
    pub preload: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    Http,
    Https,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Request line and header fields together.
    pub head_bytes: Bytes,
    /// Header fields in a request.
    pub headers_max: usize,
    /// Request target.
    pub target_bytes: Bytes,
    /// Request body, unless the route says otherwise.
    pub body_bytes: Bytes,
    /// Requests at a time on one HTTP/2 connection.
    pub streams_max: u32,
    /// From the first byte of a request (or the accept) to the end of its head, in total; the TLS handshake likewise.
    pub head_timeout: Duration,
    /// An idle keep-alive connection is closed after this long.
    pub keepalive_timeout: Duration,
    /// Longest pause while a request body arrives.
    pub body_timeout: Duration,
    /// What a request body must arrive at each second, on average, once it has taken longer than `body_timeout`.
    pub body_rate_min: Bytes,
    /// Longest pause while the client takes a response.
    pub write_timeout: Duration,
}

/// `[store]`, with `[store.redis]` or `[store.memory]`; neither = memory.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Store {
    /// While the store is down, sessions that this instance knows are served for so long; absent = not at all.
    pub grace: Option<Spanned<Duration>>,
    pub redis: Option<Spanned<RedisStore>>,
    pub memory: Option<Spanned<MemoryStore>>,
}

/// `[store.redis]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedisStore {
    /// `redis://`, `rediss://`, `redis+sentinel://`, `redis+cluster://` or `unix://`; may hold a user, a password and a
    /// database number.
    pub url: Spanned<Secret>,
    #[serde(default = "RedisStore::default_prefix")]
    pub prefix: Spanned<String>,
    #[serde(default = "RedisStore::default_connect_timeout")]
    pub connect_timeout: Duration,
    #[serde(default = "RedisStore::default_response_timeout")]
    pub response_timeout: Duration,
    /// PEM of the authority that signed the server's certificate; default: the system's.
    pub ca: Option<Spanned<PathBuf>>,
    /// PEM chain that shows the server who we are; with `key`.
    pub cert: Option<Spanned<PathBuf>>,
    /// PEM private key of `cert`.
    pub key: Option<Spanned<PathBuf>>,
    #[serde(default = "RedisStore::default_cache")]
    pub cache: Cache,
    /// Copies of sessions that this instance keeps.
    #[serde(default = "RedisStore::default_cache_sessions_max")]
    pub cache_sessions_max: usize,
    /// What the copies may take together.
    #[serde(default = "RedisStore::default_cache_bytes")]
    pub cache_bytes: Bytes,
    /// The bound of staleness: without a sign of life from the server for this long, no copy is used.
    #[serde(default = "RedisStore::default_lease")]
    pub lease: Spanned<Duration>,
    #[serde(default = "RedisStore::default_logout")]
    pub logout: Logout,
    /// With `logout = "durable"`: replicas that must have it, and how long they may take.
    #[serde(default = "RedisStore::default_logout_replicas")]
    pub logout_replicas: u16,
    #[serde(default = "RedisStore::default_logout_timeout")]
    pub logout_timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Copies, which the server takes back when they change.
    Coherent,
    /// Every request asks the server.
    Off,
}

/// When a logout is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Logout {
    /// As soon as the server has ended the session.
    Fast,
    /// When no instance can have a copy any more: one `lease` later.
    Strict,
    /// When so many replicas have it, too.
    Durable,
}

impl RedisStore {
    fn default_prefix() -> Spanned<String> {
        Spanned::new(0..0, "cloakroom:".to_owned())
    }
    const fn default_connect_timeout() -> Duration {
        Duration::from_millis(1000)
    }
    const fn default_response_timeout() -> Duration {
        Duration::from_millis(500)
    }
    const fn default_cache() -> Cache {
        Cache::Coherent
    }
    const fn default_cache_sessions_max() -> usize {
        100_000
    }
    const fn default_cache_bytes() -> Bytes {
        Bytes(128 * 1024 * 1024)
    }
    fn default_lease() -> Spanned<Duration> {
        Spanned::new(0..0, Duration::from_millis(1000))
    }
    const fn default_logout() -> Logout {
        Logout::Fast
    }
    const fn default_logout_replicas() -> u16 {
        1
    }
    const fn default_logout_timeout() -> Duration {
        Duration::from_millis(1000)
    }
}

/// `[store.memory]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryStore {
    /// Logins are refused (503) beyond this many live sessions.
    pub sessions_max: usize,
    /// Where they survive a restart; absent = nowhere.
    pub file: Option<Spanned<PathBuf>>,
}

/// `[session]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Session {
    pub cookie: Spanned<String>,
    pub same_site: SameSite,
    pub idle_timeout: Spanned<Duration>,
    pub absolute_timeout: Spanned<Duration>,
    /// Live sessions of one user; 0 = any number.
    pub max_per_user: u32,
    pub when_full: WhenFull,
    /// Entries of the activity trail that are kept for each session; 0 = none is written.
    pub activity: u16,
    /// Name of a request header whose presence says: this request is nobody's use of the session.
    pub silent_header: Option<Spanned<String>>,
    /// The key ring: one line per key, the first one seals.
    pub keys_file: Option<Spanned<PathBuf>>,
    /// Seal whole records with the key ring, not only what is secret in them.
    pub seal_records: Spanned<SealRecords>,
    pub fallback: Option<Spanned<Fallback>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// The user's oldest session makes room.
    EvictOldest,
    /// The new login is refused.
    Refuse,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SealRecords {
    /// Records are written plain.
    #[default]
    Off,
    /// Records are written sealed; plain ones, of before, are still read.
    On,
    /// As `On`, and plain ones are not read: nobody can plant one.
    Only,
}

/// `[session.fallback]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fallback {
    /// Of the sealed cookie that says who the user is while the store is down.
    pub lifetime: Spanned<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SameSite {
    Strict,
    Lax,
}

/// `[login]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Login {
    /// Our own endpoints live under this path; begins and ends with `/`.
    pub prefix: Spanned<String>,
    pub title: String,
    /// A CSS file that replaces the built-in look.
    pub stylesheet: Option<Spanned<PathBuf>>,
    /// Where a login goes that came from nowhere.
    pub default_return: Spanned<String>,
    /// Our own origins as browsers see them; a provider sends users back to these alone.
    pub origins: Vec<Spanned<String>>,
    pub password: Option<PasswordLogin>,
    pub backend: Option<BackendLogin>,
    pub basic: Option<Spanned<BasicLogin>>,
    /// `[login.oidc.NAME]`
    pub oidc: BTreeMap<String, OidcLogin>,
}

/// `[login.backend]`: backends log users in, on routes with `directives = ["login"]`.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackendLogin {
    pub preset: BackendPreset,
    /// The path of their login page; it is given `return_to`.
    pub page: Option<Spanned<String>>,
}

/// In what words a backend says that somebody has logged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendPreset {
    /// `Session-Login`
    #[default]
    Session,
    /// WebSEAL's external authentication interface: `am-eai-user-id` and others.
    Eai,
}

/// So many ways to authenticate a route may name.
pub const ACR_VALUES_MAX: usize = 8;

/// `[login.oidc.NAME]`: an OpenID Connect provider.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OidcLogin {
    /// Exactly as the provider calls itself.
    pub issuer: Spanned<String>,
    pub client_id: Spanned<String>,
    /// Absent for a public client, which PKCE alone protects.
    pub client_secret: Option<Spanned<Secret>>,
    /// What the login page calls it; default: its name here.
    pub title: Option<String>,
    #[serde(default = "OidcLogin::default_scopes")]
    pub scopes: Vec<Spanned<String>>,
    /// `login`, `consent`, `select_account`.
    pub prompt: Option<Spanned<String>>,
    /// Further parameters of the authorization request.
    #[serde(default)]
    pub parameters: BTreeMap<Spanned<String>, String>,
    /// Claims that say who somebody is; a dot leads into an object.
    #[serde(default = "OidcLogin::default_user")]
    pub user: Spanned<String>,
    /// Put before the user, so that two providers never name one user.
    #[serde(default)]
    pub user_prefix: String,
    #[serde(default = "OidcLogin::default_name")]
    pub name: String,
    #[serde(default = "OidcLogin::default_email")]
    pub email: String,
    #[serde(default = "OidcLogin::default_groups")]
    pub groups: String,
    /// Claims for `{claim.NAME}`: name = path of the claim.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
    /// Take an address that the provider does not say to be verified.
    #[serde(default)]
    pub trust_email: bool,
    /// Each list that is not empty must name the user.
    #[serde(default)]
    pub allowed_users: Vec<String>,
    #[serde(default)]
    pub allowed_groups: Vec<String>,
    #[serde(default)]
    pub allowed_email_domains: Vec<Spanned<String>>,
    #[serde(default = "OidcLogin::default_userinfo")]
    pub userinfo: UserInfo,
    /// Keep the access and the refresh token, and renew them before they end.
    #[serde(default)]
    pub tokens: bool,
    /// Log out at the provider, too.
    #[serde(default = "OidcLogin::default_logout")]
    pub logout: bool,
    /// Whether the provider's pages may end sessions by front-channel logout.
    #[serde(default)]
    pub frontchannel_logout: bool,
}

/// When the provider's UserInfo endpoint is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UserInfo {
    Never,
    /// When the ID token lacks a claim that is asked for.
    WhenMissing,
    Always,
}

impl OidcLogin {
    fn default_scopes() -> Vec<Spanned<String>> {
        ["openid", "profile", "email"].map(|scope| Spanned::new(0..0, scope.to_owned())).into()
    }
    fn default_user() -> Spanned<String> {
        Spanned::new(0..0, "preferred_username".to_owned())
    }
    fn default_name() -> String {
        "name".to_owned()
    }
    fn default_email() -> String {
        "email".to_owned()
    }
    fn default_groups() -> String {
        "groups".to_owned()
    }
    const fn default_userinfo() -> UserInfo {
        UserInfo::WhenMissing
    }
    const fn default_logout() -> bool {
        true
    }
}

/// `[login.password]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PasswordLogin {
    pub users_file: Spanned<PathBuf>,
    /// Password hashes computed at a time; 0 = one per core.
    #[serde(default)]
    pub hashes_max: usize,
    #[serde(default)]
    pub throttle: Throttle,
}

/// `[login.basic]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BasicLogin {
    /// What a script is told that it has to log in to.
    pub realm: Spanned<String>,
}

/// `[login.password.throttle]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Throttle {
    pub window: Duration,
    /// Failures of one account from one network within the window.
    pub per_account_and_network: u32,
    /// Failures of one account from all networks from which it never logged in.
    pub per_account: u32,
    /// Failures of all accounts from one network.
    pub per_network: u32,
}

/// `[identity]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Identity {
    pub preset: Preset,
    /// Header name = template, e.g. `"X-Team" = "{claim.team}"`.
    pub headers: BTreeMap<Spanned<String>, Spanned<Template>>,
    /// Further names that a client may never send to a backend.
    pub strip: Vec<Spanned<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    None,
    XForwarded,
    Remote,
    XAuthRequest,
    Webseal,
    OidcClaim,
    Authentik,
    Webauth,
}

/// `[pool.NAME]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Servers, and places where servers are found.
    pub backends: Vec<Spanned<BackendSource>>,
    #[serde(default)]
    pub balance: Balance,
    /// With `balance = "hash"`: what of a request is hashed.
    #[serde(default)]
    pub hash_by: HashBy,
    /// A backend that comes back takes this long to its full share; absent = it has it at once.
    pub slow_start: Option<Duration>,
    /// Requests that may wait while all backends have their `max_requests`; 0 = none.
    #[serde(default)]
    pub queue: u32,
    /// How long they wait at most.
    #[serde(default = "Pool::default_queue_timeout")]
    pub queue_timeout: Duration,
    /// Second attempts, in percent of the requests; 0 = none.
    #[serde(default = "Pool::default_retry_budget")]
    pub retry_budget: u8,
    #[serde(default)]
    pub eject: Eject,
    pub check: Option<Spanned<Check>>,
    #[serde(default = "Pool::default_protocol")]
    pub protocol: Spanned<Protocol>,
    /// `[pool.NAME.tls]`; absent = plain.
    pub tls: Option<BackendTls>,
    #[serde(default = "Pool::default_connect_timeout")]
    pub connect_timeout: Duration,
    /// Longest pause while a response arrives (also: until it begins).
    #[serde(default = "Pool::default_read_timeout")]
    pub read_timeout: Duration,
    /// Longest pause while the backend takes a request.
    #[serde(default = "Pool::default_write_timeout")]
    pub write_timeout: Duration,
    /// An unused backend connection is closed after this long; keep it below the backend's own.
    #[serde(default = "Pool::default_idle_timeout")]
    pub idle_timeout: Duration,
    /// Longest silence on a WebSocket.
    #[serde(default = "Pool::default_websocket_timeout")]
    pub websocket_timeout: Duration,
}

/// What backends are spoken to in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Http1,
    /// With TLS by ALPN, else with prior knowledge (h2c).
    Http2,
    /// What the backend chooses by ALPN.
    Auto,
}

/// `[pool.NAME.tls]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendTls {
    /// PEM of the authorities that sign the backends' certificates; default: the system's.
    pub ca: Option<Spanned<PathBuf>>,
    /// The name that the certificate must be for, and that is asked for (SNI); default: the host of the backend.
    pub server_name: Option<Spanned<String>>,
    /// PEM chain that shows backends who we are; with `key`.
    pub cert: Option<Spanned<PathBuf>>,
    /// PEM private key of `cert`.
    pub key: Option<Spanned<PathBuf>>,
    /// Whether the backend has to prove who it is.
    #[serde(default = "BackendTls::default_verify")]
    pub verify: Spanned<bool>,
}

impl BackendTls {
    fn default_verify() -> Spanned<bool> {
        Spanned::new(0..0, true)
    }
}

/// One of `backends`: `"host:port"`, or a table with `address`, `dns`, `srv` or `file`, and more.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendSource {
    pub place: Place,
    /// What holds for each server of it; with its address, where that is known.
    pub each: Backend,
}

/// Where servers are.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// One server, at `host:port`.
    Address,
    /// A server at each address of the host: `host:port`.
    Dns(String),
    /// Those that the SRV records of this name are for.
    Srv(String),
    /// Those that this file lists.
    File(Spanned<PathBuf>),
}

/// One server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// `host:port`
    pub address: String,
    /// Where DNS gave the address: the name that it was asked for. It is whom the server's certificate must name, because
    /// whoever forges an answer could name a server of their own (RFC 6125, section 6.2.1).
    pub host: Option<String>,
    /// Its share, compared with the others'.
    pub weight: u32,
    /// Requests that it gets at a time; 0 = any number.
    pub max_requests: u32,
    /// It gets requests only when no other can take them.
    pub backup: bool,
    /// It gets no new requests.
    pub drain: bool,
}

impl Backend {
    /// The largest weight; the smallest is 1. Finer shares than this need no load balancer.
    pub const WEIGHT_MAX: u32 = 1_000;

    /// With nothing said of it.
    pub fn at(address: String) -> Self {
        Self { address, host: None, weight: 1, max_requests: 0, backup: false, drain: false }
    }
}

/// `dns:host:port`, `srv:name`, `file:path`; a server is its address. Short enough for a label.
impl fmt::Display for BackendSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Address => f.write_str(&self.each.address),
            Place::Dns(host) => write!(f, "dns:{host}"),
            Place::Srv(name) => write!(f, "srv:{name}"),
            Place::File(path) => write!(f, "file:{}", path.get_ref().display()),
        }
    }
}

/// `[dns]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dns {
    /// Asked instead of those of `/etc/resolv.conf`, and without its search list; empty = those.
    pub servers: Vec<SocketAddr>,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// In turn, as the weights say, evenly spread.
    #[default]
    RoundRobin,
    /// Who has the fewest requests in flight for its weight.
    LeastRequests,
    /// Of two that are drawn, the one with fewer.
    PowerOfTwo,
    /// The same backend for what hashes alike, while it has no more than its share.
    Hash,
}

/// What of a request is hashed: `"user"`, `"client"`, `"header:NAME"`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HashBy {
    /// The user of the session; without one, the client address.
    #[default]
    User,
    /// The client address.
    Client,
    /// A request header; without it, the client address.
    Header(http::HeaderName),
}

/// `[pool.NAME.eject]`: when a backend that fails is passed over.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eject {
    /// Requests that fail in a row; 0 = only who cannot be connected is passed over.
    pub failures: u32,
    /// How long the first time; each further one doubles it.
    pub time: Duration,
    /// How long at most.
    pub time_max: Duration,
    /// Of the pool, in percent: so much may be out for failures at a time.
    pub share: u8,
    /// Statuses of responses that count as failures, too.
    pub statuses: Vec<u16>,
}

/// `[pool.NAME.check]`: backends are asked whether they are well.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Check {
    /// Asked for with GET; absent = a connection is enough.
    pub path: Option<Spanned<String>>,
    /// `Host`; default: the backend's address.
    pub host: Option<Spanned<String>>,
    pub statuses: Statuses,
    /// A text that must be in the first 64 KiB of the response.
    pub body: Option<String>,
    /// Default: that of the requests.
    pub port: Option<u16>,
    /// Over TLS, or not; default: as the requests.
    pub tls: Option<Spanned<bool>>,
    /// With `tls = true`: whom the certificate must name; default: `host`, then whom that of the requests must.
    pub server_name: Option<Spanned<String>>,
    /// With `tls = true`; false: any certificate will do.
    pub verify: Spanned<bool>,
    pub interval: Duration,
    /// From the connection to the end of the answer; the next interval begins after it.
    pub timeout: Duration,
    /// Checks passed in a row that bring it back.
    pub rise: u32,
    /// Checks failed in a row that take it out.
    pub fall: u32,
    /// In percent of the interval: so much earlier or later is each check.
    pub jitter: u8,
}

impl Pool {
    fn default_protocol() -> Spanned<Protocol> {
        Spanned::new(0..0, Protocol::Http1)
    }
    const fn default_queue_timeout() -> Duration {
        Duration::from_millis(1_000)
    }
    const fn default_retry_budget() -> u8 {
        20
    }
    const fn default_connect_timeout() -> Duration {
        Duration::from_millis(2_000)
    }
    const fn default_read_timeout() -> Duration {
        Duration::from_millis(60_000)
    }
    const fn default_write_timeout() -> Duration {
        Duration::from_millis(30_000)
    }
    const fn default_idle_timeout() -> Duration {
        Duration::from_millis(30_000)
    }
    const fn default_websocket_timeout() -> Duration {
        Duration::from_millis(3_600_000)
    }
}

/// `[split.NAME]`: a share of the users, whom routes may send to another pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// All users who are in one of these.
    #[serde(default)]
    pub groups: Vec<String>,
    /// And so many of all others, always the same; absent = none.
    pub percent: Option<Percent>,
}

/// `[[route]]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Exact name or `*.suffix`; absent = every host.
    pub host: Option<Spanned<String>>,
    pub path: Spanned<String>,
    pub pool: Spanned<String>,
    /// Whom another pool gets: the first that takes a user counts, else `pool`.
    #[serde(default)]
    pub splits: Vec<RouteSplit>,
    #[serde(default = "Route::default_access")]
    pub access: Spanned<Access>,
    /// The user must be in one of these; empty = any user.
    #[serde(default)]
    pub groups: Vec<String>,
    /// Add `Cache-Control: private, no-store` to an authenticated response that says nothing of caching.
    #[serde(default = "Route::default_cache_guard")]
    pub cache_guard: bool,
    /// Origins besides our own that may open a WebSocket here.
    #[serde(default)]
    pub websocket_origins: Vec<Spanned<String>>,
    /// Request body; default: `limits.body_bytes`.
    pub body_bytes: Option<Bytes>,
    /// Whether a request counts as use of the session.
    #[serde(default = "Route::default_touch")]
    pub touch: bool,
    /// Whether an open WebSocket, or another request that lasts, counts as use for as long as it lasts.
    #[serde(default)]
    pub stream_touch: bool,
    /// Whether the sealed cookie of `[session.fallback]` counts here while the store is down.
    #[serde(default = "Route::default_fallback")]
    pub fallback: bool,
    /// What its backends may say of the session by fields of their responses.
    #[serde(default)]
    pub directives: Vec<Spanned<Directive>>,
    /// Whether attributes may begin a session before anybody has logged in.
    #[serde(default)]
    pub anonymous: bool,
    /// Whether a request may bring a user name and a password (RFC 7617) in place of a session.
    #[serde(default = "Route::default_basic")]
    pub basic: Spanned<bool>,
    /// The provider must have authenticated the user in one of these ways; empty = any.
    #[serde(default)]
    pub acr: Vec<Spanned<String>>,
    /// The user must have proved who they are not longer ago than this.
    pub max_age: Option<Spanned<Duration>>,
    /// The field that carries the provider's access token to the backend.
    pub access_token: Option<Spanned<String>>,
}

/// One of a route's `splits`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSplit {
    /// The [`Split`].
    pub name: Spanned<String>,
    pub pool: Spanned<String>,
}

impl Route {
    fn default_access() -> Spanned<Access> {
        Spanned::new(0..0, Access::Required)
    }
    const fn default_cache_guard() -> bool {
        true
    }
    const fn default_touch() -> bool {
        true
    }
    const fn default_fallback() -> bool {
        true
    }
    fn default_basic() -> Spanned<bool> {
        Spanned::new(0..0, false)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Directive {
    /// Who the user is: `Session-Login`.
    Login,
    /// The session ends: `Session-Logout`.
    Logout,
    /// What it holds: `Session-Set`, `Session-Unset`; backends are told by `Session-Attributes`.
    Attributes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// No session is looked up, no identity is sent.
    Public,
    /// Identity is sent when there is a session.
    Optional,
    /// Only with a session.
    Required,
}

/// `[events]`: who is told that a session has ended.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Events {
    /// One line in the log for each.
    pub audit: bool,
    /// A URL that gets a POST for each.
    pub webhook: Option<Spanned<String>>,
    /// What the webhook's signature is made with.
    pub webhook_secret: Option<Spanned<Secret>>,
}

/// `[admin]`
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    #[serde(deserialize_with = "value::socket_address")]
    pub address: Spanned<SocketAddr>,
    /// No admin listener at all.
    pub enabled: bool,
    /// By which names it may be asked, besides addresses and names that no stranger can own.
    pub hosts: Vec<Spanned<String>>,
    /// Opens the sessions API to who sends it as a bearer token; absent = there is no such API.
    pub token: Option<Spanned<Secret>>,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub format: LogFormat,
    /// error | warn | info | debug | trace
    pub level: LogLevel,
    /// One line per request on standard output.
    pub access: bool,
}

/// `[tracing]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// Of a collector that takes OTLP over HTTP; absent = no spans are made.
    pub endpoint: Option<Spanned<String>>,
    /// Of the traces that begin here, so many are recorded, from 0 to 1.
    pub ratio: Spanned<f64>,
    /// What we are called in them.
    pub service: String,
    /// Sent along with them, so that the collector knows who sends: name = value.
    pub headers: BTreeMap<Spanned<String>, Spanned<Secret>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            threads: 0,
            connections_max: 8_192,
            drain_timeout: Duration::from_millis(30_000),
            lame_duck: None,
            trusted_proxies: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes: Bytes(32 * 1024),
            headers_max: 100,
            target_bytes: Bytes(8 * 1024),
            body_bytes: Bytes(100 * 1024 * 1024),
            streams_max: 100,
            head_timeout: Duration::from_millis(10_000),
            keepalive_timeout: Duration::from_millis(60_000),
            body_timeout: Duration::from_millis(30_000),
            body_rate_min: Bytes(256),
            write_timeout: Duration::from_millis(30_000),
        }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self { sessions_max: 1_000_000, file: None }
    }
}

impl Default for Session {
    fn default() -> Self {
        Self {
            cookie: Spanned::new(0..0, "__Host-session".to_owned()),
            same_site: SameSite::Lax,
            idle_timeout: Spanned::new(0..0, Duration::from_millis(30 * 60 * 1000)),
            absolute_timeout: Spanned::new(0..0, Duration::from_millis(12 * 60 * 60 * 1000)),
            max_per_user: 0,
            when_full: WhenFull::EvictOldest,
            activity: 0,
            silent_header: None,
            keys_file: None,
            seal_records: Spanned::new(0..0, SealRecords::Off),
            fallback: None,
        }
    }
}

impl Default for Fallback {
    fn default() -> Self {
        Self { lifetime: Spanned::new(0..0, Duration::from_millis(5 * 60 * 1000)) }
    }
}

impl Default for Login {
    fn default() -> Self {
        Self {
            prefix: Spanned::new(0..0, "/.cloakroom/".to_owned()),
            title: "Log in".to_owned(),
            stylesheet: None,
            default_return: Spanned::new(0..0, "/".to_owned()),
            origins: Vec::new(),
            password: None,
            backend: None,
            basic: None,
            oidc: BTreeMap::new(),
        }
    }
}

impl Default for BasicLogin {
    fn default() -> Self {
        Self { realm: Spanned::new(0..0, "Cloakroom".to_owned()) }
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(15 * 60 * 1000),
            per_account_and_network: 10,
            per_account: 100,
            per_network: 100,
        }
    }
}

impl Default for Identity {
    fn default() -> Self {
        Self { preset: Preset::XForwarded, headers: BTreeMap::new(), strip: Vec::new() }
    }
}

impl Default for Eject {
    fn default() -> Self {
        Self {
            failures: 5,
            time: Duration::from_millis(2_000),
            time_max: Duration::from_millis(30_000),
            share: 50,
            statuses: Vec::new(),
        }
    }
}

impl Default for Check {
    fn default() -> Self {
        Self {
            path: None,
            host: None,
            statuses: Statuses::default(),
            body: None,
            port: None,
            tls: None,
            server_name: None,
            verify: Spanned::new(0..0, true),
            interval: Duration::from_millis(5_000),
            timeout: Duration::from_millis(2_000),
            rise: 2,
            fall: 3,
            jitter: 10,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            address: Spanned::new(0..0, SocketAddr::from(([127, 0, 0, 1], 9900))),
            enabled: true,
            hosts: Vec::new(),
            token: None,
        }
    }
}

impl Default for Tracing {
    fn default() -> Self {
        let ratio = Spanned::new(0..0, 1.0);
        Self { endpoint: None, ratio, service: "cloakroom".to_owned(), headers: BTreeMap::new() }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: LogLevel::Info, access: true }
    }
}
