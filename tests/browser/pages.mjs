// Are the pages good for people? A real Chromium goes through all of them, and axe-core looks at each.
//
//   node pages.mjs URL USER PASSWORD
//
// How it is looked at is in look.mjs.

import { expect, looks, walk } from "./look.mjs";

const [url, user, password] = process.argv.slice(2);

/** Somebody at a browser, who looks at every page. */
async function journey(page, see, options) {
  const logIn = async (name, secret) => {
    await page.getByLabel("User name").fill(name);
    await page.getByLabel("Password").fill(secret);
    await page.getByRole("button", { name: "Log in" }).click();
  };

  await page.goto(`${url}/report`);
  await see("login", "Log in");
  // A browser gives the focus after it has loaded the page.
  await page.locator("#username:focus").waitFor();
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
}

/** More sessions, for the list. */
async function before(browser) {
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
}

await walk(journey, { before });
