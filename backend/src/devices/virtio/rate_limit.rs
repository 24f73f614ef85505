//! What a device may do in a time, and the wake for when it may do more.

mod bucket;

#[cfg(test)]
mod tests;

use std::num::{NonZeroU32, NonZeroU64};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use self::bucket::Bucket;
use crate::config::{ConfigError, Parameters};
use crate::devices::timer::Timer;

/// So much in a period. As much may come at once after a rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Operations, or bytes.
    pub amount: NonZeroU64,
    /// The period, in milliseconds.
    pub period: NonZeroU32,
}

/// What an operator allows a device; `None` is without a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests, or frames.
    pub operations: Option<Limit>,
    /// What they carry.
    pub bytes: Option<Limit>,
}

/// Whether a request may be done.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may, and is counted.
    Now,
    /// It is not counted: ask again when [`RateLimiter::fd`] is readable.
    Later,
}

/// Holds a device to its [`Limits`].
///
/// A request that is larger than what may come at once passes when nothing else was done for a
/// period, and others wait until it is made up for: the rate holds, and no request waits for ever.
///
/// A reset of the device has no business here: a guest could get rid of its debt by it.
#[derive(Debug)]
pub struct RateLimiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    /// There is one if there is a limit.
    timer: Option<Alarm>,
}

impl Limit {
    /// So much a second.
    #[must_use]
    pub fn per_second(amount: NonZeroU64) -> Self {
        const SECOND: NonZeroU32 = NonZeroU32::new(1000).expect("it is not zero");
        Self { amount, period: SECOND }
    }
}

impl Limits {
    /// Takes `iops=N` (operations a second) and `bps=SIZE` (bytes a second).
    ///
    /// # Errors
    /// [`ConfigError`] when a value is none, or zero: nothing would ever be done.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let operations = parameters.take_number("iops")?;
        let bytes = parameters.take_size("bps")?;
        Ok(Self { operations: per_second("iops", operations)?, bytes: per_second("bps", bytes)? })
    }
}

impl RateLimiter {
    /// A limiter that has not seen anything yet.
    ///
    /// # Errors
    /// The kernel gives no timer.
    pub fn new(limits: Limits) -> Result<Self, Errno> {
        let limited = limits.operations.or(limits.bytes).is_some();
        Ok(Self {
            operations: limits.operations.map(Bucket::new),
            bytes: limits.bytes.map(Bucket::new),
            timer: limited.then(Alarm::new).transpose()?,
        })
    }

    /// Whether a request, or several at once, may be done now. The callers that are told
    /// [`Admission::Later`] may be many; all ask again when [`fd`](Self::fd) is readable.
    pub fn admit(&mut self, operations: u64, bytes: u64, now: Instant) -> Admission {
        let demands = [(&mut self.operations, operations), (&mut self.bytes, bytes)];
        let waits = demands.map(|(bucket, demand)| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(demand, now))
        });
        let wait = waits[0].max(waits[1]);
        if wait.is_zero() {
            self.charge(operations, bytes);
            return Admission::Now;
        }
        if let Some(timer) = &mut self.timer {
            timer.arm(wait, now);
        }
        Admission::Later
    }

    /// Counts what is done whether it may be or not, because it can't wait: others wait for it.
    pub fn charge(&mut self, operations: u64, bytes: u64) {
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
    }

    /// What becomes readable when a request that had to wait may be done; none without a limit. It
    /// stays readable until it is [acknowledged](Self::acknowledge).
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.timer.as_ref().map(|alarm| alarm.timer.as_fd())
    }

    /// [`fd`](Self::fd) was seen to be readable. To be called before asking again.
    pub fn acknowledge(&mut self) {
        if let Some(timer) = &mut self.timer {
            timer.acknowledge();
        }
    }
}

fn per_second(parameter: &'static str, amount: Option<u64>) -> Result<Option<Limit>, ConfigError> {
    let limit = |amount| {
        let amount = NonZeroU64::new(amount)
            .ok_or_else(|| ConfigError::invalid(parameter, "0 a second is nothing at all"))?;
        Ok(Limit::per_second(amount))
    };
    amount.map(limit).transpose()
}

#[derive(Debug)]
struct Alarm {
    timer: Timer,
    /// When it goes off or went off, until that is acknowledged.
    due: Option<Instant>,
}

impl Alarm {
    fn new() -> Result<Self, Errno> {
        Ok(Self { timer: Timer::new()?, due: None })
    }

    /// Sets it, unless it goes off earlier or did: somebody else waits for that.
    fn arm(&mut self, wait: Duration, now: Instant) {
        let due = now.checked_add(wait);
        if self.due.is_some_and(|set| due.is_none_or(|due| set <= due)) {
            return;
        }
        self.due = due;
        self.timer.set(wait);
    }

    fn acknowledge(&mut self) {
        // Nothing to read: it was set anew, or somebody woke us without cause.
        if self.timer.take() {
            self.due = None;
        }
    }
}
