//! Message-signalled interrupts on their way into the guest: the backend signals an eventfd, and what
//! the guest has programmed says which message that is.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use barkeep_protocol::wire::{IrqAction, IrqData, PciIrq, PciRegion, SetIrqs};
use rustix::event::{EventfdFlags, eventfd};

use super::locked;
use crate::bar::{AttachedFunction, Backend, BarWindow};
use crate::client::{Client, ClientError};
use crate::hypervisor::{Hypervisor, MsiMessage};

/// Which interrupt of which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InterruptVector {
    /// Index of the function.
    pub function: usize,
    /// MSI or MSI-X.
    pub kind: MsiKind,
    /// Number of the vector.
    pub vector: u32,
}

/// One of the two kinds of message-signalled interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MsiKind {
    /// MSI (PCI 3.0, 6.8.1).
    Msi,
    /// MSI-X (PCI 3.0, 6.8.2).
    MsiX,
}

/// How a VMM gets interrupts into its guest.
pub trait InterruptRoutes: Send + Sync {
    /// From now on `eventfd` is signalled whenever the function raises this vector.
    ///
    /// # Errors
    /// Whatever keeps the VMM from listening to it.
    fn connect(&self, vector: InterruptVector, eventfd: BorrowedFd<'_>) -> io::Result<()>;

    /// The function is detached, and its eventfd means nothing any more.
    fn disconnect(&self, vector: InterruptVector, eventfd: BorrowedFd<'_>);

    /// The guest has programmed a vector: raising it means this message from now on, or nothing.
    fn route(&self, vector: InterruptVector, message: Option<MsiMessage>);
}

/// Routes that need nobody but the hypervisor: vector by vector, from an interrupt number on.
pub struct HypervisorRoutes {
    hypervisor: Arc<dyn Hypervisor>,
    numbers: Mutex<Numbers>,
}

/// Interrupt numbers that were given out, and those that are free: some that came back, and all from
/// the next one on.
#[derive(Debug)]
struct Numbers {
    given: HashMap<InterruptVector, u32>,
    returned: Vec<u32>,
    next: u32,
}

impl HypervisorRoutes {
    /// Gives out interrupt numbers from `first` on.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, first: u32) -> Self {
        let numbers = Numbers { given: HashMap::new(), returned: Vec::new(), next: first };
        Self { hypervisor, numbers: Mutex::new(numbers) }
    }

    fn number(&self, vector: InterruptVector) -> Option<u32> {
        locked(&self.numbers).given.get(&vector).copied()
    }
}

impl InterruptRoutes for HypervisorRoutes {
    fn connect(&self, vector: InterruptVector, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let mut numbers = locked(&self.numbers);
        let number = numbers.returned.last().copied().unwrap_or(numbers.next);
        self.hypervisor.add_irqfd(number, eventfd).map_err(io::Error::other)?;
        if numbers.returned.pop().is_none() {
            numbers.next += 1;
        }
        numbers.given.insert(vector, number);
        Ok(())
    }

    fn disconnect(&self, vector: InterruptVector, eventfd: BorrowedFd<'_>) {
        let mut numbers = locked(&self.numbers);
        let Some(number) = numbers.given.remove(&vector) else { return };
        match self.hypervisor.remove_irqfd(number, eventfd) {
            Ok(()) => numbers.returned.push(number),
            // Something may still raise it: nobody else gets it.
            Err(error) => {
                let InterruptVector { function, vector, .. } = vector;
                tracing::debug!(function, vector, "irqfd: {error}");
            }
        }
    }

