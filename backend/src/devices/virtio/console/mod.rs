//! The console device (5.3), with one port.

mod config;
mod options;
mod port;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

pub use self::options::Options;
use self::port::{Output, Port};
use super::spec::DeviceType;
use super::{Chain, Core, DeviceError, InFlight, Io, MemoryGuard, QueueAccess, QueueError};
use crate::config::{ConfigError, Parameters};
use crate::devices::RestoreError;

/// The console device.
///
/// While somebody reads at the host's end, nothing that the guest says is lost: a request stays with
/// the device until they have taken all of it. If they take nothing for a second, though, output is
/// dropped until they do: a driver that waits for it, as the one of Linux does for hvc with a spinlock
/// held, must not wait for ever. While nobody is there, output is dropped, as by QEMU. Input stays
/// with the host until the guest has room for it.
///
/// Clients stay through a reset of the device: a guest that boots anew is the same console.
#[derive(Debug)]
pub struct Console {
    port: Port,
    /// Requests of the transmit queue that were taken and are not out: one, or those of another
    /// instance.
    taken: VecDeque<u16>,
    /// How much of the first of them is out, in bytes.
    sent: u64,
    chain: Chain,
    /// Room for what passes.
    bytes: Box<[u8]>,
}

/// receiveq(port0) and transmitq(port0) (5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// As in QEMU.
const QUEUE_SIZE: u16 = 128;
/// What passes at once, in bytes.
const PIECE: usize = 64 << 10;
/// Pieces that pass in each direction at a stretch: a guest, or a client, that goes on without pause
/// has others wait.
const TURN: usize = 128;

/// How long output waits for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// How a turn of a queue ended.
enum Turn {
    /// All is done that can be done.
    Over,
    /// There is more to do.
    Unfinished,
}

impl Console {
    /// Creates the device: `virtio-console,socket=PATH` or `virtio-console,pty=PATH`.
    ///
    /// # Errors
    /// [`ConfigError`] when there is no path, or it can't be used.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        Self::new(&Options::from_parameters(parameters)?)
    }

    /// Creates the device.
    ///
    /// # Errors
    /// [`ConfigError`] when the path can't be used.
    pub fn new(options: &Options) -> Result<Self, ConfigError> {
        Self::with_patience(options, PATIENCE)
    }

    fn with_patience(options: &Options, patience: Duration) -> Result<Self, ConfigError> {
        let port = Port::new(options, patience).map_err(|error| {
            let parameter = match options {
                Options::Socket(_) => "socket",
                Options::Pty(_) => "pty",
            };
            ConfigError::invalid(parameter, format!("{}: {error}", options.path().display()))
        })?;
        Ok(Self {
            port,
            taken: VecDeque::new(),
            sent: 0,
            chain: Chain::default(),
            bytes: vec![0; PIECE].into(),
        })
    }

    fn turn<G: MemoryGuard>(&mut self, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        self.port.update();
        for index in [RECEIVE, TRANSMIT] {
            let Some(mut queue) = io.queue(index) else { continue };
            let turn = match index {
                RECEIVE => self.receive(&mut queue),
                _ => self.transmit(&mut queue),
            };
            match turn.map_err(|error| DeviceError::Queue { queue: index, error })? {
                Turn::Over => {}
                Turn::Unfinished => self.port.wake_again(),
            }
        }
        Ok(())
    }

    /// Fills the guest's buffers with what there is. Without input none is taken.
    fn receive<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<Turn, QueueError> {
        let mut left = TURN;
        loop {
            queue.disable_kicks()?;
            while queue.pop(&mut self.chain)? {
                if left == 0 {
                    queue.unpop(self.chain.head());
                    return Ok(Turn::Unfinished);
                }
                left -= 1;
                let room = usize::try_from(self.chain.writable.len()).unwrap_or(PIECE).min(PIECE);
                let read = if room > 0 { self.port.read(&mut self.bytes[..room]) } else { 0 };
                if read == 0 && room > 0 {
                    // The port wakes when there is more.
                    queue.unpop(self.chain.head());
                    return Ok(Turn::Over);
                }
                let input = &self.bytes[..read];
                self.chain.writable.write::<G::Target>(queue.memory(), 0, input)?;
                queue.push(self.chain.head(), u32::try_from(read).expect("PIECE is less"))?;
            }
            if !queue.rearm()? {
                return Ok(Turn::Over);
            }
        }
    }

    /// Hands on what the guest says.
    fn transmit<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<Turn, QueueError> {
        let mut left = TURN;
        loop {
            queue.disable_kicks()?;
            while self.next_output(queue)? {
                if left == 0 {
                    return Ok(Turn::Unfinished);
                }
                left -= 1;
                let len = self.chain.readable.len();
                let rest = len.saturating_sub(self.sent);
                if rest == 0 {
                    self.give_back(queue)?;
                    continue;
                }
                let piece = usize::try_from(rest).unwrap_or(PIECE).min(PIECE);
                let output = &mut self.bytes[..piece];
                self.chain.readable.read::<G::Target>(queue.memory(), self.sent, output)?;
                match self.port.write(output) {
                    Output::Sent(sent) => {
                        self.sent += sent as u64;
                        if self.sent == len {
                            self.give_back(queue)?;
                        }
                    }
                    Output::Blocked => return Ok(Turn::Over),
                    Output::Dropped => {
                        self.port.count_dropped(rest);
                        self.give_back(queue)?;
                    }
                    Output::Nobody => self.give_back(queue)?,
                }
            }
            if !queue.rearm()? {
                return Ok(Turn::Over);
            }
        }
    }

    /// Has the request in `chain` that is to be sent, if there is one.
    fn next_output<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<bool, QueueError> {
        if let Some(head) = self.taken.front() {
            // Another queue, or another instance, may have had `chain` in between.
            queue.chain(*head, &mut self.chain)?;
            return Ok(true);
        }
        if !queue.pop(&mut self.chain)? {
            return Ok(false);
        }
        self.taken.push_back(self.chain.head());
        Ok(true)
    }

    /// All of the first request is out.
    fn give_back<G: MemoryGuard>(
        &mut self,
        queue: &mut QueueAccess<'_, G>,
    ) -> Result<(), QueueError> {
        self.sent = 0;
        self.taken.pop_front().map_or(Ok(()), |head| queue.push(head, 0))
    }

    fn forget(&mut self) {
        self.taken.clear();
        self.sent = 0;
        self.port.nothing_waits();
    }
}

