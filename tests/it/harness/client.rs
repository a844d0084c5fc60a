//! What does a browser, or an attacker, send and get? Raw connections, and on them a client with a cookie jar.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::DEADLINE;
use super::wire::{Head, Length, Reader};

/// Any key will do; this one is the example of RFC 6455, section 1.3.
pub(crate) const WEBSOCKET_KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// What a response may say. Anything else is a leak, or a name to be added here on purpose.
const ALLOWED_FIELDS: &[&str] = &[
    "allow",
    "cache-control",
    "clear-site-data",
    "connection",
    "content-language",
    "content-length",
    "content-security-policy",
    "content-type",
    "cross-origin-opener-policy",
    "cross-origin-resource-policy",
    "date",
    "location",
    "permissions-policy",
    "referrer-policy",
    "retry-after",
    "sec-websocket-accept",
    "set-cookie",
    "strict-transport-security",
    "transfer-encoding",
    "upgrade",
    "vary",
    "www-authenticate",
    "x-content-type-options",
    "x-frame-options",
    "x-request-id",
];

/// The bytes of a plain GET.
pub(crate) fn get(target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

/// One connection: exact bytes out, messages in.
pub(crate) struct Connection {
    reader: Reader<Stream>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Connection {
    #[track_caller]
    pub(crate) fn open(address: SocketAddr) -> Self {
        Self { reader: Reader::new(Stream::Plain(connect(address).unwrap())) }
    }

    /// The other side must prove to be `name`.
    ///
    /// # Errors
    /// When the port is closed, or the handshake fails.
    pub(crate) fn open_as(address: SocketAddr, name: &str, trust: &Arc<ClientConfig>) -> io::Result<Self> {
        Self::open_tls(connect(address)?, name, trust)
    }

    fn open_tls(stream: TcpStream, name: &str, trust: &Arc<ClientConfig>) -> io::Result<Self> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let session = ClientConnection::new(Arc::clone(trust), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(session, stream);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self { reader: Reader::new(Stream::Tls(Box::new(stream))) })
    }

    #[track_caller]
    pub(crate) fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_write(bytes).unwrap();
    }

    /// # Errors
    /// When the other side has closed.
    pub(crate) fn try_write(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.reader.stream().write_all(bytes.as_ref())?;
        self.reader.stream().flush()
    }

    /// The next final response; those that only inform (1xx) are passed over, except 101.
    ///
    /// # Errors
    /// When there is none, or not all of it.
    pub(crate) fn read_response(&mut self, method: &str) -> io::Result<Response> {
        loop {
            let Some(head) = self.read_head()? else { return Err(io::ErrorKind::UnexpectedEof.into()) };
            let status = status(&head)?;
            if status != 101 && (100..200).contains(&status) {
                continue;
            }
            // RFC 9110, section 6.4.1: these have no body, whatever their fields say.
            let without_body = method == "HEAD" || matches!(status, 101 | 204 | 304);
            let length = if without_body { Length::Exactly(0) } else { head.length(Length::UntilClose) };
            let body = self.reader.body(length)?;
            let closes = head.closes() || length == Length::UntilClose;
            return Ok(Response { status, head, body, closes });
        }
    }

    /// # Errors
    /// When the connection ends within it.
    pub(crate) fn read_head(&mut self) -> io::Result<Option<Head>> {
        self.reader.head()
    }

    /// One chunk of a chunked body; the last one is empty.
    ///
    /// # Errors
    /// When the connection ends within it.
    pub(crate) fn read_chunk(&mut self) -> io::Result<Vec<u8>> {
        let mut chunk = Vec::new();
        self.reader.chunk(&mut chunk)?;
        Ok(chunk)
    }

    /// # Errors
    /// When the connection ends before.
    pub(crate) fn read_exactly(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        self.reader.body(Length::Exactly(bytes))
    }

    /// Everything until the other side closes; a reset is an end too.
    ///
    /// # Errors
    /// When it does not close within the deadline.
    pub(crate) fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        loop {
            match self.reader.take_some(u64::MAX, &mut bytes) {
                Ok(0) => return Ok(bytes),
                Ok(_) => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Err(err),
                Err(_) => return Ok(bytes),
            }
        }
    }

    /// Waits for the other side to close, and for nothing to come before.
    #[track_caller]
    pub(crate) fn assert_closed(&mut self, why: &str) {
        let rest = self.read_to_end().unwrap_or_else(|err| panic!("still open ({err}): {why}"));
        assert!(rest.is_empty(), "{} bytes came before the end: {why}", rest.len());
    }

    /// Ends it with a reset in place of an orderly end, as a client does that is killed.
    pub(crate) fn reset(mut self) {
        let socket = socket2::SockRef::from(self.reader.stream().socket());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
}

