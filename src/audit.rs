//! What must be known afterwards? Every event of the audit stream and its fields, named in this one place.
//!
//! One line each, of the target `audit`, whatever `[log] level` says; with `[log] format = "json"` one object. The message
//! is the event. A session goes by its handle, as in the access log
//! ([`SessionKey::log_hash`](crate::session::id::SessionKey::log_hash)), never by its id, and a name that is no user's does
//! not get here: some people type their password there.

use std::net::IpAddr;

use tracing::field::display;
use tracing::info;

/// Something that happened to somebody's access, or to where requests go.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Somebody tried to log in.
    Login(LoginAttempt<'a>),
    /// A login took the place of older sessions of its user, by `session.max_per_user`. The store does not say of which.
    Displaced { user: &'a str, sessions: u32 },
    /// A session ended because somebody asked for it who was entitled to.
    Logout { user: Option<&'a str>, client: Option<IpAddr>, session: &'a str, reason: LogoutReason },
    /// Sessions were ended from elsewhere: `what` is a handle, or says which.
    Revoked { by: Revoker, client: Option<IpAddr>, user: Option<&'a str>, what: &'a str, ended: u64 },
    /// The store let go of a session, for whatever reason; with `[events] audit`, by one instance for all.
    Ended { session: &'a str, user: &'a str, ending: &'a str, at: &'a str },
    /// An operator has given a split another percentage, at run time.
    SplitSet { client: Option<IpAddr>, split: &'a str, before: &'a str, after: &'a str },
    /// An operator has set something of a backend, a `key` of the file, at run time.
    BackendSet {
        client: Option<IpAddr>,
        pool: &'a str,
        backend: &'a str,
        key: &'a str,
        before: &'a str,
        after: &'a str,
    },
    /// A backend asked for what its route does not allow, or what is malformed; nothing of it was done. `directive` names
    /// the fields.
    DirectiveRefused { request_id: &'a str, route: &'a str, backend: &'a str, directive: &'a str, reason: &'a str },
}

/// A login, and what became of it.
#[derive(Clone, Copy, Debug)]
pub struct LoginAttempt<'a> {
    /// Where it is one.
    pub user: Option<&'a str>,
    pub client: Option<IpAddr>,
    /// As in `cloakroom_logins_total`.
    pub method: &'a str,
    /// Of several, by its name.
    pub provider: Option<&'a str>,
    /// `success`, or why not; as in `cloakroom_logins_total`.
    pub result: &'a str,
    /// The new one.
    pub session: Option<&'a str>,
}

/// Who wanted a session to end, and came with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogoutReason {
    /// The user, on our page.
    User,
    /// The user's OpenID provider.
    Provider,
    /// A backend, by a directive.
    Backend,
}

/// Who ended sessions from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoker {
    /// Whoever has the token of the admin API.
    Operator,
    /// The user, from another session.
    User,
    /// The user's OpenID provider, over a channel of its own.
    Provider,
}

/// One line. What is absent is left out.
pub fn tell(event: Event<'_>) {
    match event {
        Event::Login(LoginAttempt { user, client, method, provider, result, session }) => {
            let client = client.map(display);
            info!(target: "audit", user, client, method, provider, result, session, "login");
        }
        Event::Displaced { user, sessions } => {
            info!(target: "audit", user, sessions, "sessions displaced");
        }
        Event::Logout { user, client, session, reason } => {
            let (client, reason) = (client.map(display), reason.label());
            info!(target: "audit", user, client, session, reason, "logout");
        }
        Event::Revoked { by, client, user, what, ended } => {
            let (by, client) = (by.label(), client.map(display));
            info!(target: "audit", by, client, user, what, ended, "sessions revoked");
        }
        Event::Ended { session, user, ending, at } => {
            info!(target: "audit", session, user, ending, at, "session ended");
        }
        Event::SplitSet { client, split, before, after } => {
            let client = client.map(display);
            info!(target: "audit", client, split, before, after, "split set");
        }
        Event::BackendSet { client, pool, backend, key, before, after } => {
            let client = client.map(display);
            info!(target: "audit", client, pool, backend, key, before, after, "backend set");
        }
        Event::DirectiveRefused { request_id, route, backend, directive, reason } => {
            info!(target: "audit", request_id, route, backend, directive, reason, "directive refused");
        }
    }
}

impl<'a> LoginAttempt<'a> {
    /// Of nobody who is known, and without a provider.
    pub fn without_session(method: &'a str, client: impl Into<Option<IpAddr>>, result: &'a str) -> Self {
        Self { user: None, client: client.into(), method, provider: None, result, session: None }
    }
}

