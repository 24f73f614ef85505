//! What the client wired, and what of it the kernel is told.
//!
//! The kernel has one interrupt type enabled at a time, and enables the function's own registers with
//! it. A client may wire all types in advance. So the wiring is kept here, and the kernel gets the
//! type that the guest has enabled: MSI-X before MSI before the pin.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use thiserror::Error;

use super::config_policy::MessageEnables;
use super::device::{IrqCommand, IrqDescription, VfioDevice, VfioIrq};
use crate::irq::EventFd;

/// What a client asks for.
#[derive(Debug)]
pub enum IrqRequest {
    /// Forget every eventfd of the type.
    Disable,
    /// Eventfds for vectors from `start` on; `None` takes one away.
    Connect {
        /// First vector.
        start: u32,
        /// One a vector.
        eventfds: Vec<Option<EventFd>>,
    },
    /// As if the device had sent these vectors.
    Trigger {
        /// First vector.
        start: u32,
        /// One a vector: whether it is meant.
        which: Vec<bool>,
    },
    /// Keep INTx silent.
    Mask,
    /// Let INTx speak again.
    Unmask,
    /// An eventfd that unmasks INTx, or none any more.
    UnmaskBy(Option<EventFd>),
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum VfioIrqError {
    /// The function has no such interrupt.
    #[error("no such interrupt")]
    Absent,
    /// The range leaves the vectors that the function has.
    #[error("vectors {start} to {start}+{count} are not there")]
    Range {
        /// First vector.
        start: u32,
        /// Number of vectors.
        count: usize,
    },
    /// The type can't be masked.
    #[error("this interrupt can't be masked")]
    NotMaskable,
    /// The kernel refuses.
    #[error("vfio: {0}")]
    Device(Errno),
}

/// The interrupt wiring of one function.
#[derive(Debug)]
pub(super) struct Interrupts {
    types: [IrqDescription; 5],
    /// By [`VfioIrq::index`].
    wired: [Vec<Option<EventFd>>; 5],
    unmask: Option<EventFd>,
    active: Option<Active>,
}

/// What the guest has enabled and the client has wired: the number of vectors is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    irq: VfioIrq,
    vectors: usize,
}

/// What the kernel has enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Active {
    irq: VfioIrq,
    vectors: usize,
    /// More than `vectors` where the kernel had no more. It is not asked again for the same.
    asked: usize,
}

impl Interrupts {
    pub(super) fn new(types: [IrqDescription; 5]) -> Self {
        let wired = types.map(|irq| (0..irq.count).map(|_| None).collect());
        Self { types, wired, unmask: None, active: None }
    }

    pub(super) fn describe(&self, irq: VfioIrq) -> IrqDescription {
        self.types[slot(irq)]
    }

    /// Does what a client asks for.
    pub(super) fn request(
        &mut self,
        device: &dyn VfioDevice,
        enables: MessageEnables,
        irq: VfioIrq,
        request: IrqRequest,
    ) -> Result<(), VfioIrqError> {
        let description = self.describe(irq);
        if description.count == 0 {
            return Err(VfioIrqError::Absent);
        }
        let in_use = self.active.filter(|active| active.irq == irq).map_or(0, |it| it.vectors);
        let tell = |command| device.set_irqs(irq, command).map_err(VfioIrqError::Device);
        match request {
            IrqRequest::Disable => {
                self.wired[slot(irq)].fill_with(|| None);
                if irq == VfioIrq::Intx {
                    self.unmask = None;
                }
                self.rewired(device, enables, irq, 0..in_use)
            }
            IrqRequest::Connect { start, eventfds } => {
                self.check(irq, start, eventfds.len())?;
                let changed = start as usize..start as usize + eventfds.len();
                for (vector, eventfd) in changed.clone().zip(eventfds) {
                    self.wired[slot(irq)][vector] = eventfd;
                }
                self.rewired(device, enables, irq, changed)
            }
            IrqRequest::Trigger { start, mut which } => {
                self.check(irq, start, which.len())?;
                let single = matches!(irq, VfioIrq::Error | VfioIrq::Request);
                let limit = if single { 1 } else { in_use };
                // A vector that is not in use is lost, as a message to no address is.
                which.truncate(limit.saturating_sub(start as usize));
                if which.contains(&true) && self.wired[slot(irq)].iter().any(Option::is_some) {
                    tell(IrqCommand::Trigger { start, which: &which })?;
                }
                Ok(())
            }
            _ if !description.maskable => Err(VfioIrqError::NotMaskable),
            // A pin that is not in use can't be masked, and starts unmasked.
            IrqRequest::Mask if in_use > 0 => tell(IrqCommand::Mask).map(|_| ()),
            IrqRequest::Unmask if in_use > 0 => tell(IrqCommand::Unmask).map(|_| ()),
            IrqRequest::Mask | IrqRequest::Unmask => Ok(()),
            IrqRequest::UnmaskBy(eventfd) => {
                // The kernel takes another one only when the one before has gone.
                if self.unmask.take().is_some() && in_use > 0 {
                    tell(IrqCommand::UnmaskBy(None))?;
                }
                if let Some(eventfd) = eventfd.as_ref().filter(|_| in_use > 0) {
                    tell(IrqCommand::UnmaskBy(Some(eventfd.as_fd())))?;
                }
                self.unmask = eventfd;
                Ok(())
            }
        }
    }

