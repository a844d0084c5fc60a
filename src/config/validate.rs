//! Do the keys make sense together? Every rule that no single value can keep, all of them told at once.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::Problems;
use super::model::{
    ACR_VALUES_MAX, Access, Backend, BackendSource, Balance, Cache, Check as HealthCheck, Config, Directive, Eject,
    HashBy, Hsts, Listener, OidcLogin, Place, Pool, Protocol, RedisStore, Route, RouteSplit, Scheme, SealRecords,
};
use super::redis_url::RedisUrl;
use super::value::{Bytes, Duration, Secret, is_sample_secret};

/// `tree` is what `config` was read from: it knows where each key stands.
pub(super) fn check(config: &Config, tree: &DeTable<'_>, problems: &mut Problems<'_>) {
    let mut check = Check { config, tree, problems };
    check.server();
    check.listeners();
    check.limits();
    check.store();
    check.session();
    check.login();
    check.basic();
    check.identity();
    check.pools();
    check.splits();
    check.dns();
    check.routes();
    check.events();
    check.tracing();
    check.admin();
}

struct Check<'c, 't> {
    config: &'c Config,
    tree: &'c DeTable<'c>,
    problems: &'c mut Problems<'t>,
}

impl Check<'_, '_> {
    fn server(&mut self) {
        let server = &self.config.server;
        self.number("server.threads", server.threads, 0..=1024);
        self.number("server.connections_max", server.connections_max, 1..=1_000_000);
    }

    fn listeners(&mut self) {
        let listeners = &self.config.listeners;
        if listeners.is_empty() {
            self.problems
                .add(0..0, "no [[listener]]: there is no address to serve")
                .hint("add [[listener]] with e.g. address = \"127.0.0.1:8080\"");
        }
        for (index, listener) in listeners.iter().enumerate() {
            if let Some(first) = listeners[..index].iter().find(|other| clash(&other.address, &listener.address)) {
                let line = self.problems.line_of(&first.address.span());
                let message = format!("{} is already taken by the listener of line {line}", listener.address);
                self.problems.add(listener.address.span(), message);
            }
            self.transport(listener);
        }
    }

