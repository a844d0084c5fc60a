//! Does a login survive the process, and a logout the worst end of it? The binary itself, killed and started again.

use std::net::SocketAddr;
use std::path::Path;

use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::harness::gateway::{Form, PASSWORD};
use crate::harness::{free_port, wait_until};
use crate::operation::{Daemon, cloakroom, deployment, is_up};

const STORE: &str = "[store.memory]\nfile = \"sessions.redb\"\n";

fn start(config: &Path, address: SocketAddr) -> Daemon {
    let daemon = Daemon::run(config);
    wait_until("the gateway listens", || is_up(address));
    daemon
}

fn kill(daemon: Daemon) {
    daemon.signal("KILL");
    drop(daemon);
}

pub(crate) fn log_in(address: SocketAddr) -> Client {
    logged_in(Client::of(address))
}

pub(crate) fn logged_in(client: Client) -> Client {
    let form = Form::on(&client.navigate("/.cloakroom/login").send().text());
    send(&client, "/.cloakroom/login", &form.filled_in(&[("username", "ann"), ("password", PASSWORD)]));
    client
}

fn log_out(client: &Client) {
    let form = Form::on(&client.navigate("/.cloakroom/logout").send().text());
    send(client, "/.cloakroom/logout", &form.fields);
}

fn send(client: &Client, target: &str, fields: &[(String, String)]) {
    let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let response = client.post_form(target, &fields).send();
    assert_eq!(response.status, 303, "{target}: {}", response.text());
}

#[test]
fn after_a_kill_who_was_in_is_in_and_who_was_out_is_out() {
    let backend = Backend::echo();
    let (_folder, config, address) = deployment(&[&backend], STORE);
    let daemon = start(&config, address);
    let ann = log_in(address);
    let other = log_in(address);
    let stolen = other.cookie("session").unwrap();
    // Its answer says that all before it is in the file, too.
    log_out(&other);
    kill(daemon);

    let daemon = start(&config, address);
    assert_eq!(ann.get("/private").send().status, 200, "a login survives");
    other.set_cookie("session", &stolen);
    assert_eq!(other.get("/private").send().status, 401, "and so does a logout");
    log_out(&ann);
    kill(daemon);

    let _daemon = start(&config, address);
    assert_eq!(ann.get("/private").send().status, 401);
}

#[test]
fn a_term_loses_nothing() {
    let backend = Backend::echo();
    let (_folder, config, address) = deployment(&[&backend], STORE);
    let daemon = start(&config, address);
    let logins: Vec<_> = (0..3).map(|_| log_in(address)).collect();
    daemon.signal("TERM");
    daemon.ended();

    let _daemon = start(&config, address);
    for client in logins {
        assert_eq!(client.get("/private").send().status, 200, "what was answered a moment ago is in the file");
    }
}

#[test]
fn a_file_has_one_process_and_check_needs_none() {
    let backend = Backend::echo();
    let (folder, config, address) = deployment(&[&backend], STORE);
    let file = folder.path().join("sessions.redb");
    let check = || cloakroom(&["check", config.to_str().unwrap()]).status.code();
    assert_eq!(check(), Some(0));
    assert!(!file.exists(), "to check is not to begin");

    let _first = start(&config, address);
    assert_eq!(check(), Some(0), "a file in use is no mistake in the configuration");
    let text = std::fs::read_to_string(&config).unwrap();
    let second = folder.path().join("second.toml");
    let admin = text.lines().find(|line| line.contains("address") && !line.contains(&address.to_string())).unwrap();
    let other_ports = text
        .replace(&address.to_string(), &format!("127.0.0.1:{}", free_port()))
        .replace(admin, &format!("address = \"127.0.0.1:{}\"", free_port()));
    std::fs::write(&second, other_ports).unwrap();
    let output = cloakroom(&["run", "--config", second.to_str().unwrap()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    for part in [file.to_str().unwrap(), "another process", "[store.redis]"] {
        assert!(text.contains(part), "{part} in: {text}");
    }
}

#[test]
fn a_file_that_cannot_be_used_stays_as_it_is_and_the_next_move_is_told() {
    let backend = Backend::echo();
    let (folder, config, _) = deployment(&[&backend], STORE);
    let file = folder.path().join("sessions.redb");
    std::fs::write(&file, "something else").unwrap();
    let output = cloakroom(&["run", "--config", config.to_str().unwrap()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(file.to_str().unwrap()) && text.contains("move it away"), "{text}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "something else");

    let (_folder, config, _) = deployment(&[&backend], "[store.memory]\nfile = \"nowhere/sessions.redb\"\n");
    let output = cloakroom(&["check", config.to_str().unwrap()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("nowhere/sessions.redb") && text.contains("folder"), "{text}");
}
