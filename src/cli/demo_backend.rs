//! What stands behind the demo? A small web server that says what it was told of the user, and nothing else.
//!
//! It is what a backend behind Cloakroom looks like: it keeps no session and knows no password, it reads headers.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use askama::Template;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{FAILED, Terminal};

/// Of one request head; more than the gateway in front lets pass.
const HEAD_BYTES_MAX: u64 = 64 * 1024;

/// Longer than the gateway keeps an idle connection, so that it is never this side that closes one in use.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// What the page is about.
const FIRST_SHOWN: [&str; 4] =
    ["x-forwarded-user", "x-forwarded-preferred-username", "x-forwarded-email", "x-forwarded-groups"];

/// When a connection cannot be accepted (too many open files): before the next attempt.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// One at work, in a process of its own so that it can be killed; it ends with this value.
#[derive(Debug)]
pub struct DemoBackend {
    child: Child,
    address: SocketAddr,
}

impl DemoBackend {
    /// # Errors
    /// When it does not start, or does not say where it listens.
    pub fn start(name: &str) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["demo-backend", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut said)?;
        }
        match said.trim().parse() {
            Ok(address) => Ok(Self { child, address }),
            Err(_) => {
                let _ = child.kill();
                Err(io::Error::other(format!("demo backend {name} does not start")))
            }
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for DemoBackend {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process: says where it listens, and serves until whoever started it is gone.
pub fn run(name: &str, terminal: &mut Terminal<'_>) -> ExitCode {
    let served = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| {
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        terminal.say(address);
        // A pipe from whoever started us: its end is theirs, however they ended.
        std::thread::spawn(|| {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            std::process::exit(0);
        });
        runtime.block_on(serve(name, listener))
    });
    match served {
        Ok(never) => match never {},
        Err(error) => terminal.fail(&error, FAILED),
    }
}

/// Serves on `listener` until the future is dropped; `name` is what the page says of who answered.
///
/// # Errors
/// When the runtime cannot take the listener.
pub async fn serve(name: &str, listener: std::net::TcpListener) -> io::Result<Infallible> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let name = name.to_owned();
                tokio::spawn(async move {
                    if let Err(err) = converse(&name, stream).await {
                        tracing::debug!("demo backend: connection ended: {err}");
                    }
                });
            }
            Err(err) => {
                tracing::warn!("demo backend: no connection accepted: {err}");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Answers the requests of one connection, in their order.
async fn converse(name: &str, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let Ok(request) = timeout(IDLE_TIMEOUT, Request::read(&mut stream)).await else { return Ok(()) };
        let Some(request) = request? else { return Ok(()) };
        // The body of a form or an upload says nothing that the page shows.
        let rest = timeout(IDLE_TIMEOUT, request.pass_over_body(&mut stream)).await;
        let keep = matches!(rest, Ok(Ok(()))) && !request.asks_to_close();
        stream.write_all(&request.answer(name, keep)).await?;
        if !keep {
            return stream.shutdown().await;
        }
    }
}

struct Request {
    method: String,
    target: String,
    fields: Vec<(String, String)>,
}

impl Request {
    /// The next one; `None` when the connection ends before it.
    async fn read(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Self>> {
        let mut head = stream.take(HEAD_BYTES_MAX);
        let Some(start) = line(&mut head).await? else { return Ok(None) };
        let mut words = start.split(' ');
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a request line"));
        };
        let mut fields = Vec::new();
        loop {
            match line(&mut head).await? {
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(line) if line.is_empty() => break,
                Some(line) => {
                    if let Some((name, value)) = line.split_once(':') {
                        fields.push((name.to_owned(), value.trim().to_owned()));
                    }
                }
            }
        }
        Ok(Some(Self { method: method.to_owned(), target: target.to_owned(), fields }))
    }

