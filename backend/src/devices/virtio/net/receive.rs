use std::time::Instant;

use super::frame::Frame;
use super::header::Direction;
use super::link::{Link, Received};
use super::spec::{feature, header};
use super::{TURN, Turn};
use crate::devices::virtio::rate_limit::{Admission, RateLimiter};
use crate::devices::virtio::{Chain, MemoryGuard, QueueAccess, QueueError};

/// What moves frames from the link to the receive queue of one pair.
#[derive(Debug)]
pub(super) struct Receiver {
    frame: Frame,
    held: Held,
    /// Whether the port may have more.
    readable: bool,
    /// Kept for their memory.
    chains: Vec<Chain>,
    used: Vec<(u16, u32)>,
    /// How many frames the driver got.
    pub(super) frames: u64,
    /// How many it did not get.
    pub(super) lost: u64,
}

/// What the frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Nothing.
    Nothing,
    /// A frame that waits for the limit.
    Taken,
    /// A frame that waits for the driver to make buffers available.
    Admitted,
}

/// What came of giving a frame to the driver.
enum Placed {
    Whole,
    /// The buffers will never be enough.
    TooLong,
    /// There are not enough buffers yet; a kick will tell of more.
    Waits,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            frame: Frame::new(),
            held: Held::Nothing,
            readable: true,
            chains: Vec::new(),
            used: Vec::new(),
            frames: 0,
            lost: 0,
        }
    }

    /// The port woke.
    pub(super) fn port_is_readable(&mut self) {
        self.readable = true;
    }

    /// Forgets a frame that waits.
    pub(super) fn clear(&mut self) {
        self.held = Held::Nothing;
        self.readable = true;
    }

    /// Gives the driver what the port has, for one turn.
    pub(super) fn run<G: MemoryGuard>(
        &mut self,
        port: usize,
        link: &mut Link,
        limiter: &mut RateLimiter,
        features: u64,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<Turn, QueueError> {
        let now = Instant::now();
        // Only who waits for buffers wants to hear of them.
        queue.disable_kicks()?;
        for _ in 0..TURN {
            if self.held == Held::Nothing {
                match self.take(port, link, features) {
                    Received::Frame => self.held = Held::Taken,
                    Received::Unusable => {
                        self.lost += 1;
                        continue;
                    }
                    Received::Nothing => {
                        self.readable = false;
                        return Ok(Turn::Done);
                    }
                }
            }
            if self.held == Held::Taken {
                let bytes = self.frame.data().len() as u64;
                if limiter.admit(1, bytes, now) == Admission::Later {
                    return Ok(Turn::Done);
                }
                self.held = Held::Admitted;
            }
            match self.place(queue, features & feature::MRG_RXBUF != 0)? {
                Placed::Whole => self.frames += 1,
                Placed::TooLong => self.lost += 1,
                Placed::Waits => return Ok(Turn::Done),
            }
            self.held = Held::Nothing;
        }
        Ok(Turn::More)
    }

    fn take(&mut self, port: usize, link: &mut Link, features: u64) -> Received {
        if !self.readable {
            return Received::Nothing;
        }
        match link.receive(port, &mut self.frame) {
            Received::Frame if !self.frame.agree(features, Direction::Receive) => {
                Received::Unusable
            }
            received => received,
        }
    }

    /// Puts the frame into as many chains as it needs, or into none.
    fn place<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
        mergeable: bool,
    ) -> Result<Placed, QueueError> {
        let len = self.frame.bytes().len() as u64;
        let mut room = 0;
        let mut taken = 0;
        while room < len {
            if self.chains.len() == taken {
                self.chains.push(Chain::default());
            }
            if !queue.pop(&mut self.chains[taken])? {
                if taken == usize::from(queue.size()) {
                    give_back(queue, &self.chains[..taken]);
                    return Ok(Placed::TooLong);
                }
                // Before the chains are given back: with indices (2.7.10) the driver is to kick for
                // those behind them.
                if queue.rearm()? {
                    continue;
                }
                give_back(queue, &self.chains[..taken]);
                return Ok(Placed::Waits);
            }
            let buffer = self.chains[taken].writable.len();
            taken += 1;
            // The first has room for the header at least (5.1.6.3.1).
            if buffer == 0 || (taken == 1 && buffer < header::SIZE as u64) {
                return Err(QueueError::Short);
            }
            room += buffer;
            if room < len && !mergeable {
                give_back(queue, &self.chains[..taken]);
                return Ok(Placed::TooLong);
            }
        }
        self.copy(queue, taken)?;
        Ok(Placed::Whole)
    }

    fn copy<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
        taken: usize,
    ) -> Result<(), QueueError> {
        // As many as the queue holds at most.
        self.frame.set_num_buffers(u16::try_from(taken).unwrap_or(u16::MAX));
        let memory: &G::Target = queue.memory();
        let mut rest = self.frame.bytes();
        self.used.clear();
        for chain in &self.chains[..taken] {
            let room = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
            let (part, behind) = rest.split_at(room.min(rest.len()));
            chain.writable.write(memory, 0, part)?;
            // A part is as long as a frame at most.
            self.used.push((chain.head(), u32::try_from(part.len()).unwrap_or(u32::MAX)));
            rest = behind;
        }
        queue.push_all(&self.used)
    }
}

/// The driver's buffers are as if they had not been looked at.
fn give_back<G: MemoryGuard>(queue: &mut QueueAccess<'_, G>, taken: &[Chain]) {
    for chain in taken.iter().rev() {
        queue.unpop(chain.head());
    }
}
