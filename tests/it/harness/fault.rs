//! What if the network is slow, cut or silent, or lies? A TCP proxy in front of any server, switched while it runs.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Port, eventually, wait_until};

/// How long a connection on loopback may take that nobody stands in the way of.
const FASTER_THAN_US: Duration = Duration::from_millis(100);

/// Forwards in order, and without a fault at the start. Ends with its value, and its connections with it.
///
/// Where the server refuses a connection, the client's is made and then reset.
#[derive(Debug)]
pub(crate) struct FaultProxy {
    port: Port,
    rules: Option<watch::Sender<Rules>>,
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

/// What happens to the bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Fault {
    /// How long a byte takes to the server; the next ones do not wait for it.
    pub(crate) there: Duration,
    /// The same for answers.
    pub(crate) back: Duration,
    /// Nothing goes through, no end of a connection either. What was sent meanwhile comes when the silence ends, as TCP
    /// repeats what was lost.
    pub(crate) silent: bool,
    /// Bytes go alone, so long after one another.
    pub(crate) pace: Option<Duration>,
}

impl Fault {
    const NONE: Self = Self { there: Duration::ZERO, back: Duration::ZERO, silent: false, pace: None };
    pub(crate) const SILENT: Self = Self { silent: true, ..Self::NONE };

    /// So long there, and so long back.
    pub(crate) const fn slow(each_way: Duration) -> Self {
        Self { there: each_way, back: each_way, ..Self::NONE }
    }

    /// Byte by byte.
    pub(crate) const fn trickle(pace: Duration) -> Self {
        Self { pace: Some(pace), ..Self::NONE }
    }
}

/// What happens to new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Open,
    /// A reset at once, as from a host on which nobody listens.
    Refuses,
    /// No answer at all, as from a host that is gone.
    Gone,
}

#[derive(Debug)]
struct Rules {
    /// The port of the server.
    to: Option<u16>,
    door: Door,
    everybody: Fault,
    /// For those who come from there, instead.
    of: HashMap<IpAddr, Fault>,
}

impl Rules {
    fn fault(&self, client: IpAddr) -> Fault {
        self.of.get(&client).copied().unwrap_or(self.everybody)
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// How the door is now; the rules say how it shall be.
    door: Mutex<Option<Door>>,
    accepted: AtomicU64,
    there: AtomicU64,
    back: AtomicU64,
    open: Mutex<BTreeMap<u64, Reins>>,
}

/// By which an open connection is led from outside.
#[derive(Debug)]
struct Reins {
    questions: mpsc::UnboundedSender<Piece>,
    answers: mpsc::UnboundedSender<Piece>,
    cut: watch::Sender<bool>,
}

/// One way of a connection.
struct Queue {
    sender: mpsc::UnboundedSender<Piece>,
    receiver: mpsc::UnboundedReceiver<Piece>,
}

impl Queue {
    fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { sender, receiver }
    }
}

/// Bytes on their way, or the end after them.
#[derive(Debug)]
struct Piece {
    due: Instant,
    bytes: Option<Vec<u8>>,
}

impl FaultProxy {
    /// `port`: of a server on loopback.
    pub(crate) fn to(port: u16) -> Self {
        let proxy = Self::to_nobody();
        proxy.lead_to(port);
        proxy
    }

