mod peers;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use serde::{Deserialize, Serialize};

pub(super) use self::peers::Groups;
use self::peers::{MAX_VECTORS, Membership};
use super::{BarMapping, Context, Device, Doorbell, RestoreError, Saved};
use crate::config::{ConfigError, Parameters};
use crate::pci::{
    BarIndex, BarKind, BarOffset, BarSpec, ClassCode, ExpressSpec, FunctionSpec, Ids, MsixSpec,
    MsixVectors, PowerSpec,
};

/// Shared memory as a device: ivshmem-plain and, with `vectors`, ivshmem-doorbell (1af4:1110,
/// `docs/specs/ivshmem-spec.rst` in QEMU).
///
/// BAR0 holds the registers, BAR1 the MSI-X table of a device with interrupts, BAR2 is the memory.
/// The VMM maps BAR2 directly; accesses that are forwarded all the same go through the file, never
/// through a mapping that a truncated file could turn into SIGBUS.
///
/// The peers of a device are the devices of this process over the same file.
#[derive(Debug)]
pub struct Ivshmem {
    memory: File,
    /// Nobody else has the memory: it moves with the device.
    private: bool,
    size: u64,
    registers: Registers,
    /// Counts what may have changed them.
    revision: u64,
    interrupts: Option<Membership>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Registers {
    interrupt_mask: u32,
    interrupt_status: u32,
}

/// "BAR0": offsets of the registers. All are 4 bytes wide.
mod at {
    pub(super) const INTERRUPT_MASK: u64 = 0;
    pub(super) const INTERRUPT_STATUS: u64 = 4;
    pub(super) const IV_POSITION: u64 = 8;
    pub(super) const DOORBELL: u64 = 12;
}

const REGISTERS_SIZE: u64 = 256;
/// BAR1: the table in its first half, the pending bits in the second.
const MSIX_SIZE: u64 = 4096;
/// A BAR below a page can't be mapped.
const MIN_SIZE: u64 = 4096;
/// 1 TiB: enough for anyone to notice a typing error, and far below what a 64-bit BAR can be.
const MAX_SIZE: u64 = 1 << 40;

impl Ivshmem {
    /// Creates the device: `ivshmem,size=SIZE[,path=FILE][,vectors=N]`.
    ///
    /// # Errors
    /// [`ConfigError`] when the size is missing or no power of two, the file is missing or smaller
    /// than it, or there are too many vectors.
    pub(super) fn from_parameters(
        parameters: &mut Parameters,
        groups: &mut Groups,
    ) -> Result<Self, ConfigError> {
        let size = parameters.take_size("size")?.ok_or(ConfigError::Missing("size"))?;
        if !size.is_power_of_two() || !(MIN_SIZE..=MAX_SIZE).contains(&size) {
            let reason = format!("{size} bytes is no power of two from {MIN_SIZE} to {MAX_SIZE}");
            return Err(ConfigError::invalid("size", reason));
        }
        let path = parameters.take_string("path");
        let memory = match &path {
            Some(path) => open_shared(&PathBuf::from(path), size)?,
            None => anonymous(size).map_err(|error| ConfigError::invalid("size", error))?,
        };
        let interrupts = match parameters.take_number("vectors")? {
            None | Some(0) => None,
            Some(vectors) => Some(join(groups, &memory, vectors)?),
        };
        let private = path.is_none();
        let registers = Registers::default();
        Ok(Self { memory, private, size, registers, revision: 0, interrupts })
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        match offset {
            at::INTERRUPT_MASK => Some(self.registers.interrupt_mask),
            at::INTERRUPT_STATUS => Some(self.registers.interrupt_status),
            // "if the device is not configured for interrupts, this is zero"
            at::IV_POSITION => Some(self.interrupts.as_ref().map_or(0, |peer| peer.id().into())),
            _ => None,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        if matches!(offset, at::INTERRUPT_MASK | at::INTERRUPT_STATUS) {
            self.revision += 1;
        }
        match offset {
            at::INTERRUPT_MASK => self.registers.interrupt_mask = value,
            at::INTERRUPT_STATUS => self.registers.interrupt_status = value,
            // "If the interrupt can't be sent, the write is ignored."
            at::DOORBELL => {
                if let Some(interrupts) = &self.interrupts {
                    interrupts.ring(value);
                }
            }
            _ => {}
        }
    }
}

fn join(groups: &mut Groups, memory: &File, vectors: u64) -> Result<Membership, ConfigError> {
    let invalid = |reason: String| ConfigError::invalid("vectors", reason);
    let vectors = u16::try_from(vectors)
        .ok()
        .filter(|vectors| *vectors <= MAX_VECTORS)
        .ok_or_else(|| invalid(format!("{vectors} is more than {MAX_VECTORS}")))?;
    let metadata = memory.metadata().map_err(|error| invalid(error.to_string()))?;
    groups
        .join((metadata.dev(), metadata.ino()), vectors)
        .map_err(|errno| invalid(errno.to_string()))
}

fn msix(vectors: u16) -> MsixSpec {
    let at = |offset| BarOffset { bar: BarIndex::BAR1, offset };
    let vectors = MsixVectors::new(vectors).expect("1 to MAX_VECTORS");
    MsixSpec { vectors, table: at(0), pending: at(MSIX_SIZE / 2) }
}

/// Sealed: a VMM can map it without fearing that it shrinks.
fn anonymous(size: u64) -> Result<File, rustix::io::Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("barkeep-ivshmem", flags)?;
    ftruncate(&memory, size)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(memory))
}

