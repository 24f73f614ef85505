//! Bounds what a guest, a client or another peer can make this process write to its log.

use std::time::{Duration, Instant};

/// Bounds log lines that a guest or client can cause at will: ten at once, then one a second.
#[derive(Debug)]
pub(crate) struct RateLimit {
    /// Lines that may still be written at once.
    credit: u32,
    refilled: Instant,
    suppressed: u64,
}

const BURST: u32 = 10;
const REFILL: Duration = Duration::from_secs(1);

impl Default for RateLimit {
    fn default() -> Self {
        Self { credit: BURST, refilled: Instant::now(), suppressed: 0 }
    }
}

impl RateLimit {
    /// Whether a line may be written now; with the number of those that were not since the last.
    pub(crate) fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.refilled).as_secs() / REFILL.as_secs();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(BURST);
            self.credit = self.credit.saturating_add(earned).min(BURST);
            self.refilled = now;
        }
        if self.credit == 0 {
            self.suppressed += 1;
            return None;
        }
        self.credit -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_one_line_a_second_that_tells_what_was_lost() {
        let mut limit = RateLimit::default();
        let start = limit.refilled;
        let at = |millis| start + Duration::from_millis(millis);
        let admitted = (0..100).filter(|_| limit.admit_at(at(0)).is_some()).count();
        assert_eq!(admitted, 10);
        assert_eq!(limit.admit_at(at(999)), None);
        assert_eq!(limit.admit_at(at(1000)), Some(91));
        assert_eq!(limit.admit_at(at(1000)), None);
    }

    #[test]
    fn rest_brings_the_burst_back_and_no_more() {
        let mut limit = RateLimit::default();
        let start = limit.refilled;
        while limit.admit_at(start).is_some() {}
        let later = start + Duration::from_secs(1 << 40);
        let admitted = (0..100).filter(|_| limit.admit_at(later).is_some()).count();
        assert_eq!(admitted, 10);
    }
}
