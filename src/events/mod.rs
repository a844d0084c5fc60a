//! Who is told? Of each session that has ended: whoever counts, reads the audit log, or has a webhook. By one instance.
//!
//! The store notes each end until somebody has been told of it ([`SessionStore::sweep`]). One instance leads (`lead`):
//! it goes through the parts of the store evenly, all of them in a [`Pace::round`], and tells of what it finds there,
//! the oldest first. Only what has been told is forgotten, so nothing is lost when an instance dies in the middle; the
//! next one may then tell it again.
//!
//! ```text
//! lead      may I?                          lead.rs
//! sweep     what has ended in this part?    the store
//! tell      metrics, audit line, POST       here, webhook.rs
//! forget    the store
//! ```

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::audit::{self, Event};
use crate::config::model;
use crate::metrics::Metrics;
use crate::panics::survived;
use crate::session::control::Timestamp;
use crate::session::store::{EndEvent, SessionStore, StoreError};

mod lead;
mod webhook;

use lead::Lead;
use webhook::{Delivery, Webhook};

/// How quickly it all goes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// All parts are swept once in this time: how late an end may be told.
    pub round: Duration,
    /// An instance that leads and dies is followed by another one after this long.
    pub lease: Duration,
    /// After a failure of the webhook: this long, then twice as long, up to a minute.
    pub retry: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { round: Duration::from_secs(60), lease: Duration::from_secs(20), retry: Duration::from_secs(1) }
    }
}

/// Tells of ends, while this instance leads.
#[derive(Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn SessionStore>,
    metrics: Metrics,
    audit: bool,
    webhook: Option<Arc<Webhook>>,
    pace: Pace,
    lead: Lead,
    /// Parts that are being swept, or have events that the webhook did not take.
    parts: Mutex<Parts>,
    /// The receiver does not answer: nobody tries before this.
    away: Mutex<Failures>,
    /// Whether the last sweep failed, so that a dead store is one line in the log.
    store_failed: Mutex<bool>,
}

#[derive(Default)]
struct Parts {
    busy: HashSet<u16>,
    waiting: HashMap<u16, Waiting>,
}

/// What is known of a part whose first event could not be delivered.
#[derive(Clone, Debug, Default)]
struct Waiting {
    /// The last event that was counted and written to the audit log; those behind it are new.
    noted: Option<Vec<u8>>,
    refused: Failures,
}

/// Failures in a row, and when to try again.
#[derive(Clone, Copy, Debug, Default)]
struct Failures {
    count: u32,
    retry_at: Option<Instant>,
}

/// The webhook is tried again after this long at most.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// An event that the webhook does not take for this long is given up: else one that it never takes would hold up the
/// others of its part for ever, and a receiver that is gone would fill the store.
const TRIED_MAX: Duration = Duration::from_secs(3 * 24 * 3600);

/// So many parts are swept at a time, and so many threads wait for the webhook.
const SWEEPS_AT_ONCE: usize = 8;

/// Between two looks at what is due.
const TICK: Duration = Duration::from_millis(250);

/// Between two looks at how many sessions there are.
const COUNT_INTERVAL: Duration = Duration::from_secs(15);

impl Events {
    pub fn new(config: &model::Events, store: Arc<dyn SessionStore>, metrics: Metrics, pace: Pace) -> Self {
        let webhook = config.webhook.as_ref().map(|url| {
            let secret = config.webhook_secret.as_ref().map(|secret| secret.get_ref().clone());
            Arc::new(Webhook::new(url.get_ref(), secret))
        });
        let shared = Shared {
            store,
            metrics,
            audit: config.audit,
            webhook,
            pace,
            lead: Lead::new(),
            parts: Mutex::default(),
            away: Mutex::default(),
            store_failed: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Until it is dropped.
    pub async fn run(&self) {
        let shared = &self.shared;
        tokio::join!(shared.lead.keep(&*shared.store, shared.pace.lease), self.sweep(), shared.count());
    }

    async fn sweep(&self) {
        let shared = &self.shared;
        let sweeps = Arc::new(Semaphore::new(SWEEPS_AT_ONCE));
        let mut round = Round::begin(Instant::now());
        loop {
            tokio::time::sleep(TICK.min(shared.pace.round / 4)).await;
            let now = Instant::now();
            if !shared.lead.holds() {
                round = Round::begin(now);
                shared.parts.lock().waiting.clear();
                continue;
            }
            let mut due: Vec<u16> = round.due(now, shared.pace.round, shared.store.parts()).collect();
            if shared.away.lock().may_try() {
                due.extend(shared.parts.lock().retries());
            }
            for part in due {
                let permit = Arc::clone(&sweeps).acquire_owned().await.expect("never closed");
                self.start_sweep(part, permit);
            }
        }
    }

    fn start_sweep(&self, part: u16, permit: OwnedSemaphorePermit) {
        if !self.shared.lead.holds() || !self.shared.parts.lock().busy.insert(part) {
            return;
        }
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let swept = survived(shared.sweep_part(part)).await;
            // Also after a mistake of ours: else nobody would sweep it any more.
            shared.parts.lock().busy.remove(&part);
            if let Some(swept) = swept {
                shared.say_whether_it_went_on(&swept);
            }
            drop(permit);
        });
    }
}

