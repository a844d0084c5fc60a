//! What differs between two configurations, and what of it needs a restart?
//!
//! Each section is taken apart key by key, so that a new key does not compile until it has its place here.

use std::collections::{BTreeMap, BTreeSet};

use toml::Spanned;

use super::model::{
    Admin, BackendLogin, BasicLogin, Config, Dns, Events, Fallback, Identity, Limits, Listener, Log, Login,
    MemoryStore, OidcLogin, PasswordLogin, Pool, RedisStore, Route, Server, Session, Split, Store, Throttle, Tracing,
};

/// A line for each key, each section that is new and each that is gone: `pool.app: backends`, `route /shop: added`.
/// No line holds a value: that may be a secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// A reload applies these.
    pub at_once: Vec<String>,
    pub at_restart: Vec<String>,
    /// What an operator had set at run time and is still so, because the file has not changed there.
    pub kept: Vec<String>,
    /// What an operator had set, and is as the file has it now, or gone.
    pub dropped: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum Effect {
    AtOnce,
    AtRestart,
}

/// The sections of one kind, by the names that lines begin with.
type Sections<'c, T> = BTreeMap<String, &'c T>;

/// Compares the keys of one section. `besides`: what is a section of its own, or no key.
macro_rules! keys {
    ($changes:expr, $section:expr, $old:expr, $new:expr, $type:ident {
        $($effect:ident: $($key:ident),+;)*
    } $(besides { $($other:ident),+ })?) => {{
        let $type { $($($key,)+)* $($($other: _,)+)? } = $old;
        $($(
            if *$key != $new.$key {
                $changes.note(Effect::$effect, format!("{}: {}", $section, stringify!($key)));
            }
        )+)*
    }};
}

impl Changes {
    pub fn needs_restart(&self) -> bool {
        !self.at_restart.is_empty()
    }

    pub fn between(old: &Config, new: &Config) -> Self {
        let mut changes = Self::default();
        // Asks here for the place of a new section.
        let Config {
            file: _,
            server,
            listeners,
            limits,
            store,
            session,
            login,
            identity,
            pools,
            splits,
            dns,
            routes,
            events,
            admin,
            log,
            tracing,
        } = old;
        changes.server(server, &new.server);
        changes.listeners(listeners, &new.listeners);
        changes.limits(limits, &new.limits);
        changes.store(store, &new.store);
        changes.session(session, &new.session);
        changes.login(login, &new.login);
        changes.identity(identity, &new.identity);
        changes.pools(pools, &new.pools);
        changes.splits(splits, &new.splits);
        changes.dns(dns, &new.dns);
        changes.routes(routes, &new.routes);
        changes.events(events, &new.events);
        changes.admin(admin, &new.admin);
        changes.log(log, &new.log);
        changes.tracing(tracing, &new.tracing);
        changes
    }

    fn note(&mut self, effect: Effect, line: String) {
        match effect {
            Effect::AtOnce => self.at_once.push(line),
            Effect::AtRestart => self.at_restart.push(line),
        }
    }