    /// For a server that must know the proxy before it starts: connections wait for [`Self::lead_to`].
    pub(crate) fn to_nobody() -> Self {
        let port = Port::reserve();
        let seen = Arc::new(Seen::default());
        let (rules, told) =
            watch::channel(Rules { to: None, door: Door::Open, everybody: Fault::NONE, of: HashMap::new() });
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.number()));
        let thread = std::thread::spawn({
            let seen = Arc::clone(&seen);
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(serve(address, told, seen)).unwrap();
            }
        });
        let proxy = Self { port, rules: Some(rules), seen, thread: Some(thread) };
        proxy.until_door_is(Door::Open);
        proxy
    }

    pub(crate) fn lead_to(&self, port: u16) {
        self.change(|rules| rules.to = Some(port));
    }

    pub(crate) fn port(&self) -> u16 {
        self.port.number()
    }

    /// For a Redis behind it.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    /// For connections that are open and those that will be, except those of [`Self::set_for`].
    pub(crate) fn set(&self, fault: Fault) {
        self.change(|rules| rules.everybody = fault);
    }

    /// For those only who come from `client`.
    pub(crate) fn set_for(&self, client: IpAddr, fault: Fault) {
        self.change(|rules| {
            rules.of.insert(client, fault);
        });
    }

    /// From now on new connections are refused; open ones go on.
    pub(crate) fn refuse(&self) {
        self.turn_door(Door::Refuses);
    }

    /// As a host whose cable was pulled: open connections fall silent, new ones are neither made nor refused.
    pub(crate) fn vanish(&self) {
        self.set(Fault::SILENT);
        self.turn_door(Door::Gone);
    }

    /// No fault any more, for nobody. What is cut stays cut.
    pub(crate) fn heal(&self) {
        self.change(|rules| {
            rules.everybody = Fault::NONE;
            rules.of.clear();
        });
        self.turn_door(Door::Open);
    }

    /// Resets every open connection, on both sides.
    pub(crate) fn cut(&self) {
        let last = self.seen.accepted.load(Ordering::SeqCst);
        self.seen.open.lock().unwrap().values().for_each(|reins| reins.cut.send_modify(|is_cut| *is_cut = true));
        wait_until("all connections are cut", || self.seen.open.lock().unwrap().keys().all(|number| last < *number));
    }

    /// Says this to every client with an open connection, as if the server had, between two things that it said.
    pub(crate) fn inject(&self, bytes: &[u8]) {
        for reins in self.seen.open.lock().unwrap().values() {
            drop(reins.answers.send(Piece { due: Instant::now(), bytes: Some(bytes.to_vec()) }));
        }
    }

    /// Says this to the server on every open connection, as if its client had, between two things that it said.
    pub(crate) fn inject_there(&self, bytes: &[u8]) {
        for reins in self.seen.open.lock().unwrap().values() {
            drop(reins.questions.send(Piece { due: Instant::now(), bytes: Some(bytes.to_vec()) }));
        }
    }

    /// Connections ever made.
    pub(crate) fn connections(&self) -> u64 {
        self.seen.accepted.load(Ordering::SeqCst)
    }

    pub(crate) fn open(&self) -> usize {
        self.seen.open.lock().unwrap().len()
    }

    /// Bytes that clients sent.
    pub(crate) fn bytes_there(&self) -> u64 {
        self.seen.there.load(Ordering::SeqCst)
    }

    /// Bytes that the server answered.
    pub(crate) fn bytes_back(&self) -> u64 {
        self.seen.back.load(Ordering::SeqCst)
    }

    fn change(&self, change: impl FnOnce(&mut Rules)) {
        self.rules.as_ref().expect("taken by drop only").send_modify(change);
    }

    fn turn_door(&self, door: Door) {
        self.change(|rules| rules.door = door);
        self.until_door_is(door);
    }

    fn until_door_is(&self, door: Door) {
        wait_until("the door of the proxy turns", || *self.seen.door.lock().unwrap() == Some(door));
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        // By this `serve` learns that it is over.
        self.rules = None;
        let ended = self.thread.take().expect("taken by drop only").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the proxy met a panic");
    }
}

/// Until nobody makes rules any more.
async fn serve(address: SocketAddr, mut rules: watch::Receiver<Rules>, seen: Arc<Seen>) -> io::Result<()> {
    loop {
        let door = rules.borrow_and_update().door;
        let listener = match door {
            Door::Open => Some(listen(address, 1024).await?),
            Door::Refuses => None,
            Door::Gone => Some(listen(address, 0).await?),
        };
        let filler = match &listener {
            Some(listener) if door == Door::Gone => fill(listener).await?,
            Some(_) | None => None,
        };
        *seen.door.lock().unwrap() = Some(door);
        while rules.borrow_and_update().door == door {
            tokio::select! {
                changed = rules.changed() => if changed.is_err() { return Ok(()) },
                accepted = accept(listener.as_ref(), door) => {
                    let (client, from) = accepted?;
                    let number = 1 + seen.accepted.fetch_add(1, Ordering::SeqCst);
                    let (questions, answers) = (Queue::new(), Queue::new());
                    let (cut, is_cut) = watch::channel(false);
                    let reins = Reins { questions: questions.sender.clone(), answers: answers.sender.clone(), cut };
                    seen.open.lock().unwrap().insert(number, reins);
                    let (from, rules, seen) = (from.ip(), rules.clone(), Arc::clone(&seen));
                    let connection = Connection { client, from, questions, answers, is_cut, rules, seen };
                    tokio::spawn(async move {
                        let seen = Arc::clone(&connection.seen);
                        connection.run().await;
                        seen.open.lock().unwrap().remove(&number);
                    });
                }
            }
        }
        drop((filler, listener));
    }
}

/// A process that another test is starting may for a moment, until it runs a program of its own, hold the listener that
/// we have closed: then the address is in use.
async fn listen(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let attempt = || {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(backlog)
    };
    eventually("the proxy listens", async || match attempt() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
        done => Some(done),
    })
    .await
}

