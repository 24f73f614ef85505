//! Whether to look for the next request before sleeping.
//!
//! Waking a sleeping process on another processor costs tens of microseconds, more than the rest of a
//! request. A client that asks again at once is better served by a loop that goes on looking for a
//! while; for all others that is wasted. So it is only done while it pays.

use std::time::{Duration, Instant};

/// Decides from the recent past whether polling pays.
#[derive(Debug)]
pub(super) struct Poller {
    /// How long to look before sleeping; zero turns polling off.
    budget: Duration,
    /// The port that was busy last, and when.
    busy: Option<(usize, Instant)>,
    /// Rises when a request comes soon after the last, falls when none does.
    credit: u8,
}

/// Requests that must have come soon before polling begins.
const ENOUGH: u8 = 4;
/// What further ones can gain: so many misses in a row are forgiven.
const MOST: u8 = 8;
/// A request that found the process asleep came later than it was sent, by a wake-up of both sides.
const ASLEEP_FACTOR: u32 = 8;

impl Poller {
    pub(super) fn new(budget: Duration) -> Self {
        Self { budget, busy: None, credit: 0 }
    }

    /// Requests of this port were served now.
    pub(super) fn served(&mut self, port: usize) {
        if self.budget.is_zero() {
            return;
        }
        let now = Instant::now();
        if let Some((_, last)) = self.busy.replace((port, now)) {
            let soon = now.duration_since(last) < self.budget * ASLEEP_FACTOR;
            self.credit =
                if soon { MOST.min(self.credit + 1) } else { self.credit.saturating_sub(2) };
        }
    }

    /// The port to look at instead of sleeping, if that may pay.
    pub(super) fn target(&mut self) -> Option<usize> {
        let (port, last) = self.busy.filter(|_| self.credit >= ENOUGH)?;
        if last.elapsed() < self.budget {
            return Some(port);
        }
        self.credit = self.credit.saturating_sub(1);
        None
    }

    /// The port has nobody to serve any more.
    pub(super) fn forget(&mut self, port: usize) {
        if self.busy.is_some_and(|(busy, _)| busy == port) {
            self.busy = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_budget_nothing_is_polled() {
        let mut poller = Poller::new(Duration::ZERO);
        for _ in 0..100 {
            poller.served(0);
        }
        assert_eq!(poller.target(), None);
    }

    #[test]
    fn requests_in_quick_succession_are_waited_for_and_a_single_one_is_not() {
        let mut poller = Poller::new(Duration::from_secs(3600));
        poller.served(3);
        assert_eq!(poller.target(), None);
        for _ in 0..ENOUGH {
            poller.served(3);
        }
        assert_eq!(poller.target(), Some(3));
        poller.forget(3);
        assert_eq!(poller.target(), None);
    }

    #[test]
    fn a_budget_that_is_used_up_in_vain_ends_the_polling() {
        let mut poller = Poller::new(Duration::from_nanos(1));
        poller.credit = MOST;
        poller.busy = Some((0, Instant::now() - Duration::from_secs(1)));
        for _ in 0..MOST {
            assert_eq!(poller.target(), None);
        }
        assert_eq!(poller.credit, ENOUGH - 1);
    }
}