/// A response, whole.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    /// The connection ends with it.
    pub(crate) closes: bool,
}

/// What an [echoing](super::backend::Answer::Echo) backend says it saw.
#[derive(Clone, Debug, serde::Deserialize)]
pub(crate) struct Seen {
    pub(crate) backend: String,
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body_bytes: usize,
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Every value of a field.
    pub(crate) fn headers(&self, name: &str) -> Vec<&str> {
        self.head.values(name)
    }

    /// The value of a field that is there at most once.
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.value(name)
    }

    /// The echo of a backend that got the request.
    #[track_caller]
    pub(crate) fn seen(&self) -> Seen {
        assert_eq!(self.status, 200, "a backend answered: {self:?}");
        serde_json::from_slice(&self.body).unwrap_or_else(|err| panic!("no echo ({err}): {}", self.text()))
    }
}

impl Seen {
    /// Every value of a field, whatever its case.
    pub(crate) fn headers(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
    }
}

/// A well-behaved client: keeps connections and cookies, and fails on any field that no response should have.
pub(crate) struct Client {
    address: SocketAddr,
    host: String,
    trust: Option<Arc<ClientConfig>>,
    preface: Vec<u8>,
    idle: Mutex<Vec<Connection>>,
    cookies: Mutex<Vec<(String, String)>>,
    allowed: Vec<String>,
}

impl Client {
    pub(crate) fn of(address: SocketAddr) -> Self {
        Self {
            address,
            host: address.to_string(),
            trust: None,
            preface: Vec::new(),
            idle: Mutex::default(),
            cookies: Mutex::default(),
            allowed: ALLOWED_FIELDS.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    /// Speaks TLS, and trusts whom `trust` says.
    pub(crate) fn of_tls(address: SocketAddr, trust: Arc<ClientConfig>) -> Self {
        Self { host: format!("localhost:{}", address.port()), trust: Some(trust), ..Self::of(address) }
    }

    /// What the `Host` field says.
    pub(crate) fn with_host(mut self, host: &str) -> Self {
        host.clone_into(&mut self.host);
        self
    }

    /// Each connection begins with these bytes, before TLS.
    pub(crate) fn announced_by(mut self, preface: &[u8]) -> Self {
        preface.clone_into(&mut self.preface);
        self
    }

    /// A field that responses of this test may have.
    pub(crate) fn allowing(mut self, field: &str) -> Self {
        self.allowed.push(field.to_ascii_lowercase());
        self
    }

    /// Scheme and authority, as `Origin` says it.
    pub(crate) fn origin(&self) -> String {
        let scheme = if self.trust.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.host)
    }

    pub(crate) fn get(&self, target: &str) -> Sending<'_> {
        self.request("GET", target)
    }

