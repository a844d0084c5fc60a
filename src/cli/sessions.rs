//! `cloakroom sessions`: who is logged in, and who no longer; from the configuration file, against its store.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, Args, Subcommand};
use serde_json::json;

use super::{FAILED, Terminal, plain};
use crate::config::model::Config;
use crate::session::control::{Control, Details, Handle, Interrupted, Shown, Timestamp, span};
use crate::session::store::StoreError;
use crate::{config, server};

/// What one can ask of the sessions. Sessions go by the names that the access log has for them.
#[derive(Debug, Args)]
pub struct Arguments {
    #[arg(long, short, global = true, value_name = "FILE", default_value = "/etc/cloakroom/cloakroom.toml")]
    config: PathBuf,
    /// One JSON document in place of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The sessions of everybody, or of one user.
    List {
        #[arg(long, value_name = "USER")]
        user: Option<String>,
    },
    /// All that there is to see of one session, with its activity trail.
    Show {
        #[arg(long, value_name = "USER")]
        user: String,
        #[arg(value_name = "SESSION", value_parser = handle)]
        session: Handle,
    },
    /// End one session, all of a user, all but one, or everybody's.
    Revoke(Revoke),
    /// How many sessions there are, in all or of one user.
    Count {
        #[arg(long, value_name = "USER")]
        user: Option<String>,
    },
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["session", "all", "all_but", "everyone"]))]
struct Revoke {
    #[arg(long, value_name = "USER", required_unless_present = "everyone", conflicts_with = "everyone")]
    user: Option<String>,
    #[arg(value_name = "SESSION", value_parser = handle)]
    session: Option<Handle>,
    /// All sessions of the user.
    #[arg(long)]
    all: bool,
    /// All sessions of the user but this one.
    #[arg(long, value_name = "SESSION", value_parser = handle)]
    all_but: Option<Handle>,
    /// All sessions of all users.
    #[arg(long)]
    everyone: bool,
    /// For --everyone: yes, all of them.
    #[arg(long, conflicts_with = "user")]
    yes: bool,
}

fn handle(text: &str) -> Result<Handle, &'static str> {
    Handle::parse(text)
        .ok_or("expected ten hexadecimal digits, as `cloakroom sessions list` and the access log show them")
}

/// Why there is no answer.
#[derive(Debug)]
enum Unable {
    Store(StoreError),
    Interrupted(Interrupted),
    Nothing(String),
    Unconfirmed,
    OutOfReach(String),
    Runtime(std::io::Error),
}

pub fn run(arguments: &Arguments, terminal: &mut Terminal<'_>) -> ExitCode {
    let config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return terminal.refuse(&error),
    };
    if config.store.redis.is_none() {
        let unable = Unable::OutOfReach(ask_the_process(&config, &arguments.config, &arguments.what));
        return terminal.fail(&unable, FAILED);
    }
    let sessions = match server::sessions_of(&config) {
        Ok(sessions) => sessions,
        Err(error) => return terminal.refuse(&error),
    };
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Unable::Runtime)?;
        let asked = Asked { control: Control::new(sessions), json: arguments.json, now: Timestamp::now() };
        let answer = runtime.block_on(asked.answer(&arguments.what, terminal));
        // A connection that still tries to come about must not hold up the end.
        runtime.shutdown_background();
        answer
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(unable @ Unable::Unconfirmed) => terminal.fail(&unable, WRONG_ARGUMENTS),
        Err(unable) => terminal.fail(&unable, FAILED),
    }
}

/// As clap has it.
const WRONG_ARGUMENTS: u8 = 2;

struct Asked {
    control: Control,
    json: bool,
    now: Timestamp,
}

impl Asked {
    async fn answer(&self, what: &What, terminal: &mut Terminal<'_>) -> Result<(), Unable> {
        match what {
            What::List { user: None } => self.list_everyone(terminal).await,
            What::List { user: Some(user) } => {
                let sessions = self.control.of_user(user).await?;
                if sessions.is_empty() {
                    return Err(nobody(user));
                }
                if self.json {
                    terminal.say(json!({ "sessions": sessions }));
                } else {
                    terminal.say(format_args!("{HEADINGS}\n{}", table(&sessions, self.now)));
                }
                Ok(())
            }
            What::Show { user, session } => {
                let details = self.control.details(user, session).await?.ok_or_else(|| no_such(user, session))?;
                if self.json {
                    terminal.say(json!(details));
                } else {
                    terminal.say(sheet(&details, self.now));
                }
                Ok(())
            }
            What::Count { user } => {
                let count = self.control.count(user.as_deref()).await?;
                if self.json {
                    terminal.say(json!({ "count": count }));
                } else {
                    terminal.say(count);
                }
                Ok(())
            }
            What::Revoke(revoke) => {
                let ended = self.revoke(revoke).await?;
                if self.json {
                    terminal.say(json!({ "ended": ended }));
                } else {
                    terminal.say(format_args!("{ended} ended"));
                }
                Ok(())
            }
        }
    }

