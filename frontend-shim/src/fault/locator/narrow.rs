use super::PAGE_SIZE;
use crate::GuestAddress;
use crate::fault::{FaultAccess, FaultPlace, GuestAccess, Unlocated};

/// What lies behind a guest-physical page, for one direction of access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// No slot takes the access. It would exit as MMIO now; the slot may have gone since the fault.
    NoSlot,
    /// A slot whose memory accepts the access.
    Usable,
    /// A slot whose memory is known to refuse the access.
    Refused,
    /// A slot of a device's memory. Nobody knows without touching it.
    Device,
}

/// Tells which of the accesses of the instruction at `rip` can have faulted.
///
/// `classify` gets the address of a page and whether it would be written. Memory that is known to refuse
/// is the culprit, whatever else the instruction accesses. Next come devices. If there is none, another
/// virtual CPU has removed the slot since: then it is among the accesses without one. Memory that works
/// is never the culprit.
pub fn narrow(
    rip: u64,
    accesses: &[GuestAccess],
    mut classify: impl FnMut(GuestAddress, bool) -> Backing,
) -> FaultPlace {
    let (mut devices, mut gone) = (Vec::new(), Vec::new());
    for access in accesses {
        let page = GuestAddress(access.address.0 & !(PAGE_SIZE - 1));
        match classify(page, access.kind == Some(FaultAccess::Write)) {
            Backing::NoSlot => gone.push(*access),
            Backing::Usable => {}
            Backing::Refused => return FaultPlace::Located(*access),
            Backing::Device => devices.push(*access),
        }
    }
    let suspects = if devices.is_empty() { gone } else { devices };
    match suspects[..] {
        [] => FaultPlace::Unknown(Unlocated::NoSlot(rip)),
        [only] => FaultPlace::Located(only),
        _ => FaultPlace::OneOf(suspects),
    }
}