/// Memory as [`anonymous`] made it.
///
/// # Errors
/// It is something else.
fn same_memory(memory: OwnedFd, size: u64) -> io::Result<File> {
    let seals = fcntl_get_seals(&memory)?;
    let memory = File::from(memory);
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) || memory.metadata()?.len() != size {
        return Err(io::Error::other(format!("no memory of {size} bytes")));
    }
    Ok(memory)
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
        let registers = BarKind::Memory32 { prefetchable: false };
        let mut bars = vec![
            bar(BarIndex::BAR0, registers, REGISTERS_SIZE),
            bar(BarIndex::BAR2, BarKind::Memory64 { prefetchable: true }, self.size),
        ];
        let msix = self.interrupts.as_ref().map(|interrupts| {
            bars.push(bar(BarIndex::BAR1, registers, MSIX_SIZE));
            msix(interrupts.vectors())
        });
        FunctionSpec {
            bars,
            msix,
            power: Some(PowerSpec { no_soft_reset: true }),
            express: Some(ExpressSpec { function_level_reset: true, aer: true }),
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
        if let Ok(target) = <&mut [u8; 4]>::try_from(data)
            && bar == BarIndex::BAR0
            && let Some(value) = self.read_register(offset)
        {
            *target = value.to_le_bytes();
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8], _: &mut Context<'_>) {
        if bar == BarIndex::BAR2 {
            let _ = self.memory.write_all_at(data, offset);
            return;
        }
        if let Ok(data) = <[u8; 4]>::try_from(data)
            && bar == BarIndex::BAR0
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        self.interrupts.as_ref().map(Membership::own_vectors).unwrap_or_default()
    }

    /// A peer rang, or this device itself.
    fn woken(&mut self, index: usize, context: &mut Context<'_>) {
        if let Ok(vector) = u16::try_from(index) {
            context.raise_msix(vector);
        }
    }

    fn doorbells(&self, bar: BarIndex) -> Vec<Doorbell> {
        match &self.interrupts {
            Some(interrupts) if bar == BarIndex::BAR0 => interrupts
                .peers()
                .map(|(value, eventfd)| Doorbell {
                    offset: at::DOORBELL,
                    width: 4,
                    value: Some(value.into()),
                    eventfd,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    /// The memory is shared with others and outlives a reset of the function.
    fn reset(&mut self) {
        self.revision += 1;
        self.registers = Registers::default();
    }

    /// The memory that nobody else has, and the vectors that peers ring.
    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        let memory = self.private.then(|| self.memory.as_fd());
        let vectors = self.interrupts.as_ref().map(Membership::own_vectors).unwrap_or_default();
        memory.into_iter().chain(vectors).collect()
    }

    fn adopt(&mut self, kept: Vec<OwnedFd>) -> io::Result<()> {
        let mut kept = kept.into_iter();
        if self.private {
            let memory = kept.next().ok_or_else(|| io::Error::other("no memory"))?;
            self.memory = same_memory(memory, self.size)?;
        }
        match &mut self.interrupts {
            Some(interrupts) => interrupts.adopt(kept),
            None if kept.next().is_some() => Err(io::Error::other("too many descriptors")),
            None => Ok(()),
        }
    }

    fn saved(&mut self) -> Option<&mut dyn Saved> {
        Some(self)
    }
}

/// The first version of the state.
#[derive(Serialize, Deserialize)]
enum State {
    V1(Registers),
}

impl Saved for Ivshmem {
    fn save(&self) -> Vec<u8> {
        postcard::to_allocvec(&State::V1(self.registers.clone())).expect("plain data serialises")
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.reset();
        let State::V1(registers) = postcard::from_bytes(state).map_err(|_| RestoreError)?;
        self.registers = registers;
        Ok(())
    }

    fn revision(&self) -> Option<u64> {
        Some(self.revision)
    }

    /// A file that was given is at both ends, or is brought there by whoever gave it.
    fn memory(&self) -> Option<(&File, u64)> {
        self.private.then_some((&self.memory, self.size))
    }
}
