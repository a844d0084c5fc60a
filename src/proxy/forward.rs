//! What leaves for the backend, and what comes back from it: look-alikes and our cookies out, hop-by-hop out,
//! forwarding and identity headers in.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue, Request, header, request};
use pingora::http::{RequestHeader, ResponseHeader};

use crate::identity;
use crate::identity::headers::Facts;
use crate::session::cookie::{ReservedCookies, Stripped};
use crate::session::unix_now;

use super::context::RequestContext;
use super::directives::SESSION_ATTRIBUTES;
use super::trace;

/// In `Via` (RFC 9110, section 7.6.3).
const PSEUDONYM: &str = "1.1 cloakroom";

/// About as many fields as [`request()`] adds: room for them is made once.
const FIELDS_ADDED: usize = 10;

/// Fields that concern one connection only (RFC 9110, section 7.6.1). `Connection`, `Transfer-Encoding` and
/// `Upgrade` are pingora's to write.
static HOP_BY_HOP: [HeaderName; 5] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::TE,
    header::TRAILER,
];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Leaves the names of a request in lower case (a few that old software may look for: in their usual one). Case means
/// nothing (RFC 9110, section 5.1), and pingora keeps it in a second map, which doubles the work with every field.
pub fn forget_case(request: &mut RequestHeader) {
    *request = RequestHeader::from(take(request));
}

fn take(request: &mut RequestHeader) -> request::Parts {
    let nothing = RequestHeader::from(Request::new(()).into_parts().0);
    std::mem::replace(request, nothing).into()
}

/// The client takes trailers (RFC 9110, section 10.1.4), and where both sides speak HTTP/2 it gets them: gRPC insists on
/// being asked. Pingora removes the field.
pub fn ask_for_trailers(upstream: &mut RequestHeader, client: &RequestHeader) -> pingora::Result<()> {
    let is_http2 = |request: &RequestHeader| request.version == http::Version::HTTP_2;
    if is_http2(upstream) && is_http2(client) && client.headers.contains_key(header::TE) {
        upstream.insert_header(header::TE, HeaderValue::from_static("trailers"))?;
    }
    Ok(())
}

/// Fields after the response are for what its end has shown (gRPC: the status). What decides about anything belongs in
/// its head, where it was looked at.
pub fn trailers(trailers: &mut HeaderMap) {
    let is_late = |name: &HeaderName| *name == header::SET_COOKIE || super::directives::is_directive(name);
    let late: Vec<_> = trailers.keys().filter(|name| is_late(name)).cloned().collect();
    for name in late {
        trailers.remove(name);
    }
}

/// Makes the request that a backend sees of the one that the client sent. Called once per attempt, always with the
/// client's own fields: nothing of an earlier attempt is left.
pub fn request(upstream: &mut RequestHeader, context: &RequestContext, cookies: &ReservedCookies) {
    let mut parts = take(upstream);
    fields(&mut parts.headers, context, cookies);
    *upstream = RequestHeader::from(parts);
}

