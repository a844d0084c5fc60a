//! `cloakroom demo`: the whole thing on loopback, with nothing prepared.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::ExitCode;

use rand::distr::{Alphanumeric, SampleString};

use super::demo_backend::DemoBackend;
use super::run::{Signals, start_log};
use super::{FAILED, Terminal};
use crate::config::model::{Log, LogLevel};
use crate::login::hash::hash;
use crate::{config, server};

/// Ports tried from the first one on.
const PORTS_TRIED: u16 = 100;

const USER: &str = "demo";

pub fn demo(redis: Option<&str>, port: u16, terminal: &mut Terminal<'_>) -> ExitCode {
    let log = start_log(&Log { level: LogLevel::Warn, ..Log::default() });
    match log.map_err(Into::into).and_then(|_log| start(redis, port, terminal)) {
        Ok(code) => code,
        Err(error) => terminal.fail(&*error, FAILED),
    }
}

fn start(redis: Option<&str>, port: u16, terminal: &mut Terminal<'_>) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut signals = Signals::install()?;
    let folder = DemoFolder::make()?;
    let password = Alphanumeric.sample_string(&mut rand::rng(), 12);
    let hash = hash(&password)?;
    std::fs::write(
        folder.path().join("users.toml"),
        format!(
            "[{USER}]\npassword = \"{hash}\"\nname = \"Demo User\"\nemail = \"demo@example.org\"\ngroups = [\"staff\"]\n"
        ),
    )?;
    let [one, two] = [DemoBackend::start("one")?, DemoBackend::start("two")?];
    let address = free_port(port)?;
    let store = match redis {
        Some(url) => format!("[store.redis]\nurl = {}", toml::Value::String(url.to_owned())),
        None => "[store.memory]".to_owned(),
    };
    let text = format!(
        r#"[[listener]]
address = "{address}"

{store}

[login]
title = "Cloakroom demo"

[login.password]
users_file = "users.toml"

[identity]
preset = "x-forwarded"

[pool.app]
backends = ["{}", "{}"]

[[route]]
path = "/"
pool = "app"
access = "required"

[admin]
enabled = false

[log]
access = false
"#,
        one.address(),
        two.address()
    );
    let file = folder.path().join("cloakroom.toml");
    std::fs::write(&file, text)?;
    let prepared = match config::load(&file).and_then(server::prepare) {
        Ok(prepared) => prepared,
        Err(error) => return Ok(terminal.refuse(&error)),
    };
    let running = server::start(prepared)?;
    terminal.say(format_args!(
        "Cloakroom is in front of two backends.\n\n  open       http://{address}/\n  user       {USER}\n  password   {password}\n\n\
         Reload the page: the other backend answers, and you are still logged in.\n\
         Kill one of them (kill {} or kill {}): nobody notices.\nCtrl-C ends it.",
        one.pid(),
        two.pid()
    ));
    signals.until_end();
    running.stop();
    Ok(ExitCode::SUCCESS)
}

/// The first port from `first` on that nobody has.
fn free_port(first: u16) -> std::io::Result<SocketAddr> {
    let mut last = None;
    for port in (first..=u16::MAX).take(usize::from(PORTS_TRIED)) {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        match TcpListener::bind(address) {
            Ok(_) => return Ok(address),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into()))
}

/// A folder of our own that goes when we go.
struct DemoFolder(std::path::PathBuf);

impl DemoFolder {
    fn make() -> std::io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let name = format!("cloakroom-demo-{:016x}", rand::random::<u64>());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for DemoFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
