//! The entropy device (5.4): random bytes of the host's kernel.

mod options;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

pub use self::options::Options;
use super::rate_limit::{Admission, Limits, RateLimiter};
use super::spec::DeviceType;
use super::{Chain, Core, DeviceError, Io, MemoryGuard, QueueAccess, QueueError};
use crate::config::{ConfigError, Parameters};

/// The entropy device.
///
/// It keeps no request: one that has to wait for the limit stays in the queue. So there is nothing
/// in flight, and nothing to move.
#[derive(Debug)]
pub struct Entropy {
    limiter: RateLimiter,
    /// Signalled when a turn ends before the queue does.
    again: OwnedFd,
    /// What one request gets at most, and room for it.
    bytes: Box<[u8]>,
    chain: Chain,
}

/// requestq (5.4.2).
const QUEUE: u16 = 0;
/// As in QEMU. A driver asks for the next bytes when it has got the last.
const QUEUE_SIZE: u16 = 8;
/// What one request gets at most, in bytes: "it MAY use less than the entire buffer length"
/// (5.4.6.2).
const MAX_REQUEST: usize = 64 << 10;
/// Requests that are served at a stretch: a driver that asks without pause has others wait.
const TURN: usize = 8;

/// Its wakes.
const AGAIN: usize = 0;
const LIMITER: usize = 1;

impl Entropy {
    /// Creates the device: `virtio-rng[,max-bytes=SIZE[,period=MILLISECONDS]]`.
    ///
    /// # Errors
    /// [`ConfigError`] when a value can't be used.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let options = Options::from_parameters(parameters)?;
        Self::new(options).map_err(|errno| ConfigError::invalid("max-bytes", errno))
    }

    /// Creates the device. Right after the host has booted, it waits for the kernel's random number
    /// generator to be ready, so that no request has to.
    ///
    /// # Errors
    /// The kernel has no random bytes, or no timer.
    pub fn new(options: Options) -> Result<Self, Errno> {
        random(&mut [0])?;
        let limits = Limits { operations: None, bytes: options.limit };
        let largest = options.limit.map_or(u64::MAX, |limit| limit.amount.get());
        let largest = usize::try_from(largest).map_or(MAX_REQUEST, |bytes| bytes.min(MAX_REQUEST));
        Ok(Self {
            limiter: RateLimiter::new(limits)?,
            again: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            bytes: vec![0; largest].into(),
            chain: Chain::default(),
        })
    }

    fn serve<G: MemoryGuard>(&mut self, queue: &mut QueueAccess<'_, G>) -> Result<(), DeviceError> {
        let mut left = TURN;
        loop {
            queue.disable_kicks().map_err(malformed)?;
            while queue.pop(&mut self.chain).map_err(malformed)? {
                if left == 0 {
                    queue.unpop(self.chain.head());
                    self.go_on_later();
                    return Ok(());
                }
                left -= 1;
                if self.answer(queue)? == Admission::Later {
                    queue.unpop(self.chain.head());
                    return Ok(());
                }
            }
            if !queue.rearm().map_err(malformed)? {
                return Ok(());
            }
        }
    }

    /// Fills the buffers of a request. Those that a driver "MUST NOT" add, to be read, are ignored
    /// (5.4.6.1).
    fn answer<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<Admission, DeviceError> {
        let wanted = usize::try_from(self.chain.writable.len()).unwrap_or(usize::MAX);
        let largest = self.bytes.len();
        let bytes = &mut self.bytes[..wanted.min(largest)];
        if bytes.is_empty() {
            // "The device MUST place one or more random bytes into the buffer" (5.4.6.2).
            let reason = "a request without room for random bytes";
            return Err(DeviceError::Request { queue: QUEUE, reason });
        }
        if self.limiter.admit(1, bytes.len() as u64, Instant::now()) == Admission::Later {
            return Ok(Admission::Later);
        }
        let reason = "the host has no random bytes";
        let filled = random(bytes).map_err(|_| DeviceError::Request { queue: QUEUE, reason })?;
        let filled = &bytes[..filled];
        self.chain.writable.write::<G::Target>(queue.memory(), 0, filled).map_err(malformed)?;
        let written = u32::try_from(filled.len()).expect("MAX_REQUEST is less");
        queue.push(self.chain.head(), written).map_err(malformed)?;
        Ok(Admission::Now)
    }

    fn go_on_later(&self) {
        // Full, it is as readable as can be.
        let _ = rustix::io::write(&self.again, &1u64.to_ne_bytes());
    }
}

impl<G: MemoryGuard> Core<G> for Entropy {
    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }

    /// There are none (5.4.3).
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    /// There is none (5.4.4).
    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn start(&mut self, _features: u64) {}

    fn kicked(&mut self, _queue: u16, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        io.queue(QUEUE).map_or(Ok(()), |mut queue| self.serve(&mut queue))
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        [self.again.as_fd()].into_iter().chain(self.limiter.fd()).collect()
    }

    fn woken(&mut self, wake: usize, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        match wake {
            AGAIN => {
                // Nothing to read: woken without cause.
                let _ = rustix::io::read(&self.again, &mut [0; 8]);
            }
            LIMITER => self.limiter.acknowledge(),
            _ => {}
        }
        self.kicked(QUEUE, io)
    }

    /// Other bytes are as good.
    fn is_in_order(&self) -> bool {
        true
    }

    /// The limit goes on: a driver could get rid of it otherwise.
    fn reset(&mut self) {}
}

/// Fills `bytes`, at least the first of them; returns how many.
fn random(bytes: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| getrandom(&mut *bytes, GetRandomFlags::empty()))
}

fn malformed(error: QueueError) -> DeviceError {
    DeviceError::Queue { queue: QUEUE, error }
}
