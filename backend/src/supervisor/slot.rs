use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use tracing::{error, info};

use super::process::Process;
use crate::log_limit::RateLimit;
use crate::state::PreviousEnd;

/// A place that one worker after the other takes, to serve the same functions.
#[derive(Debug)]
pub(super) struct Slot {
    /// What the operator calls its functions.
    pub(super) name: String,
    pub(super) functions: Vec<u16>,
    pub(super) process: Option<Process>,
    /// When the next worker starts.
    pub(super) restart_at: Option<Instant>,
    pub(super) backoff: Backoff,
    /// How the last worker ended.
    pub(super) previous_end: PreviousEnd,
    /// How many workers have begun.
    pub(super) incarnation: u32,
    /// When the last one ended, until the next is ready.
    pub(super) down_since: Option<Instant>,
    /// Whether a worker has ever been ready.
    pub(super) has_served: bool,
    /// The worker is asked to reload when it is ready.
    pub(super) reload: bool,
    pub(super) log: RateLimit,
}

impl Slot {
    pub(super) fn new(name: String, functions: Vec<u16>) -> Self {
        Self {
            name,
            functions,
            process: None,
            restart_at: None,
            backoff: Backoff::default(),
            previous_end: PreviousEnd::Orderly,
            incarnation: 0,
            down_since: None,
            has_served: false,
            reload: false,
            log: RateLimit::default(),
        }
    }

    /// Whether a worker is ready.
    pub(super) fn is_ready(&self) -> bool {
        self.process.as_ref().is_some_and(Process::is_ready)
    }

    /// A descriptor of a client's could not be held.
    pub(super) fn note_loss(&mut self) {
        if let Some(suppressed) = self.log.admit() {
            let name = &self.name;
            error!(
                suppressed,
                "no room for a descriptor of {name}: its client is lost if its worker ends"
            );
        }
    }

    /// The worker serves from now on.
    pub(super) fn became_ready(&mut self) {
        self.has_served = true;
        let Some(process) = &mut self.process else { return };
        process.became_ready();
        if let Some(since) = self.down_since.take()
            && let Some(suppressed) = self.log.admit()
        {
            let (id, name, after) = (process.id(), &self.name, since.elapsed());
            info!(suppressed, "worker {id} of {name} goes on after {after:.1?}");
        }
        if std::mem::take(&mut self.reload) {
            process.reload();
        }
    }
}

/// How long to wait before the next try, so that a worker that can't live costs little.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    /// Tries that failed in a row.
    failures: u32,
}

/// Who has served for so long has not failed.
const SETTLED: Duration = Duration::from_millis(20);
const FIRST_DELAY: Duration = Duration::from_millis(10);
const LONGEST_DELAY: Duration = Duration::from_secs(1);

impl Backoff {
    /// The delay after an end: of a worker that had served for a time, or had never become ready.
    pub(super) fn delay(&mut self, served_for: Option<Duration>) -> Duration {
        if served_for.is_some_and(|served| served >= SETTLED) {
            self.failures = 0;
        }
        let doublings = self.failures.checked_sub(1);
        self.failures = self.failures.saturating_add(1);
        doublings.map_or(Duration::ZERO, |doublings| {
            FIRST_DELAY
                .saturating_mul(1u32.checked_shl(doublings).unwrap_or(u32::MAX))
                .min(LONGEST_DELAY)
        })
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

/// How a process ended, in a sentence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ending(pub(super) ExitStatus);

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => write!(f, "ended with status {code}"),
            (None, Some(signal)) => write!(f, "ended by signal {signal}"),
            (None, None) => f.write_str("ended"),
        }
    }
}

/// In how long, unless at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delay(pub(super) Duration);

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() { Ok(()) } else { write!(f, " in {:?}", self.0) }
    }
}

/// 1st, 2nd, 3rd, 4th
#[derive(Clone, Copy, Debug)]
pub(super) struct Ordinal(pub(super) u32);

impl fmt::Display for Ordinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = match (self.0 % 10, self.0 % 100) {
            (_, 11..=13) => "th",
            (1, _) => "st",
            (2, _) => "nd",
            (3, _) => "rd",
            _ => "th",
        };
        write!(f, "{}{suffix}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_cant_live_is_waited_for() {
        let mut backoff = Backoff::default();
        let mut delays = |served_for, count| -> Vec<u128> {
            (0..count).map(|_| backoff.delay(served_for).as_millis()).collect()
        };
        let settled = Some(SETTLED);
        let at_once = SETTLED.checked_sub(Duration::from_nanos(1));
        assert_eq!(delays(settled, 3), [0, 0, 0]);
        assert_eq!(delays(None, 9), [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(delays(at_once, 40), [1000; 40]);
        assert_eq!(delays(settled, 1), [0]);
        assert_eq!(delays(at_once, 2), [10, 20]);
    }

    #[test]
    fn ordinals_are_english() {
        let texts = [1, 2, 3, 4, 11, 12, 13, 21, 102, 111].map(|n| Ordinal(n).to_string());
        let expected =
            ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"];
        assert_eq!(texts, expected);
    }
}