    pub(crate) fn request(&self, method: &str, target: &str) -> Sending<'_> {
        Sending { client: self, method: method.into(), target: target.into(), fields: Vec::new(), body: None }
    }

    /// A form, sent as a browser sends it from a page of the same origin.
    pub(crate) fn post_form(&self, target: &str, fields: &[(&str, &str)]) -> Sending<'_> {
        let form = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        self.request("POST", target)
            .header("Origin", &self.origin())
            .header("Sec-Fetch-Site", "same-origin")
            .header("Sec-Fetch-Mode", "navigate")
            .header("Content-Type", "application/x-www-form-urlencoded")
            .body(form)
    }

    /// A GET as a browser sends it when somebody follows a link or types an address.
    pub(crate) fn navigate(&self, target: &str) -> Sending<'_> {
        self.get(target)
            .header("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")
            .header("Sec-Fetch-Dest", "document")
            .header("Sec-Fetch-Mode", "navigate")
            .header("Sec-Fetch-Site", "none")
    }

    /// Opens a WebSocket from our own origin; `fields` are added to the handshake.
    ///
    /// # Errors
    /// The response, when it is not 101.
    pub(crate) fn web_socket(&self, target: &str, fields: &[(&str, &str)]) -> Result<Connection, Box<Response>> {
        self.try_web_socket(target, fields).map_err(|refused| refused.expect("an answer to the handshake"))
    }

    /// # Errors
    /// As [`Self::web_socket`]; nothing, without an answer.
    pub(crate) fn try_web_socket(
        &self,
        target: &str,
        fields: &[(&str, &str)],
    ) -> Result<Connection, Option<Box<Response>>> {
        let mut handshake = self.get(target);
        if !fields.iter().any(|(name, _)| name.eq_ignore_ascii_case("origin")) {
            handshake = handshake.header("Origin", &self.origin());
        }
        for (name, value) in [
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", WEBSOCKET_KEY),
        ] {
            handshake = handshake.header(name, value);
        }
        for (name, value) in fields {
            handshake = handshake.header(name, value);
        }
        let mut connection = self.connect().map_err(|_| None)?;
        connection.try_write(handshake.bytes()).map_err(|_| None)?;
        let response = connection.read_response("GET").map_err(|_| None)?;
        self.look_at(&response);
        if response.status == 101 { Ok(connection) } else { Err(Some(Box::new(response))) }
    }

    /// A connection of its own, for bytes that no well-behaved client sends.
    ///
    /// # Errors
    /// When the port is closed, or the handshake fails.
    pub(crate) fn connect(&self) -> io::Result<Connection> {
        let mut stream = connect(self.address)?;
        stream.write_all(&self.preface)?;
        match &self.trust {
            Some(trust) => Connection::open_tls(stream, "localhost", trust),
            None => Ok(Connection { reader: Reader::new(Stream::Plain(stream)) }),
        }
    }

    pub(crate) fn cookie(&self, name: &str) -> Option<String> {
        self.cookies.lock().unwrap().iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }

    pub(crate) fn cookies(&self) -> Vec<(String, String)> {
        self.cookies.lock().unwrap().clone()
    }

    pub(crate) fn set_cookie(&self, name: &str, value: &str) {
        let mut cookies = self.cookies.lock().unwrap();
        cookies.retain(|(n, _)| n != name);
        cookies.push((name.to_owned(), value.to_owned()));
    }

    /// What the `Cookie` field would say; `None` with an empty jar.
    pub(crate) fn cookie_field(&self) -> Option<String> {
        let cookies: Vec<String> = self.cookies().iter().map(|(name, value)| format!("{name}={value}")).collect();
        (!cookies.is_empty()).then(|| cookies.join("; "))
    }

    /// Keeps its cookies and checks its fields.
    #[track_caller]
    fn look_at(&self, response: &Response) {
        for (name, _) in &response.head.fields {
            assert!(self.allowed.contains(&name.to_ascii_lowercase()), "no response should say {name}: {response:?}");
        }
        for line in response.headers("set-cookie") {
            let pair = line.split(';').next().unwrap_or_default();
            let (name, value) = pair.split_once('=').unwrap_or_else(|| panic!("not a cookie: {line}"));
            let attributes = line.to_ascii_lowercase();
            self.set_cookie(name, value);
            if attributes.contains("max-age=0") || attributes.contains("expires=thu, 01 jan 1970") {
                self.cookies.lock().unwrap().retain(|(n, _)| n != name);
            }
        }
    }
}