impl LogoutReason {
    fn label(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Provider => "provider",
            Self::Backend => "backend",
        }
    }
}

impl Revoker {
    fn label(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::User => "user",
            Self::Provider => "provider",
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;
    use std::io::Write;
    use std::sync::Once;

    use serde_json::{Value, json};

    use super::*;

    /// Hears the audit of this thread, for as long as it lives.
    ///
    /// One subscriber for the whole process stands behind it: what `tracing` remembers of who is interested holds for all
    /// threads, and would else be what some other test's thread thinks.
    pub(crate) struct Listener(());

    thread_local! {
        static HEARD: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
    }

    struct Ear;

    impl Write for Ear {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            HEARD.with_borrow_mut(|heard| heard.as_mut().map(|heard| heard.extend_from_slice(bytes)));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Listener {
        pub(crate) fn begin() -> Self {
            static SUBSCRIBED: Once = Once::new();
            SUBSCRIBED.call_once(|| {
                let log = tracing_subscriber::fmt().json().flatten_event(true).with_env_filter("off,audit=info");
                tracing::subscriber::set_global_default(log.with_writer(|| Ear).finish()).expect("nobody else listens");
            });
            HEARD.set(Some(Vec::new()));
            Self(())
        }

        /// The events so far, without their time.
        pub(crate) fn events(&self) -> Vec<Value> {
            let heard = HEARD.with_borrow(|heard| heard.clone().unwrap_or_default());
            let lines = std::str::from_utf8(&heard).unwrap().lines();
            let events = lines.map(|line| {
                let mut event: Value = serde_json::from_str(line).unwrap();
                let fields = event.as_object_mut().unwrap();
                assert_eq!(fields.remove("target"), Some(json!("audit")));
                assert!(fields.remove("timestamp").is_some() && fields.remove("level").is_some());
                event
            });
            events.collect()
        }
    }

    impl Drop for Listener {
        fn drop(&mut self) {
            HEARD.set(None);
        }
    }

    #[test]
    fn each_event_is_one_line_with_its_name_and_its_fields() {
        let listener = Listener::begin();
        let client = IpAddr::from([192, 0, 2, 7]);
        let (user, session) = (Some("ann"), "60dc1c7bf0");
        let attempt = LoginAttempt {
            session: Some(session),
            user,
            ..LoginAttempt::without_session("password", client, "success")
        };
        for event in [
            Event::Login(attempt),
            Event::Login(LoginAttempt { user: None, result: "unknown_user", session: None, ..attempt }),
            Event::Displaced { user: "ann", sessions: 2 },
            Event::Logout { user, client: Some(client), session, reason: LogoutReason::User },
            Event::Logout { user, client: None, session, reason: LogoutReason::Provider },
            Event::Revoked { by: Revoker::Operator, client: None, user: None, what: "everyone", ended: 7 },
            Event::Ended { session, user: "ann", ending: "expired", at: "2027-01-15T08:00:00Z" },
            Event::SplitSet { client: Some(client), split: "next", before: "5", after: "12.5" },
            Event::BackendSet {
                client: Some(client),
                pool: "app",
                backend: "b:1",
                key: "weight",
                before: "1",
                after: "5",
            },
            Event::DirectiveRefused {
                request_id: "4f1a",
                route: "/",
                backend: "b:1",
                directive: "session-login",
                reason: "its route does not allow it",
            },
        ] {
            tell(event);
        }
        let expected = [
            json!({ "message": "login", "user": "ann", "client": "192.0.2.7", "method": "password",
                    "result": "success", "session": session }),
            json!({ "message": "login", "client": "192.0.2.7", "method": "password", "result": "unknown_user" }),
            json!({ "message": "sessions displaced", "user": "ann", "sessions": 2 }),
            json!({ "message": "logout", "user": "ann", "client": "192.0.2.7", "session": session,
                    "reason": "user" }),
            json!({ "message": "logout", "user": "ann", "session": session, "reason": "provider" }),
            json!({ "message": "sessions revoked", "by": "operator", "what": "everyone", "ended": 7 }),
            json!({ "message": "session ended", "session": session, "user": "ann", "ending": "expired",
                    "at": "2027-01-15T08:00:00Z" }),
            json!({ "message": "split set", "client": "192.0.2.7", "split": "next", "before": "5", "after": "12.5" }),
            json!({ "message": "backend set", "client": "192.0.2.7", "pool": "app", "backend": "b:1", "key": "weight",
                    "before": "1", "after": "5" }),
            json!({ "message": "directive refused", "request_id": "4f1a", "route": "/", "backend": "b:1",
                    "directive": "session-login", "reason": "its route does not allow it" }),
        ];
        assert_eq!(listener.events(), expected);
    }
}
