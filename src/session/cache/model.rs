//! Does the rule hold in every order of things? The real cache against a model of a server that tracks, with requests,
//! touches, logouts, heartbeats, time and the loss of connections in whatever order the scheduler tries.
//!
//! A step of the cache is one step here, as it is on a worker's only thread; what is tried are the orders of steps.
//! Queues are as Redis has them: a connection's replies and pushes are one FIFO, and a command's pushes are queued when
//! it is executed, the caller's own after its reply. Time passes at any point, so any queue may be slow, and a frozen
//! server is one that is not scheduled.
//!
//! That the model can fail is a test, too: each rule is broken in turn, and must be missed.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use shuttle::rand::RngCore;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::mpsc::{Receiver, Sender, channel};
use shuttle::sync::{Mutex, MutexGuard};
use shuttle::thread;

use super::tests::{key, stored};
use super::*;

/// In ticks of the model's clock, each a millisecond.
const LEASE: u64 = 3;
const TICKS: u64 = 10;
/// Runs of one scheduler before it is the other's turn.
const BATCH: usize = 50;
/// Who is there besides time, a heart and requests.
const LOGOUT_HERE: u32 = 1;
const LOGOUT_ELSEWHERE: u32 = 2;
const TOUCHES: u32 = 4;
const TROUBLE: u32 = 8;
const SIBLING: u32 = 16;

/// A rule that the worker breaks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Against (I1): a heartbeat that is answered extends the lease from now.
    LeaseFromReply,
    /// Against (I1): copies are used without a lease.
    NoLease,
    /// Against (I2): a reply is kept, whatever was pushed since its read was sent.
    KeptAfterPush,
    /// Against (I3): a new connection goes on with the old copies.
    SameEpoch,
    /// Against (I6): forgotten before the logout is sent, not when it was answered.
    ForgottenOnlyBefore,
    /// Against (I7): a task of its own applies the pushes.
    PushesElsewhere,
    /// Each touch that found the session alive explains a push, even one that wrote nothing.
    EveryTouchExplains,
    /// A read of another worker clears what was noted after it was sent.
    SiblingKnowsBest,
}

#[test]
fn no_order_of_things_serves_an_ended_session_beyond_the_lease() {
    assert_eq!(runs_until_failure(None, 30), Ok(()), "the rule holds");
}

#[test]
fn the_model_misses_no_broken_rule() {
    for fault in [
        Fault::LeaseFromReply,
        Fault::NoLease,
        Fault::KeptAfterPush,
        Fault::SameEpoch,
        Fault::ForgottenOnlyBefore,
        Fault::PushesElsewhere,
        Fault::EveryTouchExplains,
        Fault::SiblingKnowsBest,
    ] {
        let found = runs_until_failure(Some(fault), 400);
        assert!(found.is_err(), "{fault:?} goes unnoticed");
    }
}

fn runs_until_failure(fault: Option<Fault>, batches: u64) -> Result<(), String> {
    let config = || {
        let mut config = shuttle::Config::new();
        config.failure_persistence = shuttle::FailurePersistence::None;
        config.silence_warnings = true;
        config
    };
    let run = AssertUnwindSafe(|| {
        for batch in 0..batches {
            // The one makes a side wait for long, the other mixes: some faults show under the one, some under the other.
            shuttle::Runner::new(PctScheduler::new_from_seed(batch, 4, BATCH), config()).run(move || one_run(fault));
            shuttle::Runner::new(RandomScheduler::new_from_seed(batch, BATCH), config()).run(move || one_run(fault));
        }
    });
    catch_unwind(run).map_err(|cause| match cause.downcast::<String>() {
        Ok(text) => *text,
        Err(cause) => cause.downcast_ref::<&str>().copied().unwrap_or("failed").to_owned(),
    })
}

