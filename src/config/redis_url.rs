//! Where is Redis, and how does one get in? One URL for every kind: a server, Sentinel, Cluster.
//!
//! No message here repeats any part of the URL: a password with an unescaped character can end up in every part.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::validate::{host_name_or_address, port_number};
use super::value::Secret;

/// What `store.redis.url` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    pub place: RedisPlace,
    /// To all servers named here or found through them, sentinels included.
    pub tls: bool,
    pub login: RedisLogin,
    pub database: u16,
}

/// Who is asked for the sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisPlace {
    Server(RedisAddress),
    /// The primary that these sentinels know by this name.
    Sentinel {
        sentinels: Vec<RedisAddress>,
        primary: String,
        login: RedisLogin,
    },
    /// Of a Cluster at least one node; the others are found through it.
    Cluster(Vec<RedisAddress>),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RedisAddress {
    /// A name or an address, without brackets.
    Tcp {
        host: String,
        port: u16,
    },
    Socket(PathBuf),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedisLogin {
    pub user: Option<String>,
    pub password: Option<Secret>,
}

const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;
/// As many as anybody needs to find the others.
const ADDRESSES_MAX: usize = 64;

impl RedisUrl {
    /// # Errors
    /// What is wrong, and what was expected.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err("no scheme, expected e.g. redis://127.0.0.1:6379");
        };
        if rest.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err("white space in a URL; in a password it is written %20");
        }
        if rest.contains('#') {
            return Err("a `#` is written %23 in a password, and elsewhere refused: certificates are always verified");
        }
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        match scheme {
            "unix" | "redis+unix" | "valkey+unix" => Self::socket(rest, query),
            "redis" | "valkey" => Self::server(rest, query, false),
            "rediss" | "valkeys" => Self::server(rest, query, true),
            "redis+sentinel" | "valkey+sentinel" => Self::sentinel(rest, query, false),
            "rediss+sentinel" | "valkeys+sentinel" => Self::sentinel(rest, query, true),
            "redis+cluster" | "valkey+cluster" => Self::cluster(rest, query, false),
            "rediss+cluster" | "valkeys+cluster" => Self::cluster(rest, query, true),
            _ => Err("unknown scheme, expected redis, rediss, redis+sentinel, redis+cluster or unix \
                      (in lower case; rediss+… for TLS)"),
        }
    }

    fn socket(path: &str, query: Option<&str>) -> Result<Self, &'static str> {
        let path = decoded(path)?;
        if !path.starts_with('/') || path == "/" {
            return Err("expected the absolute path of a socket, e.g. unix:///run/redis/redis.sock");
        }
        let [database, user, password] = parameters(query, ["db", "user", "pass"])?;
        Ok(Self {
            place: RedisPlace::Server(RedisAddress::Socket(path.into())),
            tls: false,
            login: login(user, password)?,
            database: database.map_or(Ok(0), |text| database_number(&text))?,
        })
    }

    fn server(rest: &str, query: Option<&str>, tls: bool) -> Result<Self, &'static str> {
        let [] = parameters(query, [])?;
        let (login, hosts, path) = parts(rest)?;
        let [address] = <[_; 1]>::try_from(addresses(hosts, REDIS_PORT)?)
            .map_err(|_| "several hosts are for redis+sentinel:// and redis+cluster://")?;
        Ok(Self { place: RedisPlace::Server(address), tls, login, database: database_of(path)? })
    }

    fn sentinel(rest: &str, query: Option<&str>, tls: bool) -> Result<Self, &'static str> {
        let [sentinel_user, sentinel_password] = parameters(query, ["sentinel_user", "sentinel_pass"])?;
        let (to_redis, hosts, path) = parts(rest)?;
        let (primary, database) = match path.split_once('/') {
            Some((primary, database)) => (primary, database),
            None => (path, ""),
        };
        let primary = decoded(primary)?;
        if primary.is_empty() {
            return Err(
                "expected the name by which the sentinels know the primary, e.g. redis+sentinel://host/mymaster",
            );
        }
        let place = RedisPlace::Sentinel {
            sentinels: addresses(hosts, SENTINEL_PORT)?,
            primary,
            login: login(sentinel_user, sentinel_password)?,
        };
        Ok(Self { place, tls, login: to_redis, database: database_of(database)? })
    }

    fn cluster(rest: &str, query: Option<&str>, tls: bool) -> Result<Self, &'static str> {
        let [] = parameters(query, [])?;
        let (login, hosts, path) = parts(rest)?;
        if database_of(path)? != 0 {
            return Err("a Cluster has no database numbers");
        }
        Ok(Self { place: RedisPlace::Cluster(addresses(hosts, REDIS_PORT)?), tls, login, database: 0 })
    }

    /// Every password in it.
    pub fn passwords(&self) -> impl Iterator<Item = &Secret> {
        let sentinel = match &self.place {
            RedisPlace::Sentinel { login, .. } => login.password.as_ref(),
            RedisPlace::Server(_) | RedisPlace::Cluster(_) => None,
        };
        self.login.password.iter().chain(sentinel)
    }
}

