// A backend behind Cloakroom: it reads who the user is from the headers, and keeps nothing.
// Start two:   node examples/backend.mjs left 9001      node examples/backend.mjs right 9002
// Then start Cloakroom in front of them, and open http://127.0.0.1:8080/ (not 9001: there nobody tells it who you are).

import { createServer } from "node:http";

const [name = "left", port = "9001"] = process.argv.slice(2);

const escape = (text) =>
  text.replace(/[&<>"']/g, (character) => `&#${character.codePointAt(0)};`);

const page = (greeting, link, headers) => `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escape(name)}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui; max-width: 46rem; margin: 3rem auto }
</style>
<h1>${escape(greeting)}</h1>
<p><strong>${escape(name)}</strong> answered. ${link}</p>
<pre>${escape(headers)}</pre>
`;

const server = createServer((request, response) => {
  // This is all that a backend does to know its user.
  const user = request.headers["x-forwarded-user"];
  const groups = request.headers["x-forwarded-groups"];

  const greeting = user ? `You are ${user}${groups ? ` of ${groups}` : ""}` : "I do not know you";
  const link = user
    ? '<a href="/.cloakroom/logout">Log out</a>'
    : '<a href="/.cloakroom/login">Log in</a>';
  const headers = [];
  for (let i = 0; i < request.rawHeaders.length; i += 2) {
    headers.push(`${request.rawHeaders[i]}: ${request.rawHeaders[i + 1]}`);
  }

  request.resume(); // a body says nothing that the page shows
  response.setHeader("Content-Type", "text/html; charset=utf-8");
  response.end(page(greeting, link, headers.join("\n")));
});

// Longer than Cloakroom keeps an idle connection, so that it is never this side that closes one in use.
server.keepAliveTimeout = 90_000;

// Loopback only: whoever reaches a backend without Cloakroom in front can claim to be anybody.
server.listen(Number(port), "127.0.0.1", () => console.log(`${name} listens on 127.0.0.1:${port}`));