impl Shared {
    async fn sweep_part(&self, part: u16) -> Result<(), StoreError> {
        let events = self.store.sweep(part).await?;
        let mut waiting = self.parts.lock().waiting.remove(&part).unwrap_or_default();
        if events.is_empty() || !self.lead.holds() {
            return Ok(());
        }
        let told = if self.audit || self.webhook.is_some() {
            self.note(&events, &mut waiting);
            self.tell(&events, &mut waiting).await
        } else {
            // Another instance may want to tell of them: while the file is being changed everywhere, two differ.
            events.iter().take_while(|event| is_old(event)).count()
        };
        if told < events.len() && self.webhook.is_some() {
            self.parts.lock().waiting.insert(part, waiting);
        }
        if told == 0 { Ok(()) } else { self.store.forget_events(part, &events[..told]).await }
    }

    /// Counts those that are seen for the first time, and writes them to the audit log: nobody waits for the webhook.
    fn note(&self, events: &[EndEvent], waiting: &mut Waiting) {
        let known = events.iter().position(|event| Some(&event.token) == waiting.noted.as_ref());
        for event in &events[known.map_or(0, |index| index + 1)..] {
            self.metrics.session_ends.with_label_values(&[event.ending.label()]).inc();
            if self.audit {
                let (at, ending) = (Timestamp(event.at).to_string(), event.ending.label());
                audit::tell(Event::Ended { session: &event.session, user: &event.user, ending, at: &at });
            }
        }
        waiting.noted = events.last().map(|event| event.token.clone());
    }

    /// How many of them, from the first on, are done with.
    async fn tell(&self, events: &[EndEvent], waiting: &mut Waiting) -> usize {
        let Some(webhook) = &self.webhook else { return events.len() };
        for (told, event) in events.iter().enumerate() {
            if !self.lead.holds() || !self.away.lock().may_try() || !waiting.refused.may_try() {
                return told;
            }
            let (webhook, posted) = (Arc::clone(webhook), event.clone());
            let delivery = tokio::task::spawn_blocking(move || webhook.post(&posted)).await;
            let delivery = delivery.unwrap_or_else(|_| Delivery::Away("the delivery broke off".into()));
            self.metrics.events_delivered.with_label_values(&[delivery.label()]).inc();
            if !matches!(delivery, Delivery::Away(_)) {
                *self.away.lock() = Failures::default();
            }
            match delivery {
                Delivery::Told => waiting.refused = Failures::default(),
                Delivery::Refused(_) | Delivery::Away(_) if is_old(event) => {
                    waiting.refused = Failures::default();
                    self.metrics.events_delivered.with_label_values(&["given_up"]).inc();
                    let (session, ending) = (&event.session, event.ending.label());
                    tracing::error!(session, ending, "session end given up: the webhook did not take it for days");
                }
                Delivery::Refused(status) => {
                    if waiting.refused.one_more(self.pace.retry) == 1 {
                        tracing::warn!(status, "webhook refused a session end; it is told again");
                    }
                    return told;
                }
                Delivery::Away(cause) => {
                    let mut away = self.away.lock();
                    // Others may have been under way to it, too: together they are one failure.
                    if away.may_try() && away.one_more(self.pace.retry) == 1 {
                        tracing::warn!(cause, "webhook does not take session ends; they are kept until it does");
                    }
                    return told;
                }
            }
        }
        events.len()
    }

