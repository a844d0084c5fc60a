// Does a login at a certified provider work in a real browser? npm's oidc-provider and Chromium, both started here.
//
//   node oidc.mjs GATEWAY_PORT PROVIDER_PORT
//
// The gateway is http://app.test to the browser. Says each step when it is done; leaves 1 with the step that failed.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [gatewayPort, providerPort] = process.argv.slice(2);
// The packages are where scripts/setup put them.
const tools = process.env.BROWSER_TOOLS;
const require = createRequire(`${tools}/package.json`);
const { chromium } = require("playwright-core");
const { default: Provider } = await import(pathToFileURL(require.resolve("oidc-provider")));

const site = "http://app.test";
const issuer = `http://127.0.0.1:${providerPort}`;
const own = `${site}/.cloakroom/oidc/real`;

const provider = new Provider(issuer, {
  clients: [
    {
      client_id: "cloakroom",
      client_secret: "uZ3kq9-a-secret-of-the-tests-7Vb1",
      redirect_uris: [`${own}/callback`],
      post_logout_redirect_uris: [`${own}/after-logout`],
      backchannel_logout_uri: `http://127.0.0.1:${gatewayPort}/.cloakroom/oidc/real/backchannel`,
      backchannel_logout_session_required: true,
      grant_types: ["authorization_code", "refresh_token"],
    },
  ],
  cookies: { keys: ["a key of the tests"] },
  claims: { openid: ["sub"], profile: ["preferred_username", "name"], email: ["email", "email_verified"] },
  features: { backchannelLogout: { enabled: true } },
  // Its own way to ask keeps it from machines of this network, and the gateway of the tests is one.
  fetch: (url, { dispatcher, ...options }) => fetch(url, options),
  issueRefreshToken: async () => true,
  // So short that a token is due at once.
  ttl: { AccessToken: 20, Session: 3600, Grant: 3600, Interaction: 600, IdToken: 300, RefreshToken: 3600 },
  findAccount: async (_, id) => ({
    accountId: id,
    claims: async () => ({ sub: id, preferred_username: id, name: "Ann Archer", email: `${id}@example.org`, email_verified: true }),
  }),
});
let refreshes = 0;
provider.on("grant.success", (context) => (refreshes += context.oidc.params.grant_type === "refresh_token"));
provider.on("backchannel.error", (_, error) => console.log(`the back channel: ${error.stack ?? error} ${error.cause}`));
provider.on("server_error", (_, error) => console.log(`the provider: ${error.stack ?? error}`));
const server = provider.listen(Number(providerPort), "127.0.0.1");

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", `--host-resolver-rules=MAP app.test 127.0.0.1:${gatewayPort}`],
});
const deadline = 60_000;

async function somebody() {
  const context = await browser.newContext();
  context.setDefaultTimeout(deadline);
  return context;
}

/** On the provider's pages: the name where it is asked for, and yes to all else, until the target is there. */
async function logIn(page, target) {
  const there = (url) => url.href === target;
  const asks = (url) => url.pathname.startsWith("/interaction/");
  await page.waitForURL((url) => there(url) || asks(url));
  while (!there(new URL(page.url()))) {
    // Each question has a page of its own: who clicks before it is left would answer the same one twice.
    const asked = page.url();
    if (await page.locator("input[name=login]").count()) {
      await page.locator("input[name=login]").fill("ann");
      await page.locator("input[name=password]").fill("any");
    }
    await page.locator("button[type=submit]").click();
    await page.waitForURL((url) => there(url) || (url.href !== asked && asks(url)));
  }
}

/** What the backend saw of the request for this page. */
async function seen(page) {
  const { headers } = JSON.parse(await page.locator("body").innerText());
  return (name) => headers.filter(([other]) => other.toLowerCase() === name).map(([, value]) => value);
}

const status = (page, path) => page.evaluate((path) => fetch(path).then((answer) => answer.status), path);

