//! Which route does a request take? The most specific host, and there the longest path, decide.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use http::HeaderName;
use percent_encoding::percent_decode_str;
use prometheus::{Histogram, IntCounter};
use toml::Spanned;

use crate::config::model;
use crate::config::value::Bytes;
use crate::identity::Identity;
use crate::login::oidc::Demand;

use super::split::Split;

/// What is decided about a request before its session is known.
#[derive(Clone, Debug)]
pub struct Route {
    /// Host and path as the operator wrote them, for the log and as a metric label: `example.org/app`, `/app`.
    pub name: String,
    pub access: model::Access,
    /// The user must be in one of these; empty = any user.
    pub groups: Vec<String>,
    pub pool: String,
    /// With splits: theirs, and last the one to [`Self::pool`], which takes all others.
    pub branches: Vec<Branch>,
    pub cache_guard: bool,
    pub websocket_origins: Vec<String>,
    pub body_bytes_max: u64,
    /// A request counts as use of the session.
    pub touch: bool,
    /// And for as long as it lasts.
    pub stream_touch: bool,
    /// The fallback cookie counts here while the store is down.
    pub fallback: bool,
    /// What its backends may say of the session.
    pub directives: Allowed,
    /// Attributes may begin a session.
    pub anonymous: bool,
    /// A user name and a password may come in place of a session.
    pub basic: bool,
    /// How, and how recently, the provider must have authenticated the user.
    pub demand: Demand,
    /// The field that carries the provider's access token.
    pub access_token: Option<HeaderName>,
    /// Its `cloakroom_request_seconds`, looked up once: to find it takes longer than to count.
    pub seconds: OnceLock<Histogram>,
    /// Its `cloakroom_requests_total` of what most requests are: forwarded, 200.
    pub forwarded: OnceLock<IntCounter>,
}

/// One of several pools that a route leads to.
#[derive(Clone, Debug)]
pub struct Branch {
    /// Whom it is for; none = all.
    pub split: Option<Arc<Split>>,
    pub pool: String,
    /// Its `cloakroom_split_requests_total` of 200, looked up once.
    pub succeeded: OnceLock<IntCounter>,
}

impl Branch {
    /// In metrics.
    pub fn label(&self) -> &str {
        self.split.as_ref().map_or("-", |split| split.name())
    }
}

/// Which requests of a route go to a pool, as its splits are at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Share<'r> {
    All,
    Nobody,
    /// Those of these splits; none = who is in no split.
    Of(Vec<Option<&'r str>>),
}

/// Which [`model::Directive`]s count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    pub login: bool,
    pub logout: bool,
    pub attributes: bool,
}

impl Allowed {
    /// Another one for each set of directives, 0 for none.
    pub fn number(self) -> u64 {
        u64::from(self.login) | u64::from(self.logout) << 1 | u64::from(self.attributes) << 2
    }
}

/// All routes, ready to be searched. A search costs the same for one route and for thousands.
///
/// Hosts: an exact name goes before `*.suffix`, a longer suffix before a shorter one, and each before the routes
/// without host. `*.example.org` means every name below `example.org`, at any depth, but not `example.org` itself.
/// Once a host has routes of its own, only these count: a path that none of them covers has no route (404), rather
/// than falling to a route that was written for other hosts and may be less strict.
///
/// Paths match on segment borders: `/app` covers `/app`, `/app/` and `/app/x`, not `/apple`; `/app/` is the same
/// route as `/app`, because most backends answer both alike. Paths are compared decoded, so that `/%40ann` does not
/// walk around the route `/@ann`; [`super::guard::path`] has refused before what decodes ambiguously. Case counts.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    exact: HashMap<String, Paths>,
    /// By the suffix without `*.`.
    below: HashMap<String, Paths>,
    any: Paths,
}

/// The routes of one host.
#[derive(Clone, Debug, Default)]
struct Paths {
    /// By the decoded path without a final slash; `/` is the empty one.
    routes: HashMap<Vec<u8>, Arc<Route>>,
    /// Bytes of the longest key: a request's path is looked up only as far as this.
    longest: usize,
}

