//! How is a webhook told? A POST of JSON, signed; only 2xx means that it has been heard.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::{Digest, Sha256};
use ureq::Agent;

use crate::config::value::Secret;
use crate::outgoing;
use crate::session::control::Timestamp;
use crate::session::store::EndEvent;

/// The receiver of session ends. Neither its URL, which may hold a secret, nor the secret is ever printed.
pub(super) struct Webhook {
    agent: Agent,
    url: String,
    secret: Option<Secret>,
}

/// What became of a POST.
#[derive(Debug)]
pub(super) enum Delivery {
    Told,
    /// It does not want this one: 3xx, which is not followed, or 4xx.
    Refused(u16),
    /// It takes none at the moment: no answer, 5xx or 429.
    Away(String),
}

/// For all of it, from the look-up of the name to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Webhook {
    pub(super) fn new(url: &str, secret: Option<Secret>) -> Self {
        Self { agent: outgoing::agent(url.starts_with("https:"), TIMEOUT), url: url.to_owned(), secret }
    }

    /// Blocks for up to [`TIMEOUT`].
    pub(super) fn post(&self, event: &EndEvent) -> Delivery {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (id, body) = (event_id(event), body(event));
        let mut request =
            self.agent.post(&self.url).header("Content-Type", "application/json").header("Cloakroom-Event-Id", &id);
        if let Some(secret) = &self.secret {
            request = request.header("Cloakroom-Signature", signature(secret.expose(), now, &body));
        }
        match request.send(&body) {
            Ok(mut response) => {
                // What it says does not matter; read, a short answer leaves the connection for the next event.
                let _ = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
                Delivery::of_status(response.status().as_u16())
            }
            Err(error) => Delivery::Away(error.to_string()),
        }
    }
}

const ANSWER_BYTES_MAX: u64 = 64 << 10;

impl Delivery {
    fn of_status(status: u16) -> Self {
        match status {
            200..=299 => Self::Told,
            429 | 500..=599 => Self::Away(format!("it answers {status}")),
            _ => Self::Refused(status),
        }
    }

    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Told => "told",
            Self::Refused(_) => "refused",
            Self::Away(_) => "away",
        }
    }
}

/// The same each time that an end is told, so that a receiver can drop what it has heard before.
fn event_id(event: &EndEvent) -> String {
    let mut hash = Sha256::new().chain_update(b"cloakroom event\0").chain_update(event.at.to_be_bytes());
    for part in [&event.session, event.ending.label(), &event.user] {
        hash.update(part);
        hash.update(b"\0");
    }
    hex(&hash.finalize()[..16])
}

fn body(event: &EndEvent) -> String {
    let EndEvent { token: _, session, user, ending, at } = event;
    let at = Timestamp(*at);
    json!({
        "event": "session.ended", "id": event_id(event), "session": session, "user": user, "ending": ending.label(),
        "at": at,
    })
    .to_string()
}

/// `t=<unix seconds>,v1=<hex of HMAC-SHA256 of "<t>.<body>">`: the time is signed, so that a receiver can refuse what
/// somebody has kept and sends again.
fn signature(secret: &str, now: u64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(format!("{now}.{body}").as_bytes());
    format!("t={now},v1={}", hex(&mac.finalize().into_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Webhook")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::store::Ending;

    fn event() -> EndEvent {
        EndEvent {
            token: b"as the store has it".to_vec(),
            session: "739e583973".into(),
            user: "ann".into(),
            ending: Ending::LoggedOut,
            at: 1_800_000_000_000,
        }
    }

    /// The value was made with `openssl dgst -sha256 -hmac`.
    #[test]
    fn a_signature_is_of_the_time_and_the_body() {
        let expected = "t=1800000000,v1=dc511593202149da4eb3a4ed569b86f027167343f63017de9d81332909482ec5";
        assert_eq!(signature("a secret of the test", 1_800_000_000, r#"{"event":"x"}"#), expected);
    }

    #[test]
    fn an_event_has_one_id_whatever_the_store_calls_it_and_each_its_own() {
        let id = event_id(&event());
        assert_eq!(event_id(&EndEvent { token: b"another".to_vec(), ..event() }), id);
        let others = [
            EndEvent { session: "739e583974".into(), ..event() },
            EndEvent { user: "bob".into(), ..event() },
            EndEvent { ending: Ending::Expired, ..event() },
            EndEvent { at: 1_800_000_000_001, ..event() },
        ];
        assert!(others.iter().all(|other| event_id(other) != id));
    }

    #[test]
    fn the_body_says_who_what_and_when_and_nothing_of_the_store() {
        let body: serde_json::Value = serde_json::from_str(&body(&event())).unwrap();
        let expected = json!({
            "event": "session.ended", "id": event_id(&event()), "session": "739e583973", "user": "ann",
            "ending": "logged_out", "at": "2027-01-15T08:00:00Z",
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn only_2xx_is_told() {
        for (status, label) in
            [(200, "told"), (204, "told"), (302, "refused"), (400, "refused"), (429, "away"), (503, "away")]
        {
            assert_eq!(Delivery::of_status(status).label(), label, "{status}");
        }
    }

    #[test]
    fn neither_the_url_nor_the_secret_prints() {
        let webhook = Webhook::new("http://127.0.0.1:1/q7Zp-Kw", Some(Secret::new("z9-secret".into())));
        let printed = format!("{webhook:?}{:?}", webhook.post(&event()));
        assert!(!printed.contains("q7Zp-Kw") && !printed.contains("z9-secret"), "{printed}");
    }
}
