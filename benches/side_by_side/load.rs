//! What do the clients do? They keep a fixed number of connections busy, each request with a session at random.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// No turn takes longer; one that would has hung.
const TURN_MAX: Duration = Duration::from_secs(180);

pub(crate) struct Load {
    /// The connections are spread over these.
    pub(crate) addresses: Vec<SocketAddr>,
    /// `name=value`, one for each session.
    pub(crate) cookies: Arc<[String]>,
    pub(crate) connections: usize,
    pub(crate) requests: usize,
    /// What every response must bring.
    pub(crate) body_bytes: usize,
    pub(crate) seed: u64,
}

pub(crate) struct Report {
    /// In order, the shortest first.
    latencies: Vec<Duration>,
}

impl Report {
    /// In milliseconds: so many percent of the requests took no longer.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let place = (self.latencies.len() as f64 * percent / 100.0).ceil() as usize;
        self.latencies[place.clamp(1, self.latencies.len()) - 1].as_secs_f64() * 1000.0
    }
}

impl Load {
    /// Sends it all and waits for every answer; an answer other than 200 with the whole body fails the run.
    pub(crate) fn run(self) -> Result<Report, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let load = Arc::new(self);
        let begun = Arc::new(AtomicUsize::new(0));
        let requests = async {
            let mut connections = tokio::task::JoinSet::new();
            for number in 0..load.connections {
                let random = Random::seeded(load.seed * 1_000_003 + number as u64);
                let address = load.addresses[number % load.addresses.len()];
                connections.spawn(Arc::clone(&load).keep_busy(address, random, Arc::clone(&begun)));
            }
            let mut latencies = Vec::with_capacity(load.requests);
            while let Some(connection) = connections.join_next().await {
                latencies.extend(connection.map_err(|err| err.to_string())??);
            }
            Ok::<_, String>(latencies)
        };
        let turn = runtime.block_on(async { tokio::time::timeout(TURN_MAX, requests).await });
        let mut latencies = turn.map_err(|_| format!("not done after {TURN_MAX:?}"))??;
        latencies.sort_unstable();
        Ok(Report { latencies })
    }

    async fn keep_busy(
        self: Arc<Self>,
        address: SocketAddr,
        mut random: Random,
        begun: Arc<AtomicUsize>,
    ) -> Result<Vec<Duration>, String> {
        let mut connection = Connection::open(address).await?;
        let mut latencies = Vec::new();
        while begun.fetch_add(1, Ordering::Relaxed) < self.requests {
            let cookie = &self.cookies[random.below(self.cookies.len())];
            let request = format!(
                "GET /{} HTTP/1.1\r\nHost: {}\r\nUser-Agent: side-by-side\r\nAccept: */*\r\nCookie: {cookie}\r\n\r\n",
                self.body_bytes, address
            );
            let started = Instant::now();
            let body_bytes = connection.exchange(request.as_bytes()).await?;
            latencies.push(started.elapsed());
            if body_bytes != self.body_bytes {
                return Err(format!("a body of {body_bytes} bytes, not {}", self.body_bytes));
            }
        }
        Ok(latencies)
    }
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(address).await.map_err(|err| format!("no connection: {err}"))?;
        stream.set_nodelay(true).map_err(|err| err.to_string())?;
        Ok(Self { stream, buffer: Vec::with_capacity(8 * 1024) })
    }

    /// The length of the body that came back.
    async fn exchange(&mut self, request: &[u8]) -> Result<usize, String> {
        self.stream.write_all(request).await.map_err(|err| format!("request not sent: {err}"))?;
        self.buffer.clear();
        let mut searched = 0;
        let head_bytes = loop {
            self.read_more().await?;
            let found = self.buffer[searched..].windows(4).position(|window| window == b"\r\n\r\n");
            if let Some(end) = found {
                break searched + end + 4;
            }
            searched = self.buffer.len().saturating_sub(3);
        };
        let head = String::from_utf8_lossy(&self.buffer[..head_bytes]);
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(format!("not 200: {head}"));
        }
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let Some(body_bytes) = length else { return Err(format!("no length: {head}")) };
        while self.buffer.len() < head_bytes + body_bytes {
            self.read_more().await?;
        }
        Ok(body_bytes)
    }

    async fn read_more(&mut self) -> Result<(), String> {
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err("connection closed before the end of a response".into()),
            Ok(_) => Ok(()),
            Err(err) => Err(format!("no response: {err}")),
        }
    }
}

/// The same numbers in every run (xorshift64*): every proxy gets the same sessions in the same order.
struct Random(u64);

impl Random {
    fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}
