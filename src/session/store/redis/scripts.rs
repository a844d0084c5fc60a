//! What happens in one step on the server? Scripts, each known to it by its hash.
//!
//! The hash is that of the text, so gateways of different versions live together, and there is nothing to install: a
//! server that does not know a script yet is sent its text, once. A script runs under the permissions of its caller.

use std::sync::LazyLock;
use std::time::Duration;

use redis::{Cmd, ToRedisArgs, Value};
use sha1::{Digest, Sha1};

use super::failure::store_error;
use super::link::{Batch, Links, Place, key_slot};
use crate::session::store::StoreError;

/// A script's text and, in hexadecimal, its hash.
pub(super) struct Script {
    text: String,
    hash: String,
}

/// A script with its keys, all of one slot, and its arguments.
pub(super) struct Call {
    script: &'static Script,
    keys: Vec<String>,
    arguments: Vec<Vec<u8>>,
}

/// Replicas that must have what a script did, and how long they may take.
#[derive(Clone, Copy)]
pub(super) struct Durably {
    pub(super) replicas: u16,
    pub(super) time: Duration,
}

pub(super) static CREATE: LazyLock<Script> = LazyLock::new(|| Script::of_bucket(IF_MEMORY, include_str!("create.lua")));
pub(super) static TOUCH: LazyLock<Script> = LazyLock::new(|| Script::of_bucket(ALWAYS, include_str!("touch.lua")));
pub(super) static UPDATE: LazyLock<Script> = LazyLock::new(|| Script::of_bucket(IF_MEMORY, include_str!("update.lua")));
pub(super) static DESTROY: LazyLock<Script> = LazyLock::new(|| Script::of_bucket(ALWAYS, include_str!("destroy.lua")));
pub(super) static DESTROY_ALL: LazyLock<Script> =
    LazyLock::new(|| Script::of_bucket(ALWAYS, include_str!("destroy_all.lua")));
pub(super) static LIST: LazyLock<Script> = LazyLock::new(|| Script::of_bucket(ALWAYS, include_str!("list.lua")));
pub(super) static SWEEP: LazyLock<Script> = LazyLock::new(|| Script::of_bucket(ALWAYS, include_str!("sweep.lua")));
pub(super) static ADD_ACTIVITY: LazyLock<Script> =
    LazyLock::new(|| Script::of_bucket(IF_MEMORY, include_str!("add_activity.lua")));
pub(super) static LEAD: LazyLock<Script> = LazyLock::new(|| Script::new(&[ALWAYS, include_str!("lead.lua")]));
pub(super) static RELEASE: LazyLock<Script> = LazyLock::new(|| Script::new(&[ALWAYS, include_str!("release.lua")]));
pub(super) static BIND: LazyLock<Script> = LazyLock::new(|| Script::new(&[IF_MEMORY, include_str!("bind.lua")]));
pub(super) static INCREMENT: LazyLock<Script> =
    LazyLock::new(|| Script::new(&[IF_MEMORY, include_str!("increment.lua")]));
pub(super) static DECREMENT: LazyLock<Script> = LazyLock::new(|| Script::new(&[ALWAYS, include_str!("decrement.lua")]));

/// First lines: a script that begins so runs always, or is refused when memory is short, before it changes anything.
const ALWAYS: &str = "#!lua flags=allow-oom\n";
const IF_MEMORY: &str = "#!lua\n";

/// Scripts count in doubles, which are exact up to here; as Unix time in ms it is the year 287396.
const NUMBER_MAX: u64 = (1 << 53) - 1;

impl Script {
    fn of_bucket(first_line: &str, body: &str) -> Self {
        Self::new(&[first_line, include_str!("bucket.lua"), body])
    }

    fn new(parts: &[&str]) -> Self {
        let text = parts.concat();
        let hash = Sha1::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { text, hash }
    }

    pub(super) fn on(&'static self, keys: Vec<String>) -> Call {
        Call { script: self, keys, arguments: Vec::new() }
    }
}

impl Call {
    pub(super) fn with(mut self, argument: impl AsRef<[u8]>) -> Self {
        self.arguments.push(argument.as_ref().to_vec());
        self
    }

    pub(super) fn with_number(self, number: u64) -> Self {
        self.with(number.min(NUMBER_MAX).to_string())
    }

    /// What the script replied; all of ours reply an array. With `durably`, so many replicas have it by then.
    pub(super) async fn run(&self, links: &Links, durably: Option<Durably>) -> Result<Vec<Value>, StoreError> {
        let known = self.command("EVALSHA", &self.script.hash);
        let reply = match self.ask(links, known, durably).await? {
            Value::ServerError(error) if error.code() == "NOSCRIPT" => {
                self.ask(links, self.command("EVAL", &self.script.text), durably).await?
            }
            reply => reply,
        };
        match reply {
            Value::Array(values) => Ok(values),
            Value::ServerError(error) => Err(store_error(&error.into())),
            _ => Err(links.senseless(self.place())),
        }
    }

    async fn ask(&self, links: &Links, command: Cmd, durably: Option<Durably>) -> Result<Value, StoreError> {
        let batch = Batch { place: self.place(), commands: vec![command] };
        let mut replies = match durably {
            None => links.ask(batch).await?,
            Some(Durably { replicas, time }) => links.ask_durably(batch, replicas, time).await?,
        };
        replies.pop().ok_or_else(|| links.senseless(self.place()))
    }

    fn command(&self, name: &str, script: impl ToRedisArgs) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(script).arg(self.keys.len()).arg(&self.keys);
        for argument in &self.arguments {
            command.arg(argument.as_slice());
        }
        command
    }

    pub(super) fn place(&self) -> Place {
        self.keys.first().map_or(Place::Anywhere, |key| Place::Slot(key_slot(key.as_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_says_first_how_it_behaves_when_memory_is_short() {
        let scripts: [(&Script, bool); 13] = [
            (&CREATE, false),
            (&TOUCH, true),
            (&UPDATE, false),
            (&DESTROY, true),
            (&DESTROY_ALL, true),
            (&LIST, true),
            (&SWEEP, true),
            (&ADD_ACTIVITY, false),
            (&LEAD, true),
            (&RELEASE, true),
            (&BIND, false),
            (&INCREMENT, false),
            (&DECREMENT, true),
        ];
        for (script, always) in scripts {
            let first = script.text.lines().next().unwrap();
            assert_eq!(first, if always { "#!lua flags=allow-oom" } else { "#!lua" });
            assert_eq!(script.hash.len(), 40, "SHA-1 in hexadecimal");
        }
    }

    #[test]
    fn a_number_is_one_that_a_script_can_count_with() {
        let call = LEAD.on(vec!["lead".to_owned()]).with_number(u64::MAX).with_number(7);
        assert_eq!(call.arguments, [b"9007199254740991".to_vec(), b"7".to_vec()]);
    }
}
