//! Percentiles of a round, and medians over the rounds.

use std::time::Instant;

use crate::clients::{Access, Measured};

/// Accesses before the clock counts: caches, and a server that polls, are warm then.
const WARM_UP: usize = 200;

/// The percentiles of one round, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Percentiles {
    p50: f64,
    p99: f64,
}

/// All rounds of one subject.
#[derive(Debug, Default)]
pub(crate) struct Rounds(Vec<Percentiles>);

/// A subject's line in a table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) ratio: f64,
}

/// Measures `accesses` accesses, one after the other.
pub(crate) fn round(subject: &mut dyn Measured, access: Access, accesses: usize) -> Percentiles {
    for _ in 0..WARM_UP {
        subject.perform(access);
    }
    let mut times: Vec<f64> = (0..accesses)
        .map(|_| {
            let start = Instant::now();
            subject.perform(access);
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    Percentiles { p50: times[times.len() / 2], p99: times[times.len() * 99 / 100] }
}

impl Rounds {
    pub(crate) fn add(&mut self, round: Percentiles) {
        self.0.push(round);
    }

    /// Medians, and the median of the ratios to `base` round by round: what disturbs a round disturbs
    /// both of its measurements.
    pub(crate) fn against(&self, base: &Self) -> Row {
        Row {
            p50: median(self.0.iter().map(|round| round.p50)),
            p99: median(self.0.iter().map(|round| round.p99)),
            ratio: median(self.0.iter().zip(&base.0).map(|(own, base)| own.p50 / base.p50)),
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
