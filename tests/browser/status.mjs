// Is the status page good for people? A browser asks its user for the token, and axe-core looks at what it shows.
//
//   node status.mjs URL TOKEN

import { expect, walk } from "./look.mjs";

const [url, token] = process.argv.slice(2);

async function journey(page, see, options) {
  await page.goto(`${url}/status?refresh=off`);
  await see("status", "Cloakroom status");
  const tables = await page.getByRole("table").all();
  expect(tables.length === 2, `${options.name}: a table for each pool, not ${tables.length}`);
  await page.getByRole("link", { name: "look again every 10 seconds" }).click();
  await page.waitForURL(`${url}/status`);
  await page.getByRole("link", { name: "stop that" }).click();
  await page.waitForURL(`${url}/status?refresh=off`);
}

const credentials = { username: "operator", password: token };
await walk(journey, { credentials, viewport: { width: 1280, height: 1000 } });
