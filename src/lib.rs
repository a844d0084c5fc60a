//! Cloakroom is a reverse proxy and load balancer that takes sessions out of the web servers behind it.
//!
//! *Hand in your session, keep the ticket.* It terminates the request, resolves the session cookie against Redis,
//! tells the backend who the user is in trusted headers, spreads requests over interchangeable backends, and answers
//! login and logout itself. The backends stay unmodified: they read headers.
//!
//! # The life of a request
//!
//! ```text
//! listener     accepts under a cap, TLS                                     listener/
//! connection   reads the head, whole, under one deadline and one limit      proxy/connection.rs, http2.rs
//! guard        refuses what two readers could read differently: 400         proxy/guard.rs
//! route        host + path -> Route, or 404                                 proxy/route.rs
//! session      cookie -> SessionId -> copy -> store      (none | live | unreadable | down)   session/
//! admit        access and groups -> forward, or: login page, 401, 403, 503  proxy/admit.rs
//! split        this user -> the route's pool, or another                     proxy/split.rs
//! balance      who is well, by turn, load or hash; another one where safe   backend/
//! forward      look-alikes and our cookies out, identity in                 proxy/forward.rs
//! backend      answers
//! respond      hop-by-hop out, foreign copies of our cookies out            proxy/forward.rs
//! directives   what the backend says of the session, where it may           proxy/directives.rs
//! log          one line, one count                                          proxy/access_log.rs
//! ```
//!
//! A request under the login prefix turns off after the guard and is answered by [`login`].
//!
//! # What always holds
//!
//! The numbers are quoted where the code keeps them and where a test holds them.
//!
//! 1. No header that a client sent under an identity name, in any spelling, reaches a backend, on any route.
//! 2. Our cookies never travel to a backend; a session id is never logged, never a metric label, never in `Debug`.
//!    The store holds only a hash of it.
//! 3. A session id is made only by [`session::id::SessionId::generate`], at a login or for a session of nobody, and never
//!    taken from the client. A login gives a new id and ends the old one.
//! 4. A store failure is 503 with `Retry-After`, or the grace or fallback cookie that the operator asked for, each for a
//!    bounded time and for who was known before: never a logout, never a let-in. The cookie is deleted only when the store
//!    said "no such session" or the user logged out.
//! 5. A logout is seen by every instance, also by requests that are answered from its local copies, within
//!    `store.redis.lease` at the latest. (Not through an outage that is bridged: invariant 4.) However a session ends, its
//!    WebSockets, event streams and other long requests end within two seconds of it.
//! 6. Access is decided on exactly the path bytes that are forwarded; what is ambiguous is refused with 400.
//! 7. Everything has a limit: heads, bodies, time per phase, attempts, pools, connections, sessions in memory, copies of
//!    them, sessions of a user, and what is remembered of guesses and of ends.
//! 8. A non-idempotent request is never sent twice. A failed backend costs a client nothing where a retry is safe.
//! 9. Every request ends in exactly one access-log line and one outcome. (Lines that nobody reads are dropped and
//!    counted.)
//! 10. A broken configuration never replaces a working one.

// In reading order.
pub mod cli;
pub mod supervisor;
pub mod server;
pub mod listener;
pub mod proxy;
pub mod session;
pub mod login;
pub mod identity;
pub mod backend;
pub mod events;
pub mod admin;
pub mod config;
pub mod pem;
pub mod audit;
pub mod outgoing;
pub mod log;
pub mod panics;
pub mod spans;
pub mod metrics;
