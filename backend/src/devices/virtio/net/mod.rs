//! The network device (virtio 1.2, 5.1).
//!
//! Frames are copied once on each way, in the turn in which they are seen; nothing is ever under way
//! in guest memory. What can't be sent at once is lost, as on a network; what the driver has no room
//! for waits at the other end of the link, and one frame of each pair of queues here.

mod config;
mod control;
mod frame;
mod header;
mod ioctl;
mod link;
mod options;
mod receive;
mod socket;
mod spec;
mod tap;
mod transmit;

#[cfg(test)]
mod tests;

use std::iter;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::debug;

use self::config::{Config, MacAddress};
use self::control::Command;
use self::link::Link;
use self::options::Options;
use self::receive::Receiver;
use self::spec::{control as answer, feature};
use self::transmit::Transmitter;
use super::rate_limit::RateLimiter;
use super::spec::DeviceType;
use super::{Chain, Core, DeviceError, Io, MemoryGuard, QueueError, Words};
use crate::config::{ConfigError, Parameters};
use crate::devices::RestoreError;

/// A network device:
/// `virtio-net,tap=IFNAME|socket=PATH[,peer=PATH]|fd=N[,mac=ADDRESS][,mtu=BYTES][,queues=PAIRS][,queue-size=ENTRIES]`
/// `[,iops=FRAMES][,bps=BYTES]`.
///
/// Behind it is a tap, with its offloads and a queue for each pair; or a UNIX datagram socket, whose
/// datagrams are Ethernet frames and arrive at the first pair.
#[derive(Debug)]
pub struct Net {
    config: Config,
    /// The address until the driver sets another one.
    first_mac: MacAddress,
    queue_size: u16,
    link: Link,
    receivers: Vec<Receiver>,
    transmitters: Vec<Transmitter>,
    /// Kept for its memory.
    control: Chain,
    /// What the driver chose, once it is set up.
    driver: Option<Driver>,
    /// Which pair has the first turn when all have one.
    next_pair: usize,
    receive_limiter: RateLimiter,
    transmit_limiter: RateLimiter,
    /// Wakes the device for its next turn.
    more: OwnedFd,
    /// What the driver was told that its commands have done: a command is acknowledged before anybody
    /// saves the state.
    words: Option<Words>,
    /// Counts what changes in the state.
    revision: u64,
}

/// A driver that is set up.
#[derive(Clone, Copy, Debug)]
struct Driver {
    features: u64,
    /// How many pairs of queues it uses.
    pairs: u16,
}

/// What a queue is for (5.1.2).
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
}

/// Whether work is left when a queue had its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Done,
    More,
}

/// Frames or commands of one queue that are handled before others have their turn.
const TURN: usize = 64;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Its wakes: [`Net::more`], then the limiters if there are any, receiving first, then the ports.
const MORE: usize = 0;
const RECEIVE_LIMITER: usize = 1;

/// What commands have done so far, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Obeyed {
    mac: [u8; 6],
    /// One at least.
    pairs: u16,
}

impl Obeyed {
    /// `None` while there was no command.
    fn of(word: u64) -> Option<Self> {
        let [m0, m1, m2, m3, m4, m5, p0, p1] = word.to_le_bytes();
        let pairs = u16::from_le_bytes([p0, p1]);
        (pairs > 0).then_some(Self { mac: [m0, m1, m2, m3, m4, m5], pairs })
    }

    fn word(self) -> u64 {
        let ([m0, m1, m2, m3, m4, m5], [p0, p1]) = (self.mac, self.pairs.to_le_bytes());
        u64::from_le_bytes([m0, m1, m2, m3, m4, m5, p0, p1])
    }
}

/// The versions of the state that moves.
#[derive(Serialize, Deserialize)]
enum State {
    V1 {
        mac: [u8; 6],
        pairs: Option<u16>,
    },
    /// Of a device that another process goes on with: the address is made up once.
    V2 {
        mac: [u8; 6],
        first_mac: [u8; 6],
        pairs: Option<u16>,
    },
}

