// Are the pages good for people? A real Chromium goes through all of them, and axe-core looks at each.
//
//   node pages.mjs URL USER PASSWORD
//
// Walks once without any script and once with scripts allowed, which only axe uses; on a wide and on a narrow window, light
// and dark. Prints what is wrong, one line each, and leaves 1 when there is something.

import { createRequire } from "node:module";
import { readFileSync, mkdirSync } from "node:fs";

const [url, user, password] = process.argv.slice(2);
// The packages are where scripts/setup put them.
const tools = process.env.BROWSER_TOOLS;
const require = createRequire(`${tools}/package.json`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const screenshots = process.env.SCREENSHOTS;
if (screenshots) mkdirSync(screenshots, { recursive: true });

const looks = [
  { name: "wide", viewport: { width: 1280, height: 800 }, colorScheme: "light" },
  { name: "narrow", viewport: { width: 320, height: 640 }, colorScheme: "dark" },
];
const wrong = [];
const expect = (fact, what) => fact || wrong.push(what);

/** Somebody at a browser; `look` is called on every page that they see. */
async function journey(browser, options, look) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  page.on("console", (message) => message.type() === "error" && noted(message.text()));
  page.on("pageerror", (error) => wrong.push(`${options.name}: ${error}`));
  // A refused login is 403, and Chromium says so.
  const noted = (text) => /status of (401|403|404|405|503)/.test(text) || wrong.push(`${options.name}: ${text}`);
  const see = async (name, title) => {
    expect((await page.title()) === title, `${options.name} ${name}: the title is "${await page.title()}"`);
    const wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth");
    expect(wide <= 0, `${options.name} ${name}: one must scroll sideways, by ${wide}px`);
    await look(page, name);
  };
  const logIn = async (name, secret) => {
    await page.getByLabel("User name").fill(name);
    await page.getByLabel("Password").fill(secret);
    await page.getByRole("button", { name: "Log in" }).click();
  };

  await page.goto(`${url}/report`);
  await see("login", "Log in");
  const focused = await page.evaluate("document.activeElement && document.activeElement.id");
  expect(focused === "username", `${options.name}: the user name has the focus, not "${focused}"`);
  await logIn(user, "wrong");
  await page.getByRole("alert").waitFor();
  await see("wrong password", "Log in");
  await logIn(user, password);
  await page.waitForURL(`${url}/report`);

  await page.goto(`${url}/.cloakroom/login`);
  await see("logged in", "Log in");
  await page.getByRole("link", { name: "Where you are logged in" }).click();
  await see("sessions", "Where you are logged in");
  const others = page.getByRole("button", { name: /^End:/ });
  const before = await others.count();
  expect(0 < before, `${options.name}: there are other sessions to end`);
  await others.first().click();
  await page.getByRole("status").waitFor();
  await see("one session ended", "Where you are logged in");
  expect((await others.count()) === before - 1, `${options.name}: one is left less`);
  await page.goto(`${url}/.cloakroom/login?reason=confirm&return_to=/.cloakroom/sessions`);
  await see("log in once more", "Log in");

  await page.goto(`${url}/staff`);
  await see("not allowed", "Not allowed");
  await page.goto(`${url}/.cloakroom/nothing`);
  await see("not found", "Not found");
  await page.goto(`${url}/dead`);
  await see("no backend", "Back in a moment");

  await page.goto(`${url}/.cloakroom/logout`);
  await see("log out", "Log out");
  await page.getByRole("link", { name: "Stay logged in" }).waitFor();
  await page.getByRole("button", { name: "Log out" }).click();
  await page.waitForURL(`${url}/.cloakroom/logout`);
  await see("logged out", "You are logged out");
  await page.goto(`${url}/.cloakroom/login?reason=unsent&return_to=/report`);
  await see("a form that came too late", "Log in");
  await page.goto(`${url}/nowhere-at-all`);
  await context.close();
}

/** What axe-core finds. */
async function inspect(page, name, look) {
  await page.evaluate(axe);
  const { violations, incomplete } = await page.evaluate("axe.run(document, { resultTypes: ['violations', 'incomplete'] })");
  for (const { id, help, nodes } of violations) {
    wrong.push(`${look}, ${name}: ${id}: ${help}: ${nodes.map((node) => node.html).join(" ").slice(0, 300)}`);
  }
  for (const { id, help, nodes } of incomplete) {
    wrong.push(`${look}, ${name}: axe cannot tell: ${id}: ${help}: ${nodes.map((node) => node.html).join(" ").slice(0, 300)}`);
  }
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  // In a container there is no other sandbox for root; nothing but our own pages is opened.
  args: ["--no-sandbox", "--disable-dev-shm-usage"],
});
try {
  // More sessions, for the list.
  for (const look of [...looks, ...looks, ...looks]) {
    const context = await browser.newContext(look);
    const page = await context.newPage();
    await page.goto(`${url}/.cloakroom/login`);
    await page.getByLabel("User name").fill(user);
    await page.getByLabel("Password").fill(password);
    await page.getByRole("button", { name: "Log in" }).click();
    await page.waitForURL(`${url}/`);
    await context.close();
  }
  for (const look of looks) {
    await journey(browser, { ...look, javaScriptEnabled: false }, async (page, name) => {
      if (screenshots) {
        await page.screenshot({ path: `${screenshots}/${look.name}-${name.replaceAll(" ", "-")}.png` });
      }
    });
    // The policy of the pages forbids every script, that of axe among them.
    await journey(browser, { ...look, bypassCSP: true }, (page, name) => inspect(page, name, look.name));
  }
} catch (error) {
  wrong.push(String(error?.stack ?? error));
} finally {
  await browser.close();
}
for (const line of wrong) console.log(line);
process.exitCode = wrong.length ? 1 : 0;