    /// TLS, a TLS-terminating proxy in front, loopback, or an explicit yes to plain HTTP: nothing else.
    fn transport(&mut self, listener: &Listener) {
        match (&listener.cert, &listener.key) {
            (Some(cert), None) => {
                self.problems.add(cert.span(), "cert without key").hint("add key = \"...\", the PEM private key");
            }
            (None, Some(key)) => {
                self.problems.add(key.span(), "key without cert").hint("add cert = \"...\", the PEM certificate chain");
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        if let Some(balancers) = &listener.proxy_protocol
            && balancers.get_ref().is_empty()
        {
            self.problems
                .add(balancers.span(), "proxy_protocol names nobody: no client could connect")
                .hint("name the networks of the balancers in front, or leave it out");
        }
        let speaks_tls = listener.has_certificate();
        let scheme = listener.scheme.as_ref().map(Spanned::get_ref);
        if let Some(written) = &listener.scheme
            && speaks_tls
            && scheme == Some(&Scheme::Http)
        {
            self.problems
                .add(written.span(), "scheme = \"http\" on a listener with cert and key")
                .hint("leave scheme out: a listener with a certificate speaks https");
        }
        let is_loopback = listener.address.get_ref().ip().to_canonical().is_loopback();
        self.about_tls(listener);
        let answers = listener.redirect_to_port.is_none();
        if answers && !speaks_tls && !is_loopback && !listener.insecure && scheme != Some(&Scheme::Https) {
            let message = format!("plain HTTP on {}, which is not loopback: sessions could be read", listener.address);
            self.problems.add(listener.address.span(), message).hint(
                "add cert and key; or scheme = \"https\" when a proxy in front terminates TLS (and name it in \
                 server.trusted_proxies); or insecure = true",
            );
        }
    }

    /// Keys that only mean something with a certificate, or only without one.
    fn about_tls(&mut self, listener: &Listener) {
        let speaks_tls = listener.has_certificate();
        let needs_tls = "add cert and key: only a listener that speaks TLS has this";
        if let Some(further) = listener.certificates.first().filter(|_| !speaks_tls) {
            self.problems.add(further.cert.span(), "certificates without cert and key").hint(
                "add cert and key, for clients that ask for no name; `certificates` are further ones, chosen by name",
            );
        }
        if let Some(ca) = listener.client_ca.as_ref().filter(|_| !speaks_tls) {
            self.problems.add(ca.span(), "client_ca on a listener without TLS").hint(needs_tls);
        }
        let is_https = speaks_tls || listener.scheme.as_ref().is_some_and(|scheme| *scheme.get_ref() == Scheme::Https);
        if let Some(hsts) = listener.hsts.as_ref() {
            if !is_https {
                self.problems
                    .add(hsts.span(), "hsts on a listener without TLS: browsers ignore it there")
                    .hint("move it to the listener with cert and key");
            }
            let Hsts { max_age, subdomains, preload } = hsts.get_ref();
            if *preload && !(*subdomains && YEAR.get() <= max_age.get()) {
                self.problems
                    .add(hsts.span(), "preload asks for subdomains = true and max_age of a year at least")
                    .hint("see https://hstspreload.org; a domain leaves that list only after months");
            }
        }
        if let Some(redirect) = &listener.redirect_to_port {
            if is_https {
                self.problems
                    .add(redirect.span(), "redirect_to_port on a listener that is https itself")
                    .hint("it belongs to a plain listener beside this one");
            }
            if *redirect.get_ref() == 0 {
                self.problems.add(redirect.span(), "redirect_to_port is 0").hint("browsers usually know https at 443");
            }
        }
    }

    fn limits(&mut self) {
        let limits = &self.config.limits;
        self.number("limits.headers_max", limits.headers_max, 1..=250);
        self.number("limits.streams_max", limits.streams_max as usize, 1..=1000);
        let head = limits.head_bytes;
        if !(1 << 10..=512 << 10).contains(&head.0) {
            let at = self.at("limits.head_bytes");
            self.problems.add(at, format!("limits.head_bytes is {head}: must be between 1KiB and 512KiB"));
        }
        if TARGET_BYTES_MAX < limits.target_bytes {
            let at = self.at("limits.target_bytes");
            self.problems
                .add(at, format!("limits.target_bytes ({}) is over {TARGET_BYTES_MAX}", limits.target_bytes))
                .hint("no longer target can be handled");
        }
        if head < limits.target_bytes {
            let at = self.at_one_of(["limits.target_bytes", "limits.head_bytes"]);
            let message =
                format!("limits.target_bytes ({}) is larger than limits.head_bytes ({head})", limits.target_bytes);
            self.problems.add(at, message).hint("the target is part of the head: lower the one or raise the other");
        }
    }

    fn store(&mut self) {
        let store = &self.config.store;
        if let (Some(_), Some(memory)) = (&store.redis, &store.memory) {
            self.problems
                .add(memory.span(), "both [store.redis] and [store.memory]: sessions are kept in one place")
                .hint("remove one of them");
        }
        if let Some(redis) = &store.redis {
            self.redis(redis.get_ref());
        }
        if let Some(memory) = &store.memory {
            self.number("store.memory.sessions_max", memory.get_ref().sessions_max, 1..=1_000_000_000);
        }
        if let Some(grace) = &store.grace {
            if store.redis.is_none() {
                self.problems
                    .add(grace.span(), "grace is for a store that can be down, and [store.memory] cannot")
                    .hint("remove grace, or add [store.redis]");
            }
            if store.redis.as_ref().is_some_and(|redis| redis.get_ref().cache == Cache::Off) {
                self.problems
                    .add(grace.span(), "grace serves copies, and with cache = \"off\" there are none")
                    .hint("remove grace, or cache = \"off\"; [session.fallback] needs no copies");
            }
            self.no_longer_than(grace, "store.grace", BRIDGED_MAX);
        }
    }

    fn redis(&mut self, redis: &RedisStore) {
        let url = redis.url.get_ref().expose();
        // An empty one was told of when it was resolved.
        if !url.is_empty() {
            match RedisUrl::parse(url) {
                Err(message) => {
                    let expected = "expected e.g. \"redis://127.0.0.1:6379\", \"rediss://user:password@redis.example.org\", \
                                    \"redis+sentinel://host1,host2,host3/mymaster\", \"redis+cluster://host1,host2\" \
                                    or \"unix:///run/redis/redis.sock\"";
                    self.problems.add(redis.url.span(), format!("store.redis.url: {message}")).hint(expected);
                }
                Ok(url) => self.redis_url(redis, &url),
            }
        }
        let prefix = redis.prefix.get_ref();
        if !(1..=64).contains(&prefix.len())
            || !prefix.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'{' | b'}'))
        {
            let message =
                format!("invalid prefix {prefix:?}: expected 1 to 64 printable ASCII characters, no space, no brace");
            self.problems
                .add(redis.prefix.span(), message)
                .hint("a brace would decide which slot of a Redis Cluster holds a key");
        }
        match (&redis.cert, &redis.key) {
            (Some(cert), None) => {
                self.problems.add(cert.span(), "cert without key").hint("add key = \"...\", the PEM private key");
            }
            (None, Some(key)) => {
                self.problems.add(key.span(), "key without cert").hint("add cert = \"...\", the PEM certificate chain");
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        self.number("store.redis.cache_sessions_max", redis.cache_sessions_max, 1..=100_000_000);
        self.number("store.redis.logout_replicas", redis.logout_replicas.into(), 1..=16);
        let lease = *redis.lease.get_ref();
        if lease < LEASE_MIN || LEASE_MAX < lease {
            let message = format!("store.redis.lease is {lease}: must be between {LEASE_MIN} and {LEASE_MAX}");
            self.problems.add(redis.lease.span(), message).hint(
                "a logout is seen everywhere within this time; every quarter of it Redis is asked for a sign of life",
            );
        }
    }

    fn redis_url(&mut self, redis: &RedisStore, url: &RedisUrl) {
        let is_sample = url.passwords().any(|password| is_sample_secret(password.expose()));
        if is_sample || is_sample_secret(redis.url.get_ref().expose()) {
            self.problems
                .add(redis.url.span(), "store.redis.url holds a sample password, which everybody knows")
                .hint("set a password of your own in Redis, and refer to it by { file = ... } or { env = ... }");
        }
        for (name, path) in [("ca", &redis.ca), ("cert", &redis.cert), ("key", &redis.key)] {
            if let Some(path) = path
                && !url.tls
            {
                self.problems
                    .add(path.span(), format!("{name} is for TLS, but store.redis.url does not begin with rediss"))
                    .hint(format!(
                        "write rediss:// (rediss+sentinel://, rediss+cluster://) in the URL, or remove {name}"
                    ));
            }
        }
    }

    fn session(&mut self) {
        let session = &self.config.session;
        if let Err(message) = cookie_name(session.cookie.get_ref()) {
            self.problems
                .add(session.cookie.span(), format!("invalid cookie name {:?}: {message}", session.cookie.get_ref()));
        }
        if session.absolute_timeout.get_ref() < session.idle_timeout.get_ref() {
            let at = self.at_one_of(["session.idle_timeout", "session.absolute_timeout"]);
            let message = format!(
                "session.idle_timeout ({}) is longer than session.absolute_timeout ({})",
                session.idle_timeout, session.absolute_timeout
            );
            self.problems
                .add(at, message)
                .hint("a session never outlives absolute_timeout: lower idle_timeout or raise absolute_timeout");
        }
        self.number("session.max_per_user", session.max_per_user as usize, 0..=10_000);
        self.number("session.activity", session.activity.into(), 0..=1_000);
        if let Some(name) = &session.silent_header
            && let Err(fault) = header_name(name.get_ref())
        {
            self.problems.add(name.span(), format!("invalid header {:?}: {fault}", name.get_ref()));
        }
        let needs_keys = "add keys_file = \"session.keys\" to [session], with a line made by: openssl rand -base64 32";
        if session.keys_file.is_none() && *session.seal_records.get_ref() != SealRecords::Off {
            self.problems.add(session.seal_records.span(), "seal_records without keys_file").hint(needs_keys);
        }
        if let Some(fallback) = &session.fallback {
            if session.keys_file.is_none() {
                self.problems.add(fallback.span(), "[session.fallback] without keys_file").hint(needs_keys);
            }
            if self.config.store.redis.is_none() {
                self.problems
                    .add(fallback.span(), "[session.fallback] is for a store that can be down, and memory cannot")
                    .hint("remove [session.fallback], or add [store.redis]");
            }
            self.no_longer_than(&fallback.get_ref().lifetime, "session.fallback.lifetime", BRIDGED_MAX);
        }
    }

    /// For what nobody can take back while it lasts.
    fn no_longer_than(&mut self, time: &Spanned<Duration>, key: &str, most: Duration) {
        if most.get() < time.get_ref().get() {
            self.problems
                .add(time.span(), format!("{key} is {time}: at most {most}"))
                .hint("so long a logout on another instance may go unnoticed, while the store is down");
        }
    }

    fn login(&mut self) {
        let login = &self.config.login;
        let (prefix, default_return) = (login.prefix.get_ref(), login.default_return.get_ref());
        let prefix_fault = match canonical(prefix) {
            Err(fault) => Some(fault),
            Ok(()) if prefix == "/" => Some("it would swallow every route"),
            Ok(()) if !prefix.ends_with('/') => Some("it must end with `/`"),
            Ok(()) => None,
        };
        if let Some(fault) = prefix_fault {
            let message = format!("invalid login.prefix {prefix:?}: {fault}");
            self.problems.add(login.prefix.span(), message).hint("expected a path such as \"/.cloakroom/\"");
        }
        if let Err(fault) = canonical(default_return) {
            let message = format!("invalid login.default_return {default_return:?}: {fault}");
            self.problems.add(login.default_return.span(), message).hint("expected a path of this site, such as \"/\"");
        } else if prefix != "/" && default_return.starts_with(prefix.as_str()) {
            let message = format!("login.default_return {default_return:?} lies under login.prefix");
            self.problems.add(login.default_return.span(), message).hint("a login must lead away from the login pages");
        }
        if let Some(password) = &login.password {
            self.number("login.password.hashes_max", password.hashes_max, 0..=1024);
            let throttle = &password.throttle;
            for (key, failures) in [
                ("login.password.throttle.per_account_and_network", throttle.per_account_and_network),
                ("login.password.throttle.per_account", throttle.per_account),
                ("login.password.throttle.per_network", throttle.per_network),
            ] {
                self.number(key, failures as usize, 1..=1_000_000);
            }
        }
        if let Some(page) = login.backend.as_ref().and_then(|backend| backend.page.as_ref()) {
            self.backend_page(page);
        }
        for origin in &login.origins {
            if let Err(fault) = web_origin(origin.get_ref()) {
                let message = format!("invalid origin {:?}: {fault}", origin.get_ref());
                self.problems.add(origin.span(), message).hint("expected e.g. \"https://app.example.org\"");
            }
        }
        for (name, provider) in &login.oidc {
            self.oidc(name, provider);
        }
    }

    /// The login page of a backend must be open to those who are not logged in, else it would lead to itself.
    fn backend_page(&mut self, page: &Spanned<String>) {
        let (path, prefix) = (page.get_ref(), self.config.login.prefix.get_ref());
        if let Err(fault) = canonical(path) {
            let message = format!("invalid login.backend.page {path:?}: {fault}");
            self.problems.add(page.span(), message).hint("expected a path of this site, such as \"/login\"");
            return;
        }
        if path.starts_with(prefix.as_str()) {
            self.problems.add(page.span(), format!("login.backend.page {path:?} lies under login.prefix"));
        }
        let covers = |route: &&Route| {
            let of = route.path.get_ref().trim_end_matches('/');
            path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let nearest = self.config.routes.iter().filter(covers).max_by_key(|route| route.path.get_ref().len());
        let is_shut = |route: &Route| *route.access.get_ref() == Access::Required;
        let logs_in = |route: &Route| route.directives.iter().any(|other| *other.get_ref() == Directive::Login);
        match nearest {
            Some(route) if is_shut(route) => {
                let message = format!("login.backend.page {path:?} is on a route that requires a session");
                let hint = "whoever has none is sent there: add a [[route]] for it with access = \"public\"";
                self.problems.add(page.span(), message).hint(hint);
            }
            Some(route) if !logs_in(route) => {
                let message = format!("login.backend.page {path:?} is on a route whose backend may log nobody in");
                self.problems.add(page.span(), message).hint("add directives = [\"login\"] to that [[route]]");
            }
            Some(_) | None => {}
        }
    }

    /// What a route's backends may say of the session.
    fn directives(&mut self, index: usize, route: &Route) {
        let access = *route.access.get_ref();
        for (number, directive) in route.directives.iter().enumerate() {
            if route.directives[..number].iter().any(|other| other.get_ref() == directive.get_ref()) {
                self.problems.add(directive.span(), "this directive is there twice");
            }
            match directive.get_ref() {
                Directive::Login if self.config.login.backend.is_none() => {
                    self.problems
                        .add(directive.span(), "a route where backends log users in, without [login.backend]")
                        .hint("add [login.backend], or remove \"login\" here");
                }
                Directive::Attributes if access == Access::Public => {
                    self.problems
                        .add(directive.span(), "attributes on a public route, where nobody looks for a session")
                        .hint("write access = \"optional\"");
                }
                Directive::Login | Directive::Logout | Directive::Attributes => {}
            }
        }
        let has_attributes = route.directives.iter().any(|other| *other.get_ref() == Directive::Attributes);
        if route.anonymous && !(has_attributes && access == Access::Optional) {
            let at = self.at_keys(&["route", &index.to_string(), "anonymous"]);
            self.problems
                .add(at, "anonymous sessions begin with attributes, where a session is not required")
                .hint("write access = \"optional\" and directives = [\"attributes\"], or remove anonymous");
        }
    }

    fn basic(&mut self) {
        let Some(basic) = &self.config.login.basic else { return };
        if self.config.login.password.is_none() {
            self.problems
                .add(basic.span(), "[login.basic] without [login.password], which says who has which password")
                .hint("add [login.password] with users_file = \"users.toml\"");
        }
        let realm = &basic.get_ref().realm;
        let text = realm.get_ref();
        let is_plain = |byte: u8| (byte.is_ascii_graphic() || byte == b' ') && !matches!(byte, b'"' | b'\\');
        if !(1..=64).contains(&text.len()) || !text.bytes().all(is_plain) {
            let message = format!("invalid login.basic.realm {text:?}");
            self.problems
                .add(realm.span(), message)
                .hint("expected 1 to 64 printable ASCII characters, no quote and no backslash");
        }
    }

    fn oidc(&mut self, name: &str, provider: &OidcLogin) {
        let at = self.at_keys(&["login", "oidc", name]);
        // The name is part of a URL, of a cookie's seal, and a label of metrics.
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=32).contains(&name.len()) || !name.bytes().all(is_plain) {
            let message = format!("invalid provider name {name:?}: expected 1 to 32 lower-case letters, digits or `-`");
            self.problems.add(at.clone(), message);
        }
        if self.config.login.origins.is_empty() {
            self.problems
                .add(at, format!("[login.oidc.{name}] needs to know where it leads back to"))
                .hint("add origins = [\"https://app.example.org\"] to [login]: what users see in the address bar");
        }
        let issuer = provider.issuer.get_ref();
        let fault = if issuer.contains('?') { Err("an issuer has no query") } else { confidential_url(issuer) };
        if let Err(fault) = fault {
            let message = format!("invalid issuer {issuer:?}: {fault}");
            self.problems
                .add(provider.issuer.span(), message)
                .hint("expected e.g. \"https://login.example.org/realms/staff\", exactly as the provider writes it");
        }
        for (key, text) in [("client_id", &provider.client_id), ("user", &provider.user)] {
            if text.get_ref().is_empty() {
                self.problems.add(text.span(), format!("login.oidc.{name}.{key} is empty"));
            }
        }
        if let Some(secret) = &provider.client_secret
            && is_sample_secret(secret.get_ref().expose())
        {
            self.problems
                .add(secret.span(), format!("login.oidc.{name}.client_secret is a sample, which everybody knows"))
                .hint("take the one that the provider shows, and refer to it by { file = ... } or { env = ... }");
        }
        let seals = provider.client_secret.is_some() || self.config.session.keys_file.is_some();
        if !seals && self.config.store.redis.is_some() {
            self.problems
                .add(provider.client_id.span(), format!("[login.oidc.{name}] has neither client_secret nor keys_file"))
                .hint(
                    "what one Cloakroom begins another must be able to end: add client_secret, or keys_file to [session]",
                );
        }
        if !provider.scopes.iter().any(|scope| scope.get_ref() == "openid") {
            let at = provider.scopes.first().map_or(provider.issuer.span(), Spanned::span);
            self.problems.add(at, "scopes without \"openid\": the provider would not say who logs in");
        }
        for scope in &provider.scopes {
            // RFC 6749, section 3.3.
            if scope.get_ref().is_empty() || !scope.get_ref().bytes().all(|b| b.is_ascii_graphic() && b != b'"') {
                self.problems.add(scope.span(), format!("invalid scope {:?}", scope.get_ref()));
            }
        }
        for name in provider.parameters.keys() {
            const OURS: [&str; 15] = [
                "response_type",
                "client_id",
                "client_secret",
                "redirect_uri",
                "scope",
                "state",
                "nonce",
                "code_challenge",
                "code_challenge_method",
                "prompt",
                "max_age",
                "acr_values",
                "response_mode",
                "request",
                "request_uri",
            ];
            if OURS.contains(&name.get_ref().as_str()) {
                self.problems
                    .add(name.span(), format!("parameter {:?} is Cloakroom's own matter", name.get_ref()))
                    .hint("scopes and prompt are keys of their own; acr and max_age are keys of a route");
            }
        }
        for domain in &provider.allowed_email_domains {
            if domain.get_ref().contains('@') || host_name_or_address(domain.get_ref()).is_err() {
                let message = format!("invalid domain {:?}", domain.get_ref());
                self.problems.add(domain.span(), message).hint("expected e.g. \"example.org\"");
            }
        }
    }

    fn identity(&mut self) {
        let identity = &self.config.identity;
        self.set_once(identity.headers.keys().collect());
        for name in identity.headers.keys().chain(&identity.strip) {
            if let Err(fault) = header_name(name.get_ref()) {
                self.problems.add(name.span(), format!("invalid header {:?}: {fault}", name.get_ref()));
            }
        }
    }

    /// No two of these names are one header.
    fn set_once(&mut self, mut headers: Vec<&Spanned<String>>) {
        let mut first_lines = BTreeMap::new();
        headers.sort_by_key(|name| name.span().start);
        for name in headers {
            let line = self.problems.line_of(&name.span());
            // Servers read `X_Team` and `x-team` as one name (CGI, RFC 3875, section 4.1.18).
            let same = name.get_ref().to_ascii_lowercase().replace('_', "-");
            if let Some(first) = first_lines.insert(same, line) {
                let message = format!("header {:?} is already set in line {first}", name.get_ref());
                self.problems.add(name.span(), message).hint("case does not matter, and `_` counts as `-`");
            }
        }
    }

    fn pools(&mut self) {
        for (name, pool) in &self.config.pools {
            let key = format!("pool.{name}");
            // The name is a label of metrics and a word of the log.
            if !is_label(name) {
                let at = self.at_keys(&["pool", name]);
                let message = format!("invalid pool name {name:?}: expected 1 to 64 letters, digits, `-` or `_`");
                self.problems.add(at, message);
            }
            if pool.backends.is_empty() {
                let at = self.at_keys(&["pool", name, "backends"]);
                self.problems
                    .add(at, format!("{key} has no backends"))
                    .hint("name at least one, e.g. \"127.0.0.1:9001\"");
            }
            self.backend_tls(pool);
            backends(&pool.backends, self.problems);
            self.backends_are_others(pool);
            if !pool.backends.is_empty() && pool.backends.iter().all(|backend| backend.get_ref().each.backup) {
                let at = self.at_keys(&["pool", name, "backends"]);
                self.problems
                    .add(at, format!("{key} has nothing but backups"))
                    .hint("without backup = true they share the requests all the time");
            }
            self.pool_numbers(name, pool);
            if let Some(check) = &pool.check {
                self.pool_check(name, check);
            }
        }
    }

    /// What a gateway sends to itself comes back to it without end.
    fn backends_are_others(&mut self, pool: &Pool) {
        for backend in pool.backends.iter().filter(|backend| backend.get_ref().place == Place::Address) {
            let address = &backend.get_ref().each.address;
            let is_it = |listener: &&Listener| leads_to(address, *listener.address.get_ref());
            if let Some(listener) = self.config.listeners.iter().find(is_it) {
                let line = self.problems.line_of(&listener.address.span());
                self.problems
                    .add(
                        backend.span(),
                        format!("{address} is the listener of line {line}: requests would go in circles"),
                    )
                    .hint("name the server that is to answer");
            }
        }
    }

    fn dns(&mut self) {
        let servers = self.config.dns.servers.len();
        self.number("dns.servers", servers, 0..=DNS_SERVERS_MAX);
        if self.config.dns.servers.iter().any(|server| server.port() == 0) {
            let at = self.at_keys(&["dns", "servers"]);
            self.problems.add(at, "a name server at port 0").hint("name servers are usually at port 53");
        }
    }

    fn pool_numbers(&mut self, name: &str, pool: &Pool) {
        let Eject { failures, time, time_max, share, statuses } = &pool.eject;
        let numbers: [(&[&str], u32, RangeInclusive<u32>); 4] = [
            (&["queue"], pool.queue, 0..=100_000),
            (&["retry_budget"], pool.retry_budget.into(), 0..=100),
            (&["eject", "failures"], *failures, 0..=1_000),
            (&["eject", "share"], (*share).into(), 0..=100),
        ];
        for (keys, number, range) in numbers {
            self.pool_number(name, keys, number, range);
        }
        if time_max < time {
            let at = self.at_keys(&["pool", name, "eject"]);
            let message = format!("pool.{name}.eject.time ({time}) is longer than time_max ({time_max})");
            self.problems.add(at, message);
        }
        if let Some(status) = statuses.iter().find(|status| !(400..=599).contains(*status)) {
            let at = self.at_keys(&["pool", name, "eject", "statuses"]);
            self.problems.add(at, format!("status {status} is no failure: expected 400 to 599"));
        }
        let has_max = pool.backends.iter().any(|backend| {
            let BackendSource { place, each } = backend.get_ref();
            // A file says it for each server of its own.
            each.max_requests != 0 || matches!(place, Place::File(_))
        });
        if pool.queue != 0 && !has_max {
            let at = self.at_keys(&["pool", name, "queue"]);
            self.problems
                .add(at, format!("pool.{name} has a queue, and no backend that is ever full"))
                .hint("give the backends max_requests, or leave queue out");
        }
        if pool.hash_by != HashBy::User && pool.balance != Balance::Hash {
            let at = self.at_keys(&["pool", name, "hash_by"]);
            self.problems
                .add(at, format!("pool.{name}.hash_by means nothing without balance = \"hash\""))
                .hint("add balance = \"hash\", or leave hash_by out");
        }
    }

    fn pool_check(&mut self, name: &str, check: &Spanned<HealthCheck>) {
        let at = check.span();
        let check = check.get_ref();
        for (key, number, range) in
            [("rise", check.rise, 1..=100), ("fall", check.fall, 1..=100), ("jitter", check.jitter.into(), 0..=50)]
        {
            self.pool_number(name, &["check", key], number, range);
        }
        if check.interval < CHECK_INTERVAL_MIN {
            let at = self.at_keys(&["pool", name, "check", "interval"]);
            let message = format!("pool.{name}.check.interval is {}: at least {CHECK_INTERVAL_MIN}", check.interval);
            self.problems.add(at, message);
        }
        match &check.path {
            Some(path) => {
                let text = path.get_ref();
                if !text.starts_with('/') || !text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
                    self.problems
                        .add(path.span(), format!("invalid path {text:?}: expected `/` and visible ASCII characters"));
                }
            }
            None if check.host.is_some() || check.body.is_some() => {
                self.problems
                    .add(
                        at,
                        format!("pool.{name}.check asks for no path, so nobody answers with a body or looks at a host"),
                    )
                    .hint("add path = \"/health\"");
            }
            None => {}
        }
        if let Some(host) = &check.host
            && let Err(fault) = host_and_port(host.get_ref())
        {
            self.problems.add(host.span(), format!("invalid host {:?}: {fault}", host.get_ref()));
        }
        let of_tls = [
            check.server_name.as_ref().map(|name| ("server_name", name.span())),
            (!check.verify.get_ref()).then(|| ("verify", check.verify.span())),
        ];
        if !check.tls.as_ref().is_some_and(|tls| *tls.get_ref()) {
            for (key, at) in of_tls.into_iter().flatten() {
                self.problems
                    .add(at, format!("pool.{name}.check.{key} means nothing without tls = true"))
                    .hint("without tls, checks go as requests do, with the certificates of the pool");
            }
        }
        if let Some(server_name) = &check.server_name
            && let Err(fault) = host_name_or_address(server_name.get_ref())
        {
            self.problems.add(server_name.span(), format!("invalid server_name {:?}: {fault}", server_name.get_ref()));
        }
    }

    fn pool_number(&mut self, name: &str, keys: &[&str], number: u32, range: RangeInclusive<u32>) {
        if !range.contains(&number) {
            let at = self.at_keys(&[&["pool", name], keys].concat());
            let key = keys.join(".");
            let (least, most) = (range.start(), range.end());
            self.problems.add(at, format!("pool.{name}.{key} is {number}: must be between {least} and {most}"));
        }
    }

    fn backend_tls(&mut self, pool: &Pool) {
        let Some(tls) = &pool.tls else {
            if *pool.protocol.get_ref() == Protocol::Auto {
                self.problems
                    .add(pool.protocol.span(), "protocol = \"auto\" without tls: nobody says which it is")
                    .hint("write \"http1\", or \"http2\" for backends that expect it (h2c); or add tls = {}");
            }
            return;
        };
        match (&tls.cert, &tls.key) {
            (Some(cert), None) => {
                self.problems.add(cert.span(), "cert without key").hint("add key = \"...\", the PEM private key");
            }
            (None, Some(key)) => {
                self.problems.add(key.span(), "key without cert").hint("add cert = \"...\", the PEM certificate chain");
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        if let Some(name) = &tls.server_name
            && rustls::pki_types::ServerName::try_from(name.get_ref().as_str()).is_err()
        {
            self.problems
                .add(name.span(), format!("invalid server_name {:?}", name.get_ref()))
                .hint("expected the name or the IP address in the backends' certificate, e.g. \"app.internal\"");
        }
        if !*tls.verify.get_ref()
            && let Some(ca) = &tls.ca
        {
            self.problems
                .add(ca.span(), "ca with verify = false: nothing is verified by it")
                .hint("remove verify = false");
        }
    }

    fn splits(&mut self) {
        for (name, split) in &self.config.splits {
            let at = self.at_keys(&["split", name]);
            // The name is a label of metrics, a word of the log, and a part of a path.
            if !is_label(name) {
                let message = format!("invalid split name {name:?}: expected 1 to 64 letters, digits, `-` or `_`");
                self.problems.add(at.clone(), message);
            }
            if split.groups.is_empty() && split.percent.is_none() {
                self.problems
                    .add(at, format!("split.{name} takes nobody"))
                    .hint("give it groups, a percent, or both; percent = 0 for one that is to be moved later");
            }
        }
    }

    /// Whom a route sends to another pool.
    fn route_splits(&mut self, route: &Route) {
        for (index, RouteSplit { name, pool }) in route.splits.iter().enumerate() {
            self.pool_is_there(pool);
            let split = name.get_ref();
            if route.splits[..index].iter().any(|other| other.name.get_ref() == split) {
                self.problems.add(name.span(), format!("split `{split}` is there twice: the second would get nobody"));
            }
            let Some(about) = self.config.splits.get(split) else {
                let hint = match &*known_names(&self.config.splits) {
                    "" => format!("add [split.{split}] with a percent or groups"),
                    known => format!("the splits are {known}"),
                };
                self.problems.add(name.span(), format!("there is no split `{split}`")).hint(hint);
                continue;
            };
            if *route.access.get_ref() == Access::Public && about.percent.is_none() {
                self.problems
                    .add(
                        name.span(),
                        format!("split `{split}` goes by groups, on a public route, where nobody looks who it is"),
                    )
                    .hint("write access = \"optional\", or remove it here");
            }
        }
    }

    fn pool_is_there(&mut self, pool: &Spanned<String>) {
        let name = pool.get_ref();
        if !self.config.pools.contains_key(name) {
            let hint = match &*known_names(&self.config.pools) {
                "" => format!("add [pool.{name}]"),
                known => format!("the pools are {known}"),
            };
            self.problems.add(pool.span(), format!("there is no pool `{name}`")).hint(hint);
        }
    }

    fn routes(&mut self) {
        let routes = &self.config.routes;
        if routes.is_empty() {
            self.problems
                .add(0..0, "no [[route]]: every request would be answered with 404")
                .hint("add [[route]] with path = \"/\" and pool = \"...\"");
        }
        let login_prefix = self.config.login.prefix.get_ref();
        let mut first_lines = BTreeMap::new();
        for (index, route) in routes.iter().enumerate() {
            let path = route.path.get_ref();
            if let Err(fault) = canonical(path) {
                self.problems.add(route.path.span(), format!("invalid path {path:?}: {fault}"));
            } else if login_prefix != "/" && format!("{path}/").starts_with(login_prefix) {
                self.problems
                    .add(route.path.span(), format!("path {path:?} lies under login.prefix, which is answered first"))
                    .hint("choose another path, or change login.prefix");
            }
            if let Some(host) = &route.host
                && let Err(fault) = route_host(host.get_ref())
            {
                let message = format!("invalid host {:?}: {fault}", host.get_ref());
                self.problems.add(host.span(), message).hint("expected e.g. \"app.example.org\" or \"*.example.org\"");
            }

            let host = route.host.as_ref().map(Spanned::get_ref);
            let line = self.problems.line_of(&route.path.span());
            // `/app/` is the same route as `/app`: most backends answer both alike.
            let place = (host, path.strip_suffix('/').unwrap_or(path));
            if let Some(first) = first_lines.get(&place) {
                let on_host = host.map_or_else(String::new, |host| format!(" on host {host:?}"));
                let message = format!("path {path:?}{on_host} already has a route in line {first}");
                self.problems.add(route.path.span(), message).hint("give the one or the other another path or host");
            } else {
                first_lines.insert(place, line);
            }

            self.pool_is_there(&route.pool);
            self.route_splits(route);
            if !route.groups.is_empty() && route.access.get_ref() != &Access::Required {
                let at = self.at_keys(&["route", &index.to_string(), "groups"]);
                self.problems
                    .add(at, "groups on a route that lets everybody in")
                    .hint("write access = \"required\", or remove groups");
            }
            self.directives(index, route);
            if *route.basic.get_ref() {
                if self.config.login.basic.is_none() {
                    self.problems
                        .add(route.basic.span(), "basic = true, but there is no [login.basic]")
                        .hint("add [login.basic]; it may be empty");
                }
                if route.access.get_ref() == &Access::Public {
                    self.problems
                        .add(route.basic.span(), "basic = true on a route that asks nobody who they are")
                        .hint("write access = \"required\" or \"optional\", or remove basic");
                }
            }
            for origin in &route.websocket_origins {
                if let Err(fault) = web_origin(origin.get_ref()) {
                    let message = format!("invalid origin {:?}: {fault}", origin.get_ref());
                    self.problems.add(origin.span(), message).hint("expected e.g. \"https://app.example.org\"");
                }
            }
        }
        for route in routes {
            self.demand(route);
        }
        self.someone_can_log_in();
    }

    /// What a route asks of a login at a provider.
    fn demand(&mut self, route: &Route) {
        let asked = route.acr.first().map(|acr| ("acr", acr.span()));
        let asked = asked.or_else(|| route.max_age.as_ref().map(|age| ("max_age", age.span())));
        let asked = asked.or_else(|| route.access_token.as_ref().map(|name| ("access_token", name.span())));
        let Some((key, at)) = asked else { return };
        let oidc = &self.config.login.oidc;
        if oidc.is_empty() {
            self.problems.add(at.clone(), format!("{key} is for logins at a provider")).hint("add [login.oidc.NAME]");
        }
        if *route.access.get_ref() == Access::Public {
            self.problems.add(at, format!("{key} on a public route, where nobody looks who it is"));
        }
        if let Some(age) = route.max_age.as_ref().filter(|age| *age.get_ref() < LOGIN_AGE_MIN) {
            self.problems
                .add(age.span(), format!("max_age ({}) is shorter than {LOGIN_AGE_MIN}", age.get_ref()))
                .hint("the login would be too old again before its page has loaded");
        }
        if let Some(first_too_many) = route.acr.get(ACR_VALUES_MAX) {
            self.problems.add(first_too_many.span(), format!("more than {ACR_VALUES_MAX} values of acr"));
        }
        for acr in &route.acr {
            // The values stand in one parameter, with spaces between (OpenID Connect Core 1.0, section 3.1.2.1).
            let value = acr.get_ref();
            if !(1..=128).contains(&value.len()) || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
                self.problems.add(acr.span(), format!("invalid acr {value:?}: expected 1 to 128 visible characters"));
            }
        }
        if let Some(name) = &route.access_token {
            if let Err(fault) = header_name(name.get_ref()) {
                self.problems.add(name.span(), format!("invalid header {:?}: {fault}", name.get_ref()));
            }
            if !oidc.is_empty() && !oidc.values().any(|provider| provider.tokens) {
                self.problems
                    .add(name.span(), "access_token without a provider whose tokens are kept")
                    .hint("add tokens = true to [login.oidc.NAME]");
            }
        }
    }

    /// A session begins with a login; without one, a route that asks for it would be shut for ever.
    fn someone_can_log_in(&mut self) {
        let attributes_begin_sessions = self.config.routes.iter().any(|route| route.anonymous);
        let asks = |access: Access| match access {
            Access::Public => false,
            Access::Optional => !attributes_begin_sessions,
            Access::Required => true,
        };
        let mut directives = self.config.routes.iter().flat_map(|route| &route.directives);
        let backends_log_in = directives.any(|directive| *directive.get_ref() == Directive::Login);
        if self.config.login.password.is_some() || !self.config.login.oidc.is_empty() || backends_log_in {
            return;
        }
        if let Some(route) = self.config.routes.iter().find(|route| asks(*route.access.get_ref())) {
            let is_default = route.access.span() == (0..0);
            let at = if is_default { route.path.span() } else { route.access.span() };
            self.problems
                .add(at, format!("route {:?} asks for a session, but nobody can log in", route.path.get_ref()))
                .hint("add [login.password] with users_file = \"users.toml\" or [login.oidc.NAME], or write access = \"public\"");
        }
    }

    fn tracing(&mut self) {
        let tracing = &self.config.tracing;
        if let Some(endpoint) = &tracing.endpoint
            && let Err(fault) = collector_url(endpoint.get_ref())
        {
            self.problems
                .add(endpoint.span(), format!("tracing.endpoint: {fault}"))
                .hint("expected e.g. \"http://127.0.0.1:4318\"; /v1/traces is added");
        }
        if !(0.0..=1.0).contains(tracing.ratio.get_ref()) {
            self.problems
                .add(tracing.ratio.span(), format!("tracing.ratio {} is not from 0 to 1", tracing.ratio.get_ref()))
                .hint("0.1 records every tenth of the traces that begin here");
        }
        self.tracing_headers();
    }

    fn tracing_headers(&mut self) {
        let tracing = &self.config.tracing;
        self.set_once(tracing.headers.keys().collect());
        for (name, value) in &tracing.headers {
            let text = value.get_ref().expose();
            if let Err(fault) = collector_header(name.get_ref()) {
                self.problems.add(name.span(), format!("invalid header {:?}: {fault}", name.get_ref()));
            }
            // Told of when it was resolved, if it is empty.
            if !text.is_empty()
                && let Err(fault) = header_value(text)
            {
                // Without the value, which is a secret.
                self.problems
                    .add(value.span(), format!("invalid value of header {:?}: {fault}", name.get_ref()))
                    .hint("expected one line of visible ASCII characters, e.g. \"Bearer ...\"");
            }
        }
        let mut names: Vec<_> = tracing.headers.keys().collect();
        names.sort_by_key(|name| name.span().start);
        if let Some(first_too_many) = names.get(COLLECTOR_HEADERS_MAX) {
            let message = format!("more than {COLLECTOR_HEADERS_MAX} headers for the collector");
            self.problems.add(first_too_many.span(), message);
        }
        let Some(first) = names.first() else { return };
        match &tracing.endpoint {
            None => {
                self.problems
                    .add(first.span(), "tracing.headers without tracing.endpoint: nobody is sent anything")
                    .hint("add endpoint = \"https://...\" to [tracing], or remove them");
            }
            Some(endpoint) => {
                let leads_away = matches!(url(endpoint.get_ref()), Ok(("http", false)));
                if leads_away {
                    self.problems
                        .add(
                            endpoint.span(),
                            "tracing.endpoint: plain http:// would show tracing.headers to the network",
                        )
                        .hint("write https://, or send to a collector on this machine, and let that one add them");
                }
            }
        }
    }

    fn events(&mut self) {
        let events = &self.config.events;
        if let Some(webhook) = &events.webhook
            && let Err(fault) = confidential_url(webhook.get_ref())
        {
            // Without the URL itself, which may hold a secret.
            self.problems
                .add(webhook.span(), format!("events.webhook: {fault}"))
                .hint("expected e.g. \"https://example.org/session-ended\"; http:// only to this machine itself");
        }
        if let Some(secret) = &events.webhook_secret {
            if events.webhook.is_none() {
                self.problems
                    .add(secret.span(), "events.webhook_secret without events.webhook: there is nothing to sign")
                    .hint("add webhook = \"https://...\", or remove it");
            }
            self.strong("events.webhook_secret", secret);
        }
    }

    /// A secret that is only ever compared with itself can be as long as it must be to be no guess.
    fn strong(&mut self, key: &str, secret: &Spanned<Secret>) {
        let text = secret.get_ref().expose();
        let fault = if text.is_empty() {
            return; // told of when it was resolved
        } else if is_sample_secret(text) {
            "is a sample, which everybody knows"
        } else if text.chars().count() < SECRET_CHARS_MIN {
            "is shorter than 32 characters"
        } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            "holds more than visible ASCII characters"
        } else {
            return;
        };
        self.problems
            .add(secret.span(), format!("{key} {fault}"))
            .hint("make one with `openssl rand -base64 32`, and refer to it by { file = ... } or { env = ... }");
    }

    fn admin(&mut self) {
        let admin = &self.config.admin;
        if let Some(token) = &admin.token {
            self.strong("admin.token", token);
        }
        for host in &admin.hosts {
            if let Err(fault) = whole_host(host.get_ref()) {
                let message = format!("invalid host {:?} in admin.hosts: {fault}", host.get_ref());
                self.problems.add(host.span(), message).hint("expected e.g. \"gw1.example.org\"");
            }
        }
        if !admin.enabled {
            return;
        }
        if let Some(listener) = self.config.listeners.iter().find(|other| clash(&other.address, &admin.address)) {
            let is_default = admin.address.span() == (0..0);
            let at = if is_default { listener.address.span() } else { admin.address.span() };
            self.problems
                .add(at, format!("admin.address ({}) is also the address of a listener", admin.address))
                .hint("what the operator sees must not be served to everybody: choose another port");
        }
    }

    fn number(&mut self, key: &str, number: usize, range: RangeInclusive<usize>) {
        if !range.contains(&number) {
            let at = self.at(key);
            let message = format!("{key} is {number}: must be between {} and {}", range.start(), range.end());
            self.problems.add(at, message);
        }
    }

    /// Where the value of a dotted key stands; `0..0` when the file leaves it at its default.
    fn at(&self, key: &str) -> Range<usize> {
        self.at_keys(&key.split('.').collect::<Vec<_>>())
    }

    /// The first of two keys, unless it is at its default and only the second is in the file.
    fn at_one_of(&self, keys: [&str; 2]) -> Range<usize> {
        keys.map(|key| self.at(key)).into_iter().find(|at| *at != (0..0)).unwrap_or(0..0)
    }

    fn at_keys(&self, keys: &[&str]) -> Range<usize> {
        let Some((first, rest)) = keys.split_first() else { return 0..0 };
        let Some(mut value) = self.tree.get(*first) else { return 0..0 };
        for key in rest {
            let next = match value.get_ref() {
                DeValue::Array(_) => key.parse::<usize>().ok().and_then(|index| value.get_ref().get(index)),
                _ => value.get_ref().get(*key),
            };
            let Some(next) = next else { return 0..0 };
            value = next;
        }
        value.span()
    }
}

/// Whether it can be a label of metrics and a word of the log as it is.
pub fn is_label(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// As a hint names them.
fn known_names<T>(sections: &BTreeMap<String, T>) -> String {
    sections.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Whether both cannot be bound: the same port of one address, or of an address and its family's wildcard.
fn clash(one: &Spanned<SocketAddr>, other: &Spanned<SocketAddr>) -> bool {
    let (one, other) = (one.get_ref(), other.get_ref());
    let same_family = one.is_ipv4() == other.is_ipv4();
    let has_wildcard = one.ip().is_unspecified() || other.ip().is_unspecified();
    // The kernel gives each port 0 a port of its own.
    one.port() == other.port() && one.port() != 0 && (one.ip() == other.ip() || same_family && has_wildcard)
}

/// Whether who connects to this backend arrives at this listener, as far as can be seen without a look at the machine.
fn leads_to(backend: &str, listener: SocketAddr) -> bool {
    let Some((host, port)) = backend.rsplit_once(':') else { return false };
    if port.parse() != Ok(listener.port()) {
        return false;
    }
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    match host.parse::<IpAddr>() {
        Ok(address) => {
            // The IPv6 wildcard takes connections of both families, the other only those of its own.
            let takes_all = listener.ip().is_unspecified() && (address.is_ipv4() || listener.is_ipv6());
            address == listener.ip() || takes_all && address.is_loopback()
        }
        Err(_) => {
            let takes_ours = listener.ip() == Ipv4Addr::LOCALHOST || listener.ip().is_unspecified();
            host.eq_ignore_ascii_case("localhost") && takes_ours
        }
    }
}

const SECRET_CHARS_MIN: usize = 32;

/// Spans are no secret, so that any network will do; headers beside them are one.
fn collector_url(text: &str) -> Result<(), &'static str> {
    if text.contains('?') {
        return Err("a query means nothing there");
    }
    if text.trim_end_matches('/').ends_with("/v1/traces") {
        return Err("it ends with what is added to it");
    }
    match url(text)? {
        ("http" | "https", _) => Ok(()),
        _ => Err("unknown scheme, expected http or https"),
    }
}

/// Whether what is secret may be sent to this URL: by TLS, or within this machine.
pub fn confidential_url(text: &str) -> Result<(), &'static str> {
    match url(text)? {
        ("https", _) | ("http", true) => Ok(()),
        ("http", false) => Err("plain http:// would show what is secret to the network"),
        _ => Err("unknown scheme, expected https"),
    }
}

/// The scheme of a plain URL, and whether it leads to this machine.
fn url(text: &str) -> Result<(&str, bool), &'static str> {
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("white space, or more than ASCII");
    }
    if text.contains('#') {
        return Err("a fragment means nothing to a server");
    }
    let (scheme, rest) = text.split_once("://").ok_or("no scheme")?;
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err("a user or password in a URL is easily shown");
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, "443"),
    };
    if host.is_empty() {
        return Err("no host");
    }
    host_name_or_address(host)?;
    port_number(port)?;
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_here = host == "localhost" || address.is_ok_and(|address| address.to_canonical().is_loopback());
    Ok((scheme, is_here))
}

