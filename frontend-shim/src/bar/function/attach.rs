//! What a backend says about its BARs, checked: it may be as hostile as a guest.

use barkeep_protocol::wire::RegionFlags;
use thiserror::Error;

use super::config::Registers;
use crate::bar::doorbells::Doorbells;
use crate::bar::mapping::BarMapping;
use crate::bar::{AddressSpace, Backend};
use crate::client::ClientError;
use crate::hypervisor::SlotId;

/// One BAR, as the backend describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// BAR number, 0 to 5.
    pub bar: u8,
    /// Memory or I/O.
    pub space: AddressSpace,
    /// Whether a memory BAR takes 64-bit addresses, and with them the next register.
    pub wide: bool,
    /// Whether a memory BAR is prefetchable.
    pub prefetchable: bool,
    /// Length in bytes.
    pub size: u64,
    /// Whether the VM maps it, or parts of it, directly.
    pub mapped: bool,
}

/// Why a function can't be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The backend can't be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It serves something that is no PCI function.
    #[error("not a PCI function")]
    NotPci,
    /// It describes a BAR that can't exist.
    #[error("BAR{bar}: {reason}")]
    BadBar {
        /// Which.
        bar: u8,
        /// What is wrong.
        reason: String,
    },
    /// A failure of ours or of the hypervisor.
    #[error("{0}")]
    Setup(String),
}

/// All BARs that exist, and by BAR number the memory of those that can be mapped.
pub(super) type Described = (Vec<BarInfo>, [Option<BarMapping>; 6]);

pub(super) fn describe_bars(
    backend: &impl Backend,
    registers: &Registers,
    slots: &mut dyn FnMut() -> SlotId,
) -> Result<Described, AttachError> {
    let mut bars = Vec::new();
    let mut mappings = [const { None }; 6];
    let mut bar = 0;
    while bar < 6 {
        let Some((described, mapping)) = describe_bar(backend, bar, registers, slots)? else {
            bar += 1;
            continue;
        };
        mappings[usize::from(bar)] = mapping;
        bars.push(described);
        bar += if described.wide { 2 } else { 1 };
    }
    Ok((bars, mappings))
}

/// The doorbells of memory BARs, by BAR number.
pub(super) fn find_doorbells(
    backend: &impl Backend,
    bars: &[BarInfo],
) -> Result<[Doorbells; 6], AttachError> {
    let mut found = [const { Doorbells::none() }; 6];
    let extensions = backend.extensions();
    if !extensions.memory_fault && !extensions.region_state {
        return Ok(found);
    }
    for info in bars.iter().filter(|info| info.space == AddressSpace::Memory) {
        match backend.doorbells(info.bar.into()) {
            Ok(offered) => found[usize::from(info.bar)] = Doorbells::new(offered, info.size),
            // It has none, or does not know the question.
            Err(error) if !error.ends_session() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

fn describe_bar(
    backend: &impl Backend,
    bar: u8,
    registers: &Registers,
    slots: &mut dyn FnMut() -> SlotId,
) -> Result<Option<(BarInfo, Option<BarMapping>)>, AttachError> {
    let (region, file) = backend.region_info(bar.into())?;
    if region.size == 0 {
        return Ok(None);
    }
    let bad = |reason: &str| AttachError::BadBar { bar, reason: reason.to_owned() };
    if !region.size.is_power_of_two() {
        return Err(bad("its size is no power of two"));
    }
    let mut info = registers.describe(bar, region.size);
    if info.wide && bar == 5 {
        return Err(bad("it is 64 bits wide and has no upper half"));
    }
    let largest = match info.space {
        AddressSpace::Io => 1 << 16,
        AddressSpace::Memory if info.wide => 1 << 63,
        AddressSpace::Memory => 1 << 31,
    };
    if region.size > largest {
        return Err(bad("it is larger than its address space"));
    }
    let mappable = region.flags.contains(RegionFlags::MMAP)
        && info.space == AddressSpace::Memory
        && region.size >= 4096;
    let mapping = match file {
        Some(file) if mappable => {
            let mapping = BarMapping::new(&region, &file, slots)
                .map_err(|failure| bad(&failure.to_string()))?;
            if mapping.is_none() {
                tracing::warn!(
                    socket = backend.name(),
                    bar,
                    "its memory can't be sealed against shrinking: trapped, not mapped"
                );
            }
            mapping
        }
        _ => None,
    };
    info.mapped = mapping.is_some();
    Ok(Some((info, mapping)))
}