fn one_run(fault: Option<Fault>) {
    let world = World::new(fault);
    world.connect();
    let scene_of = |fault: Fault| match fault {
        Fault::LeaseFromReply | Fault::NoLease | Fault::KeptAfterPush | Fault::PushesElsewhere => LOGOUT_ELSEWHERE,
        Fault::SameEpoch => LOGOUT_ELSEWHERE | TROUBLE,
        Fault::ForgottenOnlyBefore => LOGOUT_HERE,
        Fault::EveryTouchExplains => LOGOUT_ELSEWHERE | TOUCHES,
        Fault::SiblingKnowsBest => LOGOUT_ELSEWHERE | SIBLING,
    };
    let plays = fault.map_or_else(|| shuttle::rand::thread_rng().next_u32(), scene_of);
    let scene = [
        (true, World::time as fn(&World)),
        (true, World::heart),
        (true, World::requests),
        (true, World::requests),
        (plays & LOGOUT_HERE != 0, World::logout_here),
        (plays & LOGOUT_ELSEWHERE != 0, World::logout_elsewhere),
        (plays & TOUCHES != 0, World::touches),
        (plays & SIBLING != 0, World::sibling_touches),
        (plays & SIBLING != 0, World::sibling_reads),
        (plays & TROUBLE != 0, World::trouble),
    ];
    let actors: Vec<_> = scene.iter().filter(|(plays, _)| *plays).map(|(_, acts)| world.actor(*acts)).collect();
    actors.into_iter().for_each(|actor| actor.join().unwrap());
    world.look();
    if world.server().ended.is_none() {
        world.a_read_is_kept_in_quiet_times();
    }
    *world.line.lock().unwrap() = None;
}

/// One worker, its store, and one session.
#[derive(Clone)]
struct World {
    fault: Option<Fault>,
    key: SessionKey,
    cache: Arc<LeaseCache>,
    now: Arc<AtomicU64>,
    line: Arc<Mutex<Option<Line>>>,
    server: Arc<Mutex<Server>>,
}

/// The worker's end of a connection.
#[derive(Clone)]
struct Line {
    /// Its place in [`Server::lines`].
    number: usize,
    commands: Sender<(Command, Sender<Reply>)>,
}

struct Server {
    /// When the session ended.
    ended: Option<u64>,
    lines: Vec<Wire>,
    /// Whether the worker has seen the push of the end, or the answer to its own logout.
    worker_knows: bool,
}

/// The server's end of a connection.
struct Wire {
    /// Closed: none.
    messages: Option<Sender<Message>>,
    tracks: bool,
    /// Nobody notices, but nothing arrives, either way.
    cut: bool,
}

#[derive(Clone, Copy, Debug)]
enum Command {
    Get,
    Set,
    /// Whether the session's life can grow.
    Touch(bool),
    Delete,
}

#[derive(Clone, Copy, Debug)]
enum Reply {
    Done,
    Lives(bool),
    Touched(Touched),
}

enum Message {
    Reply(Sender<Reply>, Reply),
    Push { ended: bool },
}

impl World {
    fn new(fault: Option<Fault>) -> Self {
        let now = Arc::new(AtomicU64::new(1_000));
        let clock = Arc::clone(&now);
        let limits = Limits {
            sessions_max: 4,
            lease: Duration::from_millis(LEASE),
            role_lease: Duration::from_millis(LEASE * 2),
            ..Limits::default()
        };
        let moment = move || Moment::after_start(Duration::from_millis(clock.load(Relaxed)));
        let server = Server { ended: None, lines: Vec::new(), worker_knows: false };
        Self {
            fault,
            key: key(),
            cache: Arc::new(LeaseCache::with_clock(limits, moment)),
            now,
            line: Arc::default(),
            server: Arc::new(Mutex::new(server)),
        }
    }

    fn actor(&self, acts: impl FnOnce(&Self) + Send + 'static) -> thread::JoinHandle<()> {
        let world = self.clone();
        thread::spawn(move || acts(&world))
    }

    fn time(&self) {
        for _ in 0..TICKS {
            thread::yield_now();
            self.now.fetch_add(1, Relaxed);
        }
    }

    fn heart(&self) {
        for _ in 0..6 {
            self.beat();
        }
    }