impl Net {
    /// Creates the device.
    ///
    /// # Errors
    /// [`ConfigError`] when a parameter can't be used, or the link can't be opened.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let options = Options::from_parameters(parameters)?;
        Self::new(options).map_err(|errno| ConfigError::invalid("queues", errno))
    }

    fn new(options: Options) -> Result<Self, Errno> {
        let Options { link, mac, mtu, pairs, queue_size, limits } = options;
        Ok(Self {
            config: Config { mac, max_pairs: pairs, mtu },
            first_mac: mac,
            queue_size,
            link,
            receivers: (0..pairs).map(|_| Receiver::new()).collect(),
            transmitters: (0..pairs).map(|_| Transmitter::new()).collect(),
            control: Chain::default(),
            driver: None,
            next_pair: 0,
            receive_limiter: RateLimiter::new(limits)?,
            transmit_limiter: RateLimiter::new(limits)?,
            more: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            words: None,
            revision: 0,
        })
    }

    fn receive<G: MemoryGuard>(
        &mut self,
        pair: usize,
        io: &mut dyn Io<G>,
    ) -> Result<(), DeviceError> {
        let Some(driver) = self.driver.filter(|driver| pair < usize::from(driver.pairs)) else {
            return Ok(());
        };
        let index = queue_of(pair, 0);
        let (Some(mut queue), Some(receiver)) = (io.queue(index), self.receivers.get_mut(pair))
        else {
            return Ok(());
        };
        let turn = receiver
            .run(pair, &mut self.link, &mut self.receive_limiter, driver.features, &mut queue)
            .map_err(|error| DeviceError::Queue { queue: index, error })?;
        self.go_on(turn);
        Ok(())
    }

    fn transmit<G: MemoryGuard>(
        &mut self,
        pair: usize,
        io: &mut dyn Io<G>,
    ) -> Result<(), DeviceError> {
        let index = queue_of(pair, 1);
        let (Some(driver), Some(mut queue), Some(transmitter)) =
            (self.driver, io.queue(index), self.transmitters.get_mut(pair))
        else {
            return Ok(());
        };
        let turn = transmitter
            .run(pair, &mut self.link, &mut self.transmit_limiter, driver.features, &mut queue)
            .map_err(|error| DeviceError::Queue { queue: index, error })?;
        self.go_on(turn);
        Ok(())
    }

    fn control<G: MemoryGuard>(
        &mut self,
        index: u16,
        io: &mut dyn Io<G>,
    ) -> Result<(), DeviceError> {
        let wrong = |error: QueueError| DeviceError::Queue { queue: index, error };
        let mut chain = std::mem::take(&mut self.control);
        let mut left = TURN;
        while let (Some(mut queue), Some(driver)) = (io.queue(index), self.driver) {
            queue.disable_kicks().map_err(wrong)?;
            if !queue.pop(&mut chain).map_err(wrong)? {
                if queue.rearm().map_err(wrong)? {
                    continue;
                }
                break;
            }
            if left == 0 {
                queue.unpop(chain.head());
                self.go_on(Turn::More);
                break;
            }
            left -= 1;
            if chain.writable.is_empty() {
                let reason = "a control command has no room for its answer";
                return Err(DeviceError::Request { queue: index, reason });
            }
            let memory: &G::Target = queue.memory();
            let max_pairs = self.config.max_pairs;
            let command = Command::read(memory, &chain.readable, driver.features, max_pairs)
                .map_err(wrong)?;
            let ack = if command.is_some() { answer::OK } else { answer::ERR };
            // Obeyed first: who reads the answer may rely on it.
            if let Some(command) = command {
                self.obey(command);
            }
            chain.writable.write(memory, 0, &[ack]).map_err(wrong)?;
            queue.push(chain.head(), 1).map_err(wrong)?;
        }
        self.control = chain;
        Ok(())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Filter => {}
            Command::SetMac(mac) => self.config.mac = mac,
            Command::SetPairs(pairs) => self.set_pairs(pairs),
        }
        self.revision += 1;
        if let (Some(words), Some(driver)) = (&self.words, self.driver) {
            words.set(0, Obeyed { mac: self.config.mac.bytes(), pairs: driver.pairs }.word());
        }
    }

    /// Has the address and the pairs of queues that another instance had.
    fn take_over(&mut self, mac: [u8; 6], pairs: Option<u16>) -> Result<(), RestoreError> {
        let mac = MacAddress::new(mac).ok_or(RestoreError)?;
        match (pairs, self.driver) {
            (None, None) => {}
            (Some(1), Some(_)) => self.set_pairs(1),
            (Some(pairs), Some(driver))
                if (1..=self.config.max_pairs).contains(&pairs)
                    && driver.features & feature::MQ != 0 =>
            {
                self.set_pairs(pairs);
            }
            _ => return Err(RestoreError),
        }
        self.config.mac = mac;
        self.revision += 1;
        Ok(())
    }

    fn set_pairs(&mut self, pairs: u16) {
        if let Some(driver) = &mut self.driver {
            driver.pairs = pairs;
        }
        self.link.set_pairs(pairs);
        // "the device MUST NOT queue packets on receive queues greater than virtqueue_pairs"
        // (5.1.6.5.5.1).
        for receiver in self.receivers.iter_mut().skip(pairs.into()) {
            receiver.clear();
        }
        // Those that were added are looked at.
        self.go_on(Turn::More);
    }

    fn go_on(&self, turn: Turn) {
        if turn == Turn::More {
            // A counter that is full is as good as one that was raised.
            let _ = rustix::io::write(&self.more, &1_u64.to_ne_bytes());
        }
    }

    fn role(&self, queue: u16) -> Option<Role> {
        let features = self.driver?.features;
        // "N=1 if VIRTIO_NET_F_MQ [is] not negotiated" (5.1.2).
        let pairs = if features & feature::MQ != 0 { self.receivers.len() } else { 1 };
        match (usize::from(queue / 2), queue % 2) {
            (pair, 0) if pair < pairs => Some(Role::Receive(pair)),
            (pair, _) if pair < pairs => Some(Role::Transmit(pair)),
            (pair, 0) if pair == pairs && features & feature::CTRL_VQ != 0 => Some(Role::Control),
            _ => None,
        }
    }

    /// Work that a turn left, in all queues.
    fn resume<G: MemoryGuard>(&mut self, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        let pairs = self.receivers.len();
        self.next_pair = (self.next_pair + 1) % pairs;
        for pair in (self.next_pair..pairs).chain(0..self.next_pair) {
            self.receive(pair, io)?;
            if self.transmitters[pair].is_unfinished() {
                self.transmit(pair, io)?;
            }
        }
        let control = (0..=2 * self.config.max_pairs)
            .find(|queue| matches!(self.role(*queue), Some(Role::Control)));
        control.map_or(Ok(()), |queue| self.control(queue, io))
    }
}

