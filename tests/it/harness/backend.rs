//! What reaches a web server behind the gateway? A real one that keeps every byte and answers as it is told.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use serde_json::json;

use super::wire::{Head, Length, Reader};
use super::{DEADLINE, wait_until};

/// Of each connection, so much is kept; of the rest, the count.
const BYTES_KEPT: usize = 1024 * 1024;

/// The head of a backend's consent to a WebSocket, for [`Answer::Pieces`].
pub(crate) const WEBSOCKET_HEAD: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// The answer to [`super::client::WEBSOCKET_KEY`] (both are the example of RFC 6455, section 1.3).
const WEBSOCKET_ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A web server on a port of its own, which ends with this value.
pub(crate) struct Backend {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Mutex<Option<Acceptor>>,
}

/// A request as it came, before anybody tidied it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    /// Its number on its connection, from 1.
    pub(crate) on_connection: usize,
}

/// What the backend does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// 200 and what was seen, as JSON (see [`super::client::Seen`]); to a WebSocket handshake, 101 and an echo of
    /// every byte that follows.
    Echo,
    /// These bytes, whatever they are; the connection stays.
    Exactly(Vec<u8>),
    /// These bytes, and the connection ends: a response cut short, or with an empty text none at all.
    ExactlyThenClose(Vec<u8>),
    /// 200 with these chunks, one for each [`Backend::step`].
    Chunks(Vec<Vec<u8>>),
    /// These bytes, the first at once and each further piece after one [`Backend::step`].
    Pieces(Vec<Vec<u8>>),
    /// The answer within, after one [`Backend::step`].
    AfterStep(Box<Self>),
    /// 101 without being asked for a protocol that it names, then an echo.
    Upgrade,
}

impl Answer {
    /// A whole response: `Content-Length` and body are added to the fields.
    pub(crate) fn response(status: u16, fields: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let mut bytes =
            format!("HTTP/1.1 {status} Test\r\n{fields}content-length: {}\r\n\r\n", body.len()).into_bytes();
        bytes.extend_from_slice(body);
        Self::Exactly(bytes)
    }

    /// The connection ends in place of a response.
    pub(crate) fn close() -> Self {
        Self::ExactlyThenClose(Vec::new())
    }
}

impl Request {
    pub(crate) fn method(&self) -> &str {
        self.head.start_line.split(' ').next().unwrap_or_default()
    }

    pub(crate) fn target(&self) -> &str {
        self.head.start_line.split(' ').nth(1).unwrap_or_default()
    }

    fn wants_web_socket(&self) -> bool {
        self.head.values("upgrade").iter().any(|value| value.eq_ignore_ascii_case("websocket"))
    }
}

impl Backend {
    /// Answers every request with what it saw.
    pub(crate) fn echo() -> Self {
        Self::always(Answer::Echo)
    }

    /// Answers every request alike.
    pub(crate) fn always(answer: Answer) -> Self {
        Self::answering(move |_| answer.clone())
    }

    /// As many that answer alike, at `127.0.0.2`, `127.0.0.3` and so on, at the same port: as the addresses of one name.
    pub(crate) fn at_one_port(count: u8, answer: &Answer) -> Vec<Self> {
        let addresses: Vec<_> = (2..2 + count).map(|last| Ipv4Addr::new(127, 0, 0, last).into()).collect();
        Self::at_one_port_of(&addresses, answer)
    }

    /// Two that answer alike, at `127.0.0.2` and at `::1`, at the same port; none on a machine that has no IPv6.
    pub(crate) fn of_both_families(answer: &Answer) -> Option<[Self; 2]> {
        TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok()?;
        let addresses = [Ipv4Addr::new(127, 0, 0, 2).into(), Ipv6Addr::LOCALHOST.into()];
        Self::at_one_port_of(&addresses, answer).try_into().ok()
    }

