//! Is there a person before this request? A page is sent on to the login; a program learns the truth from a status.

use bytes::Bytes;
use http::header::ACCEPT;
use http::{HeaderMap, Method, Response, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::Login;
use super::pages::redirect;
use super::return_to::ReturnTo;

impl Login {
    /// Whether a request without a session is a page navigation, to be answered by [`Self::login_redirect`]; anything
    /// else gets 401. The first rule that applies decides:
    ///
    /// 1. Not GET or HEAD: no. The body of a form would be lost on the way.
    /// 2. `Sec-Fetch-Mode` is sent: yes when it is `navigate`. The browser knows best.
    /// 3. `Sec-Fetch-Dest` is sent: yes when it is `document`.
    /// 4. `Sec-Fetch-Site`, `Sec-Fetch-User` or `X-Requested-With` is sent: no.
    /// 5. `Accept` names `text/html`: yes. `*/*` is no such name: it is what programs send.
    pub fn wants_page(method: &Method, headers: &HeaderMap) -> bool {
        if method != Method::GET && method != Method::HEAD {
            return false;
        }
        if let Some(mode) = headers.get("sec-fetch-mode") {
            return mode == "navigate";
        }
        if let Some(destination) = headers.get("sec-fetch-dest") {
            return destination == "document";
        }
        if ["sec-fetch-site", "sec-fetch-user", "x-requested-with"].iter().any(|name| headers.contains_key(*name)) {
            return false;
        }
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|field| field.to_str().ok());
        let mut ranges = accepted.flat_map(|field| field.split(','));
        ranges.any(|range| range.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html")))
    }

    /// Sends a page navigation to the login page, which leads back to `path_and_query` when that is safe to follow.
    pub fn login_redirect(&self, path_and_query: &str) -> Response<Bytes> {
        let login = format!("{}login", self.prefix);
        let location = match self.own_page(path_and_query) {
            Some(target) => {
                format!("{login}?return_to={}", utf8_percent_encode(&target.to_string(), NON_ALPHANUMERIC))
            }
            None => login,
        };
        redirect(StatusCode::FOUND, &location)
    }

    /// A target of this origin that is not one of our own endpoints: a login that led to the login would go in circles.
    pub(super) fn own_page(&self, text: &str) -> Option<ReturnTo> {
        ReturnTo::parse(text).filter(|target| !self.owns(target.path()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_told_from_a_program() {
        const BROWSER: (&str, &str) = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
        type Fields = &'static [(&'static str, &'static str)];
        let cases: &[(Method, Fields, bool)] = &[
            (Method::GET, &[("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"), BROWSER], true),
            (Method::GET, &[("sec-fetch-mode", "navigate")], true),
            (Method::GET, &[("sec-fetch-dest", "document")], true),
            (Method::HEAD, &[("sec-fetch-mode", "navigate")], true),
            (Method::POST, &[("sec-fetch-mode", "navigate"), BROWSER], false),
            (Method::PUT, &[BROWSER], false),
            (Method::OPTIONS, &[BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "cors"), BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")], false),
            (Method::GET, &[("sec-fetch-mode", "same-origin"), BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "websocket"), BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "cors"), ("sec-fetch-dest", "document")], false),
            (Method::GET, &[("sec-fetch-dest", "empty"), BROWSER], false),
            (Method::GET, &[("sec-fetch-dest", "script")], false),
            (Method::GET, &[("sec-fetch-site", "same-origin"), BROWSER], false),
            (Method::GET, &[("sec-fetch-user", "?1"), BROWSER], false),
            (Method::GET, &[("x-requested-with", "XMLHttpRequest"), BROWSER], false),
            (Method::GET, &[BROWSER], true),
            (Method::GET, &[("accept", "TEXT/HTML")], true),
            (Method::GET, &[("accept", "application/json"), ("accept", "text/html;q=0.1")], true),
            (Method::GET, &[("accept", "application/json")], false),
            (Method::GET, &[("accept", "application/json, text/htmlx")], false),
            (Method::GET, &[("accept", "text/event-stream")], false),
            (Method::GET, &[("accept", "*/*")], false),
            (Method::GET, &[("accept", "text/*")], false),
            (Method::GET, &[], false),
        ];
        for (method, fields, expected) in cases {
            let mut headers = HeaderMap::new();
            for (name, value) in *fields {
                headers.append(*name, value.parse().unwrap());
            }
            assert_eq!(Login::wants_page(method, &headers), *expected, "{method} {fields:?}");
        }
    }
}