    fn beat(&self) {
        let mut heartbeat = self.cache.begin_heartbeat(Beat::Write);
        if self.ask(Command::Set).is_none() {
            return;
        }
        match self.fault {
            Some(Fault::LeaseFromReply) => heartbeat.sent = (self.cache.clock)(),
            Some(Fault::NoLease) => heartbeat.sent = heartbeat.sent + Duration::from_secs(1),
            Some(_) | None => {}
        }
        pause();
        self.cache.finish_heartbeat(&heartbeat);
    }

    fn requests(&self) {
        for _ in 0..4 {
            if !self.look() {
                self.read();
            }
        }
    }

    /// The promise: whether there is a hit, and if there is, that there may be one.
    fn look(&self) -> bool {
        let server = self.server();
        let hit = self.cache.get(&self.key).is_some();
        let old = self.cache.get_within(&self.key, Duration::from_secs(1)).is_some();
        if let Some(ended) = server.ended {
            let ago = self.now.load(Relaxed) - ended;
            assert!(!hit || ago < LEASE, "served {ago} ticks after the session ended");
            assert!(!(hit || old) || !server.worker_knows, "served by a worker that knows of the end");
            assert!(!server.worker_knows || self.cache.doubts(&self.key), "a known end is doubted");
        }
        hit
    }

    fn read(&self) {
        let ticket = self.cache.begin_read(&self.key);
        let Some(Reply::Lives(lives)) = self.ask(Command::Get) else { return };
        pause();
        let ticket = match self.fault {
            Some(Fault::KeptAfterPush) => Ticket { stamp: self.cache.begin_read(&self.key).stamp, ..ticket },
            Some(_) | None => ticket,
        };
        let found = stored();
        self.cache.finish_read(&ticket, lives.then_some(&found));
    }

    fn touches(&self) {
        for _ in 0..3 {
            let touch = self.cache.begin_touch(&self.key);
            let grows = shuttle::rand::thread_rng().next_u32() & 1 == 0;
            let Some(Reply::Touched(mut touched)) = self.ask(Command::Touch(grows)) else { continue };
            if self.fault == Some(Fault::EveryTouchExplains) && touched == Touched::Unchanged {
                touched = Touched::Extended;
            }
            pause();
            self.cache.finish_touch(&touch, touched);
        }
    }

    /// Another worker of the process, over its own connection.
    fn sibling_touches(&self) {
        for _ in 0..3 {
            let touch = self.cache.begin_touch(&self.key);
            pause();
            let touched = {
                let mut server = self.server();
                let lives = server.ended.is_none();
                if lives {
                    server.push(false);
                }
                if lives { Touched::Extended } else { Touched::Gone }
            };
            pause();
            self.cache.finish_touch(&touch, touched);
            self.look();
        }
    }

    fn sibling_reads(&self) {
        for _ in 0..3 {
            let ticket = self.cache.begin_read(&self.key);
            pause();
            let lives = self.server().ended.is_none();
            pause();
            if lives {
                let ticket = match self.fault {
                    Some(Fault::SiblingKnowsBest) => Ticket { sent: ticket.sent + Duration::from_secs(3600), ..ticket },
                    Some(_) | None => ticket,
                };
                self.cache.seen_alive(&ticket);
            }
            self.look();
        }
    }

    fn logout_here(&self) {
        self.cache.forget_own(&self.key);
        let answered = self.ask(Command::Delete).is_some();
        if self.fault != Some(Fault::ForgottenOnlyBefore) {
            self.cache.forget_own(&self.key);
        }
        self.server().worker_knows |= answered;
        self.look();
    }

    fn logout_elsewhere(&self) {
        pause();
        self.server().delete(self.now.load(Relaxed));
    }

    /// The connection is lost, in one of three ways, and made anew.
    fn trouble(&self) {
        let Some(line) = self.line.lock().unwrap().clone() else { return };
        match shuttle::rand::thread_rng().next_u32() % 3 {
            0 => self.server().lines[line.number].messages = None,
            1 => {
                self.server().lines[line.number].cut = true;
                self.look();
            }
            _ => {}
        }
        self.connect();
    }