    /// As they come, so that neither we nor the reader wait for the last of a million.
    async fn list_everyone(&self, terminal: &mut Terminal<'_>) -> Result<(), Unable> {
        let mut next = Some(0);
        let mut separator = "";
        terminal.say(if self.json { "{\"sessions\":[" } else { HEADINGS });
        while let Some(part) = next {
            let page = self.control.page(part).await?;
            next = page.next;
            if page.sessions.is_empty() {
                continue;
            }
            if self.json {
                for session in page.sessions {
                    terminal.say(format_args!("{separator}{}", json!(session)));
                    separator = ",";
                }
            } else {
                terminal.say(table(&page.sessions, self.now));
            }
        }
        if self.json {
            terminal.say("]}");
        }
        Ok(())
    }

    async fn revoke(&self, revoke: &Revoke) -> Result<u64, Unable> {
        let Some(user) = &revoke.user else {
            if !revoke.yes {
                return Err(Unable::Unconfirmed);
            }
            return self.control.end_everyone().await.map_err(Unable::Interrupted);
        };
        let ended = match (&revoke.session, &revoke.all_but) {
            (Some(session), _) => {
                let ended = self.control.end(user, session).await?;
                ended.then_some(1).ok_or_else(|| no_such(user, session))?
            }
            (None, Some(kept)) => {
                let ended = self.control.end_all_of(user, Some(kept)).await?;
                return ended.ok_or_else(|| no_such(user, kept));
            }
            (None, None) => self.control.end_all_of(user, None).await?.unwrap_or_default(),
        };
        if ended == 0 { Err(nobody(user)) } else { Ok(ended) }
    }
}

fn nobody(user: &str) -> Unable {
    Unable::Nothing(format!("user {} has no session; `cloakroom sessions list` shows who has", plain(user)))
}

fn no_such(user: &str, session: &Handle) -> Unable {
    let user = plain(user);
    Unable::Nothing(format!(
        "user {user} has no session {session}, or no longer; `cloakroom sessions list --user {user}` shows theirs"
    ))
}

/// Its memory is its own, and its file is locked: only it can answer.
fn ask_the_process(config: &Config, file: &Path, what: &What) -> String {
    let encode = |user: &str| form_urlencoded::byte_serialize(user.as_bytes()).collect::<String>().replace('+', "%20");
    let (method, place) = match what {
        What::List { user: None } => ("GET", "/api/sessions".to_owned()),
        What::List { user: Some(user) } => ("GET", format!("/api/sessions?user={}", encode(user))),
        What::Show { user, session } => ("GET", format!("/api/sessions/{session}?user={}", encode(user))),
        What::Count { user: None } => ("GET", "/api/sessions/count".to_owned()),
        What::Count { user: Some(user) } => ("GET", format!("/api/sessions/count?user={}", encode(user))),
        What::Revoke(Revoke { user: None, .. }) => ("DELETE", "/api/sessions?everyone=true".to_owned()),
        What::Revoke(Revoke { user: Some(user), session, all_but, .. }) => {
            let user = encode(user);
            let place = match (session, all_but) {
                (Some(session), _) => format!("/api/sessions/{session}?user={user}"),
                (None, Some(kept)) => format!("/api/sessions?user={user}&except={kept}"),
                (None, None) => format!("/api/sessions?user={user}"),
            };
            ("DELETE", place)
        }
    };
    let mut text = format!("the sessions of {} are in the memory of the process that serves it", file.display());
    let admin = &config.admin;
    if !admin.enabled || admin.token.is_none() {
        let missing = if admin.enabled { "admin.token" } else { "admin.enabled = true and admin.token" };
        let _ = write!(text, "; set {missing}, restart it, and ask it:");
    } else {
        text.push_str("; ask it, with admin.token as TOKEN:");
    }
    let address = admin.address.get_ref();
    let _ = write!(text, "\n  curl -X {method} -H \"Authorization: Bearer $TOKEN\" 'http://{address}{place}'");
    text
}

/// The widths are fixed, because lines are written before the last one is known; a long name only moves the rest.
const HEADINGS: &str = "SESSION     USER                  LOGGED IN      IDLE LEFT  ADDRESS          CLIENT";

