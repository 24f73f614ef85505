//! GET_IRQ_INFO and SET_IRQS.

use std::os::fd::OwnedFd;

use barkeep_protocol::wire::{
    InfoQuery, IrqAction, IrqData, IrqInfo, IrqInfoFlags, PciIrq, SetIrqs,
};

use super::{HostedFunction, Reply, RequestError};
use crate::irq::{EventFd, Intx, IrqError, Vectors};
use crate::server::served::{check_descriptors, disables_all};

pub(super) fn info(function: &HostedFunction, query: InfoQuery) -> Result<Reply, RequestError> {
    let irq = PciIrq::from_index(query.index).ok_or(RequestError::NoIrq(query.index))?;
    let msi = u32::try_from(function.interrupts.msi.count()).expect("at most 32 vectors");
    let (count, flags) = match irq {
        PciIrq::Intx => (
            u32::from(function.function.spec().interrupt_pin.is_some()),
            IrqInfoFlags::EVENTFD | IrqInfoFlags::MASKABLE | IrqInfoFlags::AUTOMASKED,
        ),
        PciIrq::Msi => (msi, IrqInfoFlags::EVENTFD | IrqInfoFlags::NORESIZE),
        PciIrq::Msix | PciIrq::Error | PciIrq::Request => (0, IrqInfoFlags::empty()),
    };
    let flags = if count == 0 { IrqInfoFlags::empty() } else { flags };
    Ok(Reply::body(IrqInfo { flags, index: query.index, count }.to_bytes()))
}

pub(super) fn set(
    function: &mut HostedFunction,
    set: &SetIrqs<'_>,
    fds: Vec<OwnedFd>,
) -> Result<Reply, RequestError> {
    check_descriptors(set, &fds)?;
    let eventfds = fds.into_iter().map(EventFd::new).collect::<Result<Vec<_>, _>>()?;
    match PciIrq::from_index(set.index) {
        Some(PciIrq::Intx) if function.function.spec().interrupt_pin.is_some() => {
            set_intx(&mut function.interrupts.intx, set, eventfds)?;
        }
        Some(PciIrq::Msi) if function.interrupts.msi.count() > 0 => {
            set_vectors(&mut function.interrupts.msi, set, eventfds)?;
        }
        _ => return Err(RequestError::NoIrq(set.index)),
    }
    Ok(Reply::default())
}

fn set_intx(
    intx: &mut Intx,
    set: &SetIrqs<'_>,
    eventfds: Vec<EventFd>,
) -> Result<(), RequestError> {
    if disables_all(set) {
        intx.set_eventfd(None);
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
        IrqData::Eventfd if set.action == IrqAction::Trigger => {
            intx.set_eventfd(eventfds.into_iter().next());
            return Ok(());
        }
        IrqData::Eventfd => return Err(RequestError::IrqAction(set.index)),
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
    if disables_all(set) {
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