    /// # Errors
    /// For a body whose end it does not look for: the connection cannot go on after it.
    async fn pass_over_body(&self, stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<()> {
        if self.field("transfer-encoding").is_some() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let Some(length) = self.field("content-length") else { return Ok(()) };
        let length = length.parse().map_err(|_| io::ErrorKind::InvalidData)?;
        let passed = tokio::io::copy_buf(&mut stream.take(length), &mut tokio::io::sink()).await?;
        if passed == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn asks_to_close(&self) -> bool {
        self.field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn answer(&self, name: &str, keep: bool) -> Vec<u8> {
        let mut fields: Vec<_> = self.fields.iter().collect();
        // Stable: the others stay in the order in which they came.
        fields.sort_by_key(|(name, _)| {
            FIRST_SHOWN.iter().position(|first| first.eq_ignore_ascii_case(name)).unwrap_or(FIRST_SHOWN.len())
        });
        let page = Page {
            backend: name,
            request: &format!("{} {}", self.method, self.target),
            user: self.field("x-forwarded-user"),
            display_name: self.field("x-forwarded-preferred-username").or_else(|| self.field("x-forwarded-user")),
            fields: &fields,
        };
        let (status, page) = match page.render() {
            Ok(page) => ("200 OK", page),
            Err(err) => ("500 Internal Server Error", err.to_string()),
        };
        let mut answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\n\
             Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
             frame-ancestors 'none'\r\n{}\r\n",
            page.len(),
            if keep { "" } else { "Connection: close\r\n" }
        )
        .into_bytes();
        if self.method != "HEAD" {
            answer.extend_from_slice(page.as_bytes());
        }
        answer
    }
}

/// One line of a head without its end; `None` at the end of the connection. Bytes outside UTF-8 show as `�`.
async fn line(head: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    if head.read_until(b'\n', &mut bytes).await? == 0 {
        return Ok(None);
    }
    if bytes.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if bytes.last() == Some(&b'\r') {
        bytes.pop();
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

#[derive(Template)]
#[template(
    ext = "html",
    source = r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ backend }}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; background: Canvas; color: CanvasText; }
main { max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-top: 1px solid #8885; }
caption { text-align: left; }
@media (min-width: 40rem) { th { white-space: nowrap; } }
td { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
{% match display_name %}{% when Some with (display_name) %}<h1>You are {{ display_name }}</h1>
{% when None %}<h1>I do not know you</h1>
{% endmatch %}<p><strong>{{ backend }}</strong> answered <code>{{ request }}</code>. It keeps no session: all that it knows of you stands in
the headers below. Reload, and the other backend answers.</p>
{% if user.is_some() %}<p><a href="/.cloakroom/logout">Log out</a></p>
{% else %}<p><a href="/.cloakroom/login">Log in</a></p>
{% endif %}<table>
<caption>Headers received</caption>
<tbody>
{% for (name, value) in fields %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody>
</table>
</main>
</body>
</html>
"#
)]
struct Page<'a> {
    backend: &'a str,
    request: &'a str,
    user: Option<&'a str>,
    display_name: Option<&'a str>,
    fields: &'a [&'a (String, String)],
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes `requests` on one connection and reads until the backend closes it.
    async fn exchange(requests: &str) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move { serve("left", listener).await });
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(requests.as_bytes()).await.unwrap();
        let mut answers = String::new();
        client.read_to_string(&mut answers).await.unwrap();
        serving.abort();
        answers
    }

    #[tokio::test]
    async fn the_page_says_who_you_are_and_who_answered_and_what_it_received() {
        let page = exchange("GET /a HTTP/1.1\r\nX-Forwarded-User: ann\r\nX-Odd: x\r\nConnection: close\r\n\r\n").await;
        for part in
            ["<h1>You are ann</h1>", "<strong>left</strong>", "GET /a", ">X-Odd</th><td>x<", "/.cloakroom/logout"]
        {
            assert!(page.contains(part), "{part} is on the page: {page}");
        }
        assert!(!page.contains("<script"), "the page runs without scripts");
    }

    #[tokio::test]
    async fn the_page_begins_with_who_you_are_and_asks_for_nothing_more() {
        let page = exchange(
            "GET / HTTP/1.1\r\nHost: h\r\nX-Odd: x\r\nX-Forwarded-Groups: staff\r\nX-Forwarded-Email: ann@h\r\n\
             X-Forwarded-User: ann\r\nConnection: close\r\n\r\n",
        )
        .await;
        let rows: Vec<_> = page.split("<th scope=\"row\">").skip(1).map(|row| row.split('<').next().unwrap()).collect();
        let expected = ["X-Forwarded-User", "X-Forwarded-Email", "X-Forwarded-Groups", "Host", "X-Odd", "Connection"];
        assert_eq!(rows, expected);
        assert!(
            page.contains("<link rel=\"icon\" href=\"data:,\">") && page.contains("img-src data:"),
            "a request for an icon would take the other backend's turn: {page}"
        );
    }

    #[tokio::test]
    async fn what_a_client_sends_is_text_on_the_page_and_never_markup() {
        let page =
            exchange("GET /<img> HTTP/1.1\r\nX-Forwarded-User: <b>ann\r\nX-<i>: <script>\r\nConnection: close\r\n\r\n")
                .await;
        for markup in ["<img>", "<b>", "<i>", "<script>"] {
            assert!(!page.contains(markup), "{markup} is escaped: {page}");
        }
    }

    #[tokio::test]
    async fn a_connection_serves_many_requests_and_ends_where_it_can_no_longer_tell_them_apart() {
        for (requests, answers, why) in [
            ("GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nConnection: close\r\n\r\n", 2, "keep-alive"),
            (
                "POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n",
                2,
                "a body",
            ),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n", 1, "chunks"),
            ("POST / HTTP/1.1\r\nContent-Length: x\r\n\r\nGET / HTTP/1.1\r\n\r\n", 1, "a length that is none"),
            ("nonsense\r\n\r\n", 0, "not HTTP"),
        ] {
            let got = exchange(requests).await.matches("HTTP/1.1 200 OK").count();
            assert_eq!(got, answers, "{why}");
        }
    }
}
