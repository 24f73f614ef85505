//! How long it takes until the next worker is at work.

use std::fmt::{Display, Formatter, Result};
use std::time::Duration;

use hdrhistogram::Histogram;

/// Times from a kill to what happened first that the killed worker can't have done.
#[derive(Debug)]
pub(crate) struct Recovery(Histogram<u64>);

impl Recovery {
    pub(crate) fn new() -> Self {
        Self(Histogram::new(3).expect("3 digits"))
    }

    pub(crate) fn add(&mut self, time: Duration) {
        self.0.record(u64::try_from(time.as_micros()).expect("less than for ever")).unwrap();
    }

    pub(crate) fn kills(&self) -> u64 {
        self.0.len()
    }
}

impl Display for Recovery {
    #[expect(clippy::cast_precision_loss, reason = "a few seconds")]
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let ms = |micros: u64| micros as f64 / 1000.0;
        let [p50, p99] = [0.5, 0.99].map(|part| ms(self.0.value_at_quantile(part)));
        let (kills, max) = (self.0.len(), ms(self.0.max()));
        write!(f, "{kills} kills: recovered in p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms")
    }
}
