//! Where everything is in guest RAM. RAM is 16 MiB at guest-physical 0:
//!
//! | address | size | what |
//! |---|---|---|
//! | `0x00_0000` | 4 KiB | nothing: a null pointer hits zeroes |
//! | `0x00_1000` | 28 KiB | page tables |
//! | `0x01_0000` | 4 KiB | control block: stop flag and parameters |
//! | `0x01_1000` | 4 KiB | device table, 64 bytes a row |
//! | `0x02_0000` | 16 KiB | stat blocks, 256 bytes per virtual CPU |
//! | `0x03_0000` | 4 KiB | result of `probe` |
//! | `0x03_8000` | 4 KiB | results of `edu`, 64 bytes a device |
//! | `0x03_9000` | 28 KiB | parameters, results and scratch memory of `instructions` |
//! | `0x04_0000` | 256 KiB | what `hammer` remembers, 64 bytes per virtual CPU and device |
//! | `0x10_0000` | 64 KiB each | code |
//! | `0x20_0000` | 1 MiB | stacks, 16 KiB per virtual CPU, growing down |
//! | `0x40_0000` | 8 KiB | DMA buffers: source page, destination page |
//!
//! `lost_ram` has more of it at `0x200_0000`, apart from the rest: 64 KiB that the VMM takes away.

use super::{GuestError, page_tables};
use crate::hypervisor::{GuestAddress, HostMapping};

/// Size of guest RAM in bytes.
pub const RAM_SIZE: u64 = 16 << 20;
/// Rows of the device table.
pub const MAX_DEVICES: usize = 64;
/// Virtual CPUs that have a stack and a stat block.
pub const MAX_VCPUS: u32 = 64;
/// Guest-physical address of the buffers that [`Program::Edu`](super::Program::Edu) gives to devices.
pub const DMA_BUFFER: GuestAddress = GuestAddress(0x40_0000);

/// Where the RAM is that [`Program::LostRam`](super::Program::LostRam) loses.
pub const LOST_RAM: GuestAddress = GuestAddress(0x200_0000);
/// Its size in bytes.
pub const LOST_RAM_SIZE: u64 = 64 << 10;

pub(super) const PAGE_TABLES: u64 = 0x1000;
pub(super) const CONTROL: u64 = 0x1_0000;
pub(super) const DEVICE_TABLE: u64 = 0x1_1000;
pub(super) const STAT_BLOCKS: u64 = 0x2_0000;
pub(super) const PROBE_RESULT: u64 = 0x3_0000;
pub(super) const EDU_RESULTS: u64 = 0x3_8000;
pub(super) const INSTRUCTIONS: u64 = 0x3_9000;
pub(super) const HAMMER_MEMORY: u64 = 0x4_0000;

pub(super) const ROW_SIZE: i32 = 64;
/// log2 of a stat block's size; blocks are found by shifting the number of the virtual CPU.
pub(super) const STAT_BLOCK_SHIFT: u32 = 8;
/// log2 of the size of what `hammer` remembers per virtual CPU.
pub(super) const HAMMER_MEMORY_SHIFT: u32 = 12;

/// From here to the code, everything is zeroed by [`Parameters::install`].
const RESULTS_END: u64 = 0x8_0000;
const CODE: u64 = 0x10_0000;
const CODE_SIZE: u64 = 0x1_0000;
const STACKS: u64 = 0x20_0000;
const STACK_SIZE: u64 = 0x4000;

/// Offsets in the control block.
pub(super) mod control {
    /// u32, not zero when `hammer` shall stop.
    pub(in super::super) const STOP: i32 = 0;
    pub(in super::super) const CYCLES: i32 = 8;
    pub(in super::super) const COMMAND_ON: i32 = 16;
    pub(in super::super) const COMMAND_OFF: i32 = 18;
    pub(in super::super) const DEVICE_COUNT: i32 = 24;
    pub(in super::super) const ECAM: i32 = 32;
    pub(in super::super) const POLL_LIMIT: i32 = 40;
    /// u64, not zero when functions may be reset at any time.
    pub(in super::super) const RESETS: i32 = 48;
}

/// Offsets in a row of the device table.
pub(super) mod row {
    pub(in super::super) const TRAPPED_CONFIG: i32 = 0;
    pub(in super::super) const MAPPED_CONFIG: i32 = 4;
    pub(in super::super) const TRAPPED_BAR: i32 = 8;
    pub(in super::super) const MAPPED_BAR: i32 = 16;
    /// u64, not zero when the edu function answers 1 and 2 bytes with all ones.
    pub(in super::super) const NARROW: i32 = 24;
}