    fn at_one_port_of(addresses: &[IpAddr], answer: &Answer) -> Vec<Self> {
        for _ in 0..100 {
            let first = TcpListener::bind((addresses[0], 0)).unwrap();
            let port = first.local_addr().unwrap().port();
            let others = addresses[1..].iter().map(|address| TcpListener::bind((*address, port)));
            // Somebody else may have the port at one of the addresses.
            let Ok(others) = others.collect::<io::Result<Vec<_>>>() else { continue };
            let serve = |listener| {
                let answer = answer.clone();
                Self::serving(listener, move |_| answer.clone())
            };
            return std::iter::once(first).chain(others).map(serve).collect();
        }
        panic!("no port is free at all of {addresses:?}");
    }

    /// Answers each request as `answer` says.
    pub(crate) fn answering(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::serving(TcpListener::bind("127.0.0.1:0").unwrap(), answer)
    }

    fn serving(listener: TcpListener, answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            name: format!("backend-{address}"),
            answer: Mutex::new(Arc::new(answer)),
            connections: Mutex::default(),
            bytes: AtomicU64::new(0),
            requests: Mutex::default(),
            steps: Steps::default(),
        });
        let acceptor = Mutex::new(Some(Acceptor::start(listener, &shared)));
        Self { address, shared, acceptor }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// As the echo says it: which of several backends answered.
    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    /// Lets one [`Answer::AfterStep`] or one chunk of [`Answer::Chunks`] go.
    pub(crate) fn step(&self) {
        self.shared.steps.allow_one();
    }

    /// Closes the port and cuts every connection.
    pub(crate) fn kill(&self) {
        if let Some(acceptor) = self.acceptor.lock().unwrap().take() {
            acceptor.stop(self.address);
        }
        for connection in self.shared.connections.lock().unwrap().iter() {
            connection.cut();
        }
        self.shared.steps.allow_all();
    }

    /// Listens again on the same port.
    pub(crate) fn revive(&self) {
        self.shared.steps.forget();
        let mut acceptor = self.acceptor.lock().unwrap();
        assert!(acceptor.is_none(), "only a killed backend can be revived");
        let listener = TcpListener::bind(self.address).unwrap();
        *acceptor = Some(Acceptor::start(listener, &self.shared));
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.lock().unwrap().len()
    }

    /// Connections that neither side has closed.
    pub(crate) fn open_connections(&self) -> usize {
        self.shared.connections.lock().unwrap().iter().filter(|connection| connection.is_open()).count()
    }

    /// Bytes received so far, on all connections.
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::SeqCst)
    }

    /// Every request so far, in the order of their ends.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// Waits for this many requests in all, and gives them.
    #[track_caller]
    pub(crate) fn after_requests(&self, count: usize) -> Vec<Request> {
        wait_until(&format!("{count} requests have reached {}", self.name()), || {
            count <= self.shared.requests.lock().unwrap().len()
        });
        self.requests()
    }

    /// The raw bytes of every connection so far, each up to a limit.
    pub(crate) fn received(&self) -> Vec<Vec<u8>> {
        self.shared.connections.lock().unwrap().iter().map(|c| c.received.lock().unwrap().clone()).collect()
    }

    /// Whether any connection has received this text, in any case.
    pub(crate) fn has_received(&self, text: &str) -> bool {
        let wanted = text.to_ascii_lowercase().into_bytes();
        let has = |bytes: Vec<u8>| bytes.to_ascii_lowercase().windows(wanted.len()).any(|window| window == wanted);
        self.received().into_iter().any(has)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

type Behaviour = dyn Fn(&Request) -> Answer + Send + Sync;

struct Shared {
    name: String,
    answer: Mutex<Arc<Behaviour>>,
    connections: Mutex<Vec<Arc<Connection>>>,
    bytes: AtomicU64,
    requests: Mutex<Vec<Request>>,
    steps: Steps,
}

impl Shared {
    /// Serves one connection to its end; an error only says that the client went away.
    fn serve(&self, connection: &Arc<Connection>) -> io::Result<()> {
        let mut reader = Reader::new(Recorded { connection: Arc::clone(connection), total: &self.bytes });
        let mut out = &connection.stream;
        for on_connection in 1.. {
            let Some(head) = reader.head()? else { return Ok(()) };
            if head.values("expect").iter().any(|value| value.eq_ignore_ascii_case("100-continue")) {
                out.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            let body = reader.body(head.length(Length::Exactly(0)))?;
            let request = Request { head, body, on_connection };
            let answer = Arc::clone(&self.answer.lock().unwrap())(&request);
            self.requests.lock().unwrap().push(request.clone());
            if !self.give(answer, &request, &mut reader, out)? || request.head.closes() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether the connection can take another request.
    fn give(
        &self,
        answer: Answer,
        request: &Request,
        reader: &mut Reader<Recorded<'_>>,
        mut out: &TcpStream,
    ) -> io::Result<bool> {
        match answer {
            Answer::Echo if request.wants_web_socket() => self.give(Answer::Upgrade, request, reader, out),
            Answer::Echo => {
                let body = json!({
                    "backend": self.name,
                    "method": request.method(),
                    "target": request.target(),
                    "headers": request.head.fields,
                    "body_bytes": request.body.len(),
                })
                .to_string();
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                out.write_all(head.as_bytes())?;
                if request.method() != "HEAD" {
                    out.write_all(body.as_bytes())?;
                }
                Ok(true)
            }
            Answer::Exactly(bytes) => {
                out.write_all(&bytes)?;
                Ok(true)
            }
            Answer::ExactlyThenClose(bytes) => {
                out.write_all(&bytes)?;
                Ok(false)
            }
            Answer::Chunks(chunks) => {
                out.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
                for chunk in chunks {
                    self.steps.take_one()?;
                    out.write_all(format!("{:x}\r\n", chunk.len()).as_bytes())?;
                    out.write_all(&chunk)?;
                    out.write_all(b"\r\n")?;
                }
                out.write_all(b"0\r\n\r\n")?;
                Ok(true)
            }
            Answer::Pieces(pieces) => {
                for (number, piece) in pieces.iter().enumerate() {
                    if 0 < number {
                        self.steps.take_one()?;
                    }
                    out.write_all(piece)?;
                }
                Ok(true)
            }
            Answer::AfterStep(answer) => {
                self.steps.take_one()?;
                self.give(*answer, request, reader, out)
            }
            Answer::Upgrade => {
                out.write_all(
                    format!(
                        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
                         sec-websocket-accept: {WEBSOCKET_ACCEPT}\r\n\r\n"
                    )
                    .as_bytes(),
                )?;
                let mut bytes = Vec::new();
                while reader.take_some(u64::MAX, &mut bytes)? != 0 {
                    out.write_all(&bytes)?;
                    bytes.clear();
                }
                Ok(false)
            }
        }
    }
}

struct Connection {
    stream: TcpStream,
    received: Mutex<Vec<u8>>,
    open: AtomicBool,
}

impl Connection {
    fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    fn cut(&self) {
        self.open.store(false, Ordering::SeqCst);
        let _ = self.stream.shutdown(Shutdown::Both); // fails when the other side was first
    }
}

struct Recorded<'s> {
    connection: Arc<Connection>,
    total: &'s AtomicU64,
}

impl Read for Recorded<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = (&self.connection.stream).read(bytes)?;
        let mut received = self.connection.received.lock().unwrap();
        let kept = count.min(BYTES_KEPT - received.len());
        received.extend_from_slice(&bytes[..kept]);
        self.total.fetch_add(count as u64, Ordering::SeqCst);
        Ok(count)
    }
}

struct Acceptor {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Acceptor {
    fn start(listener: TcpListener, shared: &Arc<Shared>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopping, shared) = (Arc::clone(&stop), Arc::clone(shared));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let _ = stream.set_nodelay(true);
                let connection = Arc::new(Connection { stream, received: Mutex::default(), open: true.into() });
                shared.connections.lock().unwrap().push(Arc::clone(&connection));
                let shared = Arc::clone(&shared);
                // A thousand connections are a thousand small stacks.
                let thread = std::thread::Builder::new().stack_size(256 * 1024);
                let served = thread.spawn(move || {
                    let _ = shared.serve(&connection);
                    connection.cut();
                });
                served.unwrap();
            }
        });
        Self { stop, thread }
    }

    /// The port is closed when this returns.
    fn stop(self, address: SocketAddr) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(address); // wakes the accept
        self.thread.join().unwrap();
    }
}

