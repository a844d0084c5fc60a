//! Under which names is what kept? All names of one bucket share a slot of a Cluster, by the braces.
//!
//! | name                        | type   | what                                                                        |
//! |-----------------------------|--------|-----------------------------------------------------------------------------|
//! | `<prefix>s:{<bb>}:<member>` | string | a session's record; or, for a while, byte 0 and why it ended: a tombstone   |
//! | `<prefix>u:{<bb>}:<user>`   | zset   | the index: a user's sessions, scored with their absolute ends               |
//! | `<prefix>x:{<bb>}`          | zset   | the registry: all sessions of the bucket, scored with when to look at each  |
//! | `<prefix>d:{<bb>}`          | hash   | whose they are, where events are on; and in `lost` how many events are lost |
//! | `<prefix>e:{<bb>}`          | list   | the outbox: ends of which nobody was told yet                               |
//! | `<prefix>a:{<bb>}:<member>` | list   | a session's activity trail, the latest last                                 |
//! | `<prefix>c:<counter>`       | string | a counter                                                                   |
//! | `<prefix>l:<claim>`         | string | who has a name to himself for a while: a lock, or a message seen before     |
//! | `<prefix>b:<handle>`        | zset   | sessions that somebody else can end by that name, scored with when to forget |
//! | `<prefix>lead`              | string | which instance sweeps                                                       |
//! | `<prefix>hb:{<bb>}`         |        | never there: the heartbeat's, and what no script may run without            |
//!
//! Times are Unix ms by the server's clock. Every key has a time to live: nothing of ours stays for ever.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::session::id::{SessionKey, UserKey, bucket_text};
use crate::session::store::{Named, name_hash};

pub(super) struct Keys {
    pub(super) prefix: String,
}

impl Keys {
    pub(super) fn session(&self, key: &SessionKey) -> String {
        key.to_store_key(&self.prefix)
    }

    pub(super) fn index(&self, user: &UserKey) -> String {
        user.to_store_key(&self.prefix)
    }

    pub(super) fn registry(&self, bucket: u16) -> String {
        self.in_bucket("x", bucket)
    }

    pub(super) fn users(&self, bucket: u16) -> String {
        self.in_bucket("d", bucket)
    }

    pub(super) fn outbox(&self, bucket: u16) -> String {
        self.in_bucket("e", bucket)
    }

    /// It is never there.
    pub(super) fn heartbeat(&self, bucket: u16) -> String {
        self.in_bucket("hb", bucket)
    }

    pub(super) fn trail(&self, key: &SessionKey) -> String {
        self.trails(key.bucket()) + &key.member()
    }

    /// What the names of a bucket's sessions begin with.
    pub(super) fn sessions(&self, bucket: u16) -> String {
        self.in_bucket("s", bucket) + ":"
    }

    /// What the names of a bucket's trails begin with.
    pub(super) fn trails(&self, bucket: u16) -> String {
        self.in_bucket("a", bucket) + ":"
    }

    pub(super) fn counter(&self, counter: &str) -> String {
        self.named("c", Named::Counter, counter)
    }

    pub(super) fn claim(&self, name: &str) -> String {
        self.named("l", Named::Claim, name)
    }

    pub(super) fn bindings(&self, handle: &str) -> String {
        self.named("b", Named::Handle, handle)
    }

    pub(super) fn lead(&self) -> String {
        format!("{}lead", self.prefix)
    }

    fn named(&self, kind: &str, what: Named, name: &str) -> String {
        format!("{}{kind}:{}", self.prefix, URL_SAFE_NO_PAD.encode(name_hash(what, name)))
    }

    fn in_bucket(&self, kind: &str, bucket: u16) -> String {
        format!("{}{kind}:{{{}}}", self.prefix, bucket_text(bucket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::id::SessionId;
    use crate::session::store::redis::link::key_slot;

    #[test]
    fn all_names_of_a_user_share_a_slot_and_no_two_are_alike() {
        let keys = Keys { prefix: "cloakroom:".to_owned() };
        let key = SessionId::generate("ann").unwrap().key();
        let bucket = key.bucket();
        let names = [
            keys.session(&key),
            keys.index(&UserKey::of("ann")),
            keys.registry(bucket),
            keys.users(bucket),
            keys.outbox(bucket),
            keys.heartbeat(bucket),
            keys.trail(&key),
        ];
        for (at, name) in names.iter().enumerate() {
            assert_eq!(key_slot(name.as_bytes()), key_slot(names[0].as_bytes()), "one command may name all: {name}");
            assert!(!names[..at].contains(name), "{name}");
        }
        assert_eq!(keys.sessions(bucket) + &key.member(), keys.session(&key));
    }
}
