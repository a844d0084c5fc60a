#!/usr/bin/env python3
# A backend behind Cloakroom: it reads who the user is from the headers, and keeps nothing.
# Start two:   python3 examples/backend.py left 9001      python3 examples/backend.py right 9002
# Then start Cloakroom in front of them, and open http://127.0.0.1:8080/ (not 9001: there nobody tells it who you are).

import sys
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = sys.argv[1] if len(sys.argv) > 1 else "left"
PORT = int(sys.argv[2]) if len(sys.argv) > 2 else 9001

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui; max-width: 46rem; margin: 3rem auto }}
</style>
<h1>{greeting}</h1>
<p><strong>{name}</strong> answered. {link}</p>
<pre>{headers}</pre>
"""


class Backend(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps the connection open for the next request
    timeout = 90  # longer than Cloakroom keeps an idle connection

    def do_GET(self):
        # This is all that a backend does to know its user.
        user = self.headers.get("X-Forwarded-User")
        groups = self.headers.get("X-Forwarded-Groups", "")

        if user:
            greeting = f"You are {user}" + (f" of {groups}" if groups else "")
            link = '<a href="/.cloakroom/logout">Log out</a>'
        else:
            greeting = "I do not know you"
            link = '<a href="/.cloakroom/login">Log in</a>'
        headers = "\n".join(f"{name}: {value}" for name, value in self.headers.items())
        page = PAGE.format(name=escape(NAME), greeting=escape(greeting), link=link, headers=escape(headers)).encode()

        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_HEAD = do_GET

    def do_POST(self):
        # A body says nothing that the page shows; one without a length ends the connection, unread.
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = self.close_connection or "Transfer-Encoding" in self.headers
        self.do_GET()


if __name__ == "__main__":
    # Loopback only: whoever reaches a backend without Cloakroom in front can claim to be anybody.
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Backend)
    print(f"{NAME} listens on 127.0.0.1:{PORT}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