/// Nobody is let in where nobody listens, or where all shall wait.
async fn accept(listener: Option<&TcpListener>, door: Door) -> io::Result<(TcpStream, SocketAddr)> {
    match (listener, door) {
        (Some(listener), Door::Open) => listener.accept().await,
        (Some(_) | None, Door::Open | Door::Refuses | Door::Gone) => std::future::pending().await,
    }
}

/// Linux drops what asks for a connection when there are more than the backlog that nobody accepts (listen(2)): here,
/// more than none. Whether we are the one or somebody else was faster is the same.
async fn fill(listener: &TcpListener) -> io::Result<Option<TcpStream>> {
    let connected = timeout(FASTER_THAN_US, TcpStream::connect(listener.local_addr()?)).await;
    connected.ok().transpose()
}

struct Connection {
    client: TcpStream,
    from: IpAddr,
    questions: Queue,
    answers: Queue,
    is_cut: watch::Receiver<bool>,
    rules: watch::Receiver<Rules>,
    seen: Arc<Seen>,
}

impl Connection {
    async fn run(mut self) {
        let mut cut = self.is_cut.clone();
        let mut server = None;
        tokio::select! {
            biased;
            _ = cut.wait_for(|is_cut| *is_cut) => {}
            forwarded = self.forward(&mut server) => if forwarded.is_ok() { return },
        }
        // Reset is what a close without lingering sends (socket(7)).
        drop(self.client.set_zero_linger());
        drop(server.map(|server| server.set_zero_linger()));
    }

    async fn forward(&mut self, server: &mut Option<TcpStream>) -> io::Result<()> {
        let from = self.from;
        let over = |_| io::Error::other("the proxy is over");
        let is_led = |rules: &Rules| !rules.fault(from).silent && rules.to.is_some();
        let to = self.rules.wait_for(is_led).await.map_err(over)?.to.expect("waited for");
        let server = server.insert(TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?);
        self.client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (asks, is_told) = self.client.split();
        let (answers, is_asked) = server.split();
        let (rules, seen) = (&self.rules, &self.seen);
        tokio::try_join!(
            take(asks, self.questions.sender.clone(), &seen.there, || rules.borrow().fault(from).there),
            give(is_asked, &mut self.questions.receiver, rules.clone(), from),
            take(answers, self.answers.sender.clone(), &seen.back, || rules.borrow().fault(from).back),
            give(is_told, &mut self.answers.receiver, rules.clone(), from),
        )?;
        Ok(())
    }
}

/// Until its sender has no more to say.
async fn take(
    mut from: ReadHalf<'_>,
    queue: mpsc::UnboundedSender<Piece>,
    counted: &AtomicU64,
    delay: impl Fn() -> Duration,
) -> io::Result<()> {
    let mut buffer = vec![0; 16_384];
    loop {
        let length = from.read(&mut buffer).await?;
        counted.fetch_add(length as u64, Ordering::SeqCst);
        let bytes = (0 < length).then(|| buffer[..length].to_vec());
        let sent = queue.send(Piece { due: Instant::now() + delay(), bytes });
        if length == 0 || sent.is_err() {
            return Ok(());
        }
    }
}