impl<G: MemoryGuard> Core<G> for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn features(&self) -> u64 {
        let mut features = self.link.offloads()
            | feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_MAC_ADDR;
        if self.config.mtu.is_some() {
            features |= feature::MTU;
        }
        if self.config.max_pairs > 1 {
            features |= feature::MQ;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let data = iter::repeat_n(self.queue_size, 2 * self.receivers.len());
        data.chain([CONTROL_QUEUE_SIZE]).collect()
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn start(&mut self, features: u64) {
        self.revision += 1;
        self.driver = Some(Driver { features, pairs: 1 });
        self.link.negotiated(features);
        self.link.set_pairs(1);
    }

    fn kicked(&mut self, queue: u16, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        match self.role(queue) {
            Some(Role::Receive(pair)) => self.receive(pair, io),
            Some(Role::Transmit(pair)) => self.transmit(pair, io),
            Some(Role::Control) => self.control(queue, io),
            None => Ok(()),
        }
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        let limiters = [self.receive_limiter.fd(), self.transmit_limiter.fd()];
        let limiters = limiters.into_iter().flatten();
        iter::once(self.more.as_fd()).chain(limiters).chain(self.link.ports()).collect()
    }

    fn woken(&mut self, wake: usize, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        // A device has both limiters or none.
        let limiters = if self.receive_limiter.fd().is_some() { 2 } else { 0 };
        if let Some(port) = wake.checked_sub(1 + limiters) {
            if let Some(receiver) = self.receivers.get_mut(port) {
                receiver.port_is_readable();
            }
            return self.receive(port, io);
        }
        match wake {
            MORE => drop(rustix::io::read(&self.more, &mut [0; 8])),
            RECEIVE_LIMITER => self.receive_limiter.acknowledge(),
            _ => self.transmit_limiter.acknowledge(),
        }
        self.resume(io)
    }

    fn queue_stopped(&mut self, queue: u16) {
        if let Some(Role::Transmit(pair)) = self.role(queue) {
            self.transmitters[pair].clear();
        }
    }

    /// A frame may be sent twice, and so may a command be obeyed.
    fn is_in_order(&self) -> bool {
        true
    }

    fn word_count(&self) -> usize {
        1
    }

    fn set_words(&mut self, words: Words) {
        self.words = Some(words);
    }

    fn queue_recovered(&mut self, queue: u16) {
        let word = self.words.as_ref().map_or(0, |words| words.get(0));
        if let (Some(Role::Control), Some(Obeyed { mac, pairs })) =
            (self.role(queue), Obeyed::of(word))
        {
            // What can't be was never acknowledged.
            let _ = self.take_over(mac, Some(pairs));
        }
    }

    fn revision(&self) -> u64 {
        self.revision
    }

    /// The limits go on: a driver could get rid of them otherwise.
    fn reset(&mut self) {
        // Not at the start of a process, which may go on where another one was killed.
        if let (Some(words), Some(_)) = (&self.words, self.driver) {
            words.set(0, 0);
        }
        self.revision += 1;
        self.driver = None;
        self.config.mac = self.first_mac;
        self.receivers.iter_mut().for_each(Receiver::clear);
        self.transmitters.iter_mut().for_each(Transmitter::clear);
        self.link.negotiated(0);
        self.link.set_pairs(1);
    }

    fn save(&self) -> Vec<u8> {
        let mac = self.config.mac.bytes();
        let pairs = self.driver.map(|driver| driver.pairs);
        let state = match &self.words {
            None => State::V1 { mac, pairs },
            Some(_) => State::V2 { mac, first_mac: self.first_mac.bytes(), pairs },
        };
        postcard::to_allocvec(&state).expect("plain data serialises")
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let Ok((state, [])) = postcard::take_from_bytes(state) else {
            return Err(RestoreError);
        };
        let (mac, pairs) = match state {
            State::V1 { mac, pairs } => (mac, pairs),
            State::V2 { mac, first_mac, pairs } => {
                self.first_mac = MacAddress::new(first_mac).ok_or(RestoreError)?;
                (mac, pairs)
            }
        };
        self.take_over(mac, pairs)
    }
}

impl Drop for Net {
    /// Counts are told once: a driver could fill the log with them.
    fn drop(&mut self) {
        let receivers = self.receivers.iter();
        let (received, lost_in) = receivers.fold((0, 0), |(frames, lost), receiver| {
            (frames + receiver.frames, lost + receiver.lost)
        });
        let transmitters = self.transmitters.iter();
        let (sent, lost_out) = transmitters.fold((0, 0), |(frames, lost), transmitter| {
            (frames + transmitter.frames, lost + transmitter.lost)
        });
        let mac = self.first_mac;
        debug!("{mac}: {received} frames received, {lost_in} lost; {sent} sent, {lost_out} lost");
    }
}

/// The index of a pair's receive queue (0) or transmit queue (1). There are few pairs.
fn queue_of(pair: usize, which: u16) -> u16 {
    u16::try_from(2 * pair).unwrap_or(u16::MAX - 1) + which
}