fn table(sessions: &[Shown], now: Timestamp) -> String {
    let mut text = String::new();
    for shown in sessions {
        let address = shown.address.map_or_else(|| "-".to_owned(), |address| address.to_string());
        let _ = writeln!(
            text,
            "{:<10}  {:<20}  {:<13}  {:<9}  {:<15}  {}",
            shown.session,
            plain(&shown.user),
            ago(shown.created, now),
            span(shown.idle_left_seconds),
            address,
            shortened(&plain(&shown.user_agent)),
        );
    }
    text.truncate(text.trim_end().len());
    text
}

/// All of one session, a line each.
fn sheet(details: &Details, now: Timestamp) -> String {
    let Details { session, name, email, groups, activity } = details;
    let or_none = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), plain);
    let when = |moment: Timestamp| format!("{moment} ({})", ago(moment, now));
    let lines = [
        ("session", session.session.clone()),
        ("user", plain(&session.user)),
        ("name", or_none(name)),
        ("e-mail", or_none(email)),
        ("groups", if groups.is_empty() { "-".to_owned() } else { plain(&groups.join(", ")) }),
        ("method", session.method.to_owned()),
        ("logged in", when(session.created)),
        ("ends", when(session.ends)),
        ("idle left", span(session.idle_left_seconds)),
        ("address", session.address.map_or_else(|| "-".to_owned(), |address| address.to_string())),
        ("client", plain(&session.user_agent)),
    ];
    let mut text: String = lines.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect();
    for (index, seen) in activity.iter().enumerate() {
        let name = if index == 0 { "activity" } else { "" };
        let _ =
            writeln!(text, "{name:<10} {}  {:<15}  {}", when(seen.at), seen.address.to_string(), plain(&seen.route));
    }
    text.truncate(text.trim_end().len());
    text
}

/// As people say it: `12 min ago`, `in 3 h`.
fn ago(moment: Timestamp, now: Timestamp) -> String {
    if moment <= now {
        format!("{} ago", span((now.0 - moment.0) / 1000))
    } else {
        format!("in {}", span((moment.0 - now.0) / 1000))
    }
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= CLIENT_CHARS_MAX {
        return text.to_owned();
    }
    text.chars().take(CLIENT_CHARS_MAX - 1).chain(['…']).collect()
}

const CLIENT_CHARS_MAX: usize = 40;

impl std::fmt::Display for Unable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hint = "look at [store.redis] of the configuration, and whether this machine may reach it";
        match self {
            Self::Store(error @ StoreError::Unavailable(_)) => write!(f, "{error}: {hint}"),
            Self::Store(error) => write!(f, "{error}"),
            Self::Interrupted(interrupted) => write!(f, "{interrupted}: {hint}, then do it again for the rest"),
            Self::Nothing(text) | Self::OutOfReach(text) => f.write_str(text),
            Self::Unconfirmed => f.write_str(
                "--everyone logs everybody out: add --yes if that is meant (`cloakroom sessions count` says how many)",
            ),
            Self::Runtime(_) => f.write_str("cannot start"),
        }
    }
}

impl std::error::Error for Unable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Store(error) => error.source(),
            Self::Interrupted(interrupted) => interrupted.source(),
            Self::Runtime(error) => Some(error),
            Self::Nothing(_) | Self::OutOfReach(_) | Self::Unconfirmed => None,
        }
    }
}

impl From<StoreError> for Unable {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{self, Command};
    use crate::session::control::Seen;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn shown() -> Shown {
        Shown {
            session: "739e583973".into(),
            user: "ann".into(),
            method: "password",
            created: Timestamp(NOW.0 - 12 * 60_000),
            ends: Timestamp(NOW.0 + 11 * 3_600_000),
            idle_left_seconds: 1_790,
            last_seen: Timestamp(1_800_000_000_000),
            address: Some("192.0.2.7".parse().unwrap()),
            user_agent: "Browser/1 (of a very long name, as they are today)".into(),
        }
    }