/// A name that browsers keep and that means what it says (RFC 6265, section 4.1.1; RFC 6265bis, section 4.1.3).
fn cookie_name(name: &str) -> Result<(), &'static str> {
    let bare = name.strip_prefix("__Host-").unwrap_or(name);
    if bare.is_empty() || !bare.bytes().all(is_token_byte) {
        return Err("expected letters, digits and the like, no space, no separator");
    }
    if bare.starts_with("__") {
        return Err("the only prefix that may begin with `__` is `__Host-`");
    }
    if 64 < name.len() {
        return Err("at most 64 characters");
    }
    Ok(())
}

/// The longest that anybody is served without a word of the store.
const BRIDGED_MAX: Duration = Duration::from_millis(60 * 60 * 1000);
/// What a route may ask of a login's age.
const LOGIN_AGE_MIN: Duration = Duration::from_millis(10_000);
/// Of Redis; below, a busy machine lets it lapse for nothing.
const LEASE_MIN: Duration = Duration::from_millis(200);
const LEASE_MAX: Duration = Duration::from_millis(60_000);

const YEAR: Duration = Duration::from_millis(365 * 24 * 60 * 60 * 1000);

/// What the guard can handle: `http::Uri` holds no longer target.
const TARGET_BYTES_MAX: Bytes = Bytes(63 * 1024);