/// `[user:password@]hosts[/path]`
fn parts(rest: &str) -> Result<(RedisLogin, &str, &str), &'static str> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if path.contains('@') {
        return Err(ESCAPES);
    }
    let Some((credentials, hosts)) = authority.split_once('@') else {
        return Ok((RedisLogin::default(), authority, path));
    };
    if hosts.contains('@') {
        return Err(ESCAPES);
    }
    let (user, password) = match credentials.split_once(':') {
        Some((user, password)) => (user, Some(decoded(password)?)),
        None => (credentials, None),
    };
    let user = decoded(user)?;
    Ok((login(Some(user).filter(|user| !user.is_empty()), password)?, hosts, path))
}

const ESCAPES: &str = "in a user or a password, `@` is written %40, `/` %2F, `:` %3A, `?` %3F and `%` %25";

fn login(user: Option<String>, password: Option<String>) -> Result<RedisLogin, &'static str> {
    match (&user, &password) {
        (Some(_), None) => Err("there is a user, but no password: expected user:password@"),
        (_, Some(password)) if password.is_empty() => Err("the password is empty"),
        (Some(_) | None, Some(_)) | (None, None) => Ok(RedisLogin { user, password: password.map(Secret::new) }),
    }
}

fn addresses(hosts: &str, default_port: u16) -> Result<Vec<RedisAddress>, &'static str> {
    let hosts: Vec<_> = hosts.split(',').map(|host| address(host, default_port)).collect::<Result<_, _>>()?;
    if ADDRESSES_MAX < hosts.len() {
        return Err("more than 64 hosts: a few of them are enough to find the others");
    }
    Ok(hosts)
}

fn address(text: &str, default_port: u16) -> Result<RedisAddress, &'static str> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        Some(_) | None => (text, None),
    };
    if host.is_empty() {
        return Err("no host");
    }
    host_name_or_address(host)?;
    let port = match port {
        None => default_port,
        Some(port) => port_number(port)?,
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if host.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified()) {
        return Err("0.0.0.0 and [::] are where a server listens, not where it is");
    }
    Ok(RedisAddress::Tcp { host: host.to_owned(), port })
}

fn database_of(path: &str) -> Result<u16, &'static str> {
    if path.is_empty() { Ok(0) } else { database_number(path) }
}

fn database_number(text: &str) -> Result<u16, &'static str> {
    let is_plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    let number = if is_plain { text.parse().ok() } else { None };
    number.ok_or("what follows the host is the number of a database, e.g. /2")
}

/// The values of these keys of a query, each at most once, and nothing else.
fn parameters<const N: usize>(query: Option<&str>, keys: [&str; N]) -> Result<[Option<String>; N], &'static str> {
    let mut values = [const { None }; N];
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err("expected key=value after the `?`; in a password, `?` is written %3F and `&` %26");
        };
        let Some(at) = keys.iter().position(|known| *known == key) else {
            return Err("unknown parameter after the `?`: unix:// knows db, user and pass, redis+sentinel:// \
                        sentinel_user and sentinel_pass, the others none");
        };
        if values[at].replace(decoded(value)?).is_some() {
            return Err("a parameter is there twice");
        }
    }
    Ok(values)
}

