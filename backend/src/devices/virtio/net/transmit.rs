use std::time::Instant;

use super::frame::{self, Frame};
use super::header::Direction;
use super::link::Link;
use super::spec::header;
use super::{TURN, Turn};
use crate::devices::virtio::rate_limit::{Admission, RateLimiter};
use crate::devices::virtio::{Chain, MemoryGuard, QueueAccess, QueueError};

/// What moves frames from the transmit queue of one pair to the link.
#[derive(Debug)]
pub(super) struct Transmitter {
    frame: Frame,
    /// Kept for its memory.
    chain: Chain,
    /// Whether a turn ended before the queue did.
    unfinished: bool,
    /// How many frames are on their way.
    pub(super) frames: u64,
    /// How many are not.
    pub(super) lost: u64,
}

impl Transmitter {
    pub(super) fn new() -> Self {
        Self { frame: Frame::new(), chain: Chain::default(), unfinished: false, frames: 0, lost: 0 }
    }

    /// Whether it is to run again without a kick.
    pub(super) fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// Forgets an unfinished turn.
    pub(super) fn clear(&mut self) {
        self.unfinished = false;
    }

    /// Sends what the driver made available, for one turn. Every chain is given back, sent or not:
    /// a network loses frames.
    pub(super) fn run<G: MemoryGuard>(
        &mut self,
        pair: usize,
        link: &mut Link,
        limiter: &mut RateLimiter,
        features: u64,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<Turn, QueueError> {
        let now = Instant::now();
        let mut left = TURN;
        self.unfinished = false;
        loop {
            queue.disable_kicks()?;
            while queue.pop(&mut self.chain)? {
                let bytes = self.chain.readable.len().saturating_sub(header::SIZE as u64);
                let bytes = bytes.min(frame::MAX_LEN as u64);
                if limiter.admit(1, bytes, now) == Admission::Later {
                    queue.unpop(self.chain.head());
                    self.unfinished = true;
                    return Ok(Turn::Done);
                }
                let whole = self.frame.gather::<G::Target>(queue.memory(), &self.chain.readable)?;
                let sent = whole
                    && self.frame.agree(features, Direction::Transmit)
                    && link.transmit(pair, &self.frame);
                *(if sent { &mut self.frames } else { &mut self.lost }) += 1;
                queue.push(self.chain.head(), 0)?;
                left -= 1;
                if left == 0 {
                    self.unfinished = true;
                    return Ok(Turn::More);
                }
            }
            if !queue.rearm()? {
                return Ok(Turn::Done);
            }
        }
    }
}