impl<G: MemoryGuard> Core<G> for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn features(&self) -> u64 {
        config::EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    /// An emergency write works at any time, but does not wait for a client that does not read.
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        if let Some(character) = config::emergency_character(offset, data) {
            self.port.update();
            if self.port.write_now(&[character]) == Output::Dropped {
                self.port.count_dropped(1);
            }
            // What else there was to see is still to be done.
            self.port.wake_again();
        }
    }

    fn start(&mut self, _features: u64) {}

    fn kicked(&mut self, _queue: u16, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        self.turn(io)
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.port.wake()]
    }

    fn woken(&mut self, _wake: usize, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        self.turn(io)
    }

    fn queue_stopped(&mut self, queue: u16) {
        if queue == TRANSMIT {
            self.forget();
        }
    }

    fn reset(&mut self) {
        self.forget();
    }

    /// What is said is said again, from the start of the buffer on that was not given back.
    fn is_in_order(&self) -> bool {
        true
    }

    fn queue_recovered(&mut self, queue: u16) {
        if queue == TRANSMIT {
            self.forget();
        }
    }

    fn in_flight(&self) -> Vec<InFlight> {
        self.taken.iter().map(|&head| InFlight { queue: TRANSMIT, head }).collect()
    }

    fn resubmit(&mut self, request: InFlight, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        if request.queue != TRANSMIT {
            let reason = "no such request is ever in flight";
            return Err(DeviceError::Request { queue: request.queue, reason });
        }
        self.taken.push_back(request.head);
        self.turn(io)
    }

    /// How much of the first request in flight is out.
    fn save(&self) -> Vec<u8> {
        self.sent.to_le_bytes().into()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.sent = u64::from_le_bytes(state.try_into().map_err(|_| RestoreError)?);
        Ok(())
    }
}