impl Routes {
    /// `routes` are valid already, and `splits` has all that they name; of two for the same host and path, the first wins. `body_bytes` applies where a
    /// route has no limit of its own.
    pub fn build(routes: &[model::Route], splits: &BTreeMap<String, Arc<Split>>, body_bytes: Bytes) -> Self {
        let mut built = Self::default();
        for route in routes {
            let host = route.host.as_ref().map(|host| canonical_host(host.get_ref()).into_owned());
            let paths = match &host {
                None => &mut built.any,
                Some(host) => match host.strip_prefix("*.") {
                    None => built.exact.entry(host.clone()).or_default(),
                    Some(suffix) => built.below.entry(suffix.to_owned()).or_default(),
                },
            };
            paths.add(route.path.get_ref(), Route::new(route, host.as_deref(), splits, body_bytes));
        }
        built
    }

    /// Each once, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Route> {
        let hosts = self.exact.values().chain(self.below.values()).chain([&self.any]);
        hosts.flat_map(|paths| paths.routes.values()).map(Arc::as_ref)
    }

    /// The route for a `Host` (port and final dot do not matter, nor does case) and a path (without query).
    ///
    /// Allocates only when the host has capitals or the path has encoded characters.
    pub fn find(&self, host: &str, path: &str) -> Option<&Arc<Route>> {
        let host = canonical_host(host);
        let below = || parents(&host).find_map(|parent| self.below.get(parent));
        let paths = self.exact.get(&*host).or_else(below).unwrap_or(&self.any);
        paths.find(path)
    }

    /// The routes that lead to this pool, all or some of their users, in the order of their names.
    pub fn to_pool(&self, pool: &str) -> Vec<&Route> {
        let leads_there =
            |route: &&Route| route.pool == pool || route.branches.iter().any(|branch| branch.pool == pool);
        let mut routes: Vec<_> = self.all().filter(leads_there).collect();
        routes.sort_unstable_by_key(|route| &route.name);
        routes
    }
}

impl Route {
    /// Which of its branches takes the requests of this user; none where it has none. No allocation: this is done for
    /// every request.
    pub fn branch_for(&self, user: Option<&Identity>) -> Option<usize> {
        self.branches.iter().position(|branch| branch.split.as_ref().is_none_or(|split| split.takes(user)))
    }

    /// Who of its users goes to this pool now.
    pub fn share_of(&self, pool: &str) -> Share<'_> {
        if self.branches.is_empty() {
            return if self.pool == pool { Share::All } else { Share::Nobody };
        }
        let is_public = self.access == model::Access::Public;
        let (mut there, mut is_elsewhere_too) = (Vec::new(), false);
        for branch in &self.branches {
            let split = branch.split.as_deref();
            if split.is_some_and(|split| !split.takes_some(is_public)) {
                continue;
            }
            if branch.pool == pool {
                there.push(split.map(Split::name));
            } else {
                is_elsewhere_too = true;
            }
            if split.is_some_and(Split::takes_all) {
                break;
            }
        }
        match (there.is_empty(), is_elsewhere_too) {
            (true, _) => Share::Nobody,
            (false, false) => Share::All,
            (false, true) => Share::Of(there),
        }
    }

    fn new(route: &model::Route, host: Option<&str>, splits: &BTreeMap<String, Arc<Split>>, body_bytes: Bytes) -> Self {
        let Bytes(body_bytes_max) = route.body_bytes.unwrap_or(body_bytes);
        let demand = Demand {
            acr: route.acr.iter().map(|acr| acr.get_ref().clone()).collect(),
            max_age: route.max_age.as_ref().map(|age| age.get_ref().get()),
        };
        Self {
            name: format!("{}{}", host.unwrap_or_default(), route.path.get_ref()),
            access: *route.access.get_ref(),
            groups: route.groups.clone(),
            pool: route.pool.get_ref().clone(),
            branches: branches(route, splits),
            cache_guard: route.cache_guard,
            websocket_origins: route.websocket_origins.iter().map(|origin| origin.get_ref().clone()).collect(),
            body_bytes_max,
            touch: route.touch,
            stream_touch: route.stream_touch,
            // That cookie says who it is, and nothing of when and how they logged in.
            fallback: route.fallback && demand.is_none(),
            directives: Allowed::of(&route.directives),
            anonymous: route.anonymous,
            basic: *route.basic.get_ref(),
            demand,
            access_token: route.access_token.as_ref().and_then(|name| name.get_ref().parse().ok()),
            seconds: OnceLock::new(),
            forwarded: OnceLock::new(),
        }
    }
}