fn fields(headers: &mut HeaderMap, context: &RequestContext, cookies: &ReservedCookies) {
    let rules = &context.rules;
    let forwarded_for = if context.trusted_peer { readable_hops(headers) } else { String::new() };
    let forwarded_host = context.trusted_peer.then(|| headers.get(X_FORWARDED_HOST).cloned()).flatten();
    let forwarded_proto = context.trusted_peer.then(|| headers.get(X_FORWARDED_PROTO).cloned()).flatten();

    // Remove, then insert, on every way: an anonymous request loses its look-alikes like any other (invariant 1).
    let (mut aliens, mut is_traced) = (Vec::new(), false);
    for name in headers.keys() {
        is_traced |= trace::is_of_a_trace(name);
        if rules.identity.is_reserved(name.as_str())
            || identity::headers::is_forwarding(name.as_str())
            || *name == header::PROXY_AUTHORIZATION
        {
            aliens.push(name.clone());
        }
    }
    for name in aliens {
        headers.remove(&name);
    }

    match cookies.strip(headers) {
        Stripped::Unchanged => {}
        Stripped::Removed => {
            headers.remove(header::COOKIE);
        }
        Stripped::Replaced(value) => {
            headers.insert(header::COOKIE, value);
        }
    }

    if context.continued {
        headers.remove(header::EXPECT);
    }
    if context.keeps_authorization {
        headers.remove(header::AUTHORIZATION);
    }

    if let Some(name) = context.route.as_ref().and_then(|route| route.access_token.as_ref()) {
        headers.remove(name);
        if let Some(token) = &context.access_token {
            headers.insert(name, token.clone());
        }
    }

    match &context.trace {
        Some(trace) => trace.pass_on(headers),
        None if is_traced => trace::drop_invalid(headers),
        None => {}
    }

    headers.reserve(FIELDS_ADDED);
    if let Some(connection) = &context.connection {
        let peer = &connection.forwarded_for;
        let hops = match forwarded_for.as_str() {
            "" => None,
            hops => HeaderValue::try_from(format!("{hops}, {}", peer.to_str().unwrap_or_default())).ok(),
        };
        headers.insert(X_FORWARDED_FOR, hops.unwrap_or_else(|| peer.clone()));
        let scheme = || HeaderValue::from_static(connection.listener.scheme);
        headers.insert(X_FORWARDED_PROTO, forwarded_proto.unwrap_or_else(scheme));
    }
    if let Some(host) = forwarded_host.or_else(|| headers.get(header::HOST).cloned()) {
        headers.insert(X_FORWARDED_HOST, host);
    }
    headers.insert(X_REQUEST_ID, context.request_id.value());
    headers.append(header::VIA, HeaderValue::from_static(PSEUDONYM));

    let session = context.told_session().filter(|session| !session.record.attributes.is_empty());
    let certificate = context.connection.as_ref().and_then(|connection| connection.certificate.as_ref());
    if session.is_some() || certificate.is_some() {
        let attributes = session.into_iter().flat_map(|session| session.record.attributes_at(unix_now()));
        let attributes: BTreeMap<_, _> = attributes.map(|(name, held)| (name, held.value.as_str())).collect();
        if context.route.as_ref().is_some_and(|route| route.directives.attributes)
            && let Some(value) = identity::attributes::field(&attributes)
        {
            headers.insert(SESSION_ATTRIBUTES, value);
        }
        let identity = context.identity.as_ref().map(|known| &***known);
        let facts = Facts { identity, attributes: Some(&attributes), certificate };
        for (name, value) in rules.identity.render_request(&facts) {
            headers.insert(name, value);
        }
    }
    if let Some(identity) = &context.identity {
        for (name, value) in identity.lines(&rules.identity).iter(&rules.identity) {
            headers.insert(name, value);
        }
    }
}

/// What a trusted proxy says of the hops. A field that cannot be read ends it: nothing before it is believed.
fn readable_hops(headers: &HeaderMap) -> String {
    let fields = headers.get_all(X_FORWARDED_FOR).iter();
    let mut readable: Vec<_> = fields.rev().map_while(|value| value.to_str().ok()).collect();
    readable.reverse();
    readable.join(", ")
}

/// Which fields a response has that something may have to be done about. One look at each of its names costs less than a
/// search for every field that it could have.
#[derive(Debug, Default)]
pub struct Notable {
    codings: bool,
    lengths: bool,
    one_hop: bool,
    cookies: bool,
    request_id: bool,
    pub directives: bool,
}

impl Notable {
    pub fn of(headers: &HeaderMap) -> Self {
        let mut seen = Self::default();
        for name in headers.keys() {
            match name.as_str() {
                "transfer-encoding" => seen.codings = true,
                "content-length" => seen.lengths = true,
                "set-cookie" => seen.cookies = true,
                "x-request-id" => seen.request_id = true,
                "connection" | "upgrade" => seen.one_hop = true,
                _ if HOP_BY_HOP.contains(name) => seen.one_hop = true,
                _ => seen.directives |= super::directives::is_directive(name),
            }
        }
        seen
    }
}

/// What makes a response one that another reader could end elsewhere, or that nobody asked for. Pingora passes these on.
pub fn problem(response: &ResponseHeader, notable: &Notable, is_upgrade: bool) -> Option<&'static str> {
    let headers = &response.headers;
    let is_chunked = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"chunked");
    let codings = || headers.get_all(header::TRANSFER_ENCODING).iter();
    if notable.codings && codings().count() != codings().filter(|value| is_chunked(value)).take(1).count() {
        return Some("the backend sent a transfer coding other than chunked");
    }
    let is_number = |value: &HeaderValue| !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_digit);
    let lengths = || headers.get_all(header::CONTENT_LENGTH).iter();
    if notable.lengths && lengths().count() != lengths().filter(|value| is_number(value)).take(1).count() {
        return Some("the backend sent a content length that is not one number");
    }
    if response.status == http::StatusCode::SWITCHING_PROTOCOLS && !is_upgrade {
        return Some("the backend switched protocols unasked");
    }
    None
}