/// Each piece when it is due, as the rules are then.
async fn give(
    mut to: WriteHalf<'_>,
    queue: &mut mpsc::UnboundedReceiver<Piece>,
    mut rules: watch::Receiver<Rules>,
    client: IpAddr,
) -> io::Result<()> {
    while let Some(Piece { due, bytes }) = queue.recv().await {
        sleep_until(due).await;
        let heard = rules.wait_for(|rules| !rules.fault(client).silent).await;
        let pace = heard.map_err(io::Error::other)?.fault(client).pace;
        let Some(bytes) = bytes else { break };
        match pace {
            None => to.write_all(&bytes).await?,
            Some(pace) => {
                for byte in bytes {
                    to.write_all(&[byte]).await?;
                    sleep(pace).await;
                }
            }
        }
    }
    to.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Shutdown, TcpListener as StdListener, TcpStream as StdStream};

    use super::*;
    use crate::harness::DEADLINE;

    /// Says what it heard.
    fn echo() -> u16 {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut answers = stream.try_clone().unwrap();
                    let mut buffer = [0; 1024];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if answers.write_all(&buffer[..length]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        port
    }

    fn connect(proxy: &FaultProxy) -> StdStream {
        let stream = StdStream::connect(("127.0.0.1", proxy.port())).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    fn hear(stream: &mut StdStream, expected: &str) {
        let mut heard = vec![0; expected.len()];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(String::from_utf8(heard).unwrap(), expected);
    }

    fn hears_nothing(stream: &StdStream) -> bool {
        stream.set_nonblocking(true).unwrap();
        let heard = stream.peek(&mut [0]);
        stream.set_nonblocking(false).unwrap();
        heard.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    #[test]
    fn a_proxy_forwards_and_counts_and_ends_what_its_client_ends() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        client.write_all(b"hello").unwrap();
        hear(&mut client, "hello");
        assert_eq!((proxy.connections(), proxy.open(), proxy.bytes_there(), proxy.bytes_back()), (1, 1, 5, 5));
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "the server left, too");
        wait_until("the connection is over", || proxy.open() == 0);
    }

    #[test]
    fn silence_ends_with_what_was_said_in_it() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        client.write_all(b"a").unwrap();
        hear(&mut client, "a");
        proxy.set(Fault::SILENT);
        client.write_all(b"b").unwrap();
        let mut late = connect(&proxy);
        late.write_all(b"c").unwrap();
        wait_until("the proxy has them", || proxy.bytes_there() == 2 && proxy.open() == 2);
        assert!(hears_nothing(&client) && hears_nothing(&late));
        assert_eq!(proxy.bytes_back(), 1, "the server was not asked");
        proxy.heal();
        hear(&mut client, "b");
        hear(&mut late, "c");
    }

    #[test]
    fn a_fault_can_be_for_those_of_one_address() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        proxy.set_for("127.0.0.9".parse().unwrap(), Fault::SILENT);
        client.write_all(b"a").unwrap();
        hear(&mut client, "a");
        proxy.set_for("127.0.0.1".parse().unwrap(), Fault::SILENT);
        client.write_all(b"b").unwrap();
        wait_until("the proxy has it", || proxy.bytes_there() == 2);
        assert!(hears_nothing(&client));
    }

    #[test]
    fn a_slow_way_delays_each_byte_and_a_trickle_parts_them() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        let each_way = Duration::from_millis(50);
        proxy.set(Fault::slow(each_way));
        let started = Instant::now();
        client.write_all(b"hello").unwrap();
        hear(&mut client, "hello");
        assert!(2 * each_way <= started.elapsed(), "never faster than it was told");

        let pace = Duration::from_millis(5);
        proxy.set(Fault::trickle(pace));
        let started = Instant::now();
        client.write_all(b"hello").unwrap();
        hear(&mut client, "hello");
        assert!(4 * pace <= started.elapsed(), "there is a time between two bytes");
    }

    #[test]
    fn what_is_cut_is_reset_and_others_may_come() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        client.write_all(b"a").unwrap();
        hear(&mut client, "a");
        proxy.cut();
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut other = connect(&proxy);
        other.write_all(b"b").unwrap();
        hear(&mut other, "b");
    }

    #[test]
    fn who_is_refused_or_finds_nobody_is_told_so_and_open_connections_go_on() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        client.write_all(b"a").unwrap();
        hear(&mut client, "a");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, proxy.port()));
        proxy.refuse();
        assert_eq!(StdStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        client.write_all(b"b").unwrap();
        hear(&mut client, "b");

        proxy.vanish();
        let kind = StdStream::connect_timeout(&address, Duration::from_millis(100)).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::TimedOut, "neither made nor refused");
        client.write_all(b"c").unwrap();
        wait_until("the proxy has it", || proxy.bytes_there() == 3);
        assert!(hears_nothing(&client));

        proxy.heal();
        hear(&mut client, "c");
        client.write_all(b"d").unwrap();
        hear(&mut client, "d");
        drop(connect(&proxy));
    }

    #[test]
    fn garbage_comes_as_if_the_server_had_said_it() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        client.write_all(b"a").unwrap();
        hear(&mut client, "a");
        proxy.inject(b"garbage");
        hear(&mut client, "garbage");
        client.write_all(b"b").unwrap();
        hear(&mut client, "b");
    }

    #[test]
    fn a_server_that_is_not_there_yet_is_waited_for_and_one_that_refuses_resets() {
        let proxy = FaultProxy::to_nobody();
        let mut client = connect(&proxy);
        client.write_all(b"a").unwrap();
        wait_until("it waits", || proxy.open() == 1);
        proxy.lead_to(echo());
        hear(&mut client, "a");

        let nobody = Port::reserve();
        proxy.lead_to(nobody.number());
        let error = connect(&proxy).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn with_the_proxy_its_connections_end() {
        let proxy = FaultProxy::to(echo());
        let mut client = connect(&proxy);
        client.write_all(b"a").unwrap();
        hear(&mut client, "a");
        let port = proxy.port();
        drop(proxy);
        assert!(client.read(&mut [0]).is_ok_and(|length| length == 0));
        assert!(StdStream::connect(("127.0.0.1", port)).is_err());
    }
}