    fn route(&self, vector: InterruptVector, message: Option<MsiMessage>) {
        let Some(number) = self.number(vector) else { return };
        if let Err(error) = self.hypervisor.route_msi(number, message) {
            // A guest can ask for what no interrupt controller takes.
            tracing::debug!(function = vector.function, vector = vector.vector, "route: {error}");
        }
    }
}

/// Why interrupts can't be connected.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// The backend.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The VMM, or the host.
    #[error("eventfd: {0}")]
    Host(#[from] io::Error),
    /// No such function.
    #[error("no such function")]
    NoFunction,
}

/// The message-signalled interrupts of one function.
pub(super) struct Interrupts {
    function: usize,
    routes: Arc<dyn InterruptRoutes>,
    msi: Option<u16>,
    msix: Option<MsiX>,
    /// What was routed last; locked while what the guest has programmed is read.
    routed: Mutex<Vec<Routed>>,
}

/// One vector, and what it was routed to last. The backend has its own descriptor of the eventfd.
struct Routed {
    vector: InterruptVector,
    eventfd: OwnedFd,
    message: Option<MsiMessage>,
}

/// Where the MSI-X structures are.
#[derive(Clone, Copy, Debug)]
struct MsiX {
    capability: u16,
    bar: u8,
    table: u64,
    vectors: u32,
}

const CAP_MSI: u8 = 0x05;
const CAP_MSIX: u8 = 0x11;
/// The longest form of the MSI capability.
const MSI_LENGTH: u16 = 0x18;
const MSIX_LENGTH: u16 = 12;
const ENTRY_SIZE: u32 = 16;
/// The most that a function may have (PCI 3.0, 6.8.2).
const MAX_VECTORS: u32 = 2048;

impl Interrupts {
    /// Hands the backend an eventfd for each vector, and the VMM the same.
    pub(super) fn connect(
        function: usize,
        client: &Client,
        routes: Arc<dyn InterruptRoutes>,
    ) -> Result<Self, InterruptError> {
        let [msi, msix] = [CAP_MSI, CAP_MSIX].map(|id| find_capability(client, id));
        let (msi, msix) = (msi?, msix?.map(|at| MsiX::read(client, at)).transpose()?);
        // From here on, dropping it takes back what was done.
        let mut interrupts = Self { function, routes, msi, msix, routed: Mutex::default() };
        if msi.is_some() {
            interrupts.add(client, MsiKind::Msi)?;
        }
        if msix.is_some() {
            interrupts.add(client, MsiKind::MsiX)?;
        }
        Ok(interrupts)
    }

    fn add(&mut self, client: &Client, kind: MsiKind) -> Result<(), InterruptError> {
        let index = match kind {
            MsiKind::Msi => PciIrq::Msi.index(),
            MsiKind::MsiX => PciIrq::Msix.index(),
        };
        let mut fresh = Vec::new();
        for vector in 0..client.irq_info(index)?.count.min(MAX_VECTORS) {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let event = eventfd(0, flags).map_err(io::Error::from)?;
            fresh.push(event.try_clone()?);
            let vector = InterruptVector { function: self.function, kind, vector };
            self.routes.connect(vector, event.as_fd())?;
            let routed = Routed { vector, eventfd: event, message: None };
            locked(&self.routed).push(routed);
        }
        client.set_eventfds(index, fresh)
    }

    /// Whether a configuration write may program something here.
    pub(super) fn in_config(&self, offset: u16, len: usize) -> bool {
        let end = usize::from(offset) + len;
        let touches = |at: u16, size: u16| offset < at + size && usize::from(at) < end;
        self.msi.is_some_and(|at| touches(at, MSI_LENGTH))
            || self.msix.is_some_and(|msix| touches(msix.capability, MSIX_LENGTH))
    }

    /// Whether a write to a BAR may.
    pub(super) fn in_bar(&self, window: &BarWindow, offset: u64, len: usize) -> bool {
        self.msix.is_some_and(|msix| {
            let end = msix.table + u64::from(msix.vectors) * u64::from(ENTRY_SIZE);
            window.bar == msix.bar && offset < end && msix.table < offset.saturating_add(len as u64)
        })
    }

    /// Routes what the guest has programmed, as the function tells.
    pub(super) fn follow<B: Backend>(&self, function: &AttachedFunction<B>) {
        let mut routed = locked(&self.routed);
        // Of the session that is the last one now, and no other may come before all is routed.
        let backend = &*function.backend();
        let msi = self.msi.and_then(|at| MsiMessages::read(backend, at).ok().flatten());
        let table = self.msix.and_then(|msix| msix.read_table(backend).ok().flatten());
        for Routed { vector, message: last, .. } in routed.iter_mut() {
            let message = match vector.kind {
                MsiKind::Msi => msi.as_ref().and_then(|msi| msi.of(vector.vector)),
                MsiKind::MsiX => table.as_deref().and_then(|table| entry(table, vector.vector)),
            };
            if *last != message {
                self.routes.route(*vector, message);
                *last = message;
            }
        }
    }
}

/// What the MSI capability says while it is enabled.
#[derive(Clone, Copy, Debug)]
struct MsiMessages {
    first: MsiMessage,
    count: u32,
}

impl MsiMessages {
    fn read(backend: &impl Backend, at: u16) -> Result<Option<Self>, ClientError> {
        let config = PciRegion::Config.index();
        let mut control = [0; 2];
        backend.region_read(config, u64::from(at) + 2, &mut control)?;
        let control = u16::from_le_bytes(control);
        if control & 1 == 0 {
            return Ok(None);
        }
        let wide = control & 1 << 7 != 0;
        // No more than there is: it may be the last thing in configuration space.
        let mut bytes = [0; 16];
        let end = if wide { 14 } else { 10 };
        backend.region_read(config, u64::from(at) + 4, &mut bytes[4..end])?;
        let half = |at: usize| u64::from(word(&bytes, at));
        let address = half(4) | if wide { half(8) << 32 } else { 0 };
        let data = word(&bytes, if wide { 12 } else { 8 }) & 0xffff;
        let count = 1 << (control >> 4 & 0b111).min(5);
        Ok(Some(Self { first: MsiMessage { address, data }, count }))
    }

