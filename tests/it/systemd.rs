//! Does systemd get what it asks for? A test that hands sockets over and listens, in its place.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};

use crate::harness::DEADLINE;
use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::operation::{ADMIN_TOKEN, CLOAKROOM, Daemon, admin_of, cloakroom, deployment};

/// What the service says, one state per line.
struct Ear {
    socket: UnixDatagram,
    path: std::path::PathBuf,
}

impl Ear {
    fn in_folder(folder: &Path) -> Self {
        let path = folder.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket, path }
    }

    /// The next message that is not just a sign of life.
    fn next(&self) -> String {
        loop {
            let mut message = [0; 4096];
            let length = self.socket.recv(&mut message).expect("a message in time");
            let text = String::from_utf8(message[..length].to_vec()).unwrap();
            if text != "WATCHDOG=1" {
                return text;
            }
        }
    }

    fn hears(&self, part: &str) {
        let mut message = [0; 4096];
        while !String::from_utf8_lossy(&message).contains(part) {
            message.fill(0);
            self.socket.recv(&mut message).expect("a message in time");
        }
    }
}

/// Starts it as systemd does: these sockets from descriptor 3 on, with names, for this process id.
fn activate(config: &Path, sockets: Vec<(OwnedFd, &str)>, environment: &[(&str, &str)]) -> Daemon {
    let (sockets, names): (Vec<_>, Vec<_>) = sockets.into_iter().unzip();
    let count = sockets.len().to_string();
    let mapped = sockets.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    let mut command = Command::new("sh");
    // Only in the process itself is its id known.
    command.args(["-c", "LISTEN_PID=$$ exec \"$0\" run --config \"$1\"", CLOAKROOM, config.to_str().unwrap()]);
    command.env("LISTEN_FDS", count).env("LISTEN_FDNAMES", names.join(":")).envs(environment.iter().copied());
    Daemon::of(command.fd_mappings(mapped.collect()).unwrap())
}

fn bound(address: SocketAddr) -> OwnedFd {
    TcpListener::bind(address).unwrap().into()
}

#[test]
fn sockets_of_systemd_are_taken_by_their_address() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "");
    // In the other order than in the file, and connected to before there is a process.
    let sockets = vec![(bound(admin_of(&file)), "admin"), (bound(address), "public")];
    let early = std::net::TcpStream::connect(address).unwrap();
    let daemon = activate(&file, sockets, &[]);
    assert_eq!(Client::of(address).get("/").send().status, 200, "who comes before it is ready waits");
    assert_eq!(Client::of(admin_of(&file)).get("/health/live").send().status, 200);
    drop(early);
    daemon.signal("TERM");
    assert_eq!(daemon.exit_code(), Some(0));
}

#[test]
fn a_socket_that_nobody_asked_for_is_named_and_ends_the_start() {
    let (_folder, file, address) = deployment(&[&Backend::echo()], "");
    let unknown = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = unknown.local_addr().unwrap().to_string();
    let mut daemon = activate(&file, vec![(bound(address), "public"), (unknown.into(), "other")], &[]);
    let log = daemon.log();
    assert_eq!(daemon.exit_code(), Some(1));
    log.wait_for(&name);

    let (datagram, _) = UnixDatagram::pair().unwrap();
    let mut daemon = activate(&file, vec![(datagram.into(), "odd")], &[]);
    let log = daemon.log();
    assert_eq!(daemon.exit_code(), Some(1));
    log.wait_for("the inherited descriptor 3 (odd) is no TCP socket that listens");
}

#[test]
fn systemd_is_told_of_start_reload_life_and_end() {
    let (folder, file, _) = deployment(&[&Backend::echo()], "");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("[admin]", &format!("[admin]\ntoken = \"{ADMIN_TOKEN}\""))).unwrap();
    let ear = Ear::in_folder(folder.path());
    let environment = [("NOTIFY_SOCKET", ear.path.to_str().unwrap()), ("WATCHDOG_USEC", "200000")];
    let daemon = activate(&file, Vec::new(), &environment);
    assert!(ear.next().starts_with("READY=1\nSTATUS="));
    ear.hears("WATCHDOG=1");

    daemon.signal("HUP");
    let reloading = ear.next();
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    let micros = reloading.lines().nth(1).and_then(|line| line.split_once('=')).unwrap().1;
    assert!(0 < micros.parse::<u64>().unwrap());
    assert_eq!(ear.next(), "READY=1\nSTATUS=Serving");

    assert!(cloakroom(&["reload", "--config", file.to_str().unwrap()]).status.success());
    assert!(ear.next().starts_with("RELOADING=1\n"), "also when it is asked for over the admin listener");
    assert_eq!(ear.next(), "READY=1\nSTATUS=Serving");

    std::fs::write(&file, "broken").unwrap();
    daemon.signal("HUP");
    assert!(ear.next().starts_with("RELOADING=1\n"));
    assert!(ear.next().starts_with("READY=1\nSTATUS=Serving; the last reload was refused"));

    daemon.signal("TERM");
    assert!(ear.next().starts_with("STOPPING=1\n"));
    assert_eq!(daemon.exit_code(), Some(0));
}

#[test]
#[ignore = "needs systemd-analyze, which not every machine has"]
fn the_unit_files_are_understood_by_systemd() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("systemd-analyze");
    command.arg("verify");
    for name in ["cloakroom.service", "cloakroom.socket"] {
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/systemd").join(name)).unwrap();
        let unit = folder.path().join(name);
        std::fs::write(&unit, text.replace("/usr/local/bin/cloakroom", CLOAKROOM)).unwrap();
        command.arg(unit);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("cloakroom."), "{said}");
}
