#!/usr/bin/env python3
# A shop behind Cloakroom that keeps nothing: the cart is in the user's session, and a login page of its own says who the
# user is. Any number of these answer in turn, and may be restarted at any time.
#
#   python3 examples/cart/shop.py left 9001 &
#   python3 examples/cart/shop.py right 9002 &
#   cloakroom run examples/cart/cloakroom.toml      and open http://127.0.0.1:8080/

import re
import sys
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

NAME = sys.argv[1] if len(sys.argv) > 1 else "left"
PORT = int(sys.argv[2]) if len(sys.argv) > 2 else 9001

GOODS = ["book", "pen", "lamp"]
# The login that this shop always had. It is an example: yours has passwords that are no secret to nobody.
USERS = {"alice": "wonderland", "bob": "builder"}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }}
form {{ display: inline }}
</style>
<h1>{title}</h1>
{body}
<p><small>{name} answered.</small></p>
"""


def attributes(field):
    """Session-Attributes as a dict: name="text", with \\" and \\\\ in it, or name=%"text" with %xx (RFC 9651)."""
    found = re.findall(r'([a-z*][a-z0-9_.*-]*)=(%?)"((?:[^"\\]|\\.)*)"', field or "")
    return {name: unquote(text) if display else re.sub(r"\\(.)", r"\1", text) for name, display, text in found}


def text(value):
    """A text as such a field says it."""
    if value.isascii() and value.isprintable():
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    plain = " !#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
    return '%"' + "".join(c if c in plain or c.isascii() and c.isalnum() else quote(c).lower() for c in value) + '"'


class Shop(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 90  # longer than Cloakroom keeps an idle connection

    def do_GET(self):
        path = urlsplit(self.path).path
        if path == "/login":
            self.page("Log in", self.login_form())
        elif path == "/":
            self.page("The shop", self.goods())
        elif path == "/checkout":
            user = self.headers.get("X-Forwarded-User", "")
            self.page("Your order", f"<p>{escape(user)} takes: {escape(self.cart_text())}</p>")
        else:
            self.page("Not found", "", status=404)

    do_HEAD = do_GET

    def do_POST(self):
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        field = lambda name: form.get(name, [""])[0]
        path = urlsplit(self.path).path
        if path == "/add" and field("item") in GOODS:
            # One attribute for each kind of thing: two requests at the same time do not undo each other.
            item = field("item")
            self.redirect("/", ("Session-Set", f"cart_{item}={text(str(self.cart().get(item, 0) + 1))}"))
        elif path == "/empty":
            self.redirect("/", ("Session-Unset", ", ".join(f"cart_{item}" for item in GOODS)))
        elif path == "/login" and USERS.get(field("user")) == field("password"):
            self.redirect(self.local(field("return_to")), ("Session-Login", f"user={text(field('user'))}"))
        elif path == "/login":
            self.page("Log in", "<p>That did not work.</p>" + self.login_form(), status=403)
        elif path == "/logout":
            self.redirect("/", ("Session-Logout", "?1"))
        else:
            self.page("Not found", "", status=404)

    def cart(self):
        held = attributes(self.headers.get("Session-Attributes"))
        return {item: int(held[f"cart_{item}"]) for item in GOODS if f"cart_{item}" in held}

    def cart_text(self):
        return ", ".join(f"{count} {item}" for item, count in self.cart().items()) or "nothing"

    def goods(self):
        user = self.headers.get("X-Forwarded-User")
        add = '<form method="post" action="/add"><button name="item" value="{0}">a {0}</button></form> '
        greeting = (
            f'<p>You are {escape(user)}. <form method="post" action="/logout"><button>Log out</button></form></p>'
            if user
            else '<p><a href="/login">Log in</a></p>'
        )
        buttons = "".join(add.format(item) for item in GOODS)
        empty = '<form method="post" action="/empty"><button>Empty it</button></form>'
        cart = f"<p>In your cart: {escape(self.cart_text())} {empty}</p>"
        return greeting + f"<p>{buttons}</p>" + cart + '<p><a href="/checkout">Check out</a></p>'

    def login_form(self):
        query = parse_qs(urlsplit(self.path).query)
        return_to = escape(query.get("return_to", ["/"])[0], quote=True)
        return (
            f'<form method="post" action="/login"><input type="hidden" name="return_to" value="{return_to}">'
            '<p><label>User <input name="user" autocomplete="username"></label></p>'
            '<p><label>Password <input name="password" type="password" autocomplete="current-password"></label></p>'
            "<p><button>Log in</button></p></form>"
        )

    @staticmethod
    def local(target):
        """A path of this site: whoever made the link must not choose another one."""
        return target if re.fullmatch(r"/([A-Za-z0-9._~?&=%-][A-Za-z0-9._~/?&=%-]*)?", target) else "/"

    def redirect(self, target, directive):
        self.send_response(303)
        self.send_header("Location", target)
        self.send_header(*directive)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def page(self, title, body, status=200):
        page = PAGE.format(title=escape(title), body=body, name=escape(NAME)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    # Loopback only: whoever reaches a backend without Cloakroom in front can claim to be anybody.
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Shop)
    print(f"{NAME} listens on 127.0.0.1:{server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