    /// Has the kernel enable what the guest has enabled and the client has wired.
    pub(super) fn apply(
        &mut self,
        device: &dyn VfioDevice,
        enables: MessageEnables,
    ) -> Result<(), Errno> {
        let wanted = self.wanted(enables);
        let enough = |wanted: Wanted, active: Active| {
            // More vectors of MSI-X than are wired cost nothing; of MSI, the device would use them.
            let spare = wanted.irq == VfioIrq::Msix && wanted.vectors < active.asked;
            wanted.irq == active.irq && (spare || wanted.vectors == active.asked)
        };
        match (wanted, self.active) {
            (None, None) => return Ok(()),
            (Some(wanted), Some(active)) if enough(wanted, active) => return Ok(()),
            _ => {}
        }
        let before = self.active.take();
        if let Some(active) = before {
            device.set_irqs(active.irq, IrqCommand::Disable)?;
        }
        let Some(wanted) = wanted else { return Ok(()) };
        let vectors = self.enable(device, wanted)?;
        self.active = Some(Active { irq: wanted.irq, vectors, asked: wanted.vectors });
        if wanted.irq == VfioIrq::Intx {
            if let Some(eventfd) = &self.unmask {
                device.set_irqs(VfioIrq::Intx, IrqCommand::UnmaskBy(Some(eventfd.as_fd())))?;
            }
        } else if let Some(before) = before.filter(|before| before.irq == wanted.irq) {
            // A message that the device sent meanwhile is lost. One too many harms nobody.
            let which = vec![true; before.vectors.min(vectors)];
            device.set_irqs(wanted.irq, IrqCommand::Trigger { start: 0, which: &which })?;
        }
        Ok(())
    }

    /// Takes every eventfd away from the kernel and forgets it, whatever the kernel says.
    pub(super) fn disconnect(&mut self, device: &dyn VfioDevice) -> Result<(), Errno> {
        self.unmask = None;
        let mut result = Ok(());
        if let Some(active) = self.active.take() {
            result = device.set_irqs(active.irq, IrqCommand::Disable).map(|_| ());
        }
        for irq in [VfioIrq::Error, VfioIrq::Request] {
            if self.wired[slot(irq)].iter().any(Option::is_some) {
                let disabled = device.set_irqs(irq, IrqCommand::Disable).map(|_| ());
                result = result.and(disabled);
            }
        }
        for wired in &mut self.wired {
            wired.fill_with(|| None);
        }
        result
    }

    /// The kernel learns of a change in what a type is wired to. If it refuses, nothing of the type
    /// is wired.
    fn rewired(
        &mut self,
        device: &dyn VfioDevice,
        enables: MessageEnables,
        irq: VfioIrq,
        changed: Range<usize>,
    ) -> Result<(), VfioIrqError> {
        let single = matches!(irq, VfioIrq::Error | VfioIrq::Request);
        let result = if single {
            self.connect_single(device, irq)
        } else {
            self.update(device, enables, irq, changed)
        };
        if result.is_err() {
            self.wired[slot(irq)].fill_with(|| None);
            // With nothing wired these only take away what the kernel had before.
            let _ =
                if single { self.connect_single(device, irq) } else { self.apply(device, enables) };
        }
        result.map_err(VfioIrqError::Device)
    }

