//! What do others cost? nginx and HAProxy as Debian packages them, each with a configuration of `benches/peers`, as
//! near to what Cloakroom does as one gets there in a few lines.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::THREADS;
use super::process::Proxy;

pub(crate) struct Peer {
    pub(crate) name: &'static str,
    program: &'static str,
    template: &'static str,
}

pub(crate) const ALL: [Peer; 5] = [
    Peer { name: "nginx", program: "nginx", template: "nginx.conf.template" },
    Peer { name: "haproxy", program: "haproxy", template: "haproxy.cfg.template" },
    Peer { name: "nginx-lua", program: "nginx", template: "nginx_lua.conf.template" },
    Peer { name: "nginx-lua-cached", program: "nginx", template: "nginx_lua_cached.conf.template" },
    Peer { name: "nginx-auth-request", program: "nginx", template: "nginx_auth_request.conf.template" },
];

/// Nothing when it is not installed: the table then has a row less.
pub(crate) fn start(peer: &Peer, backends: &[SocketAddr; 2], redis_port: u16) -> Option<Proxy> {
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers");
    let folder = TempDir::new().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = std::fs::read_to_string(templates.join(peer.template)).unwrap();
    let text = [
        ("@FOLDER@", folder.path().display().to_string()),
        ("@PEERS@", templates.display().to_string()),
        ("@ADDRESS@", address.to_string()),
        ("@WORKERS@", THREADS.to_string()),
        ("@BACKEND_1@", backends[0].to_string()),
        ("@BACKEND_2@", backends[1].to_string()),
        ("@REDIS_PORT@", redis_port.to_string()),
    ]
    .iter()
    .fold(text, |text, (name, value)| text.replace(name, value));
    let file = folder.path().join("configuration");
    std::fs::write(&file, text).unwrap();

    let mut command = Command::new(peer.program);
    match peer.program {
        // Modules are found relative to the prefix that was built in.
        "nginx" => command.arg("-c").arg(&file),
        _ => command.arg("-db").arg("-f").arg(&file),
    };
    Proxy::start_foreign(command, address, folder)
}
