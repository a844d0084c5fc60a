//! How do both ends of a test speak HTTP/2? A client and a backend of the crate `h2`, and raw frames for what no
//! well-behaved client sends.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;

use super::client::Seen;
use super::{DEADLINE, tls};

/// A well-behaved client on one connection.
pub(crate) struct Http2Client {
    runtime: Runtime,
    sender: SendRequest<Bytes>,
    authority: String,
}

/// A response, whole.
#[derive(Debug)]
pub(crate) struct Http2Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Option<HeaderMap>,
}

/// A request on its way, both sides of it open.
pub(crate) struct Exchange<'c> {
    client: &'c Http2Client,
    pub(crate) sending: SendStream<Bytes>,
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
}

impl Http2Client {
    /// Over TLS, where the server must choose HTTP/2.
    pub(crate) fn connect(address: SocketAddr, trust: &Arc<ClientConfig>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let connector = TlsConnector::from(tls::http2(trust));
        let sender = runtime.block_on(async {
            let socket = tokio::net::TcpStream::connect(address).await.unwrap();
            let socket = connector.connect(ServerName::try_from("localhost").unwrap(), socket).await.unwrap();
            assert_eq!(socket.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            let (sender, connection) = h2::client::handshake(socket).await.unwrap();
            tokio::spawn(async move {
                let _ = connection.await; // its requests say how it ended
            });
            sender
        });
        Self { runtime, sender, authority: format!("localhost:{}", address.port()) }
    }

    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    pub(crate) fn request(&self, method: &str, path: &str, fields: &[(&str, &str)]) -> Request<()> {
        let uri = format!("https://{}{path}", self.authority);
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    pub(crate) fn get(&self, path: &str, fields: &[(&str, &str)]) -> Http2Response {
        self.send("GET", path, fields, b"")
    }

    /// # Panics
    /// Without a whole response.
    #[track_caller]
    pub(crate) fn send(&self, method: &str, path: &str, fields: &[(&str, &str)], body: &[u8]) -> Http2Response {
        self.try_send(method, path, fields, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// # Errors
    /// Without a whole response.
    pub(crate) fn try_send(
        &self,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Http2Response, h2::Error> {
        let mut exchange = self.begin(method, path, fields, body.is_empty())?;
        if !body.is_empty() {
            exchange.write(body, true);
        }
        exchange.finish()
    }

    /// Sends the head of a request.
    pub(crate) fn begin(
        &self,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        is_whole: bool,
    ) -> Result<Exchange<'_>, h2::Error> {
        let request = self.request(method, path, fields);
        let (response, sending) = self.wait(async {
            let mut sender = self.sender.clone().ready().await?;
            sender.send_request(request, is_whole)
        })?;
        Ok(Exchange { client: self, sending, response: Some(response), body: None })
    }

    fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async {
            tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("nothing for {DEADLINE:?}"))
        })
    }
}

impl Exchange<'_> {
    /// Gives up when nobody takes it.
    pub(crate) fn write(&mut self, bytes: &[u8], is_last: bool) {
        let mut rest = Bytes::copy_from_slice(bytes);
        self.client.runtime.block_on(async {
            while !rest.is_empty() {
                self.sending.reserve_capacity(rest.len());
                let capacity = std::future::poll_fn(|task| self.sending.poll_capacity(task));
                let Ok(Some(Ok(count))) = tokio::time::timeout(DEADLINE, capacity).await else { return };
                let part = rest.split_to(count.min(rest.len()));
                let is_end = is_last && rest.is_empty();
                if self.sending.send_data(part, is_end).is_err() {
                    return;
                }
            }
        });
    }

    /// Waits for `100 Continue`.
    ///
    /// # Errors
    /// When the stream ends before.
    pub(crate) fn informed(&mut self) -> Result<u16, h2::Error> {
        let response = self.response.as_mut().expect("no response yet");
        let informed = std::future::poll_fn(|task| response.poll_informational(task));
        let informed = self.client.wait(informed).expect("a response that informs")?;
        Ok(informed.status().as_u16())
    }

    /// Waits for the head of the response.
    ///
    /// # Errors
    /// When the stream ends before.
    pub(crate) fn head(&mut self) -> Result<(u16, HeaderMap), h2::Error> {
        let response = self.response.take().expect("one head");
        let (parts, body) = self.client.wait(response)?.into_parts();
        self.body = Some(body);
        Ok((parts.status.as_u16(), parts.headers))
    }

