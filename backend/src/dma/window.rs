use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use rustix::fs::{SealFlags, StatFs, fcntl_get_seals, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vm_memory::Bytes;

use super::mapping::Mapping;
use super::{DmaAccess, DmaError, HostMemory};

/// The granularity of windows, and the page size of x86-64.
const PAGE_SIZE: usize = 4096;

/// One window of client memory.
#[derive(Debug)]
pub(super) struct Window {
    size: u64,
    access: DmaAccess,
    memory: Option<Memory>,
}

#[derive(Debug)]
struct Memory {
    mapping: Mapping,
    trust: Trust,
}

/// Whether touching the mapping can raise SIGBUS.
#[derive(Debug)]
enum Trust {
    /// A memfd that is sealed against shrinking: every page of the window exists for ever.
    Sealed,
    /// The client may truncate the file, or the kernel may have no page for it: a hugetlbfs file
    /// reserves none here, and its pool can be empty. Transfers go through
    /// `process_vm_readv`/`writev` on this process itself, where the kernel answers EFAULT instead.
    Doubtful,
}

impl Window {
    pub(super) fn new(
        size: u64,
        access: DmaAccess,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<Self, DmaError> {
        let memory = file.map(|(fd, offset)| Memory::map(&fd, offset, size, access)).transpose()?;
        Ok(Self { size, access, memory })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Where its memory is in this process; `None` without a file.
    pub(super) fn host_memory(&self) -> Option<HostMemory> {
        let length = usize::try_from(self.size).ok()?;
        let address = self.memory.as_ref()?.mapping.address(0, length)?;
        Some(HostMemory::new(address as u64, self.size))
    }

    /// Reads from `offset` in the window; `address` names the place in errors.
    pub(super) fn read(&self, address: u64, offset: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let memory = self.memory_for(DmaAccess::READ, address)?;
        memory.read(offset, data).ok_or(DmaError::Vanished(address))
    }

    pub(super) fn write(&self, address: u64, offset: u64, data: &[u8]) -> Result<(), DmaError> {
        let memory = self.memory_for(DmaAccess::WRITE, address)?;
        memory.write(offset, data).ok_or(DmaError::Vanished(address))
    }

    fn memory_for(&self, access: DmaAccess, address: u64) -> Result<&Memory, DmaError> {
        if !self.access.contains(access) {
            return Err(DmaError::Denied(address));
        }
        self.memory.as_ref().ok_or(DmaError::NotShared(address))
    }
}

impl Memory {
    fn map(fd: &OwnedFd, offset: u64, size: u64, access: DmaAccess) -> Result<Self, DmaError> {
        if !offset.is_multiple_of(PAGE_SIZE as u64) {
            return Err(DmaError::Unaligned);
        }
        let end = offset.checked_add(size).ok_or(DmaError::Overflow)?;
        let length = fstat(fd).map_err(DmaError::Backing)?.st_size;
        if u64::try_from(length).unwrap_or(0) < end {
            return Err(DmaError::Backing(Errno::INVAL));
        }
        let file_system = fstatfs(fd).map_err(DmaError::Backing)?;
        let trust = match fcntl_get_seals(fd) {
            Ok(seals)
                if seals.contains(SealFlags::SHRINK) && file_system.f_type == libc::TMPFS_MAGIC =>
            {
                Trust::Sealed
            }
            _ => Trust::Doubtful,
        };
        let size = usize::try_from(size).map_err(|_| DmaError::Overflow)?;
        let mut protection = ProtFlags::empty();
        protection.set(ProtFlags::READ, access.contains(DmaAccess::READ));
        protection.set(ProtFlags::WRITE, access.contains(DmaAccess::WRITE));
        let mapping = Mapping::new(fd.as_fd(), offset, size, page_size(&file_system), protection)
            .map_err(DmaError::Backing)?;
        Ok(Self { mapping, trust })
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let len = data.len();
        match self.trust {
            Trust::Sealed => self.mapping.slice(start, len)?.read_slice(data, 0).ok(),
            Trust::Doubtful => {
                let remote = RemoteIoVec { base: self.mapping.address(start, len)?, len };
                let local = &mut [IoSliceMut::new(data)];
                let copied = process_vm_readv(Pid::this(), local, &[remote]).ok()?;
                (copied == len).then_some(())
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let len = data.len();
        match self.trust {
            Trust::Sealed => self.mapping.slice(start, len)?.write_slice(data, 0).ok(),
            Trust::Doubtful => {
                let remote = RemoteIoVec { base: self.mapping.address(start, len)?, len };
                let local = &[IoSlice::new(data)];
                let copied = process_vm_writev(Pid::this(), local, &[remote]).ok()?;
                (copied == len).then_some(())
            }
        }
    }
}

/// The size of the pages that a file of this file system is mapped in.
fn page_size(file_system: &StatFs) -> usize {
    let huge = usize::try_from(file_system.f_bsize).ok();
    huge.filter(|size| file_system.f_type == libc::HUGETLBFS_MAGIC && size.is_power_of_two())
        .unwrap_or(PAGE_SIZE)
}
