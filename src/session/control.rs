//! What can an operator do, and a user with their own? See, count and end sessions, named by handles that are good for
//! nothing else.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::JoinSet;

use super::Sessions;
use super::record::LoginMethod;
use super::store::{Activity, Listed, StoreError, Stored};

/// What an operator may ask. Nothing that it gives holds an id, or a key under which a store has a session.
#[derive(Clone, Debug)]
pub struct Control {
    sessions: Sessions,
}

/// Names a session to people: [`super::id::SessionKey::log_hash`], as the access log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handle(String);

/// A session as people may see it. The names of the fields are a contract, in the API and with `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// Its handle.
    pub session: String,
    pub user: String,
    pub method: &'static str,
    pub created: Timestamp,
    /// The absolute end.
    pub ends: Timestamp,
    /// Until it ends if nobody uses it.
    pub idle_left_seconds: u64,
    /// The last use, as exactly as uses are written down (a tenth of the idle time, a minute at most); of a session near
    /// its absolute end, the earliest time that it can have been.
    pub last_seen: Timestamp,
    /// Of the client that logged in.
    pub address: Option<IpAddr>,
    pub user_agent: String,
}

/// All of one session that people may see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Details {
    #[serde(flatten)]
    pub session: Shown,
    /// As it was at the login.
    pub name: Option<String>,
    pub email: Option<String>,
    pub groups: Vec<String>,
    /// The latest first; empty without `session.activity`.
    pub activity: Vec<Seen>,
}

/// One use of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    pub at: Timestamp,
    pub address: IpAddr,
    pub route: String,
}

/// Some of all sessions: those of a few parts of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Page {
    pub sessions: Vec<Shown>,
    /// Where the next page begins; none after the last.
    pub next: Option<u16>,
}

/// Unix time in ms; as text RFC 3339, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

/// Ending everybody's sessions broke off: so many had ended by then.
#[derive(Debug)]
pub struct Interrupted {
    pub ended: u64,
    pub cause: StoreError,
}

/// So many parts are asked for at a time: enough that the way to the store and back costs nothing.
const PARTS_AT_ONCE: u16 = 64;

/// A page is full with so many sessions; the parts that are under way may make it longer.
const PAGE_SESSIONS: usize = 200;

impl Control {
    pub fn new(sessions: Sessions) -> Self {
        Self { sessions }
    }

    /// The sessions of a user, the oldest first.
    pub async fn of_user(&self, user: &str) -> Result<Vec<Shown>, StoreError> {
        Ok(self.sessions.list(user).await?.iter().map(|listed| self.shown(listed)).collect())
    }

    /// Sessions of everybody, from this part on.
    pub async fn page(&self, from: u16) -> Result<Page, StoreError> {
        let parts = self.sessions.store().parts();
        let (mut sessions, mut next) = (Vec::new(), from);
        while next < parts && sessions.len() < PAGE_SESSIONS {
            let end = parts.min(next.saturating_add(PARTS_AT_ONCE));
            let mut under_way = JoinSet::new();
            for part in next..end {
                let store = Arc::clone(self.sessions.store());
                under_way.spawn(async move { (part, store.list_part(part).await) });
            }
            let mut listed = under_way.join_all().await;
            listed.sort_by_key(|(part, _)| *part);
            for (_, part) in listed {
                sessions.extend(part?.iter().map(|listed| self.shown(listed)));
            }
            next = end;
        }
        Ok(Page { sessions, next: (next < parts).then_some(next) })
    }

    /// The session of a user with this handle.
    pub async fn details(&self, user: &str, handle: &Handle) -> Result<Option<Details>, StoreError> {
        let Some(listed) = self.find(user, handle).await? else { return Ok(None) };
        let activity = self.sessions.activity(&listed.key).await?;
        let identity = &listed.stored.record.identity;
        Ok(Some(Details {
            session: self.shown(&listed),
            name: identity.name.clone(),
            email: identity.email.clone(),
            groups: identity.groups.clone(),
            activity: activity.into_iter().map(Seen::from).collect(),
        }))
    }

    /// How many sessions there are, of a user or in all. In all, those that expired within the last minute may be
    /// among them.
    pub async fn count(&self, user: Option<&str>) -> Result<u64, StoreError> {
        match user {
            Some(user) => Ok(self.sessions.list(user).await?.len() as u64),
            None => self.sessions.store().total().await,
        }
    }

    /// Ends one session of a user; whether there was one.
    pub async fn end(&self, user: &str, handle: &Handle) -> Result<bool, StoreError> {
        let Some(listed) = self.find(user, handle).await? else { return Ok(false) };
        self.sessions.revoke(&listed.key, Some(user)).await
    }

