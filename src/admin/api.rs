//! How is an API asked whose places can be looked at, and some of them set? One order of questions: the token, the place, the method,
//! the query, and only then the body.

use http::Method;
use http::request::Parts;
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;

use super::problem::Problem;
use super::query::Query;
use super::token::Token;

/// What a path names.
pub(super) trait Place: Sized {
    /// The path of all of them; each is this or below it.
    const ROOT: &'static str;
    /// What a PATCH says.
    type Wanted: Wanted;

    /// By the segments below [`Self::ROOT`], decoded.
    fn of(segments: &[&str]) -> Option<Self>;

    /// Whether it has PATCH.
    fn can_be_set(&self) -> bool;
}

/// The body of a PATCH: an object of JSON.
pub(super) trait Wanted: DeserializeOwned {
    /// What stands there, for who has sent something else.
    const EXPECTED: &'static str;

    /// What the types leave open; the text says what is wrong.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

/// What somebody with the token wants to see, and to be otherwise before.
#[derive(Debug)]
pub(super) struct Asked<P: Place> {
    pub(super) place: P,
    pub(super) wanted: Option<P::Wanted>,
}

/// Whether a path is one of `P`'s.
pub(super) fn has<P: Place>(path: &str) -> bool {
    path.strip_prefix(P::ROOT).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl<P: Place> Asked<P> {
    /// `body` is read only where it means something.
    pub(super) async fn of(
        request: &Parts,
        token: &Token,
        body: impl Future<Output = Result<Vec<u8>, Problem>> + Send,
    ) -> Result<Self, Problem> {
        if !token.is_shown_by(request) {
            return Err(Problem::NoToken);
        }
        let place = place::<P>(request.uri.path()).ok_or(Problem::NoSuchPlace)?;
        let sets = match (&request.method, place.can_be_set()) {
            (&Method::GET | &Method::HEAD, _) => false,
            (&Method::PATCH, true) => true,
            (_, true) => return Err(Problem::Method { allowed: "GET, HEAD, PATCH" }),
            (_, false) => return Err(Problem::Method { allowed: "GET, HEAD" }),
        };
        Query::parse(request.uri.query(), &[])?;
        let wanted = if sets { Some(parsed(&body.await?)?) } else { None };
        Ok(Self { place, wanted })
    }
}

fn place<P: Place>(path: &str) -> Option<P> {
    let rest = path.strip_prefix(P::ROOT)?;
    if rest.is_empty() {
        return P::of(&[]);
    }
    let segments = rest.strip_prefix('/')?.split('/');
    let decoded: Option<Vec<_>> = segments.map(|text| percent_decode_str(text).decode_utf8().ok()).collect();
    P::of(&decoded?.iter().map(AsRef::as_ref).collect::<Vec<_>>())
}

fn parsed<W: Wanted>(body: &[u8]) -> Result<W, Problem> {
    // An array would pass for an object.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::Body(format!("expected {}", W::EXPECTED)));
    }
    let wanted: W =
        serde_json::from_slice(body).map_err(|error| Problem::Body(format!("{error}: expected {}", W::EXPECTED)))?;
    wanted.check().map_err(Problem::Body)?;
    Ok(wanted)
}