/// A path that every reader takes the same way: policy and backend must not differ on what it names.
fn canonical(path: &str) -> Result<(), &'static str> {
    if !path.starts_with('/') {
        return Err("it must begin with `/`");
    }
    if path.bytes().any(|b| !b.is_ascii_graphic()) {
        return Err("only visible ASCII characters, no spaces");
    }
    // No request with one of these is ever let in.
    if path.contains(['%', ';', '\\', '?', '#', '"', '<', '>', '^', '`', '{', '|', '}']) {
        return Err("none of `%` `;` `\\` `?` `#` `\"` `<` `>` `^` `{` `|` `}` and no backtick is allowed");
    }
    let mut segments = path[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        if segment.is_empty() && segments.peek().is_some() {
            return Err("no `//`");
        }
        if matches!(segment, "." | "..") {
            return Err("no `.` and no `..` as a segment");
        }
    }
    Ok(())
}

/// A name that we may write or remove without breaking HTTP or what Cloakroom itself says.
fn header_name(name: &str) -> Result<(), &'static str> {
    if name.starts_with(':') {
        return Err("pseudo-headers belong to HTTP/2 itself");
    }
    if name.is_empty() || !name.bytes().all(is_token_byte) {
        return Err("expected a field name: letters, digits, `-` and the like (RFC 9110, section 5.6.2)");
    }
    let name = name.to_ascii_lowercase().replace('_', "-");
    match name.as_str() {
        "connection"
        | "keep-alive"
        | "proxy-connection"
        | "proxy-authenticate"
        | "proxy-authorization"
        | "proxy-authentication-info"
        | "te"
        | "trailer"
        | "transfer-encoding"
        | "upgrade"
        | "http2-settings" => Err("it belongs to one connection, not to the request (RFC 9110, section 7.6.1)"),
        "content-length" | "host" | "expect" => Err("it frames or routes the request"),
        "cookie" | "set-cookie" => Err("cookies are Cloakroom's own matter"),
        "x-forwarded-for" | "x-forwarded-proto" | "x-forwarded-host" | "x-request-id" | "via" => {
            Err("Cloakroom writes it itself")
        }
        _ if name.starts_with("sec-websocket-") => Err("it belongs to the WebSocket handshake"),
        _ => Ok(()),
    }
}