    fn update(
        &mut self,
        device: &dyn VfioDevice,
        enables: MessageEnables,
        irq: VfioIrq,
        changed: Range<usize>,
    ) -> Result<(), Errno> {
        let (Some(active), Some(wanted)) = (self.active, self.wanted(enables)) else {
            return self.apply(device, enables);
        };
        if irq != active.irq || wanted.irq != active.irq {
            return self.apply(device, enables);
        }
        if irq == VfioIrq::Intx {
            // A new eventfd starts unmasked.
            device.set_irqs(irq, IrqCommand::Disable)?;
            self.active = None;
            return self.apply(device, enables);
        }
        let grows = wanted.vectors > active.asked;
        if grows && !self.describe(irq).resizable {
            return self.apply(device, enables);
        }
        // The other vectors are not touched: they would lose messages.
        let vectors = if grows { wanted.vectors } else { active.vectors };
        let changed = changed.start.min(vectors)..changed.end.min(vectors);
        if !changed.is_empty() {
            let start = u32::try_from(changed.start).expect("a function has at most 2048 vectors");
            let eventfds = self.descriptors(irq, changed);
            device.set_irqs(irq, IrqCommand::Connect { start, eventfds: &eventfds })?;
        }
        self.active = Some(Active { irq, vectors, asked: active.asked.max(wanted.vectors) });
        Ok(())
    }

    fn wanted(&self, enables: MessageEnables) -> Option<Wanted> {
        let used = |irq: VfioIrq| {
            let last = self.wired[slot(irq)].iter().rposition(Option::is_some);
            last.map(|last| last + 1)
        };
        if enables.msix {
            return used(VfioIrq::Msix).map(|vectors| Wanted { irq: VfioIrq::Msix, vectors });
        }
        if let Some(enabled) = enables.msi {
            let most = self.wired[slot(VfioIrq::Msi)].len();
            let vectors = (enabled as usize).min(most);
            return used(VfioIrq::Msi).map(|_| Wanted { irq: VfioIrq::Msi, vectors });
        }
        used(VfioIrq::Intx).map(|vectors| Wanted { irq: VfioIrq::Intx, vectors })
    }

    /// Enables a type, with fewer vectors if there are no more. Returns how many.
    fn enable(&self, device: &dyn VfioDevice, wanted: Wanted) -> Result<usize, Errno> {
        let mut vectors = wanted.vectors;
        loop {
            let eventfds = self.descriptors(wanted.irq, 0..vectors);
            let command = IrqCommand::Connect { start: 0, eventfds: &eventfds };
            match device.set_irqs(wanted.irq, command)? as usize {
                0 => return Ok(vectors),
                fewer if fewer < vectors => vectors = fewer,
                _ => return Err(Errno::NOSPC),
            }
        }
    }

    /// No eventfd is connected too: to disable what is not in use is an error to the kernel.
    fn connect_single(&self, device: &dyn VfioDevice, irq: VfioIrq) -> Result<(), Errno> {
        let eventfds = self.descriptors(irq, 0..1);
        device.set_irqs(irq, IrqCommand::Connect { start: 0, eventfds: &eventfds }).map(|_| ())
    }

    fn descriptors(&self, irq: VfioIrq, vectors: Range<usize>) -> Vec<Option<BorrowedFd<'_>>> {
        let wired = &self.wired[slot(irq)];
        vectors.map(|vector| wired.get(vector)?.as_ref().map(AsFd::as_fd)).collect()
    }

    fn check(&self, irq: VfioIrq, start: u32, count: usize) -> Result<(), VfioIrqError> {
        match (start as usize).checked_add(count) {
            Some(end) if end <= self.wired[slot(irq)].len() => Ok(()),
            _ => Err(VfioIrqError::Range { start, count }),
        }
    }
}

fn slot(irq: VfioIrq) -> usize {
    irq as usize
}
