//! The sessions of a function, one after the other: which is the last one, whether it is alive, and
//! what becomes of accesses while it is not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::client::DeadBackend;
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, Snapshot, lock, wait};

/// One connection to the process that owns a function.
#[derive(Debug)]
pub(super) struct Session<B> {
    pub(super) backend: Arc<B>,
    /// From 0 on.
    pub(super) number: u64,
}

/// The last session, and who waits for the next.
#[derive(Debug)]
pub(super) struct Sessions<B> {
    /// Replaced under the lock of the function.
    current: Snapshot<Session<B>>,
    dead_backend: DeadBackend,
    presence: Mutex<Presence>,
    /// There is a session, or nobody may wait any longer.
    changed: Condvar,
    unsupported_requests: AtomicU64,
    resumed: AtomicU64,
}

#[derive(Debug, Default)]
struct Presence {
    /// Since when the last session has been over.
    gone: Option<Instant>,
    /// Nobody brings another session.
    stopped: bool,
    told: Outages,
    /// Accesses that had completed as UR when the last session ended.
    before: u64,
}

/// How often the backend of a function was gone, and what that cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outages {
    /// Sessions that have ended.
    pub gone: u64,
    /// Sessions that took the place of one that had ended.
    pub back: u64,
    /// Time without a session, in nanoseconds; the one under way is included.
    pub away_ns: u64,
    /// Accesses that completed as Unsupported Request because no backend answered.
    pub unsupported_requests: u64,
    /// Accesses that waited for another session and were done there.
    pub resumed: u64,
}

impl std::iter::Sum for Outages {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            gone: sum.gone + one.gone,
            back: sum.back + one.back,
            away_ns: sum.away_ns.saturating_add(one.away_ns),
            unsupported_requests: sum.unsupported_requests + one.unsupported_requests,
            resumed: sum.resumed + one.resumed,
        })
    }
}

/// Longer than any VM runs, and short enough for the clock.
const LONGEST_STALL: Duration = Duration::from_secs(1 << 32);

/// What an access has waited so far.
#[derive(Debug, Default)]
pub(super) struct Patience {
    ends: Option<Instant>,
}

impl Patience {
    pub(super) fn has_waited(&self) -> bool {
        self.ends.is_some()
    }
}

/// An outage that is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outage {
    pub(super) away: Duration,
    pub(super) unsupported_requests: u64,
}

impl<B> Sessions<B> {
    pub(super) fn new(backend: B, dead_backend: DeadBackend) -> Self {
        Self {
            current: Snapshot::new(Session { backend: Arc::new(backend), number: 0 }),
            dead_backend,
            presence: Mutex::new(Presence::default()),
            changed: Condvar::new(),
            unsupported_requests: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
        }
    }

    pub(super) fn with_dead_backend(self, dead_backend: DeadBackend) -> Self {
        let dead_backend = match dead_backend {
            DeadBackend::Stall(limit) => DeadBackend::Stall(limit.min(LONGEST_STALL)),
            policy => policy,
        };
        Self { dead_backend, ..self }
    }

    pub(super) fn current(&self) -> Arc<Session<B>> {
        self.current.load_full()
    }

    pub(super) fn is_current(&self, session: &Session<B>) -> bool {
        self.current.load().number == session.number
    }

    /// Notes that a session is over; whether that is news.
    pub(super) fn ended(&self, session: &Session<B>) -> bool {
        let presence = &mut lock(&self.presence);
        if presence.gone.is_some() || !self.is_current(session) {
            return false;
        }
        presence.gone = Some(Instant::now());
        presence.told.gone += 1;
        presence.before = self.unsupported_requests.load(Ordering::Relaxed);
        true
    }

    /// Puts another session in the place of the last one, which is over. Nobody that waits is told yet.
    pub(super) fn replace(&self, backend: B) -> Arc<Session<B>> {
        let number = self.current.load().number + 1;
        self.current.store(Session { backend: Arc::new(backend), number });
        self.current()
    }

    /// Tells those that wait that they can go on. The function is as the new session says.
    pub(super) fn resume(&self) -> Outage {
        let presence = &mut lock(&self.presence);
        let away = presence.gone.take().map_or(Duration::ZERO, |since| since.elapsed());
        presence.told.back += 1;
        presence.told.away_ns = presence.told.away_ns.saturating_add(nanoseconds(away));
        self.changed.notify_all();
        let done = self.unsupported_requests.load(Ordering::Relaxed);
        Outage { away, unsupported_requests: done - presence.before }
    }

    /// Nobody brings another session from now on: whoever waits for one has waited enough.
    pub(super) fn stop(&self) {
        lock(&self.presence).stopped = true;
        self.changed.notify_all();
    }

    pub(super) fn is_stopped(&self) -> bool {
        lock(&self.presence).stopped
    }

    /// Waits at most so long, and no longer than until [`stop`](Self::stop); whether that was called.
    pub(super) fn pause(&self, limit: Duration) -> bool {
        let expires = Instant::now() + limit;
        let mut presence = lock(&self.presence);
        while !presence.stopped {
            let left = expires.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            presence = wait(&self.changed, presence, left);
        }
        presence.stopped
    }

    /// Waits until another session has taken the place of `session`, as long as the policy lets an
    /// access wait; whether one has.
    pub(super) fn await_next(&self, session: &Session<B>, patience: &mut Patience) -> bool {
        let DeadBackend::Stall(limit) = self.dead_backend else { return false };
        let now = Instant::now();
        let own = *patience.ends.get_or_insert_with(|| now + limit);
        let mut presence = lock(&self.presence);
        loop {
            // Sessions that end as soon as they begin give it no more time.
            let ends = presence.gone.map_or(own, |since| own.min(since + limit));
            let left = ends.saturating_duration_since(Instant::now());
            if left.is_zero() || presence.stopped {
                return false;
            }
            if presence.gone.is_none() {
                return !self.is_current(session);
            }
            presence = wait(&self.changed, presence, left);
        }
    }

    /// Counts an access that no backend answers.
    pub(super) fn count_unsupported_request(&self) {
        self.unsupported_requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one that has waited, and was answered then.
    pub(super) fn count_resumed(&self) {
        self.resumed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn outages(&self) -> Outages {
        let presence = lock(&self.presence);
        let under_way = presence.gone.map_or(0, |since| nanoseconds(since.elapsed()));
        Outages {
            away_ns: presence.told.away_ns.saturating_add(under_way),
            unsupported_requests: self.unsupported_requests.load(Ordering::Relaxed),
            resumed: self.resumed.load(Ordering::Relaxed),
            ..presence.told
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
