//! Does the whole keep its promises? A real gateway, real backends and a real Redis, one file per promise.
//!
//! A test waits for facts ([`harness::wait_until`]), never for times, and takes free ports, never named ones.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, and says where")]

mod harness;
mod identity_headers;
mod directives;
mod guard;
mod proxying;
mod balancing;
mod splits;
mod pools_admin;
mod admin_listener;
mod backends_fail;
mod bad_nights;
mod discovery;
mod proxy_protocol;
mod http2;
mod http2_hostile;
mod tls;
mod login_journey;
mod own_pages;
mod own_pages_browser;
mod basic;
mod oidc;
mod oidc_conformance;
mod oidc_attacks;
mod hostile_targets;
mod oidc_browser;
mod store_down;
mod outage;
mod guessing;
mod per_user;
mod operation;
mod systemd;
mod upgrade;
mod audit;
mod memory_file;
mod session_control;
mod endings;
mod events;
mod tidy;
mod traces;

mod store_contract;
mod store_redis_faults;
mod store_sentinel;
mod store_cluster;
mod cache_coherence;
mod store_matrix;