/// A name that may stand beside what we send to a collector.
fn collector_header(name: &str) -> Result<(), &'static str> {
    header_name(name)?;
    match name.to_ascii_lowercase().replace('_', "-").as_str() {
        "content-type" | "content-encoding" => Err("it says what is sent, which is Cloakroom's own matter"),
        _ => Ok(()),
    }
}

/// As it is sent (RFC 9110, section 5.5), without what would be trimmed or is read in more than one way.
fn header_value(text: &str) -> Result<(), &'static str> {
    if HEADER_VALUE_BYTES_MAX < text.len() {
        return Err("it is longer than 8 KiB");
    }
    if text.starts_with(' ') || text.ends_with(' ') {
        return Err("a space at its beginning or its end would be lost");
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return Err("it holds more than visible ASCII characters and spaces");
    }
    Ok(())
}

/// They go with every batch of spans; services ask for one or two.
const COLLECTOR_HEADERS_MAX: usize = 16;

/// What most servers take for the whole head of a request.
const HEADER_VALUE_BYTES_MAX: usize = 8 << 10;

const MAX_REQUESTS_MAX: u32 = 1_000_000;

/// As many are asked in vain before a look-up gives up.
const DNS_SERVERS_MAX: usize = 4;

/// More often than this, checks are load.
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// As `Host` says it; the port may be missing.
fn host_and_port(text: &str) -> Result<(), &'static str> {
    match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host_name_or_address(host).and(port_number(port).map(drop)),
        _ => host_name_or_address(text),
    }
}

/// Those of a pool, or of a file that a pool names.
pub(super) fn backends(backends: &[Spanned<BackendSource>], problems: &mut Problems<'_>) {
    let mut seen = HashSet::new();
    for backend in backends {
        let BackendSource { place, each: Backend { address, host: _, weight, max_requests, backup: _, drain: _ } } =
            backend.get_ref();
        let (text, fault, expected) = match place {
            Place::Address => (
                address,
                backend_address(address),
                "expected host:port, e.g. \"10.0.0.7:8080\", \"app.internal:80\" or \"[fd00::7]:80\"",
            ),
            Place::Dns(host) => (host, named_backend(host), "expected host:port, e.g. \"app.internal:8080\""),
            Place::Srv(name) => (name, service_name(name), "expected a name, e.g. \"_http._tcp.app.internal\""),
            Place::File(_) => (address, Ok(()), ""),
        };
        if let Err(fault) = fault {
            problems.add(backend.span(), format!("invalid backend {text:?}: {fault}")).hint(expected);
        }
        let printed = backend.get_ref().to_string();
        let is_path = matches!(place, Place::File(_));
        if !seen.insert(if is_path { printed.clone() } else { printed.to_ascii_lowercase() }) {
            problems
                .add(backend.span(), format!("backend {printed:?} is there twice"))
                .hint("it would get two shares of the requests: say so with weight = 2");
        }
        if !(1..=Backend::WEIGHT_MAX).contains(weight) {
            let message = format!("weight is {weight}: must be between 1 and {}", Backend::WEIGHT_MAX);
            problems.add(backend.span(), message).hint("drain = true keeps new requests from a backend");
        }
        if MAX_REQUESTS_MAX < *max_requests {
            let message = format!("max_requests is {max_requests}: at most {MAX_REQUESTS_MAX}");
            problems.add(backend.span(), message);
        }
    }
}

fn named_backend(text: &str) -> Result<(), &'static str> {
    backend_address(text)?;
    let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
    if host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok() {
        return Err("an address is no name: write it without dns");
    }
    Ok(())
}

/// RFC 2782: `_service._proto.name`.
fn service_name(text: &str) -> Result<(), &'static str> {
    if text.contains(':') {
        return Err("no port here: SRV records have their own");
    }
    host_name_or_address(text)?;
    let mut labels = text.split('.');
    let is_service = labels.by_ref().take(2).filter(|label| label.starts_with('_')).count() == 2;
    if is_service && labels.next().is_some() { Ok(()) } else { Err("not the name of a service") }
}

pub(super) fn backend_address(text: &str) -> Result<(), &'static str> {
    if text.contains("://") {
        return Err("no scheme here");
    }
    let Some((host, port)) = text.rsplit_once(':') else { return Err("the port is missing") };
    if host.contains(':') && !host.starts_with('[') {
        return Err("an IPv6 address stands in brackets");
    }
    host_name_or_address(host)?;
    port_number(port).map(drop)
}

/// Compared with the request's host in lower case, so that is how it must be written.
fn route_host(text: &str) -> Result<(), &'static str> {
    if text == "*" {
        return Err("leave host out to match every host");
    }
    let name = text.strip_prefix("*.").unwrap_or(text);
    if name.contains(':') && !name.starts_with('[') {
        return Err("a host without its port");
    }
    if name.contains('_') || name.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("only lower-case letters, digits, `-` and `.`");
    }
    host_name_or_address(name)?;
    let is_address = name.starts_with('[') || name.parse::<Ipv4Addr>().is_ok();
    if is_address && name != text {
        return Err("an address has no subdomains");
    }
    Ok(())
}

/// As [`route_host`], and one at a time.
fn whole_host(text: &str) -> Result<(), &'static str> {
    if text.contains('*') { Err("each name is listed in full") } else { route_host(text) }
}

/// As browsers write `Origin` (RFC 6454, section 6.2): lower case, no path, no default port.
fn web_origin(text: &str) -> Result<(), &'static str> {
    let Some((scheme, place)) = text.split_once("://") else { return Err("no scheme") };
    let starts_well = scheme.starts_with(|c: char| c.is_ascii_lowercase());
    if !starts_well || !scheme.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'+' | b'-' | b'.')) {
        return Err("a scheme is lower-case letters");
    }
    if place.contains(['/', '?', '#', '@']) {
        return Err("only a scheme, a host and perhaps a port");
    }
    if place.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("browsers send it in lower case");
    }
    let (host, port) = match place.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (place, None),
    };
    host_name_or_address(host)?;
    match (scheme, port) {
        ("https", Some("443")) | ("http", Some("80")) => Err("browsers leave the default port out"),
        (_, Some(port)) => port_number(port).map(drop),
        (_, None) => Ok(()),
    }
}

/// A DNS name (RFC 1123, section 2.1; `_` as container networks use it), an IPv4 address, or `[IPv6]`.
pub(super) fn host_name_or_address(text: &str) -> Result<(), &'static str> {
    if let Some(rest) = text.strip_prefix('[') {
        let address = rest.strip_suffix(']').and_then(|address| address.parse::<Ipv6Addr>().ok());
        return address.map(|_| ()).ok_or("not an IPv6 address");
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if 253 < text.len() || !text.split('.').all(is_label) {
        return Err("not a host name");
    }
    let last = text.rsplit('.').next().unwrap_or(text);
    let looks_numeric = last.bytes().all(|b| b.is_ascii_digit());
    if looks_numeric && text.parse::<Ipv4Addr>().is_err() {
        return Err("not an IPv4 address");
    }
    Ok(())
}

pub(super) fn port_number(text: &str) -> Result<u16, &'static str> {
    let is_plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    let port = if is_plain { text.parse().ok() } else { None };
    port.ok_or("a port is a number from 1 to 65535")
}

/// RFC 9110, section 5.6.2.
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::parse;
    use super::{confidential_url, leads_to};

    const GOOD: &str = r#"[[listener]]