    fn parse(arguments: &str) -> Result<What, clap::error::ErrorKind> {
        let words = ["cloakroom", "sessions"].into_iter().chain(arguments.split_whitespace());
        match cli::Arguments::try_parse_from(words).map_err(|error| error.kind())?.command {
            Command::Sessions(Arguments { what, .. }) => Ok(what),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_revocation_names_exactly_what_it_ends() {
        for good in [
            "revoke --user ann 739e583973",
            "revoke --user ann --all",
            "revoke --user ann --all-but 739e583973",
            "revoke --everyone --yes",
            "revoke --everyone",
        ] {
            assert!(matches!(parse(good), Ok(What::Revoke(_))), "{good}");
        }
        for bad in [
            "revoke",
            "revoke --all",
            "revoke 739e583973",
            "revoke --user ann",
            "revoke --user ann --all --all-but 739e583973",
            "revoke --user ann 739e583973 --all",
            "revoke --user ann --everyone --yes",
            "revoke --user ann --all --yes",
            "revoke --user ann 739E583973",
            "revoke --yes",
            "show 739e583973",
            "show --user ann",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_table_is_aligned_and_shows_what_matters() {
        let other = Shown { user: "bob".into(), address: None, user_agent: String::new(), ..shown() };
        let expected = "\
SESSION     USER                  LOGGED IN      IDLE LEFT  ADDRESS          CLIENT
739e583973  ann                   12 min ago     29 min     192.0.2.7        Browser/1 (of a very long name, as they…
739e583973  bob                   12 min ago     29 min     -";
        assert_eq!(format!("{HEADINGS}\n{}", table(&[shown(), other], NOW)), expected);
    }

    #[test]
    fn a_sheet_tells_all_of_one_session() {
        let details = Details {
            session: shown(),
            name: Some("Ann Archer".into()),
            email: None,
            groups: vec!["staff".into(), "ops".into()],
            activity: [("/", 4_000), ("/shop", 200_000)]
                .map(|(route, before)| Seen {
                    at: Timestamp(NOW.0 - before),
                    address: "192.0.2.7".parse().unwrap(),
                    route: route.into(),
                })
                .to_vec(),
        };
        let expected = "\
session    739e583973
user       ann
name       Ann Archer
e-mail     -
groups     staff, ops
method     password
logged in  2027-01-15T07:48:00Z (12 min ago)
ends       2027-01-15T19:00:00Z (in 11 h)
idle left  29 min
address    192.0.2.7
client     Browser/1 (of a very long name, as they are today)
activity   2027-01-15T07:59:56Z (4 s ago)  192.0.2.7        /
           2027-01-15T07:56:40Z (3 min ago)  192.0.2.7        /shop";
        assert_eq!(sheet(&details, NOW), expected);
    }

    #[test]
    fn nothing_that_a_client_sent_steers_the_terminal() {
        let hostile = Shown { user: "a\x1b[2Jb\n\u{202e}c".into(), user_agent: "\u{9b}31mx\r".into(), ..shown() };
        let text = table(&[hostile], NOW);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        assert!(text.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{text:?}");
    }

    #[test]
    fn json_has_the_documented_names() {
        let expected = serde_json::json!({
            "session": "739e583973", "user": "ann", "method": "password", "created": "2027-01-15T07:48:00Z",
            "ends": "2027-01-15T19:00:00Z", "idle_left_seconds": 1790,
            "last_seen": "2027-01-15T08:00:00Z", "address": "192.0.2.7",
            "user_agent": "Browser/1 (of a very long name, as they are today)",
        });
        assert_eq!(json!(shown()), expected);
    }

    #[test]
    fn sessions_in_memory_are_asked_for_where_they_are() {
        let text = "[[listener]]\naddress = \"127.0.0.1:1\"\n[pool.app]\nbackends = [\"127.0.0.1:2\"]\n[[route]]\npath = \"/\"\n\
                    pool = \"app\"\naccess = \"public\"\n";
        let token = "[admin]\ntoken = \"q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2\"\n";
        for (arguments, expected) in [
            ("list", "-X GET -H \"Authorization: Bearer $TOKEN\" 'http://127.0.0.1:9900/api/sessions'"),
            ("count --user a+b", "'http://127.0.0.1:9900/api/sessions/count?user=a%2Bb'"),
            ("revoke --user it's 739e583973", "-X DELETE"),
            ("revoke --user it's 739e583973", "'http://127.0.0.1:9900/api/sessions/739e583973?user=it%27s'"),
            ("revoke --user ann --all-but 739e583973", "/api/sessions?user=ann&except=739e583973'"),
            ("revoke --everyone --yes", "-X DELETE"),
        ] {
            let config = config::parse(&format!("{text}{token}"), Path::new("a.toml")).unwrap();
            let told = ask_the_process(&config, Path::new("a.toml"), &parse(arguments).unwrap());
            assert!(told.contains(expected) && !told.contains("q7Zp"), "{arguments}: {told}");
        }
        let config = config::parse(text, Path::new("a.toml")).unwrap();
        let told = ask_the_process(&config, Path::new("a.toml"), &parse("list").unwrap());
        assert!(told.contains("set admin.token, restart it"), "{told}");
    }
}