    /// The low bits of the data are the vector's (PCI 3.0, 6.8.1.6).
    fn of(&self, vector: u32) -> Option<MsiMessage> {
        let data = self.first.data & !(self.count - 1) | vector;
        (vector < self.count).then_some(MsiMessage { data, ..self.first })
    }
}

impl MsiX {
    fn read(client: &Client, capability: u16) -> Result<Self, ClientError> {
        let mut bytes = [0; 8];
        client.region_read(PciRegion::Config.index(), capability.into(), &mut bytes)?;
        let vectors = u32::from(u16::from_le_bytes([bytes[2], bytes[3]]) & 0x7ff) + 1;
        let place = word(&bytes, 4);
        let bar = (place & 0b111).to_le_bytes()[0];
        Ok(Self { capability, bar, table: u64::from(place & !0b111), vectors })
    }

    /// The whole table, while MSI-X is enabled.
    fn read_table(self, backend: &impl Backend) -> Result<Option<Vec<u8>>, ClientError> {
        let mut control = [0; 2];
        let register = u64::from(self.capability) + 2;
        backend.region_read(PciRegion::Config.index(), register, &mut control)?;
        if control[1] & 0x80 == 0 {
            return Ok(None);
        }
        let mut table = vec![0; (self.vectors * ENTRY_SIZE) as usize];
        backend.region_read(self.bar.into(), self.table, &mut table)?;
        Ok(Some(table))
    }
}

/// A masked entry keeps its message: the function itself holds back what is masked.
fn entry(table: &[u8], vector: u32) -> Option<MsiMessage> {
    let at = (vector * ENTRY_SIZE) as usize;
    let bytes = table.get(at..at + ENTRY_SIZE as usize)?;
    let address = u64::from(word(bytes, 4)) << 32 | u64::from(word(bytes, 0));
    (address != 0).then_some(MsiMessage { address, data: word(bytes, 8) })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Walks the capability list. A backend may send one that loops: 48 are all that fit.
fn find_capability(client: &Client, id: u8) -> Result<Option<u16>, ClientError> {
    let byte = |offset: u16| {
        let mut data = [0];
        client.region_read(PciRegion::Config.index(), offset.into(), &mut data).map(|()| data[0])
    };
    let mut at = u16::from(byte(0x34)? & !0b11);
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        if byte(at)? == id {
            return Ok(Some(at));
        }
        at = u16::from(byte(at + 1)? & !0b11);
    }
    Ok(None)
}

impl Client {
    /// Sets the eventfds of an interrupt index, from its first vector on, in as many messages as the
    /// server's limit on descriptors asks for.
    fn set_eventfds(&self, index: u32, eventfds: Vec<OwnedFd>) -> Result<(), InterruptError> {
        let mut start = 0;
        let mut left = eventfds.into_iter().peekable();
        while left.peek().is_some() {
            let fds: Vec<_> = left.by_ref().take(self.message_fds().max(1)).collect();
            let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
            let (action, data) = (IrqAction::Trigger, IrqData::Eventfd);
            self.set_irqs(&SetIrqs { action, data, index, start, count }, fds)?;
            start += count;
        }
        Ok(())
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        for Routed { vector, eventfd, message } in locked(&self.routed).drain(..) {
            if message.is_some() {
                self.routes.route(vector, None);
            }
            self.routes.disconnect(vector, eventfd.as_fd());
        }
    }
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupts").field("function", &self.function).finish_non_exhaustive()
    }
}

impl fmt::Debug for HypervisorRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HypervisorRoutes").field("numbers", &self.numbers).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