address = "127.0.0.1:8080"
[login.password]
users_file = "users.toml"
[pool.app]
backends = ["127.0.0.1:9001"]
[[route]]
path = "/"
pool = "app"
"#;

    fn errors(text: &str) -> String {
        match parse(text, Path::new("cloakroom.toml")) {
            Ok(_) => "nothing is wrong".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn headers_for_a_collector_are_names_and_values_that_can_be_sent_to_it_in_secret() {
        let secret = "q7Zp-Kw";
        let https = "endpoint = \"https://c.example\"";
        let many: String = (0..17).map(|number| format!("x-{number} = \"{secret}\"\n")).collect();
        let long = format!("x-key = \"{secret}{}\"", "x".repeat(super::HEADER_VALUE_BYTES_MAX));
        for (endpoint, headers, place, fault) in [
            (https, "host = \"q7Zp-Kw\"", "13:1", "invalid header \"host\": it frames or routes the request"),
            (https, "Content-Length = \"q7Zp-Kw\"", "13:1", "invalid header \"Content-Length\": it frames"),
            (https, "content_type = \"q7Zp-Kw\"", "13:1", "invalid header \"content_type\": it says what is sent"),
            (https, "Content-Encoding = \"q7Zp-Kw\"", "13:1", "it says what is sent"),
            (https, "te = \"q7Zp-Kw\"", "13:1", "invalid header \"te\": it belongs to one connection"),
            (https, "transfer-encoding = \"q7Zp-Kw\"", "13:1", "it belongs to one connection"),
            (https, "\"x key\" = \"q7Zp-Kw\"", "13:1", "invalid header \"x key\": expected a field name"),
            (https, "x-key = \"q7Zp-Kw\"\nX-Key = \"q7Zp-Kw\"", "14:1", "header \"X-Key\" is already set in line 13"),
            (
                https,
                "x-key = \"q7Zp-Kw\\r\\nhost: a\"",
                "13:9",
                "invalid value of header \"x-key\": it holds more than",
            ),
            (https, "x-key = \"q7Zp-Kwä\"", "13:9", "it holds more than visible ASCII"),
            (https, "x-key = \" q7Zp-Kw\"", "13:9", "a space at its beginning or its end"),
            (https, &long, "13:9", "it is longer than 8 KiB"),
            (https, "x-key = \"\"", "13:9", "tracing.headers: the secret is empty"),
            (https, "x-key = { file = \"no-such-file\" }", "13:9", "tracing.headers: secret file"),
            (
                https,
                "x-key = { env = \"NO_SUCH_Q7\" }",
                "13:9",
                "tracing.headers: environment variable NO_SUCH_Q7 is not set",
            ),
            (https, "x-key = 1712345678", "13:9", "invalid type: a number, expected a text in quotes, { file"),
            (https, "x-key = \"q7Zp-Kw", "13:", "invalid basic string"),
            (https, &many, "29:1", "more than 16 headers for the collector"),
            ("", "x-key = \"q7Zp-Kw\"", "13:1", "tracing.headers without tracing.endpoint"),
            (
                "endpoint = \"http://collector.example:4318\"",
                "x-key = \"q7Zp-Kw\"",
                "11:12",
                "plain http:// would show tracing.headers to the network",
            ),
        ] {
            let text = format!("{GOOD}[tracing]\n{endpoint}\n[tracing.headers]\n{headers}\n");
            let found = headlines(&text);
            assert!(
                found.len() == 1 && found[0].starts_with(place) && found[0].contains(fault),
                "{headers}: {found:?}"
            );
            let said = errors(&text);
            assert!(!said.contains(secret) && !said.contains("1712345678"), "{headers}: {said}");
        }
        for (endpoint, headers) in [
            ("https://c.example", "authorization = \"Bearer q7Zp Kw=\"\nx-honeycomb-team = \"q7Zp-Kw\""),
            ("http://localhost:4318", "x-scope-orgid = \"test\""),
            ("http://[::1]:4318", &many.lines().take(super::COLLECTOR_HEADERS_MAX).collect::<Vec<_>>().join("\n")),
        ] {
            let text = format!("{GOOD}[tracing]\nendpoint = \"{endpoint}\"\n[tracing.headers]\n{headers}\n");
            let config = parse(&text, Path::new("a.toml")).unwrap_or_else(|error| panic!("{error}"));
            assert!(!format!("{config:?}").contains(secret), "it never prints itself");
        }
    }

    /// The problems without lines, carets and hints.
    fn headlines(text: &str) -> Vec<String> {
        let prefix = "error: cloakroom.toml:";
        errors(text).lines().filter_map(|line| Some(line.strip_prefix(prefix)?.to_owned())).collect()
    }

    #[test]
    fn a_collector_is_a_plain_url_and_a_ratio_is_a_share() {
        for (keys, fault) in [
            ("endpoint = \"collector:4318\"", "tracing.endpoint: no scheme"),
            ("endpoint = \"grpc://collector:4317\"", "tracing.endpoint: unknown scheme, expected http or https"),
            ("endpoint = \"https://u:p@collector\"", "tracing.endpoint: a user or password"),
            ("endpoint = \"http://collector/?a=b\"", "tracing.endpoint: a query"),
            ("endpoint = \"http://collector:4318/v1/traces\"", "tracing.endpoint: it ends with what is added"),
            ("ratio = 1.1", "tracing.ratio 1.1 is not from 0 to 1"),
            ("ratio = -0.1", "tracing.ratio -0.1"),
            ("ratio = nan", "tracing.ratio NaN"),
        ] {
            let found = headlines(&format!("{GOOD}[tracing]\n{keys}\n"));
            assert!(found.len() == 1 && found[0].contains(fault), "{keys}: {found:?}");
        }
        for keys in
            ["endpoint = \"http://collector.example:4318\"", "endpoint = \"https://c.example/otlp/\"\nratio = 0"]
        {
            assert!(parse(&format!("{GOOD}[tracing]\n{keys}\n"), Path::new("a.toml")).is_ok(), "{keys}");
        }
    }

    #[test]
    fn a_webhook_is_told_over_tls_or_on_this_machine() {
        let good = [
            "https://example.org/ended",
            "https://example.org",
            "https://10.0.0.7:8443/a?key=1",
            "http://127.0.0.1:9000/ended",
            "http://[::1]:9000/",
            "http://localhost:9000",
        ];
        for url in good {
            assert_eq!(confidential_url(url), Ok(()), "{url}");
        }
        let bad = [
            "",
            "example.org/ended",
            "https://",
            "https:///ended",
            "http://example.org/ended",
            "http://localhost.example.org/",
            "http://127.0.0.1.example.org/",
            "http://10.0.0.7/",
            "http://[::2]/",
            "ftp://example.org/",
            "https://user:password@example.org/",
            "https://user@example.org/",
            "http://127.0.0.1@example.org/",
            "http://127.0.0.1\\@example.org/",
            "https://example.org/#a",
            "https://example.org/a b",
            "https://example.org:0/",
            "https://example.org:99999/",
            "https://exa_mple..org/",
        ];
        for url in bad {
            assert!(confidential_url(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_secret_of_the_api_or_the_webhook_is_no_guess() {
        let headlines_of = |value: &str| {
            let events = format!("[events]\nwebhook = \"https://a.example\"\nwebhook_secret = \"{value}\"\n");
            headlines(&format!("{GOOD}[admin]\ntoken = \"{value}\"\n{events}"))
        };
        assert!(headlines_of("q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2").is_empty());
        for (value, fault) in [
            ("q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw", "is shorter than 32 characters"),
            ("<openssl rand -base64 32 is the way>", "is a sample, which everybody knows"),
            ("q7Zp Kw2 q7Zp Kw2 q7Zp Kw2 q7Zp Kw2", "holds more than visible ASCII characters"),
        ] {
            let found = headlines_of(value);
            assert_eq!(found.len(), 2, "{value}: {found:?}");
            assert!(found[0].ends_with(&format!("admin.token {fault}")), "{found:?}");
            assert!(found[1].ends_with(&format!("events.webhook_secret {fault}")), "{found:?}");
        }
        let unsigned = format!("{GOOD}[events]\nwebhook_secret = \"q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2\"\n");
        assert!(headlines(&unsigned)[0].contains("without events.webhook"));
        let url = errors(&format!("{GOOD}[events]\nwebhook = \"https://u:q7Zp@a.example\"\n"));
        assert!(url.contains("events.webhook: a user or password"), "{url}");
    }

    #[test]
    fn the_smallest_file_is_right() {
        assert_eq!(errors(GOOD), "nothing is wrong");
    }

    #[test]
    fn an_unknown_key_is_shown_with_what_was_meant() {
        let expected = "\
error: cloakroom.toml:2:1: unknown key `formt` in [log], expected one of `format`, `level`, `access`
  |
2 | formt = \"json\"
  | ^^^^^
  hint: did you mean `format`?";
        assert_eq!(errors("[log]\nformt = \"json\"\n"), expected);
    }

    #[test]
    fn a_number_without_its_unit_is_shown_with_an_example() {
        let expected = "\
error: cloakroom.toml:2:16: invalid type: integer `30`, expected a number and a unit in quotes, e.g. \"30s\" (ms, s, m, h, d)
  |
2 | idle_timeout = 30
  |                ^^";
        assert_eq!(errors("[session]\nidle_timeout = 30\n"), expected);
        let expected = "\
error: cloakroom.toml:2:16: invalid duration \"30min\": expected a number and a unit, e.g. \"30m\" (ms, s, m, h, d)
  |
2 | idle_timeout = \"30min\"
  |                ^^^^^^^";
        assert_eq!(errors("[session]\nidle_timeout = \"30min\"\n"), expected);
    }

    #[test]
    fn a_missing_key_is_shown_at_its_section() {
        let expected = "\
error: cloakroom.toml:10:1: missing key `path` in [route]
   |
10 | [[route]]
   | ^^^^^^^^^";
        assert_eq!(errors(&format!("{GOOD}[[route]]\npool = \"app\"\n")), expected);
    }

    #[test]
    fn keys_that_contradict_each_other_are_shown_all_at_once_in_the_order_of_the_file() {
        let text = format!(
            "{GOOD}[[route]]\npath = \"/\"\npool = \"ap\"\n[session]\nidle_timeout = \"12h\"\nabsolute_timeout = \"8h\"\n"
        );
        let expected = "\
error: cloakroom.toml:11:8: path \"/\" already has a route in line 8
   |
11 | path = \"/\"
   |        ^^^
   hint: give the one or the other another path or host
error: cloakroom.toml:12:8: there is no pool `ap`
   |
12 | pool = \"ap\"
   |        ^^^^
   hint: the pools are `app`
error: cloakroom.toml:14:16: session.idle_timeout (12h) is longer than session.absolute_timeout (8h)
   |
14 | idle_timeout = \"12h\"
   |                ^^^^^
   hint: a session never outlives absolute_timeout: lower idle_timeout or raise absolute_timeout";
        assert_eq!(errors(&text), expected);
    }

    #[test]
    fn a_sample_password_is_refused_and_not_printed() {
        let text = GOOD.to_owned() + "[store.redis]\nurl = \"redis://:changeme@redis:6379\"\n";
        let expected = "\
error: cloakroom.toml:11:7: store.redis.url holds a sample password, which everybody knows
   |
11 | url = ******************************
   |       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
   hint: set a password of your own in Redis, and refer to it by { file = ... } or { env = ... }";
        assert_eq!(errors(&text), expected);
    }

    #[test]
    fn an_empty_file_says_what_is_missing() {
        let expected = "\
error: cloakroom.toml: no [[listener]]: there is no address to serve
  hint: add [[listener]] with e.g. address = \"127.0.0.1:8080\"
error: cloakroom.toml: no [[route]]: every request would be answered with 404
  hint: add [[route]] with path = \"/\" and pool = \"...\"";
        assert_eq!(errors(""), expected);
    }

    /// Each mistake is put behind the good file, which has nine lines.
    #[test]
    fn every_mistake_is_told_at_its_place() {
        let listener = |keys: &str| format!("[[listener]]\n{keys}");
        let redis = |url: &str| format!("[store.redis]\nurl = \"{url}\"");
        let cookie = |name: &str| format!("[session]\ncookie = \"{name}\"");
        let route = |path: &str| format!("[[route]]\npool = \"app\"\npath = '{path}'");
        let host = |name: &str| format!("[[route]]\npath = \"/\"\npool = \"app\"\nhost = \"{name}\"");
        let origin = |text: &str| format!("[[route]]\npath = \"/a\"\npool = \"app\"\nwebsocket_origins = [\"{text}\"]");
        let pool = |backends: &str| format!("[pool.b]\nbackends = [{backends}]");
        let header = |name: &str| format!("[identity.headers]\n{name} = \"{{user}}\"");
        let cases: Vec<(String, &str, &str)> = vec![
            ("[server]\nthreads = 5000".into(), "11:11", "server.threads is 5000: must be between 0 and 1024"),
            ("[server]\nthreads = \"two\"".into(), "11:11", "expected a whole number"),
            ("[server]\nconnections_max = 0".into(), "11:19", "must be between 1 and"),
            ("[server]\ndrain_timeout = \"0s\"".into(), "11:17", "must be longer than nothing"),
            ("[server]\nlame_duck = \"0s\"".into(), "11:13", "must be longer than nothing"),
            ("[server]\ntrusted_proxies = [\"10.0.0.1/8\"]".into(), "11:20", "the network is 10.0.0.0/8"),
            ("[[server]]\nthreads = 1".into(), "10:1", "invalid type: a table"),
            ("[serve]\nthreads = 1".into(), "10:2", "unknown key `serve`"),
            ("[server".into(), "10:8", "unclosed table"),
            ("[pool.app]".into(), "10:7", "duplicate key"),
            (listener("address = \"127.0.0.1:8080\""), "11:11", "already taken by the listener of line 2"),
            (listener("address = \"0.0.0.0:8080\"\ninsecure = true"), "11:11", "already taken"),
            (listener("address = \"0.0.0.0:80\""), "11:11", "plain HTTP on 0.0.0.0:80, which is not loopback"),
            (listener("address = \"[2001:db8::1]:80\"\nscheme = \"http\""), "11:11", "which is not loopback"),
            (listener("address = \"localhost:80\""), "11:11", "expected an IP address and a port"),
            (listener("address = \"127.0.0.1:1\"\nproxy_protocol = []"), "12:18", "proxy_protocol names nobody"),
            (listener("address = \"127.0.0.1:1\"\nproxy_protocol = true"), "12:18", "expected"),
            (listener("address = \"127.0.0.1:1\"\nproxy_protocol = [\"10.0.0.1/8\"]"), "12:19", "the network is 10.0.0.0/8"),
            (listener("address = 8080"), "11:11", "expected an address with its port in quotes"),
            (listener("address = \"127.0.0.1:1\"\ncert = \"c.pem\""), "12:8", "cert without key"),
            (listener("address = \"127.0.0.1:1\"\nkey = \"k.pem\""), "12:7", "key without cert"),
            (listener("address = \"127.0.0.1:1\"\ncert = \"\"\nkey = \"k\""), "12:8", "an empty path"),
            (
                listener("address = \"127.0.0.1:1\"\ncert = \"c\"\nkey = \"k\"\nscheme = \"http\""),
                "14:10",
                "scheme = \"http\" on a listener with cert",
            ),
            (
                listener("address = \"127.0.0.1:1\"\nscheme = \"ftp\""),
                "12:10",
                "unknown value `ftp`, expected `http` or",
            ),
            (listener("insecure = true"), "10:1", "missing key `address` in [listener]"),
            ("[limits]\nheaders_max = 251".into(), "11:15", "must be between 1 and 250"),
            ("[limits]\nhead_bytes = \"1MiB\"".into(), "11:14", "must be between 1KiB and 512KiB"),
            (
                "[limits]\nhead_bytes = \"4KiB\"".into(),
                "11:14",
                "target_bytes (8KiB) is larger than limits.head_bytes (4KiB)",
            ),
            ("[limits]\ntarget_bytes = \"40KiB\"".into(), "11:16", "is larger than limits.head_bytes (32KiB)"),
            ("[limits]\nhead_bytes = \"128KiB\"\ntarget_bytes = \"64KiB\"".into(), "12:16", "is over 63KiB"),
            ("[limits]\nbody_bytes = \"1MB\"".into(), "11:14", "invalid size \"1MB\""),
            (
                "[store.redis]\nurl = \"redis://a\"\n[store.memory]".into(),
                "12:1",
                "both [store.redis] and [store.memory]",
            ),
            ("[store.memory]\nsessions_max = 0".into(), "11:16", "must be between 1 and"),
            ("[store.redis]\nprefix = \"a\"".into(), "10:1", "missing key `url` in [store.redis]"),
            (
                "[store.redis]\nurl = { env = \"CLOAKROOM_IS_NOT_SET\" }".into(),
                "11:7",
                "CLOAKROOM_IS_NOT_SET is not set",
            ),
            ("[store.redis]\nurl = { file = \"no/such/file\" }".into(), "11:7", "no/such/file cannot be read"),
            (
                "[store.redis]\nurl = { path = \"x\" }".into(),
                "11:7",
                "unknown key `path` in [store.redis.url], expected `file` or",
            ),
            (redis(""), "11:7", "the secret is empty"),
            (redis("127.0.0.1:6379"), "11:7", "no scheme"),
            (redis("http://h"), "11:7", "unknown scheme"),
            (redis("redis://"), "11:7", "no host"),
            (redis("redis://h:0"), "11:7", "a port is a number from 1 to 65535"),
            (redis("rediss://h/#insecure"), "11:7", "certificates are always verified"),
            (redis("unix://redis.sock"), "11:7", "expected the absolute path of a socket"),
            (redis("redis://user:Change%2DMe@h"), "11:7", "holds a sample password"),
            (redis("unix:///run/redis.sock?pass=foobared"), "11:7", "holds a sample password"),
            (redis("redis://h") + "\nca = \"ca.pem\"", "12:6", "ca is for TLS"),
            (redis("redis+sentinel://h"), "11:7", "the name by which the sentinels know"),
            (redis("redis+sentinel://h/m?sentinel_pass=changeme"), "11:7", "holds a sample password"),
            (redis("rediss+cluster://h") + "\nkey = \"key.pem\"", "12:7", "key without cert"),
            (redis("rediss+cluster://h") + "\ncert = \"cert.pem\"", "12:8", "cert without key"),
            (redis("redis://h") + "\nlease = \"100ms\"", "12:9", "must be between 200ms and 1m"),
            (redis("redis://h") + "\ncache_sessions_max = 0", "12:22", "cache_sessions_max is 0: must be between 1"),
            (redis("redis://h") + "\nlogout_replicas = 0", "12:19", "logout_replicas is 0: must be between 1 and 16"),
            (redis("redis://h") + "\nprefix = \"a b\"", "12:10", "invalid prefix"),
            (redis("redis://h") + "\nprefix = \"{a}\"", "12:10", "invalid prefix"),
            (cookie("__Secure-s"), "11:10", "the only prefix that may begin with `__` is `__Host-`"),
            (cookie("__host-s"), "11:10", "the only prefix"),
            (cookie("__Host-"), "11:10", "invalid cookie name"),
            (cookie("a;b"), "11:10", "invalid cookie name"),
            (cookie(&"s".repeat(65)), "11:10", "at most 64 characters"),
            ("[session]\nsame_site = \"none\"".into(), "11:13", "unknown value `none`, expected `strict` or `lax`"),
            ("[session]\nabsolute_timeout = \"10m\"".into(), "11:20", "idle_timeout (30m) is longer than"),
            ("[session]\nabsolute_timeout = \"401d\"".into(), "11:20", "at most 400d"),
            ("[session]\nmax_per_user = 10001".into(), "11:16", "must be between 0 and 10000"),
            ("[session]\nactivity = 1001".into(), "11:12", "must be between 0 and 1000"),
            ("[session]\nsilent_header = \"X Silent\"".into(), "11:17", "expected a field name"),
            ("[session]\nsilent_header = \"Cookie\"".into(), "11:17", "cookies are Cloakroom's own matter"),
            ("[session]\nseal_records = \"on\"".into(), "11:16", "seal_records without keys_file"),
            ("[session]\nseal_records = true".into(), "11:16", "wanted string"),
            ("[session.fallback]\n[store.redis]\nurl = \"redis://h\"".into(), "10:1", "without keys_file"),
            ("[session]\nkeys_file = \"k\"\n[session.fallback]".into(), "12:1", "and memory cannot"),
            (
                "[session]\nkeys_file = \"k\"\n[session.fallback]\nlifetime = \"2h\"\n[store.redis]\nurl = \"redis://h\""
                    .into(),
                "13:12",
                "session.fallback.lifetime is 2h: at most 1h",
            ),
            ("[login.basic]\nrealm = \"a\\\"b\"".into(), "11:9", "invalid login.basic.realm"),
            ("[login.basic]\nrealm = \"\"".into(), "11:9", "invalid login.basic.realm"),
            (
                "[[route]]\npath = \"/api\"\npool = \"app\"\nbasic = true".into(),
                "13:9",
                "basic = true, but there is no [login.basic]",
            ),
            (
                "[login.basic]\n[[route]]\npath = \"/api\"\npool = \"app\"\nbasic = true\naccess = \"public\"".into(),
                "14:9",
                "asks nobody who they are",
            ),
            ("[store]\ngrace = \"5m\"".into(), "11:9", "[store.memory] cannot"),
            (
                "[store]\ngrace = \"5m\"\n[store.redis]\nurl = \"redis://h\"\ncache = \"off\"".into(),
                "11:9",
                "with cache = \"off\" there are none",
            ),
            (
                "[store]\ngrace = \"2h\"\n[store.redis]\nurl = \"redis://h\"".into(),
                "11:9",
                "store.grace is 2h: at most 1h",
            ),
            ("[login]\nprefix = \"/auth\"".into(), "11:10", "it must end with `/`"),
            ("[login]\nprefix = \"/\"".into(), "11:10", "it would swallow every route"),
            ("[login]\nprefix = \"/a/../b/\"".into(), "11:10", "no `.` and no `..`"),
            ("[login]\ndefault_return = \"//evil.example\"".into(), "11:18", "no `//`"),
            ("[login]\ndefault_return = \"https://evil.example\"".into(), "11:18", "it must begin with `/`"),
            ("[login]\ndefault_return = \"/.cloakroom/login\"".into(), "11:18", "lies under login.prefix"),
            ("[login.password.throttle]\nper_account = 0".into(), "11:15", "must be between 1 and"),
            ("[identity]\npreset = \"xforwarded\"".into(), "11:10", "unknown value `xforwarded`"),
            ("[identity]\nstrip = [\"X Role\"]".into(), "11:10", "expected a field name"),
            ("[identity]\nstrip = [\"Cookie\"]".into(), "11:10", "cookies are Cloakroom's own matter"),
            (header("Content_Length"), "11:1", "it frames or routes the request"),
            (header("Transfer-Encoding"), "11:1", "it belongs to one connection"),
            (header("\":path\""), "11:1", "pseudo-headers"),
            (header("X-Forwarded-For"), "11:1", "Cloakroom writes it itself"),
            (header("X-A = \"{user}\"\nx_a"), "12:1", "header \"x_a\" is already set in line 11"),
            (
                "[identity.headers]\nX-A = \"{usr}\"".into(),
                "11:7",
                "unknown placeholder `{usr}`, expected one of `{user}`",
            ),
            (pool(""), "11:12", "pool.b has no backends"),
            (pool("\"127.0.0.1\""), "11:13", "the port is missing"),
            (pool("\"h:80\", \"H:80\""), "11:21", "is there twice"),
            (pool("\"http://h:80\""), "11:13", "no scheme here"),
            (pool("\"127.0.0.1:8080\""), "11:13", "127.0.0.1:8080 is the listener of line 2"),
            (pool("{ address = \"LOCALHOST:8080\" }"), "11:13", "is the listener of line 2"),
            ("[dns]\nservers = [\"10.0.0.53:0\"]".into(), "11:11", "a name server at port 0"),
            (pool("\"::1:80\""), "11:13", "stands in brackets"),
            (pool("\"h:65536\""), "11:13", "a port is a number"),
            (pool("\"h:+80\""), "11:13", "a port is a number"),
            (pool("\"256.1.1.1:80\""), "11:13", "not an IPv4 address"),
            (pool("\"-h:80\""), "11:13", "not a host name"),
            (pool("{ address = \"h\" }"), "11:13", "the port is missing"),
            (pool("{ adress = \"h:80\" }"), "11:15", "unknown key `adress`"),
            (pool("{ address = \"h:80\", weight = 0 }"), "11:13", "weight is 0: must be between 1 and 1000"),
            (pool("{ address = \"h:80\", max_requests = 1000001 }"), "11:13", "at most 1000000"),
            (pool("\"h:80\", { address = \"h:80\" }"), "11:21", "is there twice"),
            (pool("{ dns = \"h:80\" }, { dns = \"H:80\" }"), "11:31", "is there twice"),
            (pool("{ file = \"/h\" }, { file = \"/H\" }, { file = \"/h\" }"), "11:47", "is there twice"),
            (pool("{ address = \"h:80\", backup = true }"), "11:12", "pool.b has nothing but backups"),
            (pool("\"h:80\"") + "\nbalance = \"random\"", "12:11", "unknown value `random`"),
            (pool("\"h:80\"") + "\nbalance = \"hash\"\nhash_by = \"cookie\"", "13:11", "expected \"user\", \"client\""),
            (pool("\"h:80\"") + "\nhash_by = \"client\"", "12:11", "means nothing without balance = \"hash\""),
            (pool("\"h:80\"") + "\nqueue = 5", "12:9", "no backend that is ever full"),
            (pool("{ address = \"h:80\", max_requests = 1 }") + "\nqueue = 100001", "12:9", "must be between 0 and 100000"),
            (pool("\"h:80\"") + "\nretry_budget = 101", "12:16", "must be between 0 and 100"),
            (pool("\"h:80\"") + "\n[pool.b.eject]\nshare = 101", "13:9", "pool.b.eject.share is 101"),
            (pool("\"h:80\"") + "\n[pool.b.eject]\ntime = \"1h\"", "12:1", "is longer than time_max (30s)"),
            (pool("\"h:80\"") + "\n[pool.b.eject]\nstatuses = [200]", "13:12", "status 200 is no failure"),
            (pool("\"h:80\"") + "\n[pool.b.check]\npath = \"health\"", "13:8", "expected `/`"),
            (pool("\"h:80\"") + "\n[pool.b.check]\nbody = \"ok\"", "12:1", "asks for no path"),
            (pool("\"h:80\"") + "\n[pool.b.check]\nrise = 0", "13:8", "must be between 1 and 100"),
            (pool("\"h:80\"") + "\n[pool.b.check]\ninterval = \"50ms\"", "13:12", "at least 100ms"),
            (pool("\"h:80\"") + "\n[pool.b.check]\npath = \"/\"\nhost = \"a b\"", "14:8", "invalid host \"a b\""),
            (pool("\"h:80\"") + "\n[pool.b.check]\ntls = true\nserver_name = \"a:1\"", "14:15", "invalid server_name"),
            (pool("\"h:80\"") + "\n[pool.b.check]\nserver_name = \"a\"", "13:15", "means nothing without tls = true"),
            (pool("\"h:80\"") + "\n[pool.b.check]\nverify = false", "13:10", "means nothing without tls = true"),
            (pool("\"h:80\"") + "\n[pool.b.check]\nstatuses = \"2xx\"", "13:12", "expected e.g. \"200\""),
            ("[pool.\"a b\"]\nbackends = [\"h:1\"]".into(), "10:1", "invalid pool name"),
            ("[pool.b]".into(), "10:1", "missing key `backends` in [pool.b]"),
            (route("shop"), "12:8", "it must begin with `/`"),
            (route("/a%2fb"), "12:8", "none of `%`"),
            (route("/a//b"), "12:8", "no `//`"),
            (route("/a/./b"), "12:8", "no `.` and no `..`"),
            (route("/a/.."), "12:8", "no `.` and no `..`"),
            (route("/a;b"), "12:8", "none of `%`"),
            (route("/a\\b"), "12:8", "none of `%`"),
            (route("/a?b"), "12:8", "none of `%`"),
            (route("/ä"), "12:8", "only visible ASCII"),
            (route("/.cloakroom"), "12:8", "lies under login.prefix"),
            (route("/"), "12:8", "already has a route in line 8"),
            (route("/a") + "\n" + &route("/a/"), "15:8", "already has a route in line 12"),
            (
                "[[route]]\npool = \"app\"\nhost = \"a.b\"\npath = \"/\"\n[[route]]\npool = \"app\"\nhost = \"a.b\"\npath = \"/\"".into(),
                "17:8",
                "path \"/\" on host \"a.b\" already has a route in line 13",
            ),
            (host("App.example.org"), "13:8", "only lower-case"),
            (host("*"), "13:8", "leave host out"),
            (host("a.*.org"), "13:8", "not a host name"),
            (host("*.10.0.0.1"), "13:8", "an address has no subdomains"),
            (host("example.org:443"), "13:8", "a host without its port"),
            (host("example.org."), "13:8", "not a host name"),
            ("[[route]]\npath = \"/a\"\npool = \"no\"".into(), "12:8", "there is no pool `no`"),
            (
                route("/a") + "\naccess = \"public\"\ngroups = [\"x\"]",
                "14:10",
                "groups on a route that lets everybody in",
            ),
            (
                route("/a") + "\nsplits = [{ name = \"b\", pool = \"no\" }]\n[split.b]\npercent = 0",
                "13:32",
                "there is no pool `no`",
            ),
            (route("/a") + "\nsplits = [{ name = \"b\", pool = \"app\" }]", "13:20", "there is no split `b`"),
            (
                route("/a")
                    + "\nsplits = [{ name = \"b\", pool = \"app\" }, { name = \"b\", pool = \"app\" }]\n[split.b]\npercent = 5",
                "13:50",
                "split `b` is there twice",
            ),
            (
                route("/a")
                    + "\naccess = \"public\"\nsplits = [{ name = \"b\", pool = \"app\" }]\n[split.b]\ngroups = [\"x\"]",
                "14:20",
                "goes by groups, on a public route",
            ),
            (route("/a") + "\nsplits = [{ name = \"b\" }]", "13:11", "missing key `pool`"),
            ("[split.b]".into(), "10:1", "split.b takes nobody"),
            ("[split.\"a b\"]\npercent = 1".into(), "10:1", "invalid split name"),
            ("[split.b]\npercent = 100.01".into(), "11:11", "expected 0 to 100, with two decimals at most"),
            ("[split.b]\npercent = \"5\"".into(), "11:11", "a percentage without quotes"),
            (route("/a") + "\naccess = \"private\"", "13:10", "unknown value `private`"),
            (origin("app.example.org"), "13:22", "no scheme"),
            (origin("https://app.example.org/"), "13:22", "only a scheme, a host"),
            (origin("https://app.example.org:443"), "13:22", "browsers leave the default port out"),
            (origin("https://App.example.org"), "13:22", "browsers send it in lower case"),
            (origin("*://x"), "13:22", "a scheme is lower-case letters"),
            ("[admin]\naddress = \"127.0.0.1:8080\"".into(), "11:11", "is also the address of a listener"),
            ("[admin]\nhosts = [\"gw1.test\", \"*.test\"]".into(), "11:22", "each name is listed in full"),
            ("[admin]\nhosts = [\"gw1.test:9900\"]".into(), "11:10", "a host without its port"),
            ("[admin]\nenabled = false\nhosts = [\"Gw1.test\"]".into(), "12:10", "only lower-case letters"),
            ("[admin]\nhosts = [\"gw1.test.\"]".into(), "11:10", "not a host name"),
            ("[admin]\nhosts = \"gw1.test\"".into(), "11:9", "expected an array"),
            (listener("address = \"127.0.0.1:9900\""), "11:11", "admin.address (127.0.0.1:9900) is also"),
            ("[log]\nlevel = \"verbose\"".into(), "11:9", "unknown value `verbose`"),
        ];
        let mut surprises = Vec::new();
        for (mistake, place, message) in cases {
            let told = headlines(&format!("{GOOD}{mistake}\n"));
            let is_right = |only: &String| only.starts_with(&format!("{place}: ")) && only.contains(message);
            if told.len() != 1 || !told.iter().all(is_right) {
                surprises.push(format!("{mistake}\n  should say {place}: {message}\n  but says {told:#?}"));
            }
        }
        assert!(surprises.is_empty(), "{}", surprises.join("\n"));
    }

    #[test]
    fn what_looks_odd_but_is_right_is_accepted() {
        let cases = [
            "[split.b]\npercent = 0",
            "[split.b]\ngroups = [\"x\"]\npercent = 100.00",
            "[[route]]\npath = \"/a\"\npool = \"app\"\nsplits = [{ name = \"b\", pool = \"app\" }]\n[split.b]\npercent = 33.33",
            "[[route]]\npath = \"/a\"\npool = \"app\"\naccess = \"public\"\nsplits = [{ name = \"b\", pool = \"app\" }]\n[split.b]\npercent = 0",
            "[[listener]]\naddress = \"0.0.0.0:80\"\ninsecure = true",
            "[[listener]]\naddress = \"0.0.0.0:80\"\nscheme = \"https\"",
            "[[listener]]\naddress = \"[::1]:8080\"",
            "[[listener]]\naddress = \"[::]:443\"\ncert = \"c\"\nkey = \"k\"\nscheme = \"https\"",
            "[store.redis]\nurl = \"redis+unix:///run/redis.sock?db=2\"",
            "[store.redis]\nurl = \"rediss://user:p%40ss-7@[::1]:6380/3\"\nca = \"ca.pem\"",
            "[store.redis]\nurl = \"redis://[fd00::1]\"",
            "[session]\ncookie = \"sid\"",
            "[session]\nkeys_file = \"k\"\nseal_records = \"only\"",
            "[session]\nkeys_file = \"k\"\n[session.fallback]\nlifetime = \"1h\"\n[store.redis]\nurl = \"redis://h\"",
            "[store]\ngrace = \"5m\"\n[store.redis]\nurl = \"redis://h\"",
            "[session]\nsilent_header = \"X-Session-Silent\"\nmax_per_user = 3\nwhen_full = \"refuse\"",
            "[session]\nidle_timeout = \"1h\"\nabsolute_timeout = \"1h\"",
            "[identity]\nstrip = [\"X_Role\", \"Authorization\"]",
            "[pool.b]\nbackends = [\"my_app.internal:1\", \"[::1]:65535\", \"10.0.0.1:80\"]",
            "[pool.b]\nbackends = [{ address = \"h:1\", max_requests = 5 }, { address = \"h:2\", backup = true }]\nqueue = 5",
            "[pool.b]\nbackends = [\"h:1\"]\nbalance = \"hash\"\nhash_by = \"header:X-Tenant\"\n[pool.b.check]\ntimeout = \"1m\"",
            "[pool.b]\nbackends = [\"h:1\"]\n[pool.b.check]\npath = \"/up?deep=1\"\nhost = \"[::1]:80\"\ntls = true",
            "[[route]]\npath = \"/\"\npool = \"app\"\nhost = \"*.example.org\"",
            "[[route]]\npath = \"/\"\npool = \"app\"\nhost = \"example.org\"",
            "[[route]]\npath = \"/a.b/~c/\"\npool = \"app\"\naccess = \"public\"",
            "[[route]]\npath = \"/ws\"\npool = \"app\"\nwebsocket_origins = [\"https://a.example:8443\", \"http://[::1]:1\"]",
            "[login.basic]\nrealm = \"Nightly builds\"\n[[route]]\npath = \"/api\"\npool = \"app\"\nbasic = true",
            "[admin]\naddress = \"127.0.0.1:8080\"\nenabled = false",
            "[admin]\naddress = \"0.0.0.0:9900\"",
        ];
        for addition in cases {
            assert_eq!(errors(&format!("{GOOD}{addition}\n")), "nothing is wrong", "{addition}");
        }
    }

    #[test]
    fn a_route_that_asks_for_a_session_needs_a_login() {
        let nobody = GOOD.replace("[login.password]\nusers_file = \"users.toml\"\n", "");
        assert_eq!(headlines(&nobody), ["6:8: route \"/\" asks for a session, but nobody can log in"]);
        let optional = nobody.clone() + "access = \"optional\"\n";
        assert_eq!(headlines(&optional), ["8:10: route \"/\" asks for a session, but nobody can log in"]);
        assert_eq!(errors(&(nobody + "access = \"public\"\n")), "nothing is wrong");
    }

    #[test]
    fn a_route_names_as_many_kinds_of_login_as_one_request_carries() {
        let provider = "[login]\norigins = [\"https://app.example.org\"]\n[login.oidc.staff]\n\
                        issuer = \"https://p.example\"\nclient_id = \"us\"\n";
        let with = |values: usize| {
            GOOD.replace("[pool", &format!("{provider}[pool")) + &format!("acr = {:?}\n", vec!["x"; values])
        };
        assert_eq!(errors(&with(8)), "nothing is wrong");
        assert!(errors(&with(9)).contains("more than 8 values of acr"));
    }

    #[test]
    fn what_backends_may_say_makes_sense_together() {
        let with = |login: &str, route: &str| GOOD.replace("[pool", &format!("{login}[pool")) + route;
        let page = "[login.backend]\npage = \"/\"\n";
        let good = [
            with("[login.backend]\n", "directives = [\"login\", \"logout\", \"attributes\"]\n"),
            with(page, "access = \"public\"\ndirectives = [\"login\"]\n"),
            with("", "access = \"optional\"\ndirectives = [\"attributes\"]\nanonymous = true\n"),
        ];
        for text in good {
            assert_eq!(errors(&text), "nothing is wrong", "{text}");
        }
        let cases = [
            (with("", "directives = [\"login\"]\n"), "without [login.backend]"),
            (with("", "directives = [\"logout\", \"logout\"]\n"), "there twice"),
            (with("", "access = \"public\"\ndirectives = [\"attributes\"]\n"), "attributes on a public route"),
            (with("", "directives = [\"attributes\"]\nanonymous = true\n"), "anonymous sessions begin with attributes"),
            (with("", "access = \"optional\"\nanonymous = true\n"), "anonymous sessions begin with attributes"),
            (with(page, "directives = [\"login\"]\n"), "on a route that requires a session"),
            (with(page, "access = \"public\"\n"), "on a route whose backend may log nobody in"),
            (with("[login.backend]\npage = \"login\"\n", "directives = [\"login\"]\n"), "it must begin with `/`"),
            (with("[login.backend]\npage = \"/.cloakroom/x\"\n", "directives = [\"login\"]\n"), "under login.prefix"),
        ];
        for (text, expected) in cases {
            let told = headlines(&text);
            assert!(told.iter().any(|line| line.contains(expected)), "{text}\nshould say {expected:?}: {told:?}");
        }
        let nobody = GOOD.replace("[login.password]\nusers_file = \"users.toml\"\n", "[login.backend]\n");
        assert_eq!(headlines(&nobody).len(), 1, "no route lets a backend log anybody in");
    }

    #[test]
    fn a_provider_and_what_routes_ask_of_its_logins_make_sense_together() {
        let provider = "[login.oidc.staff]\nissuer = \"https://p.example\"\nclient_id = \"us\"\nclient_secret = \"Zk3-a-secret-of-nobody-91Qp\"\n";
        let with =
            |login: &str, route: &str| GOOD.replace("[login.password]", &format!("{login}[login.password]")) + route;
        let origins = "[login]\norigins = [\"https://app.example.org\"]\n";
        let of = |keys: &str, route: &str| with(&format!("{origins}{provider}{keys}"), route);
        for (keys, route) in [
            ("", ""),
            ("", "acr = [\"gold\"]\nmax_age = \"10s\"\n"),
            ("tokens = true\n", "access_token = \"Authorization\"\n"),
            ("scopes = [\"openid\", \"groups\"]\nparameters = { hd = \"example.org\" }\n", ""),
        ] {
            assert_eq!(errors(&of(keys, route)), "nothing is wrong", "{keys}{route}");
        }
        let cases = [
            (with(provider, ""), "needs to know where it leads back to"),
            (of("", "max_age = \"9s\"\n"), "max_age (9s) is shorter than 10s"),
            (of("", "max_age = \"0s\"\n"), "must be longer than nothing"),
            (of("", "acr = [\"gold plated\"]\n"), "invalid acr \"gold plated\""),
            (of("", "acr = [\"\"]\n"), "invalid acr \"\""),
            (of("", "access = \"public\"\nacr = [\"gold\"]\n"), "acr on a public route"),
            (of("", "access_token = \"Authorization\"\n"), "without a provider whose tokens are kept"),
            (of("tokens = true\n", "access_token = \"a b\"\n"), "invalid header \"a b\""),
            (with("", "max_age = \"10m\"\n"), "max_age is for logins at a provider"),
            (with("", "acr = [\"gold\"]\n"), "acr is for logins at a provider"),
            (of("scopes = [\"profile\"]\n", ""), "scopes without \"openid\""),
            (of("scopes = [\"openid\", \"a b\"]\n", ""), "invalid scope \"a b\""),
            (of("user = \"\"\n", ""), "login.oidc.staff.user is empty"),
            (of("parameters = { state = \"x\" }\n", ""), "parameter \"state\" is Cloakroom's own matter"),
            (of("parameters = { max_age = \"0\" }\n", ""), "parameter \"max_age\" is Cloakroom's own matter"),
            (of("allowed_email_domains = [\"@example.org\"]\n", ""), "invalid domain \"@example.org\""),
            (of("", "").replace("https://p.example", "http://p.example"), "invalid issuer"),
            (of("", "").replace("https://p.example", "https://p.example?a"), "an issuer has no query"),
            (of("", "").replace("oidc.staff", "oidc.Staff"), "invalid provider name \"Staff\""),
            (of("", "").replace("Zk3-a-secret-of-nobody-91Qp", "change-me"), "is a sample, which everybody knows"),
        ];
        for (text, expected) in cases {
            let told = headlines(&text);
            assert!(told.iter().any(|line| line.contains(expected)), "{text}\nshould say {expected:?}: {told:?}");
        }
    }

    #[test]
    fn brackets_of_the_wrong_kind_get_a_hint() {
        assert!(errors("[listener]\naddress = \"127.0.0.1:80\"").contains("hint: write it in double brackets"));
        assert!(errors("[[server]]\nthreads = 1").contains("hint: only [[listener]] and [[route]]"));
    }

    #[test]
    fn a_gateway_is_no_backend_of_its_own_and_its_neighbours_are() {
        for (backend, listener, is_it) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "0.0.0.0:80", true),
            ("127.0.0.1:80", "[::]:80", true),
            ("[::1]:80", "[::]:80", true),
            ("localhost:80", "127.0.0.1:80", true),
            ("Localhost:80", "0.0.0.0:80", true),
            ("127.0.0.1:81", "127.0.0.1:80", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("[::1]:80", "0.0.0.0:80", false),
            ("localhost:80", "127.0.0.2:80", false),
            ("10.0.0.7:80", "0.0.0.0:80", false),
            ("app:80", "0.0.0.0:80", false),
        ] {
            assert_eq!(leads_to(backend, listener.parse().unwrap()), is_it, "{backend} and {listener}");
        }
    }
}