    /// `effect`: of a whole section that comes or goes.
    fn sections<T>(
        &mut self,
        effect: Effect,
        old: &Sections<'_, T>,
        new: &Sections<'_, T>,
        compare: impl Fn(&mut Self, &str, &T, &T),
    ) {
        for name in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            match (old.get(name), new.get(name)) {
                (Some(old), Some(new)) => compare(self, name, old, new),
                (None, Some(_)) => self.note(effect, format!("{name}: added")),
                (Some(_), None) => self.note(effect, format!("{name}: removed")),
                (None, None) => {}
            }
        }
    }

    fn server(&mut self, old: &Server, new: &Server) {
        keys!(self, "server", old, new, Server {
            AtRestart: threads, connections_max, drain_timeout, lame_duck, trusted_proxies;
        });
    }

    fn listeners(&mut self, old: &[Listener], new: &[Listener]) {
        fn by_address(listeners: &[Listener]) -> Sections<'_, Listener> {
            listeners.iter().map(|listener| (format!("listener {}", listener.address.get_ref()), listener)).collect()
        }
        self.sections(Effect::AtRestart, &by_address(old), &by_address(new), |changes, section, old, new| {
            if old.has_certificate() != new.has_certificate() {
                // Another kind of socket: nothing of it is applied before.
                keys!(changes, section, old, new, Listener {
                    AtRestart: cert, key, certificates, http2, client_ca, client_certificates, insecure, scheme,
                        proxy_protocol, hsts, redirect_to_port;
                } besides { address });
                return;
            }
            keys!(changes, section, old, new, Listener {
                AtOnce: cert, key, certificates, http2, client_ca, client_certificates, insecure;
                AtRestart: scheme, proxy_protocol, hsts, redirect_to_port;
            } besides { address });
        });
    }

    fn limits(&mut self, old: &Limits, new: &Limits) {
        keys!(self, "limits", old, new, Limits {
            // A route's body limit is a rule, and so is the default of it.
            AtOnce: body_bytes;
            AtRestart: head_bytes, headers_max, target_bytes, streams_max, head_timeout, keepalive_timeout, body_timeout,
                body_rate_min, write_timeout;
        });
    }

    fn store(&mut self, old: &Store, new: &Store) {
        keys!(self, "store", old, new, Store { AtRestart: grace; } besides { redis, memory });
        let name = "store.redis";
        self.sections(
            Effect::AtRestart,
            &spanned(name, &old.redis),
            &spanned(name, &new.redis),
            |changes, section, old, new| {
                keys!(changes, section, old, new, RedisStore {
                    AtRestart: url, prefix, connect_timeout, response_timeout, ca, cert, key, cache, cache_sessions_max,
                        cache_bytes, lease, logout, logout_replicas, logout_timeout;
                });
            },
        );
        let name = "store.memory";
        self.sections(
            Effect::AtRestart,
            &spanned(name, &old.memory),
            &spanned(name, &new.memory),
            |changes, section, old, new| {
                keys!(changes, section, old, new, MemoryStore { AtRestart: sessions_max, file; });
            },
        );
    }

    fn session(&mut self, old: &Session, new: &Session) {
        keys!(self, "session", old, new, Session {
            AtRestart: cookie, same_site, idle_timeout, absolute_timeout, max_per_user, when_full, activity,
                silent_header, keys_file, seal_records;
        } besides { fallback });
        let name = "session.fallback";
        self.sections(
            Effect::AtRestart,
            &spanned(name, &old.fallback),
            &spanned(name, &new.fallback),
            |changes, section, old, new| {
                keys!(changes, section, old, new, Fallback { AtRestart: lifetime; });
            },
        );
    }

    fn login(&mut self, old: &Login, new: &Login) {
        keys!(self, "login", old, new, Login {
            AtOnce: prefix, title, stylesheet, default_return, origins;
        } besides { password, backend, basic, oidc });
        let name = "login.password";
        self.sections(
            Effect::AtOnce,
            &optional(name, old.password.as_ref()),
            &optional(name, new.password.as_ref()),
            |changes, section, old, new| {
                keys!(changes, section, old, new, PasswordLogin { AtOnce: users_file, hashes_max; } besides { throttle });
                keys!(changes, "login.password.throttle", &old.throttle, new.throttle, Throttle {
                    AtOnce: window, per_account_and_network, per_account, per_network;
                });
            },
        );
        let name = "login.backend";
        self.sections(
            Effect::AtOnce,
            &optional(name, old.backend.as_ref()),
            &optional(name, new.backend.as_ref()),
            |changes, section, old, new| {
                keys!(changes, section, old, new, BackendLogin { AtOnce: preset, page; });
            },
        );
        let name = "login.basic";
        self.sections(
            Effect::AtOnce,
            &spanned(name, &old.basic),
            &spanned(name, &new.basic),
            |changes, section, old, new| {
                keys!(changes, section, old, new, BasicLogin { AtOnce: realm; });
            },
        );
        let name = "login.oidc";
        self.sections(Effect::AtOnce, &named(name, &old.oidc), &named(name, &new.oidc), |changes, section, old, new| {
            keys!(changes, section, old, new, OidcLogin {
                AtOnce: issuer, client_id, client_secret, title, scopes, prompt, parameters, user, user_prefix, name,
                    email, groups, claims, trust_email, allowed_users, allowed_groups, allowed_email_domains, userinfo,
                    tokens, logout, frontchannel_logout;
            });
        });
    }

    fn identity(&mut self, old: &Identity, new: &Identity) {
        keys!(self, "identity", old, new, Identity { AtOnce: preset, headers, strip; });
    }

    fn pools(&mut self, old: &BTreeMap<String, Pool>, new: &BTreeMap<String, Pool>) {
        self.sections(Effect::AtOnce, &named("pool", old), &named("pool", new), |changes, section, old, new| {
            keys!(changes, section, old, new, Pool {
                AtOnce: backends, balance, hash_by, slow_start, queue, queue_timeout, retry_budget, eject, check, protocol, tls,
                    connect_timeout, read_timeout, write_timeout, idle_timeout, websocket_timeout;
            });
        });
    }

    fn splits(&mut self, old: &BTreeMap<String, Split>, new: &BTreeMap<String, Split>) {
        self.sections(Effect::AtOnce, &named("split", old), &named("split", new), |changes, section, old, new| {
            keys!(changes, section, old, new, Split { AtOnce: groups, percent; });
        });
    }

    fn dns(&mut self, old: &Dns, new: &Dns) {
        keys!(self, "dns", old, new, Dns { AtOnce: servers; });
    }

    /// A route is known by its host and its path; their order in the file means nothing.
    fn routes(&mut self, old: &[Route], new: &[Route]) {
        fn by_place(routes: &[Route]) -> Sections<'_, Route> {
            let named = routes.iter().map(|route| {
                let host = route.host.as_ref().map_or("", |host| host.get_ref());
                (format!("route {host}{}", route.path.get_ref()), route)
            });
            named.collect()
        }
        self.sections(Effect::AtOnce, &by_place(old), &by_place(new), |changes, section, old, new| {
            keys!(changes, section, old, new, Route {
                AtOnce: pool, splits, access, groups, cache_guard, websocket_origins, body_bytes, touch, stream_touch, fallback, directives,
                    anonymous, basic, acr, max_age, access_token;
            } besides { host, path });
        });
    }

    fn events(&mut self, old: &Events, new: &Events) {
        keys!(self, "events", old, new, Events { AtRestart: audit, webhook, webhook_secret; });
    }

    fn admin(&mut self, old: &Admin, new: &Admin) {
        keys!(self, "admin", old, new, Admin { AtOnce: hosts; AtRestart: address, enabled, token; });
    }

    fn log(&mut self, old: &Log, new: &Log) {
        keys!(self, "log", old, new, Log {
            AtOnce: level;
            AtRestart: format, access;
        });
    }

    fn tracing(&mut self, old: &Tracing, new: &Tracing) {
        keys!(self, "tracing", old, new, Tracing { AtRestart: endpoint, ratio, service, headers; });
    }
}

