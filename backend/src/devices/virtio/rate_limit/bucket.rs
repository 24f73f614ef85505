use std::time::{Duration, Instant};

use super::Limit;

/// What is left of a limit. It fills at a steady rate, up to the amount of one period.
///
/// It is counted in amount times nanoseconds of the period, so that nothing is lost by rounding
/// however often it is looked at: at most 2^64 * 2^32 * 10^6, less than 2^116.
#[derive(Debug)]
pub(super) struct Bucket {
    limit: Limit,
    /// Negative after a request that was larger than a whole bucket.
    level: i128,
    /// Up to when it was filled; it was full at first.
    filled: Option<Instant>,
}

const NANOS_PER_MILLI: i128 = 1_000_000;

impl Bucket {
    pub(super) fn new(limit: Limit) -> Self {
        let mut bucket = Self { limit, level: 0, filled: None };
        bucket.level = bucket.capacity();
        bucket
    }

    /// How long it takes until `demand` can be [taken](Self::take); zero when it can.
    pub(super) fn wait(&mut self, demand: u64, now: Instant) -> Duration {
        self.fill(now);
        if demand == 0 {
            return Duration::ZERO;
        }
        // More than a bucket holds would never be there.
        let needed = self.cost(demand).min(self.capacity());
        let missing = needed.saturating_sub(self.level).max(0);
        nanoseconds(missing.unsigned_abs().div_ceil(self.limit.amount.get().into()))
    }

    /// Takes it, whether it is there or not.
    pub(super) fn take(&mut self, demand: u64) {
        self.level = self.level.saturating_sub(self.cost(demand));
    }

    fn fill(&mut self, now: Instant) {
        let since = self.filled.map_or(Duration::ZERO, |then| now.saturating_duration_since(then));
        let elapsed = i128::try_from(since.as_nanos()).unwrap_or(i128::MAX);
        let earned = elapsed.saturating_mul(self.limit.amount.get().into());
        self.level = self.level.saturating_add(earned).min(self.capacity());
        self.filled = self.filled.max(Some(now));
    }

    fn cost(&self, demand: u64) -> i128 {
        i128::from(demand) * i128::from(self.limit.period.get()) * NANOS_PER_MILLI
    }

    fn capacity(&self) -> i128 {
        self.cost(self.limit.amount.get())
    }
}

fn nanoseconds(count: u128) -> Duration {
    const SECOND: u128 = 1_000_000_000;
    let subsecond = u32::try_from(count % SECOND).expect("it is less than 10^9");
    u64::try_from(count / SECOND).map_or(Duration::MAX, |whole| Duration::new(whole, subsecond))
}