/// What the programs are told.
#[derive(Debug, Clone)]
pub struct Parameters {
    /// How often `toggle` goes through all functions.
    pub cycles: u64,
    /// `PCI_COMMAND` with memory decode on; with bus mastering on too if DMA shall work.
    pub command_on: u16,
    /// `PCI_COMMAND` with memory decode off.
    pub command_off: u16,
    /// ECAM base of segment 0, for `probe`. Must be below 4 GiB or in the MMIO window.
    pub ecam: GuestAddress,
    /// How often `edu` polls for a result before it gives up.
    pub poll_limit: u64,
    /// Somebody resets functions while `hammer` runs: any register may hold its reset value at any time.
    pub resets: bool,
    /// Functions to work on.
    pub devices: Vec<Device>,
}

/// One row of the device table: an edu and an ivshmem function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// The edu function, whose BAR0 is trapped.
    pub trapped: ConfigAddress,
    /// Address of its BAR0.
    pub trapped_bar: GuestAddress,
    /// It answers reads of 1 and 2 bytes with all ones, as ours does; what QEMU's own edu answers is
    /// undefined.
    pub narrow: bool,
    /// The ivshmem function, whose BAR2 is mapped into the guest. Its memory is zero at the start and at
    /// least 64 bytes per virtual CPU long.
    pub mapped: ConfigAddress,
    /// Address of its BAR2.
    pub mapped_bar: GuestAddress,
}

/// What to write to CONFIG_ADDRESS to reach register 0 of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigAddress(u32);

impl ConfigAddress {
    /// For the function with this routing ID: bus << 8 | device << 3 | function.
    pub const fn from_bdf(bdf: u16) -> ConfigAddress {
        ConfigAddress(1 << 31 | (bdf as u32) << 8)
    }
}

impl Parameters {
    /// Writes page tables, parameters and the device table to guest RAM, and clears all results.
    ///
    /// # Errors
    /// [`GuestError::TooManyDevices`], and [`GuestError::Ram`] for RAM smaller than [`RAM_SIZE`].
    pub fn install(&self, ram: &HostMapping) -> Result<(), GuestError> {
        if self.devices.len() > MAX_DEVICES {
            return Err(GuestError::TooManyDevices { devices: self.devices.len() });
        }
        for page in (CONTROL..RESULTS_END).step_by(0x1000) {
            ram.write(page, &[0; 0x1000])?;
        }
        page_tables::install(ram, PAGE_TABLES)?;

        let control = |offset: i32| CONTROL + u64::from(offset.unsigned_abs());
        ram.store_u64(control(control::CYCLES), self.cycles)?;
        ram.write(control(control::COMMAND_ON), &self.command_on.to_le_bytes())?;
        ram.write(control(control::COMMAND_OFF), &self.command_off.to_le_bytes())?;
        ram.store_u64(control(control::DEVICE_COUNT), self.devices.len() as u64)?;
        ram.store_u64(control(control::ECAM), self.ecam.0)?;
        ram.store_u64(control(control::POLL_LIMIT), self.poll_limit)?;
        ram.store_u64(control(control::RESETS), self.resets.into())?;

        for (at, device) in (DEVICE_TABLE..).step_by(64).zip(&self.devices) {
            let field = |offset: i32| at + u64::from(offset.unsigned_abs());
            ram.store_u32(field(row::TRAPPED_CONFIG), device.trapped.0)?;
            ram.store_u32(field(row::MAPPED_CONFIG), device.mapped.0)?;
            ram.store_u64(field(row::TRAPPED_BAR), device.trapped_bar.0)?;
            ram.store_u64(field(row::MAPPED_BAR), device.mapped_bar.0)?;
            ram.store_u64(field(row::NARROW), device.narrow.into())?;
        }
        Ok(())
    }
}

/// Sets the stop flag, as `toggle` does at its end: the virtual CPUs that run `hammer` halt.
///
/// # Errors
/// [`GuestError::Ram`].
pub fn request_stop(ram: &HostMapping) -> Result<(), GuestError> {
    Ok(ram.store_u32(CONTROL + u64::from(control::STOP.unsigned_abs()), 1)?)
}

pub(super) fn code(program: u64) -> u64 {
    CODE + program * CODE_SIZE
}

pub(super) fn stack_top(vcpu: u32) -> u64 {
    STACKS + (u64::from(vcpu) + 1) * STACK_SIZE
}

pub(super) fn stat_block(vcpu: u32) -> u64 {
    STAT_BLOCKS + (u64::from(vcpu) << STAT_BLOCK_SHIFT)
}