fn optional<'c, T>(name: &str, section: Option<&'c T>) -> Sections<'c, T> {
    section.map(|section| (name.to_owned(), section)).into_iter().collect()
}

fn spanned<'c, T>(name: &str, section: &'c Option<Spanned<T>>) -> Sections<'c, T> {
    optional(name, section.as_ref().map(Spanned::get_ref))
}

fn named<'c, T>(kind: &str, sections: &'c BTreeMap<String, T>) -> Sections<'c, T> {
    sections.iter().map(|(name, section)| (format!("{kind}.{name}"), section)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config;

    const BASE: &str = r#"
        [[listener]]
        address = "127.0.0.1:1"
        [store.memory]
        [session]
        [login.password]
        users_file = "users.toml"
        [pool.app]
        backends = ["127.0.0.1:2"]
        [split.next]
        percent = 5
        [[route]]
        path = "/"
        pool = "app"
        [[route]]
        host = "shop.example.org"
        path = "/cart"
        pool = "app"
    "#;

    fn changes(new: &str) -> (Vec<String>, Vec<String>) {
        let parse = |text: &str| config::parse(text, Path::new("a.toml")).unwrap_or_else(|error| panic!("{error}"));
        let Changes { at_once, at_restart, .. } = Changes::between(&parse(BASE), &parse(new));
        (at_once, at_restart)
    }

    #[test]
    fn what_has_changed_is_a_line_and_says_when_it_counts() {
        let cases: &[(&str, &str, &[&str], &[&str])] = &[
            ("[[listener]]", "# a line more\n\n[[listener]]", &[], &[]),
            ("127.0.0.1:2", "127.0.0.1:3", &["pool.app: backends"], &[]),
            ("[pool.app]", "[pool.next]\nbackends = [\"127.0.0.1:4\"]\n[pool.app]", &["pool.next: added"], &[]),
            ("[pool.app]", "[pool.app]\nread_timeout = \"5s\"", &["pool.app: read_timeout"], &[]),
            ("percent = 5", "percent = 10", &["split.next: percent"], &[]),
            ("path = \"/\"", "splits = [{ name = \"next\", pool = \"app\" }]\npath = \"/\"", &["route /: splits"], &[]),
            ("path = \"/\"", "path = \"/\"\naccess = \"public\"", &["route /: access"], &[]),
            (
                "\"/cart\"",
                "\"/basket\"",
                &["route shop.example.org/basket: added", "route shop.example.org/cart: removed"],
                &[],
            ),
            ("[session]", "[identity]\npreset = \"remote\"", &["identity: preset"], &[]),
            ("[session]", "[login]\ntitle = \"Come in\"", &["login: title"], &[]),
            ("[session]", "[login.password.throttle]\nwindow = \"1m\"", &["login.password.throttle: window"], &[]),
            ("[session]", "[login.basic]", &["login.basic: added"], &[]),
            ("[session]", "[log]\nlevel = \"debug\"", &["log: level"], &[]),
            ("[session]", "[log]\nformat = \"json\"", &[], &["log: format"]),
            (
                "[session]",
                "[limits]\nbody_bytes = \"1KiB\"\nheaders_max = 7",
                &["limits: body_bytes"],
                &["limits: headers_max"],
            ),
            ("[session]", "[server]\nthreads = 3", &[], &["server: threads"]),
            ("[session]", "[session]\nidle_timeout = \"5m\"", &[], &["session: idle_timeout"]),
            ("[session]", "[session]\n[admin]\nhosts = [\"gw1.example.org\"]", &["admin: hosts"], &[]),
            ("[session]", "[admin]\ntoken = \"q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2\"", &[], &["admin: token"]),
            ("[session]", "[tracing]\nratio = 0.5", &[], &["tracing: ratio"]),
            (
                "[session]",
                "[tracing]\nendpoint = \"http://[::1]:4318\"\nheaders = { x-key = \"q7Zp-Kw\" }",
                &[],
                &["tracing: endpoint", "tracing: headers"],
            ),
            ("[session]", "[events]\naudit = true", &[], &["events: audit"]),
            (
                "127.0.0.1:1\"",
                "127.0.0.1:1\"\ncert = \"a.pem\"\nkey = \"b.pem\"\nhttp2 = false\nhsts = { max_age = \"30d\" }",
                &[],
                &[
                    "listener 127.0.0.1:1: cert",
                    "listener 127.0.0.1:1: key",
                    "listener 127.0.0.1:1: http2",
                    "listener 127.0.0.1:1: hsts",
                ],
            ),
            ("127.0.0.1:1", "127.0.0.1:8", &[], &["listener 127.0.0.1:1: removed", "listener 127.0.0.1:8: added"]),
            ("[store.memory]", "[store.memory]\nsessions_max = 5", &[], &["store.memory: sessions_max"]),
            (
                "[store.memory]",
                "[store.redis]\nurl = \"redis://u:q7Zp-Kw@127.0.0.1\"",
                &[],
                &["store.redis: added", "store.memory: removed"],
            ),
        ];
        for (before, after, at_once, at_restart) in cases {
            let new = BASE.replacen(before, after, 1);
            assert_ne!(new, BASE, "{before}");
            let (applied, restart) = changes(&new);
            assert_eq!((applied, restart), (lines(at_once), lines(at_restart)), "{before} -> {after}");
        }
    }

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|&line| line.to_owned()).collect()
    }
}