/// Permits that a test hands out one by one.
#[derive(Default)]
struct Steps {
    allowed: Mutex<usize>,
    changed: Condvar,
}

impl Steps {
    fn allow_one(&self) {
        *self.allowed.lock().unwrap() += 1;
        self.changed.notify_one();
    }

    fn allow_all(&self) {
        *self.allowed.lock().unwrap() = usize::MAX / 2;
        self.changed.notify_all();
    }

    fn forget(&self) {
        *self.allowed.lock().unwrap() = 0;
    }

    fn take_one(&self) -> io::Result<()> {
        let allowed = self.allowed.lock().unwrap();
        let (mut allowed, waited) =
            self.changed.wait_timeout_while(allowed, DEADLINE, |allowed| *allowed == 0).unwrap();
        if waited.timed_out() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        *allowed -= 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::{Client, Connection, get};
    use super::*;

    #[test]
    fn the_echo_keeps_order_and_spelling_of_the_fields() {
        let backend = Backend::echo();

        let seen =
            Client::of(backend.address()).get("/a?b=c").header("X_User", "root").header("x-a", "1").send().seen();

        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/a?b=c"));
        assert_eq!(seen.backend, backend.name());
        let ours: Vec<_> = seen.headers.iter().filter(|(name, _)| name.to_ascii_lowercase().starts_with('x')).collect();
        assert_eq!(ours, [&("X_User".to_owned(), "root".to_owned()), &("x-a".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn every_byte_is_kept() {
        let backend = Backend::echo();
        let sent = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";

        let mut connection = Connection::open(backend.address());
        connection.write(sent);
        let seen = connection.read_response("POST").unwrap().seen();

        assert_eq!(seen.body_bytes, 3);
        assert_eq!(backend.received(), [sent.to_vec()]);
        assert_eq!(backend.bytes(), sent.len() as u64);
        assert!(backend.has_received("transfer-encoding: CHUNKED"));
    }

    #[test]
    fn a_connection_serves_many_requests_until_the_backend_is_killed_and_again_when_it_lives() {
        let backend = Backend::echo();
        let client = Client::of(backend.address());
        for _ in 0..3 {
            assert_eq!(client.get("/").send().status, 200);
        }
        assert_eq!((backend.connections(), backend.requests().len()), (1, 3));
        assert_eq!(backend.requests()[2].on_connection, 3);

        backend.kill();
        assert!(TcpStream::connect(backend.address()).is_err(), "a killed backend has no port");
        assert_eq!(backend.open_connections(), 0);

        backend.revive();
        assert_eq!(Client::of(backend.address()).get("/").send().status, 200);
    }

    #[test]
    fn chunks_and_late_answers_wait_for_their_step() {
        let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Chunks(vec![b"one".into(), b"two".into()]))));
        let mut connection = Connection::open(backend.address());
        connection.write(get("/"));
        backend.after_requests(1);

        backend.step();
        let head = connection.read_head().unwrap().unwrap();
        assert_eq!(head.length(Length::UntilClose), Length::Chunked);
        backend.step();
        assert_eq!(connection.read_chunk().unwrap(), b"one");
        backend.step();
        assert_eq!(connection.read_chunk().unwrap(), b"two");
        assert_eq!(connection.read_chunk().unwrap(), b"", "the last chunk is empty");
    }

    #[test]
    fn a_response_can_be_missing_or_cut_short() {
        for (answer, why) in [
            (Answer::close(), "no response at all"),
            (Answer::ExactlyThenClose(b"HTTP/1.1 200 OK\r\ncontent-le".into()), "a head cut short"),
            (Answer::ExactlyThenClose(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc".into()), "a body cut short"),
        ] {
            let backend = Backend::always(answer);
            let mut connection = Connection::open(backend.address());
            connection.write(get("/"));
            assert!(connection.read_response("GET").is_err(), "{why} is no response");
        }
    }

    #[test]
    fn a_web_socket_echoes_until_it_is_closed() {
        let backend = Backend::echo();
        let mut socket = Client::of(backend.address()).web_socket("/chat", &[]).unwrap();
        for text in ["hello", "world"] {
            socket.write(text);
            assert_eq!(socket.read_exactly(5).unwrap(), text.as_bytes());
        }
        drop(socket);
        wait_until("the backend sees the end", || backend.open_connections() == 0);
    }
}