    /// The next bytes of the response; none at its end.
    ///
    /// # Errors
    /// When it breaks off.
    pub(crate) fn chunk(&mut self) -> Result<Option<Bytes>, h2::Error> {
        let body = self.body.as_mut().expect("after the head");
        let chunk = self.client.wait(body.data()).transpose()?;
        if let Some(chunk) = &chunk {
            let _ = body.flow_control().release_capacity(chunk.len());
        }
        Ok(chunk)
    }

    /// # Errors
    /// When it breaks off.
    pub(crate) fn finish(mut self) -> Result<Http2Response, h2::Error> {
        let (status, headers) = self.head()?;
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk()? {
            body.extend_from_slice(&chunk);
        }
        let stream = self.body.as_mut().expect("after the head");
        let trailers = self.client.wait(stream.trailers())?;
        Ok(Http2Response { status, headers, body, trailers })
    }
}

impl Http2Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The echo of a backend that got the request.
    #[track_caller]
    pub(crate) fn seen(&self) -> Seen {
        assert_eq!(self.status, 200, "a backend answered: {self:?} {}", self.text());
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no echo ({error}): {}", self.text()))
    }
}

/// A web server that speaks HTTP/2 without TLS (h2c), and by paths:
///
/// - `/echo...`: what was seen, as [`Seen`], with the trailers `grpc-status: 0`, `set-cookie` and `session-set`;
/// - `/talk`: each chunk comes back, until the client ends;
/// - `/early`: 413 before the body;
/// - `/refused-first`: each first attempt of a connection is refused unseen;
/// - `/kept-closed`: only the first request of a connection is answered, and the connection ends;
/// - `/broken`: the response breaks off;
/// - `/reset`: no response, an error;
/// - `/bytes/N`: N bytes.
pub(crate) struct Http2Backend {
    runtime: Option<Runtime>,
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Http2Backend {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&seen);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let all = Arc::clone(&all);
                tokio::spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(socket).await else { return };
                    let (mut refused, mut kept) = (false, false);
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        let path = request.uri().path().to_owned();
                        all.lock().unwrap().push(format!("{} {path}", request.method()));
                        if path == "/refused-first" && !std::mem::replace(&mut refused, true) {
                            respond.send_reset(h2::Reason::REFUSED_STREAM);
                            continue;
                        }
                        if std::mem::replace(&mut kept, true) && path == "/kept-closed" {
                            break;
                        }
                        tokio::spawn(async move {
                            let _ = answer(request, respond).await; // the client went away
                        });
                    }
                });
            }
        });
        Self { runtime: Some(runtime), address, seen }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Method and path of every request so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Http2Backend {
    fn drop(&mut self) {
        self.runtime.take().expect("dropped once").shutdown_background();
    }
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let (parts, mut body) = request.into_parts();
    let ok = http::Response::builder().status(200).body(()).unwrap();
    let path = parts.uri.path().to_owned();
    if path == "/talk" {
        let mut response = respond.send_response(ok, false)?;
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            let _ = body.flow_control().release_capacity(chunk.len());
            write(&mut response, chunk, false).await?;
        }
        return response.send_data(Bytes::new(), true);
    }
    if path == "/early" {
        let early = http::Response::builder().status(413).body(()).unwrap();
        respond.send_response(early, false)?.send_data(Bytes::from_static(b"too much"), true)?;
        while let Some(Ok(chunk)) = body.data().await {
            let _ = body.flow_control().release_capacity(chunk.len());
        }
        return Ok(());
    }
    if path == "/reset" {
        respond.send_reset(h2::Reason::INTERNAL_ERROR);
        return Ok(());
    }
    if path == "/broken" {
        let mut response = respond.send_response(ok, false)?;
        response.send_data(Bytes::from_static(b"the beginning"), false)?;
        response.send_reset(h2::Reason::INTERNAL_ERROR);
        return Ok(());
    }
    if let Some(count) = path.strip_prefix("/bytes/") {
        let mut left = count.parse::<usize>().unwrap();
        let mut response = respond.send_response(ok, false)?;
        while left != 0 {
            let part = left.min(16 << 10);
            left -= part;
            write(&mut response, Bytes::from(vec![b'x'; part]), left == 0).await?;
        }
        return Ok(());
    }
    let mut bytes = 0;
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        bytes += chunk.len();
        let _ = body.flow_control().release_capacity(chunk.len());
    }
    let trailers = body.trailers().await?;
    let mut headers: Vec<_> = parts
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    headers.push((":authority".into(), parts.uri.authority().map_or(String::new(), ToString::to_string)));
    headers.extend(trailers.iter().flatten().map(|(name, _)| (format!("trailer-{name}"), String::new())));
    let echo = json!({
        "backend": "http2",
        "method": parts.method.as_str(),
        "target": parts.uri.path_and_query().map(ToString::to_string),
        "headers": headers,
        "body_bytes": bytes,
    });
    if parts.method == http::Method::HEAD {
        return respond.send_response(ok, true).map(drop);
    }
    let mut response = respond.send_response(ok, false)?;
    write(&mut response, Bytes::from(echo.to_string()), false).await?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    trailers.insert("set-cookie", "a=1".parse().unwrap());
    trailers.insert("session-set", "a=\"1\"".parse().unwrap());
    response.send_trailers(trailers)
}

