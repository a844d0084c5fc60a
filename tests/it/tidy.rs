//! Is the house in order? The rooms know only whom they may know, and every file opens with what it is for.

use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Each room and the rooms that it may name, as ARCHITECTURE.md says it.
const ROOMS: &[(&str, &[&str])] = &[
    ("cli", &["supervisor", "server", "admin", "login", "session", "config", "outgoing", "log"]),
    (
        "server",
        &[
            "listener", "proxy", "admin", "events", "login", "session", "backend", "config", "log", "panics", "spans",
            "metrics",
        ],
    ),
    ("supervisor", &[]),
    ("listener", &["proxy", "config", "pem", "metrics"]),
    ("admin", &["proxy", "session", "backend", "config", "audit", "metrics"]),
    ("events", &["session", "config", "audit", "outgoing", "panics", "metrics"]),
    (
        "proxy",
        &["login", "session", "identity", "backend", "config", "pem", "audit", "log", "panics", "spans", "metrics"],
    ),
    ("login", &["session", "identity", "config", "audit", "outgoing", "metrics"]),
    ("session", &["identity", "config"]),
    ("identity", &["config"]),
    ("backend", &["config", "panics", "metrics"]),
    ("config", &[]),
    ("pem", &["config"]),
    // For a link in its text alone.
    ("audit", &["session"]),
    ("outgoing", &[]),
    ("log", &[]),
    ("panics", &[]),
    ("spans", &["outgoing", "metrics"]),
    ("metrics", &[]),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn room_of(path: &Path) -> String {
    let inside = path.strip_prefix(Path::new(ROOT).join("src")).unwrap();
    inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn the_rooms_know_only_whom_they_may_know() {
    let mut broken = Vec::new();
    for path in sources(&Path::new(ROOT).join("src")) {
        let room = room_of(&path);
        if room == "main" || room == "lib" {
            continue;
        }
        let (_, known) = ROOMS.iter().find(|(name, _)| *name == room).unwrap_or_else(|| panic!("a new room: {room}"));
        let text = std::fs::read_to_string(&path).unwrap();
        let used = text.split("crate::").skip(1);
        for name in used.filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()) {
            let grouped = name.is_empty(); // `use crate::{a, b}`: listed below
            if !grouped && name != room && ROOMS.iter().any(|(other, _)| *other == name) && !known.contains(&name) {
                broken.push(format!("{}: {room} -> {name}", path.display()));
            }
        }
        for group in text.split("use crate::{").skip(1) {
            for name in group.split('}').next().unwrap().split([',', ' ', '\n']).map(|n| n.split("::").next().unwrap())
            {
                if name != room && ROOMS.iter().any(|(other, _)| *other == name) && !known.contains(&name) {
                    broken.push(format!("{}: {room} -> {name}", path.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn only_one_folder_names_redis_and_only_the_edge_names_pingora() {
    for path in sources(&Path::new(ROOT).join("src")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let code: String =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        if code.contains("redis::") {
            let allowed = path.to_string_lossy().contains("session/store/redis/") || code.contains("store::redis::");
            assert!(allowed, "{} names redis", path.display());
        }
        if code.contains("pingora::") {
            let room = room_of(&path);
            assert!(
                ["proxy", "listener", "server", "admin"].contains(&room.as_str()),
                "{} names pingora",
                path.display()
            );
        }
    }
}

#[test]
fn every_file_opens_with_what_it_is_for() {
    for folder in ["src", "tests", "benches"] {
        for path in sources(&Path::new(ROOT).join(folder)) {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("//! "), "{} does not say what it is for", path.display());
        }
    }
}