    fn connect(&self) {
        let connection = self.cache.connecting();
        let (commands, received) = channel();
        let (messages, incoming) = channel();
        let wire = Wire { messages: Some(messages), tracks: false, cut: false };
        let mut server = self.server();
        let number = server.lines.len();
        server.lines.push(wire);
        drop(server);
        self.actor(move |world| world.serve(number, &received));
        self.actor(move |world| world.drive(connection, number, &incoming));
        let mut line = self.line.lock().unwrap();
        let epoch = self.cache.state.lock().epoch;
        let connected = self.cache.connected(connection);
        if self.fault == Some(Fault::SameEpoch) {
            self.cache.state.lock().epoch = epoch;
        }
        *line = connected.then_some(Line { number, commands });
    }

    /// Sends a command and waits for its reply; none when the connection was lost.
    fn ask(&self, command: Command) -> Option<Reply> {
        let line = self.line.lock().unwrap().clone()?;
        let (sender, reply) = channel();
        line.commands.send((command, sender)).ok()?;
        drop(line);
        reply.recv().ok()
    }

    /// The server's side of a connection: each command is one step.
    fn serve(&self, number: usize, commands: &Receiver<(Command, Sender<Reply>)>) {
        while let Ok((command, sender)) = commands.recv() {
            let mut server = self.server();
            let now = self.now.load(Relaxed);
            if server.lines[number].cut {
                continue;
            }
            let lives = server.ended.is_none();
            let mut own_push = false;
            let reply = match command {
                Command::Set => Reply::Done,
                Command::Get => {
                    server.lines[number].tracks = true;
                    Reply::Lives(lives)
                }
                Command::Touch(true) if lives => {
                    own_push = std::mem::take(&mut server.lines[number].tracks);
                    server.push(false);
                    Reply::Touched(Touched::Extended)
                }
                Command::Touch(_) if lives => Reply::Touched(Touched::Unchanged),
                Command::Touch(_) => Reply::Touched(Touched::Gone),
                Command::Delete => {
                    own_push = lives && std::mem::take(&mut server.lines[number].tracks);
                    server.delete(now);
                    Reply::Done
                }
            };
            server.lines[number].send(Message::Reply(sender, reply));
            if own_push {
                server.lines[number].send(Message::Push { ended: matches!(command, Command::Delete) });
            }
        }
        self.server().lines[number].messages = None;
    }

    /// The worker's side: pushes are applied, replies handed to whoever waits, in the order in which they come.
    fn drive(&self, connection: Connection, number: usize, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            if self.server().lines[number].cut {
                continue;
            }
            match message {
                Message::Push { ended } if self.fault == Some(Fault::PushesElsewhere) => {
                    self.actor(move |world| {
                        pause();
                        world.apply(ended);
                    });
                }
                Message::Push { ended } => self.apply(ended),
                // Whoever waited may have given up.
                Message::Reply(sender, reply) => drop(sender.send(reply)),
            }
        }
        if self.fault != Some(Fault::SameEpoch) {
            self.cache.disconnected(connection);
        }
        self.look();
    }

    fn apply(&self, ended: bool) {
        self.cache.invalidate(&self.key);
        self.server().worker_knows |= ended;
    }

    /// The other half of correctness: it is a cache.
    fn a_read_is_kept_in_quiet_times(&self) {
        self.connect();
        self.beat();
        self.read();
        assert!(self.look(), "a live session that was read under a lease is a hit");
        assert!(!self.cache.doubts(&self.key), "and nobody doubts it");
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap()
    }
}

/// Others go first, for a while that is mostly short.
fn pause() {
    let turns = 1_u32 << (shuttle::rand::thread_rng().next_u32() % 6);
    (1..turns).for_each(|_| thread::yield_now());
}

impl Server {
    fn delete(&mut self, now: u64) {
        if self.ended.is_none() {
            self.ended = Some(now);
            self.push(true);
        }
    }

    /// To all that were told of the session since the last push.
    fn push(&mut self, ended: bool) {
        for line in self.lines.iter_mut().filter(|line| line.tracks) {
            line.tracks = false;
            line.send(Message::Push { ended });
        }
    }
}

impl Wire {
    fn send(&self, message: Message) {
        if let Some(messages) = self.messages.as_ref().filter(|_| !self.cut) {
            // A worker that has gone does not listen.
            let _ = messages.send(message);
        }
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}
