//! Where do names lead? A name server on a port of its own whose answers a test changes, and that counts its questions.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// As the wire has them (RFC 1035, section 3.2.2; RFC 2782).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    A = 1,
    Cname = 5,
    Aaaa = 28,
    Srv = 33,
}

/// What a name server says when it has no records to give (RFC 1035, section 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The name is there, the records are not.
    Empty,
    ServerFailure,
    NoSuchName,
    Refused,
    /// It says nothing at all.
    Silence,
    /// It says nothing when it is asked for this, as firewalls that know no IPv6 do.
    SilenceOn(Kind),
}

#[derive(Clone, Debug)]
pub(crate) enum Record {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(String),
    /// priority, weight, port, target
    Srv(u16, u16, u16, String),
}

/// A name server, which ends with this value. Of names that it was not told of it says that there are none.
pub(crate) struct NameServer {
    address: SocketAddr,
    zone: Arc<Zone>,
    stop: Arc<AtomicBool>,
    /// One for datagrams, one for connections.
    threads: Vec<JoinHandle<()>>,
}

/// An answer by datagram has no more bytes (RFC 1035, section 4.2.1); what is left out of it is had over TCP.
const DATAGRAM_BYTES_MAX: usize = 512;

#[derive(Default)]
struct Zone {
    /// With their time to live, in seconds.
    records: Mutex<HashMap<String, (u32, Vec<Record>)>>,
    troubles: Mutex<HashMap<String, Trouble>>,
    questions: Mutex<HashMap<(String, u16), usize>>,
    questions_over_tcp: AtomicUsize,
}

impl NameServer {
    pub(crate) fn start() -> Self {
        let (socket, listener) = bound_twice();
        let address = socket.local_addr().unwrap();
        let (zone, stop) = (Arc::<Zone>::default(), Arc::new(AtomicBool::new(false)));
        let (answering, stopping) = (Arc::clone(&zone), Arc::clone(&stop));
        let by_datagram = std::thread::spawn(move || {
            let mut question = [0; 1500];
            while let Ok((length, asker)) = socket.recv_from(&mut question) {
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                if let Some(answer) = answering.answer(&question[..length], DATAGRAM_BYTES_MAX) {
                    let _ = socket.send_to(&answer, asker); // fails when the asker has left
                }
            }
        });
        let (answering, stopping) = (Arc::clone(&zone), Arc::clone(&stop));
        let by_connection = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                let zone = Arc::clone(&answering);
                // Ends with its connection, which is the asker's to close.
                std::thread::spawn(move || zone.serve(stream));
            }
        });
        Self { address, zone, stop, threads: vec![by_datagram, by_connection] }
    }

    /// The table that names it.
    pub(crate) fn table(&self) -> String {
        format!("[dns]\nservers = [\"{}\"]", self.address)
    }

    /// From now on, `name` has these records, for so many seconds.
    pub(crate) fn set(&self, name: &str, ttl: u32, records: &[Record]) {
        self.zone.records.lock().unwrap().insert(name.to_owned(), (ttl, records.to_vec()));
        self.zone.troubles.lock().unwrap().remove(name);
    }

    /// As `set`, with the addresses of these.
    pub(crate) fn set_addresses(&self, name: &str, ttl: u32, addresses: &[SocketAddr]) {
        let record = |address: &SocketAddr| match address {
            SocketAddr::V4(address) => Record::A(*address.ip()),
            SocketAddr::V6(address) => Record::Aaaa(*address.ip()),
        };
        self.set(name, ttl, &addresses.iter().map(record).collect::<Vec<_>>());
    }

    /// From now on, there is only this about `name`.
    pub(crate) fn fail(&self, name: &str, trouble: Trouble) {
        self.zone.troubles.lock().unwrap().insert(name.to_owned(), trouble);
    }

    /// How often it was asked for this.
    pub(crate) fn questions(&self, name: &str, kind: Kind) -> usize {
        self.zone.questions.lock().unwrap().get(&(name.to_owned(), kind as u16)).copied().unwrap_or_default()
    }

    /// How often it was asked for anything over TCP.
    pub(crate) fn questions_over_tcp(&self) -> usize {
        self.zone.questions_over_tcp.load(Ordering::SeqCst)
    }
}

