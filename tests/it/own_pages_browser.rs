//! Are our own pages good for people? A real browser goes through all of them, without any script and on a small window,
//! and axe-core looks for what would shut somebody out.
//!
//! `scripts/setup chromium node browser-tools` brings what this needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::Port;
use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::harness::gateway::{Gateway, PASSWORD};
use crate::harness::provider::{FakeProvider, Script};

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
    walk("pages.mjs", &[&format!("http://{}", gateway.address()), "ann", PASSWORD]);
}

#[test]
fn several_ways_to_log_in_and_a_login_that_is_too_old_are_plain_to_everybody() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    provider.play(Script { logged_in_ago: 3600, ..Script::default() });
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "")
        .route("/legacy", "access = \"public\"\ndirectives = [\"login\"]")
        .with("[login]\norigins = [\"http://app.localhost\"]\n[login.backend]\npage = \"/legacy\"")
        .with(&provider.table("directory", "title = \"The staff directory\""))
        .start();
    walk("ways.mjs", &[&gateway.address().port().to_string(), "ann", PASSWORD]);
}

#[test]
fn the_status_page_shuts_nobody_out_and_asks_for_the_token() {
    const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";
    let (one, two, three) = (Backend::echo(), Backend::echo(), Backend::echo());
    let dead = Port::reserve();
    let gateway = Gateway::in_front_of(&[])
        .weighted_pool(
            "app",
            &[(&one, "weight = 2, max_requests = 200"), (&two, ""), (&three, "backup = true")],
            "queue = 500",
        )
        .route("/", "access = \"public\"")
        .route("/reports", "access = \"public\"\npool = \"reports\"")
        .with(&format!(
            "[pool.reports]\nbackends = [\"127.0.0.1:{}\"]\neject.time = \"1h\"\neject.time_max = \"1h\"",
            dead.number()
        ))
        .with(&format!("[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\""))
        .start();
    let client = gateway.client();
    for _ in 0..40 {
        assert_eq!(client.get("/").send().status, 200);
    }
    assert_eq!(client.get("/reports").send().status, 503, "so that a warning shows");
    let drained = Client::of(gateway.admin_address())
        .request("PATCH", &format!("/api/pools/app/backends/{}", two.address()))
        .header("Authorization", &format!("Bearer {TOKEN}"))
        .body("{\"drain\": true, \"weight\": 3}")
        .send();
    assert_eq!(drained.status, 200);
    walk("status.mjs", &[&format!("http://{}", gateway.admin_address()), TOKEN]);
}

/// Fails with what is wrong with the pages that this script of `tests/browser` goes through.
#[track_caller]
fn walk(script: &str, arguments: &[&str]) {
    let walked = Command::new("node")
        .arg(Path::new(ROOT).join("tests/browser").join(script))
        .args(arguments)
        .env("BROWSER_TOOLS", tools())
        .output()
        .expect("node runs: scripts/setup chromium node browser-tools");
    let told = String::from_utf8_lossy(&walked.stdout);
    assert!(walked.status.success(), "{told}\n{}", String::from_utf8_lossy(&walked.stderr));
    assert_eq!(told, "", "nothing is wrong");
}
