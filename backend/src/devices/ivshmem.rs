use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::{BarMapping, Context, Device};
use crate::config::{ConfigError, Parameters};
use crate::pci::{
    BarIndex, BarKind, BarSpec, ClassCode, ExpressSpec, FunctionSpec, Ids, PowerSpec,
};

/// Shared memory as a device: ivshmem-plain (1af4:1110, `docs/specs/ivshmem-spec.rst` in QEMU).
///
/// BAR0 holds the registers of a device without interrupts, BAR2 is the memory. The VMM maps BAR2
/// directly; accesses that are forwarded all the same go through the file, never through a mapping
/// that a truncated file could turn into SIGBUS.
#[derive(Debug)]
pub struct Ivshmem {
    memory: File,
    size: u64,
    registers: Registers,
}

#[derive(Debug, Default)]
struct Registers {
    interrupt_mask: u32,
    interrupt_status: u32,
}

/// "BAR0": offsets of the registers. All are 4 bytes wide.
mod at {
    pub(super) const INTERRUPT_MASK: u64 = 0;
    pub(super) const INTERRUPT_STATUS: u64 = 4;
    pub(super) const IV_POSITION: u64 = 8;
}

const REGISTERS_SIZE: u64 = 256;
/// A BAR below a page can't be mapped.
const MIN_SIZE: u64 = 4096;
/// 1 TiB: enough for anyone to notice a typing error, and far below what a 64-bit BAR can be.
const MAX_SIZE: u64 = 1 << 40;

impl Ivshmem {
    /// Creates the device: `ivshmem,size=SIZE[,path=FILE]`.
    ///
    /// # Errors
    /// [`ConfigError`] when the size is missing or no power of two, or the file is missing or
    /// smaller than it.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let size = parameters.take_size("size")?.ok_or(ConfigError::Missing("size"))?;
        if !size.is_power_of_two() || !(MIN_SIZE..=MAX_SIZE).contains(&size) {
            let reason = format!("{size} bytes is no power of two from {MIN_SIZE} to {MAX_SIZE}");
            return Err(ConfigError::invalid("size", reason));
        }
        let memory = match parameters.take_string("path") {
            Some(path) => open_shared(&PathBuf::from(path), size)?,
            None => anonymous(size).map_err(|error| ConfigError::invalid("size", error))?,
        };
        Ok(Self { memory, size, registers: Registers::default() })
    }

    fn register(&mut self, offset: u64) -> Option<&mut u32> {
        match offset {
            at::INTERRUPT_MASK => Some(&mut self.registers.interrupt_mask),
            at::INTERRUPT_STATUS => Some(&mut self.registers.interrupt_status),
            _ => None,
        }
    }
}

/// Sealed: a VMM can map it without fearing that it shrinks.
fn anonymous(size: u64) -> Result<File, rustix::io::Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("barkeep-ivshmem", flags)?;
    ftruncate(&memory, size)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(memory))
}

fn open_shared(path: &Path, size: u64) -> Result<File, ConfigError> {
    let invalid =
        |reason: String| ConfigError::invalid("path", format!("{}: {reason}", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| invalid(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| invalid(error.to_string()))?;
    if !metadata.is_file() {
        return Err(invalid("not a regular file".into()));
    }
    if metadata.len() < size {
        return Err(invalid(format!("{} bytes, smaller than size={size}", metadata.len())));
    }
    Ok(file)
}

impl Device for Ivshmem {
    fn spec(&self) -> FunctionSpec {
        let bar = |index, kind, size| BarSpec { index, kind, size };
        FunctionSpec {
            bars: vec![
                bar(BarIndex::BAR0, BarKind::Memory32 { prefetchable: false }, REGISTERS_SIZE),
                bar(BarIndex::BAR2, BarKind::Memory64 { prefetchable: true }, self.size),
            ],
            power: Some(PowerSpec { no_soft_reset: true }),
            express: Some(ExpressSpec { function_level_reset: true, aer: false }),
            ..FunctionSpec::new(Ids {
                vendor: 0x1af4,
                device: 0x1110,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
                revision: 1,
                class: ClassCode { base: 0x05, sub: 0x00, interface: 0x00 },
            })
        }
    }

    fn mapping(&self, bar: BarIndex) -> Option<BarMapping<'_>> {
        (bar == BarIndex::BAR2).then(|| BarMapping { file: self.memory.as_fd(), offset: 0 })
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        if bar == BarIndex::BAR2 {
            // A hole in a truncated file leaves the rest all ones.
            if self.memory.read_exact_at(data, offset).is_err() {
                data.fill(0xff);
            }
            return;
        }
        let Ok(target) = <&mut [u8; 4]>::try_from(data) else { return };
        if let Some(register) = self.register(offset) {
            *target = register.to_le_bytes();
        } else if offset == at::IV_POSITION {
            // "if the device is not configured for interrupts, this is zero"
            *target = [0; 4];
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8], _: &mut Context<'_>) {
        if bar == BarIndex::BAR2 {
            let _ = self.memory.write_all_at(data, offset);
            return;
        }
        // A doorbell write rings nobody: there are no peers ("the write is ignored").
        if let (Ok(data), Some(register)) = (<[u8; 4]>::try_from(data), self.register(offset)) {
            *register = u32::from_le_bytes(data);
        }
    }

    /// The memory is shared with others and outlives a reset of the function.
    fn reset(&mut self) {
        self.registers = Registers::default();
    }
}