    /// Keeps the gauge, at the instance that leads; elsewhere there is none, so that a sum over all is right.
    async fn count(&self) {
        let mut counted: Option<Instant> = None;
        loop {
            tokio::time::sleep(TICK).await;
            if !self.lead.holds() {
                self.metrics.sessions.reset();
                counted = None;
            } else if counted.is_none_or(|at| COUNT_INTERVAL <= at.elapsed()) {
                counted = Some(Instant::now());
                if let Ok(sessions) = self.store.total().await {
                    let sessions = i64::try_from(sessions).unwrap_or(i64::MAX);
                    self.metrics.sessions.with_label_values::<&str>(&[]).set(sessions);
                }
            }
        }
    }

    /// A dead store is told of once, and not once per part.
    fn say_whether_it_went_on(&self, swept: &Result<(), StoreError>) {
        let failed_before = std::mem::replace(&mut *self.store_failed.lock(), swept.is_err());
        match swept {
            Ok(()) if failed_before => tracing::info!("session ends are swept again"),
            Err(error) if !failed_before => {
                let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(%error, cause, "session ends are not swept");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

impl Parts {
    /// Those that may be tried again now.
    fn retries(&self) -> Vec<u16> {
        self.waiting.iter().filter(|(_, waiting)| waiting.refused.may_try()).map(|(part, _)| *part).collect()
    }
}

impl Failures {
    fn may_try(&self) -> bool {
        self.retry_at.is_none_or(|at| at <= Instant::now())
    }

    /// How many there are with this one.
    fn one_more(&mut self, first: Duration) -> u32 {
        let wait = first.saturating_mul(1 << self.count.min(16)).min(RETRY_MAX);
        self.count = self.count.saturating_add(1);
        self.retry_at = Some(Instant::now() + wait);
        self.count
    }
}

/// By our own clock, which may differ a little from the store's: it is a matter of days.
fn is_old(event: &EndEvent) -> bool {
    let age = Timestamp::now().0.saturating_sub(event.at);
    u128::from(age) > TRIED_MAX.as_millis()
}

/// One walk through all parts.
#[derive(Debug)]
struct Round {
    begun: Instant,
    next: u16,
}

impl Round {
    fn begin(now: Instant) -> Self {
        Self { begun: now, next: 0 }
    }

    /// The parts whose turn has come since the last call: evenly, and no part twice in a round.
    fn due(&mut self, now: Instant, length: Duration, parts: u16) -> std::ops::Range<u16> {
        if length <= now.duration_since(self.begun) && parts <= self.next {
            *self = Self::begin(now);
        }
        let share = now.duration_since(self.begun).as_secs_f64() / length.as_secs_f64();
        let until = (share * f64::from(parts)) as u16;
        let due = self.next..until.saturating_add(1).min(parts);
        self.next = self.next.max(due.end);
        due
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("pace", &self.shared.pace).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_takes_each_part_once_and_evenly() {
        let (begun, length) = (Instant::now(), Duration::from_secs(60));
        for parts in [1, 7, 4096] {
            let mut round = Round::begin(begun);
            let mut taken = Vec::new();
            for tick in 0..240 {
                let due = round.due(begun + Duration::from_millis(tick * 250), length, parts);
                assert!(due.len() <= 19, "{parts} parts: {} at a time are not even", due.len());
                taken.extend(due);
            }
            taken.extend(round.due(begun + length - Duration::from_nanos(1), length, parts));
            assert!(taken.iter().copied().eq(0..parts), "{parts} parts: each has its turn once");
            assert_eq!(round.due(begun + length, length, parts).start, 0, "and then it begins anew");
        }
    }

    #[test]
    fn a_round_that_was_held_up_takes_the_rest_before_it_begins_anew() {
        let (begun, length) = (Instant::now(), Duration::from_secs(60));
        let mut round = Round::begin(begun);
        assert_eq!(round.due(begun, length, 10), 0..1);
        assert_eq!(round.due(begun + length * 3, length, 10), 1..10);
        assert_eq!(round.due(begun + length * 3, length, 10), 0..1);
    }

    #[test]
    fn failures_wait_longer_and_longer_up_to_a_minute() {
        let mut failures = Failures::default();
        assert!(failures.may_try());
        for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
            failures.one_more(Duration::from_secs(1));
            let wait = failures.retry_at.unwrap() - Instant::now();
            assert!(wait <= Duration::from_secs(expected) && Duration::from_secs(expected - 1) < wait, "{wait:?}");
            assert!(!failures.may_try());
        }
    }
}