fn branches(route: &model::Route, splits: &BTreeMap<String, Arc<Split>>) -> Vec<Branch> {
    if route.splits.is_empty() {
        return Vec::new();
    }
    let branch =
        |split, pool: &Spanned<String>| Branch { split, pool: pool.get_ref().clone(), succeeded: OnceLock::new() };
    let to_split = |to: &model::RouteSplit| Some(branch(Some(Arc::clone(splits.get(to.name.get_ref())?)), &to.pool));
    route.splits.iter().filter_map(to_split).chain([branch(None, &route.pool)]).collect()
}

impl Allowed {
    fn of(directives: &[Spanned<model::Directive>]) -> Self {
        let has = |directive| directives.iter().any(|other| *other.get_ref() == directive);
        Self {
            login: has(model::Directive::Login),
            logout: has(model::Directive::Logout),
            attributes: has(model::Directive::Attributes),
        }
    }
}

impl Paths {
    fn add(&mut self, path: &str, route: Route) {
        let decoded = decoded(path);
        let key = decoded.strip_suffix(b"/").unwrap_or(&decoded);
        self.longest = self.longest.max(key.len());
        self.routes.entry(key.to_vec()).or_insert_with(|| Arc::new(route));
    }

    /// Tries the path up to each segment border, the longest first.
    fn find(&self, path: &str) -> Option<&Arc<Route>> {
        let path = decoded(path);
        let border_before = |end: usize| path[..end].iter().rposition(|&byte| byte == b'/');
        let mut border = if path.len() <= self.longest { Some(path.len()) } else { border_before(self.longest + 1) };
        while let Some(end) = border {
            if let Some(route) = self.routes.get(&path[..end]) {
                return Some(route);
            }
            border = border_before(end);
        }
        None
    }
}

fn decoded(path: &str) -> Cow<'_, [u8]> {
    percent_decode_str(path).into()
}

/// Lower case, without port and final dot.
pub fn canonical_host(host: &str) -> Cow<'_, str> {
    // Behind the bracket of an IPv6 address; byte by byte, which for so few is quicker than to search in earnest.
    let port_from = if host.starts_with('[') { host.rfind(']').unwrap_or(0) } else { 0 };
    let port = host.bytes().skip(port_from).position(|byte| byte == b':').map(|colon| port_from + colon);
    let name = &host[..port.unwrap_or(host.len())];
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) { name.to_ascii_lowercase().into() } else { name.into() }
}

/// `b.c` and `c` for `a.b.c`.
fn parents(host: &str) -> impl Iterator<Item = &str> {
    host.match_indices('.').map(|(dot, _)| &host[dot + 1..])
}

#[cfg(test)]
mod tests {
    use toml::Spanned;

    use super::*;
    use crate::config::value::Percent;

    fn route(host: Option<&str>, path: &str) -> model::Route {
        let spanned = |text: &str| Spanned::new(0..0, text.to_owned());
        model::Route {
            host: host.map(spanned),
            path: spanned(path),
            pool: spanned("app"),
            splits: Vec::new(),
            access: Spanned::new(0..0, model::Access::Required),
            groups: Vec::new(),
            cache_guard: true,
            websocket_origins: Vec::new(),
            body_bytes: None,
            touch: true,
            stream_touch: false,
            fallback: true,
            directives: Vec::new(),
            anonymous: false,
            basic: Spanned::new(0..0, false),
            acr: Vec::new(),
            max_age: None,
            access_token: None,
        }
    }