/// For datagrams and for connections, at the same port.
fn bound_twice() -> (UdpSocket, TcpListener) {
    for _ in 0..100 {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        // Somebody else may have the port of the other kind.
        if let Ok(listener) = TcpListener::bind(socket.local_addr().unwrap()) {
            return (socket, listener);
        }
    }
    panic!("no port is free for both kinds");
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the threads.
        let _ = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.send_to(&[], self.address));
        let _ = TcpStream::connect(self.address);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Zone {
    /// Questions one after the other, each behind its length (RFC 1035, section 4.2.2).
    fn serve(&self, mut stream: TcpStream) {
        let mut length = [0; 2];
        while stream.read_exact(&mut length).is_ok() {
            let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
            if stream.read_exact(&mut question).is_err() {
                return;
            }
            self.questions_over_tcp.fetch_add(1, Ordering::SeqCst);
            let Some(answer) = self.answer(&question, usize::from(u16::MAX)) else { continue };
            let framed = [&(answer.len() as u16).to_be_bytes(), answer.as_slice()].concat();
            if stream.write_all(&framed).is_err() {
                return;
            }
        }
    }

    /// One question, as all resolvers send it; the answer has no pointers, and the targets' addresses beside it. Of what
    /// does not fit into `bytes_max`, it says that there is more (RFC 2181, section 9).
    fn answer(&self, message: &[u8], bytes_max: usize) -> Option<Vec<u8>> {
        let (name, end) = name_at(message, 12)?;
        let kind = u16::from_be_bytes([*message.get(end)?, *message.get(end + 1)?]);
        *self.questions.lock().unwrap().entry((name.clone(), kind)).or_default() += 1;
        let mut trouble = self.troubles.lock().unwrap().get(&name).copied();
        if let Some(Trouble::SilenceOn(silent)) = trouble {
            trouble = (silent as u16 == kind).then_some(Trouble::Silence);
        }
        let records = self.records.lock().unwrap();
        let known = records.get(&name).filter(|_| trouble.is_none());
        let code = match trouble {
            Some(Trouble::Silence | Trouble::SilenceOn(_)) => return None,
            Some(Trouble::ServerFailure) => 2,
            Some(Trouble::NoSuchName) => 3,
            Some(Trouble::Refused) => 5,
            Some(Trouble::Empty) => 0,
            None if known.is_none() => 3,
            None => 0,
        };
        let (mut answers, mut additional) = (Vec::new(), Vec::new());
        let mut asked = name;
        while let Some((ttl, list)) = records.get(&asked).filter(|_| code == 0 && trouble.is_none()) {
            let mut next = None;
            for record in list {
                if record.kind() as u16 == kind || matches!(record, Record::Cname(_)) {
                    answers.push(record.encode(&asked, *ttl));
                }
                match record {
                    Record::Srv(.., target) => {
                        let addresses = records.get(target).map(|(ttl, list)| (*ttl, list.as_slice()));
                        let (ttl, addresses) = addresses.unwrap_or_default();
                        additional.extend(addresses.iter().map(|address| address.encode(target, ttl)));
                    }
                    Record::Cname(target) => next = Some(target.clone()),
                    Record::A(_) | Record::Aaaa(_) => {}
                }
            }
            let Some(next) = next else { break };
            asked = next;
        }
        let mut room = bytes_max - (end + 4);
        let mut fits = |record: &Vec<u8>| {
            let rest = room.checked_sub(record.len());
            room = rest.unwrap_or(0);
            rest.is_some()
        };
        let whole = answers.len();
        answers = answers.into_iter().take_while(&mut fits).collect();
        // What is only beside the answer may be left out without a word.
        additional = additional.into_iter().take_while(&mut fits).collect();
        let truncated = if answers.len() < whole { 0x02 } else { 0 };
        let mut answer = message[..2].to_vec();
        // A response, with recursion asked for and available.
        answer.extend([0x81 | truncated, 0x80 | code, 0, 1, 0, answers.len() as u8, 0, 0, 0, additional.len() as u8]);
        answer.extend(&message[12..end + 4]);
        answer.extend(answers.concat());
        answer.extend(additional.concat());
        Some(answer)
    }
}

impl Record {
    fn kind(&self) -> Kind {
        match self {
            Self::A(_) => Kind::A,
            Self::Aaaa(_) => Kind::Aaaa,
            Self::Cname(_) => Kind::Cname,
            Self::Srv(..) => Kind::Srv,
        }
    }

    fn encode(&self, owner: &str, ttl: u32) -> Vec<u8> {
        let value = match self {
            Self::A(address) => address.octets().to_vec(),
            Self::Aaaa(address) => address.octets().to_vec(),
            Self::Cname(target) => name_on_the_wire(target),
            Self::Srv(priority, weight, port, target) => {
                let numbers = [priority, weight, port].into_iter().flat_map(|number| number.to_be_bytes());
                numbers.chain(name_on_the_wire(target)).collect()
            }
        };
        let mut bytes = name_on_the_wire(owner);
        bytes.extend((self.kind() as u16).to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(ttl.to_be_bytes());
        bytes.extend((value.len() as u16).to_be_bytes());
        bytes.extend(value);
        bytes
    }
}

/// In lower case, and where it ends.
fn name_at(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        labels.push(String::from_utf8_lossy(message.get(at..at + length)?).to_ascii_lowercase());
        at += length;
    }
}

fn name_on_the_wire(name: &str) -> Vec<u8> {
    let labels = name.split('.').filter(|label| !label.is_empty());
    let mut bytes: Vec<u8> = labels.flat_map(|label| std::iter::once(label.len() as u8).chain(label.bytes())).collect();
    bytes.push(0);
    bytes
}
