//! Are our own pages good for people? A real browser goes through all of them, without any script and on a small window,
//! and axe-core looks for what would shut somebody out.
//!
//! `scripts/setup chromium node browser-tools` brings what this needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::Port;
use crate::harness::backend::Backend;
use crate::harness::gateway::{Gateway, PASSWORD};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What scripts/setup installs.
fn tools() -> PathBuf {
    Path::new(ROOT).join("target/tools/browser")
}

#[test]
fn every_page_works_without_script_and_shuts_nobody_out() {
    let backend = Backend::echo();
    let dead = Port::reserve();
    let dead = format!("127.0.0.1:{}", dead.number());
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "")
        .route("/staff", "groups = [\"nobody-is-in-it\"]")
        .route("/dead", "pool = \"dead\"")
        .with(&format!("[pool.dead]\nbackends = [\"{dead}\"]"))
        .start();
    let walked = Command::new("node")
        .arg(Path::new(ROOT).join("tests/browser/pages.mjs"))
        .args([format!("http://{}", gateway.address()).as_str(), "ann", PASSWORD])
        .env("BROWSER_TOOLS", tools())
        .output()
        .expect("node runs: scripts/setup chromium node browser-tools");
    let told = String::from_utf8_lossy(&walked.stdout);
    assert!(walked.status.success(), "{told}\n{}", String::from_utf8_lossy(&walked.stderr));
    assert_eq!(told, "", "nothing is wrong");
}
