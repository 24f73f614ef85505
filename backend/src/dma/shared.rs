use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::fstatfs;
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::sigbus::{Guarded, GuardedRange};
use super::window::page_size;

/// Guest memory that somebody else mapped, readable and writable: it stays mapped while this or a
/// clone of it is there. What its owner takes away reads as zeros and is [`lost`](Self::lost) from
/// then on; touching it does not kill.
#[derive(Clone, Debug)]
pub struct SharedMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Dropped before the mappings are.
    guards: Vec<Guard>,
    memory: GuestMemoryMmap,
}

/// One region's, whose mapping may be a part of more than one memory.
#[derive(Clone, Debug)]
struct Guard {
    start: usize,
    len: usize,
    guarded: Arc<Guarded>,
}

impl SharedMemory {
    /// Takes care of memory. What `previous` has as well stays lost if it was.
    ///
    /// # Errors
    /// `NOMEM` when the process has as many mappings as it may, others when a region is not of a
    /// file.
    pub fn new(memory: GuestMemoryMmap, previous: Option<&Self>) -> Result<Self, Errno> {
        let known = previous.map_or(&[][..], |previous| &previous.0.guards);
        let guards = memory.iter().map(|region| guard(region, known)).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Inner { guards, memory })))
    }

    /// Whether a page was not there when it was touched.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.0.guards.iter().any(|guard| guard.guarded.lost(0, guard.len))
    }
}

impl Deref for SharedMemory {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.0.memory
    }
}

/// The guard of a mapping: the one that is there, because a page that was replaced must not be
/// forgotten, or a new one.
fn guard(region: &GuestRegionMmap, known: &[Guard]) -> Result<Guard, Errno> {
    let start = region.as_ptr().addr();
    // What is still mapped for the previous memory can't be another mapping.
    if let Some(guard) = known.iter().find(|guard| guard.start == start) {
        return Ok(guard.clone());
    }
    let file = region.file_offset().ok_or(Errno::BADF)?.file();
    let page_size = page_size(&fstatfs(file.as_fd())?);
    let size = usize::try_from(region.len()).map_err(|_| Errno::OVERFLOW)?;
    let len = size.checked_next_multiple_of(page_size).ok_or(Errno::OVERFLOW)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let range = GuardedRange { start, len, page_size, protection };
    Ok(Guard { start, len, guarded: Arc::new(Guarded::reserve()?.arm(range)) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    use super::*;

    fn region(file: &File, guest: u64, size: usize) -> (GuestAddress, usize, Option<FileOffset>) {
        (GuestAddress(guest), size, Some(FileOffset::new(file.try_clone().unwrap(), 0)))
    }

    fn file(size: u64) -> File {
        let file = File::from(memfd_create("shared", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn memory_that_is_taken_away_reads_as_zeros_and_is_lost() {
        let file = file(0x2000);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([region(&file, 0x1000, 0x1800)]).unwrap();
        let memory = SharedMemory::new(memory, None).unwrap();
        memory.write_obj(7_u32, GuestAddress(0x2000)).unwrap();
        assert!(!memory.lost());
        file.set_len(0x1000).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x2000)).unwrap(), 0);
        assert!(memory.lost());
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 0);
    }

    #[test]
    fn what_was_lost_stays_lost_when_a_region_is_added() {
        let (first, second) = (file(0x1000), file(0x1000));
        let ranges = [region(&first, 0, 0x1000)];
        let table = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let memory = SharedMemory::new(table.clone(), None).unwrap();
        first.set_len(0).unwrap();
        memory.read_obj::<u8>(GuestAddress(0)).unwrap();
        let ranges = [region(&second, 0x1000, 0x1000)];
        let other = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        assert!(!SharedMemory::new(other, Some(&memory)).unwrap().lost());
        let more = SharedMemory::new(table, Some(&memory)).unwrap();
        drop(memory);
        assert!(more.lost());
    }
}
