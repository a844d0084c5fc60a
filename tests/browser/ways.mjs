// Is it clear what to do where there are several ways to log in, and where a login is too old for what one wants to do?
//
//   node ways.mjs GATEWAY_PORT USER PASSWORD
//
// The gateway is http://app.localhost to the browser, has passwords, a login page of a backend, and a provider that has known
// the user for an hour and lets them in without a question, unless it is asked for a fresh login. How it is looked at is
// in look.mjs.

import { expect, looks, walk } from "./look.mjs";

const [port, user, password] = process.argv.slice(2);
const url = "http://app.localhost";

async function journey(page, see, options) {
  const focused = () => page.evaluate("document.activeElement && document.activeElement.textContent.trim()");
  const fresh = (address) => address.pathname === "/authorize";

  await page.goto(`${url}/report`);
  await see("ways to log in", "Log in");
  for (const way of ["The staff directory", "Log in with the account of this application"]) {
    expect((await page.getByRole("link", { name: way }).count()) === 1, `${options.name}: there is one way "${way}"`);
  }
  expect((await page.getByLabel("Password").count()) === 1, `${options.name}: and the password`);
  await page.getByRole("link", { name: "Log in with the account of this application" }).click();
  await page.waitForURL((address) => address.pathname === "/legacy");
  expect(new URL(page.url()).searchParams.get("return_to") === "/report", `${options.name}: the backend learns where to`);
  await page.goBack();

  // By the keyboard alone: the field for the name has the focus, the ways stand before it.
  // A browser gives the focus after it has loaded the page.
  await page.goto(`${url}/report`);
  await page.locator("#username:focus").waitFor();
  for (const step of ["Shift+Tab", "Shift+Tab"]) await page.keyboard.press(step);
  const reached = [await focused()];
  await page.keyboard.press("Tab");
  reached.push(await focused());
  const both = ["Log in with the account of this application", "The staff directory"];
  expect(JSON.stringify(reached) === JSON.stringify(both), `${options.name}: the keyboard comes to ${reached}`);
  const outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle");
  expect(outline !== "none", `${options.name}: one sees where the focus is`);
  await page.keyboard.press("Enter");
  await page.waitForURL(`${url}/report`);

  // The login here is new, and at the provider it is an hour old: it ends no other session.
  await page.goto(`${url}/.cloakroom/sessions`);
  await see("sessions of an old login", "Where you are logged in");
  const others = page.getByRole("button", { name: /^End:/ });
  const before = await others.count();
  expect(0 < before, `${options.name}: there are other sessions to end`);
  await others.first().click();
  await page.getByText("Please log in once more.").waitFor();
  await see("a login that is too old", "Log in");
  await page.getByRole("link", { name: "The staff directory" }).click();
  await page.waitForURL(fresh);
  await page.getByRole("link", { name: "It is me" }).click();
  await page.waitForURL(`${url}/.cloakroom/sessions`);
  expect((await others.count()) === before, `${options.name}: none has ended yet, and the old one of this browser is gone`);
  await others.first().click();
  await page.getByText("Done. These are left:").waitFor();
  await see("ended after a fresh login", "Where you are logged in");
  expect((await others.count()) === before - 1, `${options.name}: one is left less`);

  // Whoever has a password confirms with that.
  await page.goto(`${url}/.cloakroom/login?reason=confirm&return_to=/.cloakroom/sessions`);
  await page.getByLabel("User name").fill(user);
  await page.getByLabel("Password").fill(password);
  await page.getByLabel("Password").press("Enter");
  await page.waitForURL(`${url}/.cloakroom/sessions`);
}

/** More sessions, for the list. */
async function before(browser) {
  for (const look of [...looks, ...looks, ...looks]) {
    const context = await browser.newContext(look);
    const page = await context.newPage();
    await page.goto(`${url}/.cloakroom/oidc/directory/login`);
    await page.waitForURL(`${url}/`);
    await context.close();
  }
}

await walk(journey, { before, hosts: `MAP app.localhost 127.0.0.1:${port}` });
