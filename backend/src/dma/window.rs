use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{StatFs, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use super::mapping::Mapping;
use super::{DmaAccess, DmaError, HostMemory, Iova};

/// The granularity of windows, and the page size of x86-64.
pub(super) const PAGE_SIZE: usize = 4096;

/// One window of client memory.
#[derive(Debug)]
pub(super) struct Window {
    size: u64,
    access: DmaAccess,
    /// `None` without a file: it is reached with messages to the client.
    memory: Option<Mapping>,
    /// Its file, for as long as the window is there, if somebody else is to map it too.
    file: Option<KeptFile>,
}

/// A window as it was announced.
#[derive(Clone, Copy, Debug)]
pub struct WindowInfo<'a> {
    /// Its first address.
    pub iova: Iova,
    /// Its length in bytes.
    pub size: u64,
    /// What the function may do with it.
    pub access: DmaAccess,
    /// What backs it; `None` if it came without a file, or if files are not
    /// [kept](super::DmaTable::keep_files).
    pub file: Option<WindowFile<'a>>,
}

/// The file that backs a window.
#[derive(Clone, Copy, Debug)]
pub struct WindowFile<'a> {
    /// As the client sent it.
    pub fd: BorrowedFd<'a>,
    /// Where the window starts in it, in bytes.
    pub offset: u64,
    /// Which file it is, whatever descriptor it came with: device and inode.
    pub id: (u64, u64),
}

/// How many windows may keep their files.
#[derive(Clone, Debug, Default)]
pub(super) struct FileBudget {
    most: usize,
    /// Every kept file has a clone of it.
    taken: Arc<()>,
}

#[derive(Debug)]
struct KeptFile {
    fd: OwnedFd,
    offset: u64,
    id: (u64, u64),
    _taken: Arc<()>,
}

impl FileBudget {
    pub(super) fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    fn keep(&self, fd: OwnedFd, offset: u64) -> Option<KeptFile> {
        if Arc::strong_count(&self.taken) > self.most {
            return None;
        }
        let stat = fstat(&fd).ok()?;
        let taken = Arc::clone(&self.taken);
        Some(KeptFile { fd, offset, id: (stat.st_dev, stat.st_ino), _taken: taken })
    }
}

impl Window {
    pub(super) fn new(
        size: u64,
        access: DmaAccess,
        file: Option<(OwnedFd, u64)>,
        budget: &FileBudget,
    ) -> Result<Self, DmaError> {
        let Some((fd, offset)) = file else {
            return Ok(Self { size, access, memory: None, file: None });
        };
        let memory = Some(map(&fd, offset, size, access)?);
        Ok(Self { size, access, memory, file: budget.keep(fd, offset) })
    }

    pub(super) fn info(&self, iova: Iova) -> WindowInfo<'_> {
        let Self { size, access, file, .. } = self;
        let file = file.as_ref().map(|file| WindowFile {
            fd: file.fd.as_fd(),
            offset: file.offset,
            id: file.id,
        });
        WindowInfo { iova, size: *size, access: *access, file }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn allows(&self, access: DmaAccess) -> bool {
        self.access.contains(access)
    }

    pub(super) fn is_mapped(&self) -> bool {
        self.memory.is_some()
    }

    /// Where its memory is in this process; `None` without a file.
    pub(super) fn host_memory(&self) -> Option<HostMemory> {
        let length = usize::try_from(self.size).ok()?;
        let address = self.memory.as_ref()?.address(0, length)?;
        Some(HostMemory::new(address as u64, self.size))
    }

    /// Reads from `offset` in the window; `address` names the place in errors.
    pub(super) fn read(&self, address: u64, offset: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let slice = self.slice(address, offset, data.len(), DmaAccess::READ, ())?;
        slice.read_slice(data, 0).map_err(|_| DmaError::Vanished(address))?;
        self.intact(address, offset, data.len())
    }

    /// Writes to `offset` in the window, and marks `bitmap`.
    pub(super) fn write<B: BitmapSlice>(
        &self,
        address: u64,
        offset: u64,
        data: &[u8],
        bitmap: B,
    ) -> Result<(), DmaError> {
        let slice = self.slice(address, offset, data.len(), DmaAccess::WRITE, bitmap)?;
        slice.write_slice(data, 0).map_err(|_| DmaError::Vanished(address))?;
        self.intact(address, offset, data.len())
    }

    /// The memory of a part of the window. Writes mark `bitmap`.
    pub(super) fn slice<B: BitmapSlice>(
        &self,
        address: u64,
        offset: u64,
        len: usize,
        access: DmaAccess,
        bitmap: B,
    ) -> Result<VolatileSlice<'_, B>, DmaError> {
        if !self.access.contains(access) {
            return Err(DmaError::Denied(address));
        }
        let memory = self.memory.as_ref().ok_or(DmaError::NotShared(address))?;
        self.intact(address, offset, len)?;
        let start = usize::try_from(offset).map_err(|_| DmaError::Unmapped(address))?;
        memory.slice(start, len, bitmap).ok_or(DmaError::Unmapped(address))
    }

    /// Whether the file has held every page of the range whenever it was accessed.
    pub(super) fn intact(&self, address: u64, offset: u64, len: usize) -> Result<(), DmaError> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match &self.memory {
            Some(memory) if memory.lost(start, len) => Err(DmaError::Vanished(address)),
            _ => Ok(()),
        }
    }
}

fn map(fd: &OwnedFd, offset: u64, size: u64, access: DmaAccess) -> Result<Mapping, DmaError> {
    if !offset.is_multiple_of(PAGE_SIZE as u64) {
        return Err(DmaError::Unaligned);
    }
    let end = offset.checked_add(size).ok_or(DmaError::Overflow)?;
    let length = fstat(fd).map_err(DmaError::Backing)?.st_size;
    if u64::try_from(length).unwrap_or(0) < end {
        return Err(DmaError::Backing(Errno::INVAL));
    }
    let file_system = fstatfs(fd).map_err(DmaError::Backing)?;
    let size = usize::try_from(size).map_err(|_| DmaError::Overflow)?;
    let mut protection = ProtFlags::empty();
    protection.set(ProtFlags::READ, access.contains(DmaAccess::READ));
    protection.set(ProtFlags::WRITE, access.contains(DmaAccess::WRITE));
    Mapping::new(fd.as_fd(), offset, size, page_size(&file_system), protection)
        .map_err(DmaError::Backing)
}

/// The size of the pages that a file of this file system is mapped in.
pub(super) fn page_size(file_system: &StatFs) -> usize {
    let huge = usize::try_from(file_system.f_bsize).ok();
    huge.filter(|size| file_system.f_type == libc::HUGETLBFS_MAGIC && size.is_power_of_two())
        .unwrap_or(PAGE_SIZE)
}
