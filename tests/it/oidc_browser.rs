//! Does a login work with a provider that is certified, in a browser that people use? npm's oidc-provider and Chromium,
//! driven by `tests/browser/oidc.mjs`; `scripts/setup` brings both.

use std::process::Command;

use crate::harness::Port;
use crate::harness::backend::Backend;
use crate::harness::gateway::Gateway;
use crate::harness::provider::CLIENT_SECRET;

const TOOLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/browser");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/browser/oidc.mjs");

#[test]
fn login_tabs_refresh_step_up_and_both_logouts_work_in_chromium_with_a_certified_provider() {
    let (backend, provider) = (Backend::echo(), Port::reserve());
    let provider_port = provider.number();
    let login = format!(
        "[login]\norigins = [\"http://app.test\"]\n[login.oidc.real]\nissuer = \"http://127.0.0.1:{provider_port}\"\n\
         client_id = \"cloakroom\"\nclient_secret = \"{CLIENT_SECRET}\"\ntokens = true\n"
    );
    let gateway = Gateway::in_front_of(&[&backend])
        .without_passwords()
        .route("/", "")
        .route("/api", "access_token = \"X-Access-Token\"")
        .route("/fresh", "max_age = \"30s\"")
        .with(&login)
        .start();
    let ports = [gateway.address().port().to_string(), provider_port.to_string()];
    let output = Command::new("node").arg(SCRIPT).args(&ports).env("BROWSER_TOOLS", TOOLS).output();
    let output = output.expect("node is there: scripts/setup node chromium browser-tools");
    let [said, complained] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(said.matches("done: ").count(), 7, "every step was gone: {said}");
}
