//! What did the operator ask for? One TOML file becomes a [`model::Config`], or a list of everything that is wrong with it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub mod model;
pub mod value;
pub mod redis_url;
mod validate;
pub mod changes;
pub mod error;

pub use validate::{confidential_url, is_label};

/// Whether this is `host:port`, as `backends` has it.
pub fn is_backend_address(text: &str) -> bool {
    validate::backend_address(text).is_ok()
}

use error::{ConfigError, Problems};
use model::{
    Admin, Backend, BackendSource, BackendTls, CertificateFiles, Config, Events, Listener, Login, PasswordLogin, Place,
    Pool, RedisStore, Session, Store, Tracing,
};
use value::Secret;

/// Reads, parses and validates one file. In what comes back, paths are absolute and secrets are resolved; of the files
/// that it names, only those of secrets were opened.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    parse(&read(path)?, path)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |error| ConfigError::unreadable(path, &error);
    let about = std::fs::metadata(path).map_err(unreadable)?;
    if !about.is_file() {
        return Err(ConfigError::of_file(path, "is not a file", "name the configuration file itself"));
    }
    if FILE_BYTES_MAX < about.len() {
        return Err(ConfigError::of_file(path, "is larger than 1 MiB", "this is hardly a configuration"));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// `[admin]` alone, whatever else is wrong in the file: for who wants to ask the gateway that it belongs to.
pub fn load_admin(path: &Path) -> Result<Admin, ConfigError> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        admin: Admin,
    }
    fn only<'t>(table: DeTable<'t>, names: &[&str]) -> DeTable<'t> {
        table.into_iter().filter(|(name, _)| names.contains(&name.get_ref().as_ref())).collect()
    }
    let text = read(path)?;
    let (tree, _) = DeTable::parse_recoverable(&text);
    let at = tree.span();
    let mut tree = only(tree.into_inner(), &["admin"]);
    if let Some(DeValue::Table(keys)) = tree.get_mut("admin").map(Spanned::get_mut) {
        // Keys of a section whose own heading is damaged may have got here. `hosts` is for others: we ask by address.
        *keys = only(std::mem::take(keys), &["address", "enabled", "token"]);
    }
    let File { mut admin } = File::deserialize(toml::Deserializer::from(Spanned::new(at, tree)))
        .map_err(|error| ConfigError::not_toml(path, &text, &error))?;
    let mut problems = Problems::in_file(path, &text);
    if let Some(token) = &mut admin.token
        && let Err(message) = token.get_mut().resolve(&directory_of(path), |name| std::env::var_os(name))
    {
        problems.add(token.span(), format!("admin.token: {message}"));
    }
    problems.into_result(admin)
}

/// The servers that a file lists for a pool: `backends`, written as in the pool itself.
pub fn load_backends(path: &Path) -> Result<Vec<Backend>, ConfigError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        backends: Spanned<Vec<Spanned<BackendSource>>>,
    }
    let text = read(path)?;
    let File { backends } = toml::from_str(&text).map_err(|error| ConfigError::not_toml(path, &text, &error))?;
    let mut problems = Problems::in_file(path, &text);
    let place = backends.span();
    let backends = backends.into_inner();
    if backends.is_empty() {
        problems.add(place, "it lists no backend").hint("who shall serve nobody is drained, or taken out of the pool");
    }
    if let Some(backend) = backends.get(FILE_BACKENDS_MAX) {
        problems
            .add(backend.span(), format!("more than {FILE_BACKENDS_MAX} backends"))
            .hint("a choice looks at each of them: make several pools of them");
        return problems.into_result(Vec::new()); // the rest would only say more of too much
    }
    validate::backends(&backends, &mut problems);
    for backend in backends.iter().filter(|backend| backend.get_ref().place != Place::Address) {
        problems
            .add(backend.span(), format!("{} in a file of backends", backend.get_ref()))
            .hint("such a file lists servers; other places stand in the pool");
    }
    problems.into_result(backends.into_iter().map(|backend| backend.into_inner().each).collect())
}

/// A choice looks at each backend.
const FILE_BACKENDS_MAX: usize = 1_000;

/// Room for some ten thousand routes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// `file` names the text in messages; relative paths in the text are meant from its directory.
pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
    parse_within(text, file, |name| std::env::var_os(name))
}