async fn write(stream: &mut SendStream<Bytes>, mut bytes: Bytes, is_last: bool) -> Result<(), h2::Error> {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let Some(capacity) = std::future::poll_fn(|task| stream.poll_capacity(task)).await else { return Ok(()) };
        let part = bytes.split_to(capacity?.min(bytes.len()));
        let is_end = is_last && bytes.is_empty();
        stream.send_data(part, is_end)?;
    }
    Ok(())
}

/// A connection over TLS for frames of any kind (RFC 9113, section 4.1), in any order.
pub(crate) struct Frames {
    stream: StreamOwned<ClientConnection, TcpStream>,
}

/// What came.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

impl Frames {
    /// With the preface and these settings.
    pub(crate) fn open(address: SocketAddr, trust: &Arc<ClientConfig>, settings: &[(u16, u32)]) -> Self {
        Self::over(TcpStream::connect(address).unwrap(), trust, settings)
    }

    /// From a client that takes little at a time, as one at the end of a long line does.
    pub(crate) fn open_narrow(address: SocketAddr, trust: &Arc<ClientConfig>, settings: &[(u16, u32)]) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(8 << 10).unwrap();
        socket.connect(&address.into()).unwrap();
        Self::over(socket.into(), trust, settings)
    }

    fn over(socket: TcpStream, trust: &Arc<ClientConfig>, settings: &[(u16, u32)]) -> Self {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        let session = ClientConnection::new(tls::http2(trust), ServerName::try_from("localhost").unwrap()).unwrap();
        let mut frames = Self { stream: StreamOwned::new(session, socket) };
        frames.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        let settings: Vec<u8> =
            settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
        frames.write(SETTINGS, 0, 0, &settings).unwrap();
        frames
    }

    /// # Errors
    /// When the other side has closed.
    pub(crate) fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        self.write_raw(&frame(kind, flags, stream, payload))
    }

    /// # Errors
    /// When the other side has closed.
    pub(crate) fn write_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// # Errors
    /// When the other side has closed.
    pub(crate) fn read(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload)?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Ok(Frame { kind: head[3], stream, payload })
    }

    /// Passes over frames until one of this kind on this stream.
    ///
    /// # Errors
    /// When the other side closes before.
    pub(crate) fn read_until(&mut self, mut wanted: impl FnMut(&Frame) -> bool) -> io::Result<Frame> {
        loop {
            let frame = self.read()?;
            if wanted(&frame) {
                return Ok(frame);
            }
        }
    }
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&[length[1], length[2], length[3], kind, flags][..], &stream.to_be_bytes(), payload].concat()
}

/// Fields as HPACK writes them that remembers nothing (RFC 7541, section 6.2.2).
pub(crate) fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    fields
        .iter()
        .flat_map(|(name, value)| [&[0][..], &text(name.as_bytes()), &text(value.as_bytes())].concat())
        .collect()
}

/// A text without Huffman code (RFC 7541, section 5.2).
pub(crate) fn text(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    if text.len() < 127 {
        bytes.push(text.len() as u8);
    } else {
        bytes.push(127);
        let mut rest = text.len() - 127;
        while 128 <= rest {
            bytes.push((rest % 128) as u8 | 128);
            rest /= 128;
        }
        bytes.push(rest as u8);
    }
    bytes.extend_from_slice(text);
    bytes
}

/// A whole GET of `path`.
pub(crate) fn get(stream: u32, path: &str) -> Vec<u8> {
    let head = fields(&[(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", path)]);
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &head)
}
