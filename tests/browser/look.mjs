// How are our pages looked at? Each journey is walked once without any script and once with scripts allowed, which only axe
// uses; on a wide and on a narrow window, light and dark.
//
// Prints what is wrong, one line each, and leaves 1 when there is something. With SCREENSHOTS, a folder, pictures of all,
// from top to bottom.

import { createRequire } from "node:module";
import { readFileSync, mkdirSync } from "node:fs";

// The packages are where scripts/setup put them.
const tools = process.env.BROWSER_TOOLS;
const require = createRequire(`${tools}/package.json`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const screenshots = process.env.SCREENSHOTS;
if (screenshots) mkdirSync(screenshots, { recursive: true });

export const looks = [
  { name: "wide", viewport: { width: 1280, height: 800 }, colorScheme: "light" },
  { name: "narrow", viewport: { width: 320, height: 640 }, colorScheme: "dark" },
];
/** In milliseconds, for whatever a page is waited for. */
const DEADLINE = 60_000;
const wrong = [];
export const expect = (fact, what) => fact || wrong.push(what);

/**
 * `journey(page, see, options)` goes through pages, and calls `see(name, title)` on each. `hosts` are Chromium's rules,
 * `credentials` what its user types where it asks for them. `viewport` is the one that axe looks through: it does not judge
 * what one must scroll to within a page.
 */
export async function walk(journey, { before, hosts, credentials: httpCredentials, viewport } = {}) {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    // In a container there is no other sandbox for root; nothing but our own pages is opened.
    args: ["--no-sandbox", "--disable-dev-shm-usage", ...(hosts ? [`--host-resolver-rules=${hosts}`] : [])],
  });
  try {
    await before?.(browser);
    for (const look of looks) {
      await once(browser, journey, { ...look, httpCredentials, javaScriptEnabled: false }, async (page, name) => {
        if (screenshots) {
          await page.screenshot({ path: `${screenshots}/${look.name}-${name.replaceAll(" ", "-")}.png`, fullPage: true });
        }
      });
      // The policy of the pages forbids every script, that of axe among them.
      const inspected = { ...look, viewport: viewport ?? look.viewport, httpCredentials, bypassCSP: true };
      await once(browser, journey, inspected, (page, name) => inspect(page, name, look.name));
    }
  } catch (error) {
    wrong.push(String(error?.stack ?? error));
  } finally {
    await browser.close();
  }
  for (const line of wrong) console.log(line);
  process.exitCode = wrong.length ? 1 : 0;
}

async function once(browser, journey, options, look) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(DEADLINE);
  page.on("console", (message) => message.type() === "error" && noted(message.text()));
  page.on("pageerror", (error) => wrong.push(`${options.name}: ${error}`));
  // A refused login is 403, and Chromium says so.
  const noted = (text) => /status of (401|403|404|405|503)/.test(text) || wrong.push(`${options.name}: ${text}`);
  const see = async (name, title) => {
    await settled(page, title);
    expect((await page.title()) === title, `${options.name} ${name}: the title is "${await page.title()}"`);
    const wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth");
    expect(wide <= 0, `${options.name} ${name}: one must scroll sideways, by ${wide}px`);
    await look(page, name);
  };
  await journey(page, see, options);
  await context.close();
}

/** A click is over before the page that it asks for is there: returns when it is, or with the wrong one when none comes. */
async function settled(page, title) {
  for (const end = Date.now() + DEADLINE; Date.now() < end; await page.waitForTimeout(50)) {
    // While one page replaces another, neither has a title to ask for.
    if ((await page.title().catch(() => null)) === title) break;
  }
  await page.waitForLoadState();
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