fn parse_within(
    text: &str,
    file: &Path,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Config, ConfigError> {
    let not_toml = |error| ConfigError::not_toml(file, text, &error);
    let tree = DeTable::parse(text).map_err(not_toml)?;
    let mut config = Config::deserialize(toml::Deserializer::from(tree.clone())).map_err(not_toml)?;
    config.file = file.to_owned();

    let mut problems = Problems::in_file(file, text);
    resolve(&mut config, &directory_of(file), environment, &mut problems);
    validate::check(&config, tree.get_ref(), &mut problems);
    problems.into_result(config)
}

/// Absolute, so that it means the same after a change of the working directory.
fn directory_of(file: &Path) -> PathBuf {
    let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    file.parent().map(Path::to_owned).unwrap_or_default()
}

/// Makes paths absolute and reads secrets. Sections are named one by one, so that a new key asks here for its place.
fn resolve(
    config: &mut Config,
    directory: &Path,
    environment: impl Fn(&str) -> Option<OsString>,
    problems: &mut Problems<'_>,
) {
    let Config {
        file: _,
        listeners,
        store: Store { redis, memory, grace: _ },
        login:
            Login { stylesheet, password, oidc, backend: _, basic: _, prefix: _, title: _, default_return: _, origins: _ },
        server: _,
        limits: _,
        session: Session { keys_file, .. },
        identity: _,
        pools,
        splits: _,
        dns: _,
        routes: _,
        events: Events { webhook_secret, webhook: _, audit: _ },
        admin: Admin { token, address: _, enabled: _, hosts: _ },
        log: _,
        tracing: Tracing { headers, endpoint: _, ratio: _, service: _ },
    } = config;

    let mut paths = Vec::<&mut Spanned<PathBuf>>::new();
    let mut secrets = Vec::<(&str, &mut Spanned<Secret>)>::new();
    for Listener { cert, key, certificates, client_ca, .. } in listeners {
        paths.extend(cert.iter_mut().chain(key).chain(client_ca));
        paths.extend(certificates.iter_mut().flat_map(|CertificateFiles { cert, key }| [cert, key]));
    }
    for Pool { backends, tls, .. } in pools.values_mut() {
        for backend in backends {
            if let Place::File(path) = &mut backend.get_mut().place {
                paths.push(path);
            }
        }
        if let Some(BackendTls { ca, cert, key, server_name: _, verify: _ }) = tls {
            paths.extend(ca.iter_mut().chain(cert).chain(key));
        }
    }
    if let Some(redis) = redis {
        let RedisStore { url, ca, cert, key, .. } = redis.get_mut();
        paths.extend(ca.iter_mut().chain(cert).chain(key));
        secrets.push(("store.redis.url", url));
    }
    for provider in oidc.values_mut() {
        secrets.extend(provider.client_secret.as_mut().map(|secret| ("login.oidc.client_secret", secret)));
    }
    secrets.extend(webhook_secret.as_mut().map(|secret| ("events.webhook_secret", secret)));
    secrets.extend(token.as_mut().map(|token| ("admin.token", token)));
    secrets.extend(headers.values_mut().map(|value| ("tracing.headers", value)));
    for (name, secret) in secrets {
        if let Err(message) = secret.get_mut().resolve(directory, &environment) {
            problems.add(secret.span(), format!("{name}: {message}"));
        }
    }
    if let Some(memory) = memory {
        paths.extend(&mut memory.get_mut().file);
    }
    paths.extend(keys_file);
    paths.extend(stylesheet);
    if let Some(PasswordLogin { users_file, hashes_max: _, throttle: _ }) = password {
        paths.push(users_file);
    }

    for path in paths {
        if path.get_ref().as_os_str().is_empty() {
            problems
                .add(path.span(), "an empty path")
                .hint("name a file; a relative one is looked up beside this file");
        }
        let absolute = directory.join(path.get_ref());
        *path.get_mut() = absolute;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const CONF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conf");
    const MANUAL: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/conf/cloakroom.toml"));

    /// Keys that the manual shows by example, because they have no default or must be there.
    const EXAMPLES: [&str; 44] = [
        "endpoint",
        "page",
        "lame_duck",
        "certificates",
        "client_ca",
        "hsts",
        "redirect_to_port",
        "path",
        "tls",
        "slow_start",
        "body",
        "port",
        "server_name",
        "cert",
        "key",
        "scheme",
        "url",
        "ca",
        "stylesheet",
        "X-Team",
        "host",
        "body_bytes",
        "grace",
        "file",
        "silent_header",
        "keys_file",
        "webhook",
        "webhook_secret",
        "token",
        "issuer",
        "client_id",
        "client_secret",
        "title",
        "prompt",
        "team",
        "hd",
        "acr",
        "max_age",
        "access_token",
        "origins",
        "proxy_protocol",
        "percent",
        "splits",
        "authorization",
    ];

    /// The manual with every key in force: `#key = value` and `#[section]` lose their `#`, prose (`# text`) stays.
    fn manual_with_every_key() -> String {
        let uncommented = MANUAL.lines().map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '[') => rest,
            _ => line,
        });
        uncommented.collect::<Vec<_>>().join("\n")
    }

    fn without_line(text: &str, index: usize) -> String {
        let lines = text.lines().enumerate().filter(|(at, _)| *at != index).map(|(_, line)| line);
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn every_default_in_the_manual_is_the_default_in_the_code() {
        let every_key = manual_with_every_key();
        let whole = toml::from_str::<Config>(&every_key).unwrap();
        let mut checked = 0;
        for (index, line) in MANUAL.lines().enumerate() {
            let Some((key, _)) = line.strip_prefix('#').and_then(|line| line.split_once(" = ")) else { continue };
            // `body_bytes` is an example on a route, but a default in [limits].
            let is_example = EXAMPLES.contains(&key) && line != "#body_bytes = \"100MiB\"";
            if key.contains(' ') || is_example {
                continue;
            }
            let without = toml::from_str::<Config>(&without_line(&every_key, index)).unwrap();
            assert_eq!(without, whole, "conf/cloakroom.toml:{}: {line} is not what leaving it out means", index + 1);
            checked += 1;
        }
        assert!(40 < checked, "only {checked} defaults were compared: the form of the manual has changed");
    }

    /// Each table of the manual gets a key that does not exist; serde answers with all that do.
    #[test]
    fn every_key_of_the_model_is_in_the_manual() {
        let whole = manual_with_every_key().parse::<toml::Table>().unwrap();
        let mut sections = Vec::new();
        tables(&whole, &mut Vec::new(), &mut sections);
        let mut known = 0;
        for path in sections {
            let mut probed = whole.clone();
            let section = table_at(&mut probed, &path);
            let written = section.keys().cloned().collect::<BTreeSet<_>>();
            section.insert("no_such_key".to_owned(), toml::Value::Boolean(true));
            let probed = toml::to_string(&probed).unwrap();
            let error = toml::from_str::<Config>(&probed).expect_err("a key that does not exist").message().to_owned();
            // [pool], [identity.headers] and [tracing.headers] take any name, and complain of the value.
            let Some((_, expected)) = error.split_once("unknown field `no_such_key`, expected ") else { continue };
            for key in expected.split('`').skip(1).step_by(2) {
                assert!(written.contains(key), "{}.{key} is missing in conf/cloakroom.toml", path.join("."));
                known += 1;
            }
        }
        assert!(60 < known, "only {known} keys were looked for: serde's message has changed");
    }

    fn tables(table: &toml::Table, path: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
        found.push(path.clone());
        for (key, value) in table {
            let inner = value.as_array().and_then(|array| array.first()).unwrap_or(value);
            if let Some(inner) = inner.as_table() {
                path.push(key.clone());
                tables(inner, path, found);
                path.pop();
            }
        }
    }

    fn table_at<'t>(mut table: &'t mut toml::Table, path: &[String]) -> &'t mut toml::Table {
        for key in path {
            let value = table.get_mut(key).unwrap();
            table = if value.is_array() { value[0].as_table_mut() } else { value.as_table_mut() }.unwrap();
        }
        table
    }

    /// With TLS for the sake of `ca`, the one thing wrong with it is that it names both stores.
    #[test]
    fn every_value_in_the_manual_is_valid() {
        // What stands for a secret there is refused, lest somebody takes it for one.
        let text = manual_with_every_key()
            .replace("\"redis://", "\"rediss://")
            // The route of the manual is for those who have logged in, and this page is for the others.
            .replace("page = \"/login\"", "")
            // For another listener than the one with the certificate.
            .replace("redirect_to_port = 443", "")
            .replace("tokens = false", "tokens = true")
            // The manual has one pool.
            .replace("pool = \"app-next\"", "pool = \"app\"")
            .replace("\"<as the provider shows it>\"", "\"Vq83-nK2\"")
            .replace("\"<openssl rand -base64 32>\"", "\"pA0yXbq9vG3kWm7RzT5sLd2fHj8cNe4u\"");
        let error = parse(&text, Path::new("manual.toml")).unwrap_err().to_string();
        let problems = error.lines().filter(|line| line.starts_with("error: ")).collect::<Vec<_>>();
        assert!(problems.len() == 1 && problems[0].contains("both [store.redis] and [store.memory]"), "{error}");
    }

    #[test]
    fn the_manual_is_a_small_configuration_as_it_stands() {
        let config = load(&Path::new(CONF).join("cloakroom.toml")).unwrap();
        assert_eq!((config.listeners.len(), config.pools.len(), config.routes.len()), (1, 1, 1));
        assert!(config.listeners[0].address.get_ref().ip().is_loopback(), "nobody else is let in by a first try");
        assert!(config.store.redis.is_none(), "a first try needs no Redis");
        assert!(config.login.password.as_ref().unwrap().users_file.get_ref().exists());
    }

    #[test]
    fn the_real_set_ups_are_valid() {
        let environment =
            |name: &str| (name == "CLOAKROOM_REDIS_URL").then(|| "rediss://u:J8k-2wQ@redis.internal".into());
        for name in ["single-host.toml", "redis-ha.toml"] {
            let file = Path::new(CONF).join(name);
            let text = std::fs::read_to_string(&file).unwrap();
            if let Err(error) = parse_within(&text, &file, environment) {
                panic!("{error}");
            }
        }
    }

    #[test]
    fn the_sample_users_file_lets_nobody_in() {
        let text = std::fs::read_to_string(Path::new(CONF).join("users.toml")).unwrap();
        assert!(text.parse::<toml::Table>().unwrap().is_empty(), "a user in it would be a known password");
    }

    #[test]
    fn relative_paths_begin_at_the_file_and_absolute_ones_stay() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cloakroom.toml");
        let text = r#"
            [[listener]]
            address = "127.0.0.1:8443"
            cert = "certs/chain.pem"
            key = "/etc/key.pem"
            [store.redis]
            url = { file = "redis-url" }
            ca = "ca.pem"
            [login]
            stylesheet = "look.css"
            [login.password]
            users_file = "users.toml"
            [pool.app]
            backends = ["127.0.0.1:9001"]
            [[route]]
            path = "/"
            pool = "app"
        "#;
        std::fs::write(&file, text).unwrap();
        std::fs::write(directory.path().join("redis-url"), "rediss://user:q7Zp-Kw@redis/0\n").unwrap();

        let config = load(&file).unwrap();
        let beside = |name: &str| directory.path().join(name);
        let Config { listeners, store, login, .. } = &config;
        assert_eq!(listeners[0].cert.as_ref().unwrap().get_ref(), &beside("certs/chain.pem"));
        assert_eq!(listeners[0].key.as_ref().unwrap().get_ref(), Path::new("/etc/key.pem"));
        assert_eq!(login.stylesheet.as_ref().unwrap().get_ref(), &beside("look.css"));
        assert_eq!(login.password.as_ref().unwrap().users_file.get_ref(), &beside("users.toml"));
        let redis = store.redis.as_ref().unwrap().get_ref();
        assert_eq!(redis.ca.as_ref().unwrap().get_ref(), &beside("ca.pem"));
        assert_eq!(redis.url.get_ref().expose(), "rediss://user:q7Zp-Kw@redis/0");

        let printed = format!("{config:?} {config:#?}");
        assert!(!printed.contains("q7Zp-Kw") && printed.contains("****"), "secrets never print: {printed}");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = load(Path::new("/no/such/cloakroom.toml")).unwrap_err().to_string();
        assert!(error.starts_with("error: /no/such/cloakroom.toml: cannot be read: No such file"), "{error}");
    }

    /// Bytes flipped, removed, doubled and put in: whatever comes out is a configuration or an error that prints.
    #[test]
    fn no_damage_to_a_file_makes_the_parser_panic() {
        let mut rng = StdRng::seed_from_u64(0x5e55_1014);
        let texts = [MANUAL.to_owned(), manual_with_every_key()];
        for round in 0..1_500 {
            let mut bytes = texts[round % texts.len()].clone().into_bytes();
            for _ in 0..rng.random_range(1..=8) {
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..4) {
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => drop(bytes.drain(at..(at + rng.random_range(1..200)).min(bytes.len() - 1).max(at))),
                    2 => bytes.insert(at, b"\"'[]{}=.#\n\r\t\0,"[rng.random_range(0..14)]),
                    _ => bytes.extend_from_within(at..(at + 100).min(bytes.len())),
                }
            }
            let text = String::from_utf8_lossy(&bytes);
            if let Err(error) = parse(&text, Path::new("damaged.toml")) {
                assert!(error.to_string().starts_with("error: damaged.toml"), "{error}");
            }
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        for (open, close) in [("[", "]"), ("{a=", "}")] {
            let text = format!("x = {}1{}", open.repeat(50_000), close.repeat(50_000));
            assert!(parse(&text, Path::new("deep.toml")).is_err());
        }
    }
}