/// A request on its way.
#[must_use = "nothing is sent before `send`"]
pub(crate) struct Sending<'c> {
    client: &'c Client,
    method: String,
    target: String,
    fields: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl Sending<'_> {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// # Panics
    /// Without a whole response.
    #[track_caller]
    pub(crate) fn send(self) -> Response {
        let (method, target) = (self.method.clone(), self.target.clone());
        self.try_send().unwrap_or_else(|err| panic!("{method} {target}: no response: {err}"))
    }

    /// # Errors
    /// Without a whole response.
    #[track_caller]
    pub(crate) fn try_send(self) -> io::Result<Response> {
        let bytes = self.bytes();
        let kept = self.client.idle.lock().unwrap().pop();
        let reused = kept.is_some();
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.client.connect()?,
        };
        let mut response = connection.try_write(&bytes).and_then(|()| connection.read_response(&self.method));
        // An idle connection may be closed at any time: a client asks once more on a new one (RFC 9112, 9.3.1).
        if reused && response.is_err() {
            connection = self.client.connect()?;
            response = connection.try_write(&bytes).and_then(|()| connection.read_response(&self.method));
        }
        let response = response?;
        self.client.look_at(&response);
        if !response.closes && response.status != 101 {
            self.client.idle.lock().unwrap().push(connection);
        }
        Ok(response)
    }

    /// What `send` would write.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        let mut add = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
        if !self.fields.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            add("Host", &self.client.host);
        }
        if let Some(cookies) = self.client.cookie_field() {
            add("Cookie", &cookies);
        }
        for (name, value) in &self.fields {
            add(name, value);
        }
        if let Some(body) = &self.body {
            add("Content-Length", &body.len().to_string());
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(self.body.as_deref().unwrap_or_default());
        bytes
    }
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

fn status(head: &Head) -> io::Result<u16> {
    let status = head.start_line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    status.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no status line: {}", head.start_line)))
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(bytes),
            Self::Tls(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::backend::{Answer, Backend};
    use super::*;

    #[test]
    fn cookies_come_back_until_they_are_taken_away() {
        let backend = Backend::answering(|request| match request.target() {
            "/in" => Answer::response(200, &[("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2; HttpOnly")], ""),
            "/out" => Answer::response(200, &[("Set-Cookie", "a=; Max-Age=0")], ""),
            _ => Answer::Echo,
        });
        let client = Client::of(backend.address());

        client.get("/in").send();
        assert_eq!(client.get("/").send().seen().headers("cookie"), ["a=1; b=2"]);
        client.get("/out").send();
        assert_eq!(client.get("/").send().seen().headers("cookie"), ["b=2"]);
    }

    #[test]
    #[should_panic(expected = "no response should say X-Secret")]
    fn a_field_that_nobody_allowed_fails_the_test() {
        let backend = Backend::always(Answer::response(200, &[("X-Secret", "1")], ""));
        Client::of(backend.address()).get("/").send();
    }

    #[test]
    fn a_body_is_read_however_it_is_framed() {
        for (response, closes) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", false),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: v\r\n\r\n",
                false,
            ),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", false),
            ("HTTP/1.1 200 OK\r\n\r\nhello", true),
        ] {
            let backend = Backend::answering(move |_| {
                let bytes = response.as_bytes().to_vec();
                if closes { Answer::ExactlyThenClose(bytes) } else { Answer::Exactly(bytes) }
            });
            let response = Client::of(backend.address()).get("/").send();
            assert_eq!((response.text().as_str(), response.closes), ("hello", closes));
        }
    }
}
