//! What firmware does: gives every BAR an address.

use super::MachineError;
use super::guest::{ConfigAddress, Device, MMIO_WINDOW, MMIO_WINDOW_SIZE};
use crate::Frontend;
use crate::bar::{AddressSpace, BarInfo};
use crate::hypervisor::GuestAddress;

/// Where the BARs are.
#[derive(Debug)]
pub(super) struct Placement {
    functions: Vec<Placed>,
}

/// One function, as firmware found it.
#[derive(Debug)]
struct Placed {
    /// Vendor and device.
    ids: (u16, u16),
    /// BAR number and address, in the order of its BARs.
    bars: Vec<(u8, u64)>,
}

/// 32-bit memory BARs: between ECAM and the local APIC.
const LOW_MEMORY: (u64, u64) = (0xc000_0000, 0xfe00_0000);
const IO_PORTS: (u64, u64) = (0xc000, 0x1_0000);

const COMMAND: u16 = 0x04;
const BAR0: u16 = 0x10;

/// An address range that is given out from below.
struct Pool {
    next: u64,
    end: u64,
}

impl Pool {
    /// BARs are aligned to their size (PCI 6.2.5.1).
    fn take(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size)?;
        self.next = start.checked_add(size).filter(|next| *next <= self.end)?;
        Some(start)
    }
}

impl Placement {
    /// Places every BAR, with decode off.
    pub(super) fn assign(frontend: &Frontend) -> Result<Self, MachineError> {
        let mut low = Pool { next: LOW_MEMORY.0, end: LOW_MEMORY.1 };
        let mut high = Pool { next: MMIO_WINDOW.0, end: MMIO_WINDOW.0 + MMIO_WINDOW_SIZE };
        let mut io = Pool { next: IO_PORTS.0, end: IO_PORTS.1 };
        let mut functions = Vec::new();
        for (index, function) in frontend.functions().iter().enumerate() {
            frontend.config_write(index, COMMAND, &[0, 0]);
            let mut bars = Vec::new();
            for info in function.bars() {
                let pool = match info.space {
                    AddressSpace::Io => &mut io,
                    AddressSpace::Memory if info.wide => &mut high,
                    AddressSpace::Memory => &mut low,
                };
                let address = pool.take(info.size).ok_or_else(|| MachineError::NoRoom {
                    path: function.client().path().to_owned(),
                    bar: info.bar,
                    size: info.size,
                })?;
                write_bar(frontend, index, info, address);
                bars.push((info.bar, address));
            }
            functions.push(Placed { ids: read_ids(frontend, index), bars });
        }
        Ok(Self { functions })
    }

    /// Lets every function decode.
    pub(super) fn enable(&self, frontend: &Frontend, command: u16) {
        for index in 0..self.functions.len() {
            frontend.config_write(index, COMMAND, &command.to_le_bytes());
        }
    }

    /// The rows of the device table for `toggle`: each edu function with the next ivshmem function.
    pub(super) fn pairs(&self, frontend: &Frontend) -> Vec<Device> {
        let row = |(edu, ivshmem): (usize, usize)| self.row(frontend, edu, (ivshmem, 2));
        self.edu_functions().zip(self.with_ids(IVSHMEM)).filter_map(row).collect()
    }

    /// The rows for `edu`, which looks at nothing else: each function is its own partner.
    pub(super) fn edu_alone(&self, frontend: &Frontend) -> Vec<Device> {
        self.edu_functions().filter_map(|edu| self.row(frontend, edu, (edu, 0))).collect()
    }

    /// The rows for `instructions`: the mapped BARs of ivshmem functions, or if there is none, those of
    /// edu functions that are passed through.
    pub(super) fn mapped_alone(&self, frontend: &Frontend) -> Vec<Device> {
        let mut mapped: Vec<_> = self.ivshmem_functions().map(|index| (index, 2)).collect();
        if mapped.is_empty() {
            let edu = self.edu_functions().filter(|index| is_mapped(frontend, *index, 0));
            mapped = edu.map(|index| (index, 0)).collect();
        }
        let row = |(index, bar): (usize, u8)| self.row(frontend, index, (index, bar));
        mapped.into_iter().filter_map(row).collect()
    }

    fn row(
        &self,
        frontend: &Frontend,
        trapped: usize,
        (mapped, mapped_bar): (usize, u8),
    ) -> Option<Device> {
        Some(Device {
            trapped: config_address(trapped)?,
            trapped_bar: GuestAddress(self.bar(trapped, 0)?),
            narrow: !is_mapped(frontend, trapped, 0),
            mapped: config_address(mapped)?,
            mapped_bar: GuestAddress(self.bar(mapped, mapped_bar)?),
        })
    }

    /// Functions whose trapped BAR0 the guest programs write to.
    pub(super) fn edu_functions(&self) -> impl Iterator<Item = usize> {
        self.with_ids(EDU)
    }

    /// Functions whose mapped BAR2 they write to.
    pub(super) fn ivshmem_functions(&self) -> impl Iterator<Item = usize> {
        self.with_ids(IVSHMEM)
    }

    fn with_ids(&self, ids: (u16, u16)) -> impl Iterator<Item = usize> {
        let functions = self.functions.iter().enumerate();
        functions.filter(move |(_, placed)| placed.ids == ids).map(|(index, _)| index)
    }

    pub(super) fn bar(&self, function: usize, bar: u8) -> Option<u64> {
        self.functions
            .get(function)?
            .bars
            .iter()
            .find(|(number, _)| *number == bar)
            .map(|(_, address)| *address)
    }
}

/// Whether a BAR has memory that is mapped while it decodes. An edu function with such a BAR0 is passed
/// through, and not ours.
pub(super) fn is_mapped(frontend: &Frontend, function: usize, bar: u8) -> bool {
    let bars = frontend.functions().get(function).map_or(&[][..], |function| function.bars());
    bars.iter().any(|info| info.bar == bar && info.mapped)
}

/// Vendor and device of edu.
const EDU: (u16, u16) = (0x1234, 0x11e8);
/// Vendor and device of ivshmem.
const IVSHMEM: (u16, u16) = (0x1af4, 0x1110);

fn read_ids(frontend: &Frontend, function: usize) -> (u16, u16) {
    let mut data = [0; 4];
    frontend.config_read(function, 0, &mut data);
    let [a, b, c, d] = data;
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}

fn write_bar(frontend: &Frontend, function: usize, info: &BarInfo, address: u64) {
    let register = BAR0 + 4 * u16::from(info.bar);
    let bytes = address.to_le_bytes();
    frontend.config_write(function, register, &bytes[..4]);
    if info.wide {
        frontend.config_write(function, register + 4, &bytes[4..]);
    }
}

/// Function N is device N on bus 0.
fn config_address(function: usize) -> Option<ConfigAddress> {
    Some(ConfigAddress::from_bdf(u16::try_from(function).ok()? << 3))
}
