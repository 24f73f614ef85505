//! Numbers that look random and can be had again.

use std::time::{SystemTime, UNIX_EPOCH};

/// A sequence of them (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Of the seed that `BARKEEP_CRASH_SEED` gives, or of another one each time. Says which.
    pub(crate) fn new() -> Self {
        let given = std::env::var("BARKEEP_CRASH_SEED").ok();
        let seed = given.map_or_else(of_the_clock, |seed| seed.parse().expect("a number"));
        println!("BARKEEP_CRASH_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = self.0;
        let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    /// One below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Another sequence.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

fn of_the_clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is past 1970");
    now.as_secs() ^ u64::from(now.subsec_nanos())
}