/// Percent-decoded, strictly: RFC 3986, section 2.1.
fn decoded(text: &str) -> Result<String, &'static str> {
    let is_hex = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_hexdigit);
    let bytes = text.as_bytes();
    let stray = |at: usize| bytes[at] == b'%' && !(is_hex(bytes.get(at + 1)) && is_hex(bytes.get(at + 2)));
    if (0..bytes.len()).any(stray) {
        return Err("a `%` is written %25");
    }
    percent_decode_str(text).decode_utf8().map(Into::into).map_err(|_| "what is percent-encoded is not UTF-8")
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What may be shown.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, addresses) = match &self.place {
            RedisPlace::Server(address) => return write!(f, "{address}"),
            RedisPlace::Sentinel { sentinels, primary, .. } => (format!("{primary} of "), sentinels),
            RedisPlace::Cluster(nodes) => ("the Cluster of ".to_owned(), nodes),
        };
        f.write_str(&before)?;
        for (index, address) in addresses.iter().enumerate() {
            write!(f, "{}{address}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> RedisAddress {
        RedisAddress::Tcp { host: host.to_owned(), port }
    }

    fn login(user: Option<&str>, password: &str) -> RedisLogin {
        RedisLogin { user: user.map(str::to_owned), password: Some(Secret::new(password.to_owned())) }
    }

    #[test]
    fn every_kind_of_redis_has_its_url() {
        let server =
            |address, tls, login, database| RedisUrl { place: RedisPlace::Server(address), tls, login, database };
        let none = RedisLogin::default();
        let sentinel = |sentinels, tls, login, to_sentinel, database| RedisUrl {
            place: RedisPlace::Sentinel { sentinels, primary: "mymaster".to_owned(), login: to_sentinel },
            tls,
            login,
            database,
        };
        let cluster = |nodes, tls, login| RedisUrl { place: RedisPlace::Cluster(nodes), tls, login, database: 0 };
        let socket = |path: &str| RedisAddress::Socket(path.into());
        let cases = [
            ("redis://h", server(tcp("h", 6379), false, none.clone(), 0)),
            ("valkey://h:7000/3", server(tcp("h", 7000), false, none.clone(), 3)),
            ("redis://h/", server(tcp("h", 6379), false, none.clone(), 0)),
            ("redis://:p@h", server(tcp("h", 6379), false, login(None, "p"), 0)),
            ("redis://u:p%40%2F%3a%25@h/1", server(tcp("h", 6379), false, login(Some("u"), "p@/:%"), 1)),
            ("redis://u:a:b@h", server(tcp("h", 6379), false, login(Some("u"), "a:b"), 0)),
            ("rediss://[::1]:6380", server(tcp("::1", 6380), true, none.clone(), 0)),
            ("valkeys://[fd00::1]", server(tcp("fd00::1", 6379), true, none.clone(), 0)),
            ("unix:///run/redis.sock", server(socket("/run/redis.sock"), false, none.clone(), 0)),
            (
                "redis+unix:///run/redis.sock?db=2&user=u&pass=%26p",
                server(socket("/run/redis.sock"), false, login(Some("u"), "&p"), 2),
            ),
            (
                "redis+sentinel://h1,h2:26380,[::1]/mymaster",
                sentinel(
                    vec![tcp("h1", 26379), tcp("h2", 26380), tcp("::1", 26379)],
                    false,
                    none.clone(),
                    none.clone(),
                    0,
                ),
            ),
            (
                "rediss+sentinel://u:p@h/mymaster/4?sentinel_user=s&sentinel_pass=t",
                sentinel(vec![tcp("h", 26379)], true, login(Some("u"), "p"), login(Some("s"), "t"), 4),
            ),
            ("redis+cluster://:p@h1:7001,h2", cluster(vec![tcp("h1", 7001), tcp("h2", 6379)], false, login(None, "p"))),
            ("rediss+cluster://h/0", cluster(vec![tcp("h", 6379)], true, none)),
        ];
        for (text, expected) in cases {
            assert_eq!(RedisUrl::parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        let cases = [
            ("localhost:6379", "no scheme"),
            ("http://:hunter2@h", "unknown scheme"),
            ("REDIS://:hunter2@h", "unknown scheme"),
            ("redis://", "no host"),
            ("redis://:hunter2@", "no host"),
            ("redis://:hunter2@0.0.0.0", "where a server listens"),
            ("redis://:hunter2@[::]", "where a server listens"),
            ("redis://:hunter2@h:port", "a port"),
            ("redis://:hunter2@h:0", "a port"),
            ("redis://:hunter2@h:65536", "a port"),
            ("redis://:hunter2@[h]", "not an IPv6 address"),
            ("redis://:hunter2@h h", "white space"),
            ("redis://:hunter2@h/first", "the number of a database"),
            ("redis://:hunter2@h/-1", "the number of a database"),
            ("redis://:hunter2@h/+1", "the number of a database"),
            ("redis://:hunter2@h/01", "the number of a database"),
            ("redis://:hunter2@h/65536", "the number of a database"),
            ("redis://:hunter2@h/0/1", "the number of a database"),
            ("redis://:hunt/er2@h", "written %40, `/` %2F"),
            ("redis://:hunter2@x@h", "written %40"),
            ("redis://:hunt%er2@h", "written %25"),
            ("redis://:hunter2%ff@h", "not UTF-8"),
            ("redis://proxy@h", "a user, but no password"),
            ("redis://proxy:@h", "the password is empty"),
            ("redis://:hunter2@h?protocol=4", "unknown parameter"),
            ("redis://:hunter2@h?x", "key=value"),
            ("redis://:hunter2#3@h", "written %23"),
            ("rediss://:hunter2@h#insecure", "certificates are always verified"),
            ("redis://:hunter2@h1,h2", "several hosts"),
            ("unix://:hunter2@host/run/redis.sock", "the absolute path"),
            ("unix://redis.sock", "the absolute path"),
            ("unix:///run/redis.sock?db=first&pass=hunter2", "the number of a database"),
            ("unix:///run/redis.sock?pass=hunter2&pass=hunter2", "twice"),
            ("unix:///run/redis.sock?user=hunter2", "a user, but no password"),
            ("redis+sentinel://:hunter2@h", "the name by which"),
            ("redis+sentinel://:hunter2@h/", "the name by which"),
            ("redis+sentinel://:hunter2@h//2", "the name by which"),
            ("redis+sentinel://:hunter2@h,/m", "no host"),
            ("redis+sentinel://:hunter2@h/m/x", "the number of a database"),
            ("redis+sentinel://h/m?sentinel_user=hunter2", "a user, but no password"),
            ("redis+cluster://:hunter2@h/2", "no database numbers"),
        ];
        for (url, expected) in cases {
            let message = RedisUrl::parse(url).expect_err(url);
            assert!(message.contains(expected) && !message.contains("hunter2"), "{url}: {message}");
        }
        let many = format!("redis+cluster://{}", vec!["h"; 65].join(","));
        assert!(RedisUrl::parse(&many).is_err());
    }

    #[test]
    fn what_is_shown_of_a_url_holds_no_password() {
        let cases = [
            ("redis://:hunter2@h", "h:6379"),
            ("rediss://:hunter2@[::1]:1", "[::1]:1"),
            ("unix:///run/redis.sock?pass=hunter2", "/run/redis.sock"),
            ("redis+sentinel://:hunter2@a,b:1/m?sentinel_pass=hunter2", "m of a:26379, b:1"),
            ("redis+cluster://:hunter2@a,b", "the Cluster of a:6379, b:6379"),
        ];
        for (url, expected) in cases {
            let parsed = RedisUrl::parse(url).unwrap();
            assert_eq!(parsed.to_string(), expected);
            assert!(!format!("{parsed:?}").contains("hunter2"), "{url}");
        }
    }
}