/// Makes the response that the client sees of the one that a backend sent.
pub fn response(
    response: &mut ResponseHeader,
    notable: &Notable,
    context: &RequestContext,
    cookies: &ReservedCookies,
) -> pingora::Result<()> {
    if notable.one_hop {
        remove_hop_by_hop(response);
    }

    // A backend that sets a cookie under our name could log somebody in or out.
    if notable.cookies
        && response.headers.get_all(header::SET_COOKIE).iter().any(|line| cookies.is_set_by(line.as_bytes()))
    {
        let others = response.headers.get_all(header::SET_COOKIE).iter();
        let others: Vec<_> = others.filter(|line| !cookies.is_set_by(line.as_bytes())).cloned().collect();
        response.remove_header(&header::SET_COOKIE);
        for line in others {
            response.append_header(header::SET_COOKIE, line)?;
        }
    }

    let is_personal = context.identity.is_some() || context.told_session().is_some();
    let guards = is_personal && context.route.as_ref().is_some_and(|route| route.cache_guard);
    let says_nothing = || {
        let headers = &response.headers;
        let says = |name| headers.get_all(name).iter().any(|value| !value.as_bytes().trim_ascii().is_empty());
        ![header::CACHE_CONTROL, header::EXPIRES].into_iter().any(says)
    };
    let hands_out_a_cookie = context.fallback_cookie.is_some();
    if (guards || hands_out_a_cookie) && says_nothing() {
        response.insert_header(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"))?;
    }
    if let Some(cookie) = &context.fallback_cookie
        && is_for_one_user(response)
    {
        response.append_header(header::SET_COOKIE, cookie.clone())?;
    }
    if let Some(hsts) = context.hsts() {
        response.insert_header(header::STRICT_TRANSPORT_SECURITY, hsts)?;
    }
    // What was there may have been nominated, or taken out with what it told of a login.
    if !notable.request_id || !response.headers.contains_key(X_REQUEST_ID) {
        response.insert_header("X-Request-Id", context.request_id.value())?;
    }
    Ok(())
}

/// Whether no cache on the way may give this very response to somebody else, with a cookie that it sets (RFC 9111,
/// sections 5.2.2.5 and 5.2.2.7). A cookie that does not fit here goes with a later response.
fn is_for_one_user(response: &ResponseHeader) -> bool {
    let fields = response.headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut directives = fields.flat_map(|field| field.split(',')).map(str::trim);
    // `private="field"` hides a field and not the response.
    let has_a_body_of_its_own =
        ![http::StatusCode::NOT_MODIFIED, http::StatusCode::SWITCHING_PROTOCOLS].contains(&response.status);
    has_a_body_of_its_own
        && directives.any(|directive| ["private", "no-store"].iter().any(|name| directive.eq_ignore_ascii_case(name)))
}

/// Pingora leaves these in an HTTP/1 response, and what `Connection` nominates with them.
fn remove_hop_by_hop(response: &mut ResponseHeader) {
    let headers = &response.headers;
    let is_switch = response.status == http::StatusCode::SWITCHING_PROTOCOLS;
    let mut of_one_hop = Vec::new();
    for name in headers.keys() {
        if *name == header::CONNECTION {
            of_one_hop.extend(nominated(headers));
        } else if HOP_BY_HOP.contains(name) || (*name == header::UPGRADE && !is_switch) {
            of_one_hop.push(name.clone());
        }
    }
    for name in of_one_hop {
        response.remove_header(&name);
    }
}

/// What the response has of the fields that its `Connection` names.
fn nominated(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(',')).filter_map(|token| token.trim().parse().ok());
    names.filter(|name| {
        ![header::CONNECTION, header::UPGRADE, header::TRANSFER_ENCODING, header::CONTENT_LENGTH].contains(name)
            && headers.contains_key(name)
    })
}