    fn table() -> Vec<model::Route> {
        vec![
            route(None, "/"),
            route(None, "/app"),
            route(None, "/app/admin/"),
            route(None, "/@ann"),
            route(None, "/caf%C3%A9"),
            route(Some("Example.org"), "/"),
            route(Some("example.org"), "/app"),
            route(Some("*.example.org"), "/"),
            route(Some("*.eu.example.org"), "/eu"),
            route(Some("api.example.org"), "/v1"),
            route(Some("[2001:db8::1]"), "/"),
        ]
    }

    #[rustfmt::skip]
    const CASES: [(&str, &str, Option<&str>); 44] = [
        // Paths, on a host without routes of its own.
        ("other.test", "/", Some("/")),
        ("other.test", "/x", Some("/")),
        ("other.test", "/app", Some("/app")),
        ("other.test", "/app/", Some("/app")),
        ("other.test", "/app/x", Some("/app")),
        ("other.test", "/app/x/y/z", Some("/app")),
        ("other.test", "/apple", Some("/")),
        ("other.test", "/app.html", Some("/")),
        ("other.test", "/ap", Some("/")),
        ("other.test", "/App", Some("/")),
        ("other.test", "/app/admin", Some("/app/admin/")),
        ("other.test", "/app/admin/", Some("/app/admin/")),
        ("other.test", "/app/admin/users", Some("/app/admin/")),
        ("other.test", "/app/administrator", Some("/app")),
        ("other.test", "/app/adm", Some("/app")),
        // Encoded characters do not walk around a route.
        ("other.test", "/@ann", Some("/@ann")),
        ("other.test", "/%40ann", Some("/@ann")),
        ("other.test", "/%40ann/x", Some("/@ann")),
        ("other.test", "/%40anna", Some("/")),
        ("other.test", "/caf%C3%A9", Some("/caf%C3%A9")),
        ("other.test", "/caf%c3%a9/menu", Some("/caf%C3%A9")),
        ("other.test", "/caf%C3%A8", Some("/")),
        // Hosts.
        ("example.org", "/", Some("example.org/")),
        ("example.org", "/app/x", Some("example.org/app")),
        ("EXAMPLE.ORG", "/app", Some("example.org/app")),
        ("Example.Org:8080", "/app", Some("example.org/app")),
        ("example.org.", "/app", Some("example.org/app")),
        ("example.org.:443", "/app", Some("example.org/app")),
        ("www.example.org", "/app", Some("*.example.org/")),
        ("WWW.example.org:80", "/", Some("*.example.org/")),
        ("a.b.example.org", "/", Some("*.example.org/")),
        ("notexample.org", "/", Some("/")),
        ("example.org.evil.test", "/", Some("/")),
        ("org", "/", Some("/")),
        // The most specific host answers alone.
        ("a.eu.example.org", "/eu", Some("*.eu.example.org/eu")),
        ("a.eu.example.org", "/app", None),
        ("eu.example.org", "/eu", Some("*.example.org/")),
        ("api.example.org", "/v1/users", Some("api.example.org/v1")),
        ("api.example.org", "/v2", None),
        ("api.example.org", "/", None),
        // Addresses.
        ("[2001:db8::1]", "/", Some("[2001:db8::1]/")),
        ("[2001:DB8::1]:8080", "/x", Some("[2001:db8::1]/")),
        ("[2001:db8::2]:8080", "/x", Some("/")),
        ("192.0.2.7:8080", "/app", Some("/app")),
    ];