async function until(what, fact) {
  for (const started = Date.now(); !(await fact()); ) {
    if (Date.now() - started > deadline) throw new Error(`still not so: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

function expect(fact, what) {
  if (!fact) throw new Error(what);
}

let step = "start";
try {
  const context = await somebody();
  const page = await context.newPage();

  step = "login";
  await page.goto(`${site}/report?year=2026`);
  await logIn(page, `${site}/report?year=2026`);
  const header = await seen(page);
  expect(header("x-forwarded-user")[0] === "ann", "the backend knows who it is");
  expect(header("x-forwarded-email")[0] === "ann@example.org", "with the address from UserInfo");
  expect(header("cookie").length === 0, "and gets no cookie of ours");
  expect((await context.cookies(site)).every((cookie) => cookie.httpOnly), "no cookie is for scripts");
  console.log("done: login");

  step = "second tab";
  const second = await context.newPage();
  await second.goto(`${site}/other`);
  expect(new URL(second.url()).pathname === "/other", "the session is good in every tab");
  console.log("done: second tab");

  step = "two tabs that log in at once";
  const twice = await somebody();
  const [one, other] = [await twice.newPage(), await twice.newPage()];
  await one.goto(`${site}/one`);
  await other.goto(`${site}/two`);
  await logIn(one, `${site}/one`);
  await logIn(other, `${site}/two`);
  expect((await seen(other))("x-forwarded-user")[0] === "ann", "both arrive");
  console.log("done: two tabs that log in at once");

  step = "refresh";
  await page.goto(`${site}/api`);
  const first = (await seen(page))("x-access-token")[0];
  expect(first, "the route gets the access token");
  await until("another token is in use", async () => {
    await page.goto(`${site}/api`);
    return (await seen(page))("x-access-token")[0] !== first;
  });
  expect(refreshes >= 1, "it was renewed at the provider");
  console.log("done: refresh");

  step = "step-up";
  // Nobody has said yet how old the login is: the provider is asked, and the user only where it is too old.
  await page.goto(`${site}/fresh`);
  if (page.url().startsWith(issuer)) await logIn(page, `${site}/fresh`);
  expect(page.url() === `${site}/fresh`, `the page is reached, and not ${page.url()}`);
  await until("the login is too old for the page", async () => (await status(page, "/fresh")) === 401);
  const before = (await context.cookies(site)).find((cookie) => cookie.name === "session").value;
  await page.goto(`${site}/fresh`);
  expect(page.url().startsWith(issuer), `the provider asks again, and not ${page.url()}`);
  await logIn(page, `${site}/fresh`);
  const after = (await context.cookies(site)).find((cookie) => cookie.name === "session").value;
  expect(before !== after, "the id changes");
  console.log("done: step-up");

  step = "logout from here";
  await page.goto(`${site}/.cloakroom/logout`);
  await page.getByRole("button", { name: "Log out" }).click();
  await page.waitForURL((url) => url.href.startsWith(`${issuer}/session/end`));
  await page.locator("button[name=logout]").click();
  await page.waitForURL((url) => url.pathname.endsWith("/after-logout"));
  expect((await page.title()) === "You are logged out", `the last page says so, not ${await page.title()}`);
  // Our own pages let no script ask for anything, so the browser goes there.
  expect((await page.goto(`${site}/.cloakroom/session`)).status() === 401, "no session is left");
  console.log("done: logout from here");

  step = "logout at the provider";
  expect((await status(one, "/.cloakroom/session")) === 200, "the other browser is still logged in");
  await other.goto(`${issuer}/session/end`);
  await other.locator("button[name=logout]").click();
  await until("the back channel has ended the session", async () => (await status(one, "/.cloakroom/session")) === 401);
  console.log("done: logout at the provider");
} catch (error) {
  console.log(`failed: ${step}: ${error.stack ?? error}`);
  process.exitCode = 1;
} finally {
  await browser.close();
  server.close();
  server.closeAllConnections();
}
process.exit();
