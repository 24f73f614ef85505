//! GET_IRQ_INFO and SET_IRQS.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use barkeep_protocol::wire::{
    InfoQuery, IrqAction, IrqData, IrqInfo, IrqInfoFlags, PciIrq, SetIrqs,
};

use super::HostedFunction;
use crate::irq::{EventFd, Interrupts, Intx, IrqError, Vectors};
use crate::server::request_error::RequestError;
use crate::server::served::{Reply, check_descriptors};

pub(super) fn info(
    function: &HostedFunction,
    query: InfoQuery,
    reply: &mut Reply<'_>,
) -> Result<(), RequestError> {
    let irq = PciIrq::from_index(query.index).ok_or(RequestError::NoIrq(query.index))?;
    let count = match irq {
        PciIrq::Intx => usize::from(function.function.spec().interrupt_pin.is_some()),
        PciIrq::Msi => function.interrupts.msi.count(),
        PciIrq::Msix => function.interrupts.msix.count(),
        PciIrq::Error => function.interrupts.error.count(),
        PciIrq::Request => function.interrupts.request.count(),
    };
    let count = u32::try_from(count).expect("at most 2048 vectors");
    let flags = match irq {
        _ if count == 0 => IrqInfoFlags::empty(),
        PciIrq::Intx => IrqInfoFlags::EVENTFD | IrqInfoFlags::MASKABLE | IrqInfoFlags::AUTOMASKED,
        PciIrq::Msi | PciIrq::Msix | PciIrq::Error | PciIrq::Request => {
            IrqInfoFlags::EVENTFD | IrqInfoFlags::NORESIZE
        }
    };
    reply.bytes(&IrqInfo { flags, index: query.index, count }.to_bytes());
    Ok(())
}

pub(super) fn set(
    function: &mut HostedFunction,
    set: &SetIrqs<'_>,
    fds: Vec<OwnedFd>,
) -> Result<(), RequestError> {
    check_descriptors(set, &fds)?;
    let eventfds = fds.into_iter().map(EventFd::new).collect::<Result<Vec<_>, _>>()?;
    let Interrupts { intx, msi, msix, error, request } = &mut function.interrupts;
    let vectors = match PciIrq::from_index(set.index) {
        Some(PciIrq::Intx) if function.function.spec().interrupt_pin.is_some() => {
            return set_intx(intx, set, eventfds);
        }
        Some(PciIrq::Msi) => msi,
        Some(PciIrq::Msix) => msix,
        Some(PciIrq::Error) => error,
        Some(PciIrq::Request) => request,
        Some(PciIrq::Intx) | None => return Err(RequestError::NoIrq(set.index)),
    };
    if vectors.count() == 0 {
        return Err(RequestError::NoIrq(set.index));
    }
    set_vectors(vectors, set, eventfds)
}

fn set_intx(
    intx: &mut Intx,
    set: &SetIrqs<'_>,
    eventfds: Vec<EventFd>,
) -> Result<(), RequestError> {
    if set.disables_index() {
        intx.disconnect();
        return Ok(());
    }
    if set.start != 0 || set.count > 1 {
        return Err(IrqError::Range { start: set.start, count: set.count }.into());
    }
    if set.count == 0 {
        return Ok(());
    }
    let meant = match set.data {
        IrqData::None => true,
        IrqData::Bool(bools) => bools.first().is_some_and(|byte| *byte != 0),
        IrqData::Eventfd => {
            let eventfd = eventfds.into_iter().next();
            match set.action {
                IrqAction::Trigger => intx.set_eventfd(eventfd),
                IrqAction::Unmask => intx.set_unmask_eventfd(eventfd.map(Arc::new)),
                // VFIO has no such thing for any interrupt.
                IrqAction::Mask => return Err(RequestError::IrqAction(set.index)),
            }
            return Ok(());
        }
    };
    if meant {
        match set.action {
            IrqAction::Mask => intx.mask(),
            IrqAction::Unmask => intx.unmask(),
            IrqAction::Trigger => intx.trigger(),
        }
    }
    Ok(())
}

fn set_vectors(
    vectors: &mut Vectors,
    set: &SetIrqs<'_>,
    eventfds: Vec<EventFd>,
) -> Result<(), RequestError> {
    if set.action != IrqAction::Trigger {
        // GET_IRQ_INFO does not offer masking: the capability's own mask bits do that.
        return Err(RequestError::IrqAction(set.index));
    }
    if set.disables_index() {
        vectors.clear();
        return Ok(());
    }
    let range = vectors.range(set.start, set.count)?;
    match set.data {
        IrqData::None => range.for_each(|vector| vectors.signal(vector)),
        IrqData::Bool(bools) => range
            .zip(bools)
            .filter(|(_, byte)| **byte != 0)
            .for_each(|(vector, _)| vectors.signal(vector)),
        IrqData::Eventfd => {
            let mut eventfds = eventfds.into_iter();
            for vector in range {
                vectors.set_eventfd(vector, eventfds.next())?;
            }
        }
    }
    Ok(())
}