    fn found<'r>(routes: &'r Routes, host: &str, path: &str) -> Option<&'r str> {
        routes.find(host, path).map(|route| route.name.as_str())
    }

    #[test]
    fn the_most_specific_host_and_then_the_longest_path_win() {
        let routes = Routes::build(&table(), &BTreeMap::new(), Bytes(1));
        for (host, path, expected) in CASES {
            assert_eq!(found(&routes, host, path), expected, "{host} {path}");
        }
    }

    #[test]
    fn a_thousand_other_routes_and_any_order_change_nothing() {
        for others in [1, 100, 1000] {
            let mut list = table();
            for number in 0..others {
                list.push(route(Some(&format!("host-{number}.test")), "/"));
                list.push(route(Some(&format!("*.zone-{number}.test")), "/app"));
                list.push(route(None, &format!("/app-{number}/deep/er")));
                list.push(route(Some("example.org"), &format!("/app/list-{number}")));
            }
            for list in [list.clone(), list.into_iter().rev().collect()] {
                let routes = Routes::build(&list, &BTreeMap::new(), Bytes(1));
                for (host, path, expected) in CASES {
                    assert_eq!(found(&routes, host, path), expected, "{host} {path} among {others} others");
                }
            }
        }
    }

    #[test]
    fn the_first_split_that_takes_a_user_counts_and_else_the_pool_of_the_route() {
        let spanned = |text: &str| Spanned::new(0..0, text.to_owned());
        let split = |name: &str, keys: &str| {
            (name.to_owned(), Arc::new(Split::new(name, &toml::from_str(keys).unwrap(), None)))
        };
        let splits = BTreeMap::from([split("staff", "groups = [\"staff\"]"), split("next", "percent = 0")]);
        let to = |name: &str, pool: &str| model::RouteSplit { name: spanned(name), pool: spanned(pool) };
        let mut route = route(None, "/app");
        route.splits = vec![to("staff", "blue"), to("next", "green")];
        let routes = Routes::build(&[route, self::route(None, "/")], &splits, Bytes(1));
        let user = |groups: &[&str]| {
            let groups = groups.iter().map(|&group| group.to_owned()).collect();
            Identity { user: "ann".into(), groups, ..Identity::default() }
        };
        let pools = |path: &str| {
            let route = routes.find("a.test", path).unwrap();
            [Some(&user(&["staff"])), Some(&user(&[])), None]
                .map(|user| route.branch_for(user).map(|branch| route.branches[branch].pool.as_str()))
        };
        assert_eq!(pools("/app"), [Some("blue"), Some("app"), Some("app")]);
        splits["next"].set(Percent::ALL);
        assert_eq!(pools("/app"), [Some("blue"), Some("green"), Some("green")], "what is set counts at once");
        assert_eq!(pools("/"), [None; 3], "a route without splits has one pool");
        assert_eq!(routes.all().count(), 2);
    }

    #[test]
    fn without_a_route_nothing_is_found() {
        let none = Routes::build(&[], &BTreeMap::new(), Bytes(1));
        assert_eq!(found(&none, "example.org", "/"), None, "no route is the default");

        let deep = Routes::build(&[route(None, "/app")], &BTreeMap::new(), Bytes(1));
        for path in ["/", "/other", "/apple", "", "app", "*"] {
            assert_eq!(found(&deep, "example.org", path), None, "{path:?} is not below /app");
        }
    }

    #[test]
    fn of_two_routes_for_the_same_the_first_wins() {
        let mut second = route(None, "/app/");
        second.access = Spanned::new(0..0, model::Access::Public);
        let routes = Routes::build(&[route(None, "/app"), second], &BTreeMap::new(), Bytes(1));
        assert_eq!(routes.find("a.test", "/app/").unwrap().access, model::Access::Required, "it was there first");
    }

    #[test]
    fn the_body_limit_of_the_route_goes_before_the_general_one() {
        let mut small = route(None, "/small");
        small.body_bytes = Some(Bytes(7));
        let routes = Routes::build(&[route(None, "/"), small], &BTreeMap::new(), Bytes(1000));
        assert_eq!(routes.find("a.test", "/").unwrap().body_bytes_max, 1000);
        assert_eq!(routes.find("a.test", "/small").unwrap().body_bytes_max, 7);
    }

    #[test]
    fn a_long_path_costs_as_many_looks_as_the_longest_route_has_segments() {
        let routes = Routes::build(&table(), &BTreeMap::new(), Bytes(1));
        let long = format!("/app{}", "/x".repeat(4000));
        assert_eq!(found(&routes, "other.test", &long), Some("/app"));
    }
}