    /// Ends all sessions of a user, but for the excepted one; how many. None when the excepted one is not there: then
    /// nothing has ended.
    pub async fn end_all_of(&self, user: &str, except: Option<&Handle>) -> Result<Option<u64>, StoreError> {
        let excepted = match except {
            None => None,
            Some(handle) => match self.find(user, handle).await? {
                Some(listed) => Some(listed.key),
                None => return Ok(None),
            },
        };
        self.sessions.revoke_all(user, excepted.as_ref()).await.map(Some)
    }

    /// Ends all sessions of everybody; how many.
    ///
    /// # Errors
    /// When the store fails on the way: those that had ended stay ended.
    pub async fn end_everyone(&self) -> Result<u64, Interrupted> {
        let (mut ended, parts) = (0, self.sessions.store().parts());
        for begin in (0..parts).step_by(usize::from(PARTS_AT_ONCE)) {
            let mut under_way = JoinSet::new();
            for part in begin..parts.min(begin.saturating_add(PARTS_AT_ONCE)) {
                let sessions = self.sessions.clone();
                under_way.spawn(async move { sessions.revoke_part(part).await });
            }
            let mut failed = None;
            for part in under_way.join_all().await {
                match part {
                    Ok(sessions) => ended += sessions,
                    Err(cause) => failed = Some(cause),
                }
            }
            if let Some(cause) = failed {
                return Err(Interrupted { ended, cause });
            }
        }
        Ok(ended)
    }

    fn shown(&self, listed: &Listed) -> Shown {
        let Listed { key, stored: Stored { record, time_to_live } } = listed;
        // A use gives a session the idle time to live, or what is left to its absolute end.
        let unused = self.sessions.lifetime.idle.saturating_sub(*time_to_live).as_millis();
        let last_seen = Timestamp::now().0.saturating_sub(u64::try_from(unused).unwrap_or(u64::MAX));
        Shown {
            session: key.log_hash(),
            user: record.identity.user.clone(),
            method: match record.method {
                LoginMethod::Password => "password",
                LoginMethod::Oidc => "oidc",
                LoginMethod::Backend => "backend",
                LoginMethod::Anonymous => "anonymous",
            },
            created: Timestamp(record.created),
            ends: Timestamp(record.ends),
            idle_left_seconds: time_to_live.as_secs(),
            last_seen: Timestamp(last_seen.max(record.created)),
            address: record.client.address,
            user_agent: record.client.user_agent.clone(),
        }
    }

    async fn find(&self, user: &str, handle: &Handle) -> Result<Option<Listed>, StoreError> {
        let listed = self.sessions.list(user).await?;
        Ok(listed.into_iter().find(|listed| listed.key.log_hash() == handle.0))
    }
}

impl Handle {
    /// Ten hexadecimal digits, in lower case as they are written, or nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (text.len() == HANDLE_CHARS && text.bytes().all(is_digit)).then(|| Self(text.to_owned()))
    }
}

const HANDLE_CHARS: usize = 10;

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Activity> for Seen {
    fn from(activity: Activity) -> Self {
        Self { at: Timestamp(activity.at), address: activity.address, route: activity.route }
    }
}

impl Timestamp {
    pub fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(self.0 / 1000).unwrap_or(i64::MAX);
        let text = OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok());
        f.write_str(text.as_deref().unwrap_or("-"))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let moment = OffsetDateTime::parse(&text, &Rfc3339).map_err(de::Error::custom)?;
        Ok(Self(u64::try_from(moment.unix_timestamp()).map_err(de::Error::custom)?.saturating_mul(1000)))
    }
}

/// As people say so many seconds: `90 s`, `12 min`.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, after {} sessions had been ended", self.cause, self.ended)
    }
}

impl std::error::Error for Interrupted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_ten_digits_and_nothing_else() {
        assert_eq!(Handle::parse("739e583973").unwrap().to_string(), "739e583973");
        for text in ["", "739e58397", "739e5839733", "739E583973", "739e58397g", "739e58397\u{e9}", " 739e58397"] {
            assert!(Handle::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn a_moment_is_told_in_utc() {
        assert_eq!(Timestamp(1_800_000_000_999).to_string(), "2027-01-15T08:00:00Z");
        assert_eq!(Timestamp(u64::MAX).to_string(), "-", "no time is no reason to panic");
        let told = serde_json::json!("2027-01-15T08:00:00Z");
        assert_eq!(serde_json::from_value::<Timestamp>(told).unwrap(), Timestamp(1_800_000_000_000));
    }
}
