use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, fstat, ftruncate, memfd_create,
    open,
};

use super::crash::crash_point;
use super::memory::Memory;

/// Memory of a fixed length that this process writes and others only read: it outlives the process if
/// somebody holds its [file](AsFd).
#[derive(Debug)]
pub struct SharedPage {
    file: OwnedFd,
    memory: Memory,
}

/// Who writes a page after this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heirs {
    /// Nobody.
    None,
    /// Whoever gets its file.
    Holder,
}

impl SharedPage {
    /// A page of zeros, of whole pages of memory. Its length never changes.
    ///
    /// # Errors
    /// When the kernel has no more memory or descriptors.
    pub fn new(name: &str, length: usize, heirs: Heirs) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create(name, flags)?;
        ftruncate(&file, length as u64)?;
        let memory = Memory::map(&file, length)?;
        // Who has a descriptor to read with could open the file anew, through /proc.
        fchmod(&file, Mode::RUSR)?;
        let mut seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if heirs == Heirs::None {
            // The mapping that is there stays.
            seals |= SealFlags::FUTURE_WRITE;
        }
        fcntl_add_seals(&file, seals)?;
        Ok(Self { file, memory })
    }

    /// The page of a predecessor, by its file.
    ///
    /// # Errors
    /// When it can't be mapped, or has another length.
    pub fn adopt(file: OwnedFd, length: usize) -> io::Result<Self> {
        if fstat(&file)?.st_size.cast_unsigned() != length as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let memory = Memory::map(&file, length)?;
        Ok(Self { file, memory })
    }

    /// A descriptor for those who read: nothing can be written with it.
    ///
    /// # Errors
    /// When the kernel has no more descriptors, or /proc is not there.
    pub fn reader(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// To be called before each store: tests end the process there.
    pub fn before_store() {
        crash_point();
    }
}

impl AsRef<[AtomicU64]> for SharedPage {
    fn as_ref(&self) -> &[AtomicU64] {
        self.memory.words()
    }
}

impl AsFd for SharedPage {
    /// The file, for whoever writes next.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use rustix::fs::{FallocateFlags, fallocate, fcntl_getfl};
    use rustix::io::{Errno, pwrite};

    use super::*;

    const LENGTH: usize = 4096;

    fn page(heirs: Heirs) -> SharedPage {
        SharedPage::new("test", LENGTH, heirs).unwrap()
    }

    #[test]
    fn a_reader_can_neither_write_nor_cut_nor_seal_it() {
        for heirs in [Heirs::None, Heirs::Holder] {
            let page = page(heirs);
            page.as_ref()[3].store(7, Ordering::Relaxed);
            let reader = page.reader().unwrap();
            assert_eq!(fcntl_getfl(&reader).unwrap() & OFlags::ACCMODE, OFlags::RDONLY);
            assert_eq!(pwrite(&reader, &[1], 0), Err(Errno::BADF));
            let mapped = Memory::map(&reader, LENGTH).map_err(|error| error.raw_os_error());
            assert_eq!(mapped.err(), Some(Some(Errno::ACCESS.raw_os_error())));
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            assert_eq!(fallocate(&reader, punch, 0, 4096), Err(Errno::BADF));
            assert_eq!(ftruncate(&reader, 0), Err(Errno::INVAL));
            assert_eq!(fcntl_add_seals(&reader, SealFlags::WRITE), Err(Errno::PERM));
            // Nor could anybody who has the file itself.
            assert_eq!(ftruncate(&page.file, 0), Err(Errno::PERM));
            assert_eq!(ftruncate(&page.file, 8192), Err(Errno::PERM));
            let mode = fstat(&page.file).unwrap().st_mode & 0o777;
            assert_eq!(mode, 0o400, "nobody else opens it by its name in /proc");
            assert_eq!(page.as_ref()[3].load(Ordering::Relaxed), 7);
        }
    }

    #[test]
    fn without_heirs_not_even_its_file_can_be_written() {
        let page = page(Heirs::None);
        assert_eq!(pwrite(&page.file, &[1], 0), Err(Errno::PERM));
        let again = SharedPage::adopt(page.file.try_clone().unwrap(), LENGTH);
        assert!(again.is_err());
    }

    #[test]
    fn an_heir_writes_where_readers_look() {
        let mine = page(Heirs::Holder);
        mine.as_ref()[3].store(7, Ordering::Relaxed);
        let file = mine.file.try_clone().unwrap();
        let theirs = SharedPage::adopt(file, LENGTH).unwrap();
        assert_eq!(theirs.as_ref()[3].load(Ordering::Relaxed), 7);
        theirs.as_ref()[3].store(8, Ordering::Relaxed);
        assert_eq!(mine.as_ref()[3].load(Ordering::Relaxed), 8);
        assert!(theirs.reader().is_ok());
        let short = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
        assert!(SharedPage::adopt(short, LENGTH).is_err());
    }
}
