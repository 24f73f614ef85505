use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs};

use crate::state::FdKey;

/// The file system of eventfds and the like, which have one file for all of them.
const ANON_INODE_FS_MAGIC: u64 = 0x0904_1934;

/// Under which keys files are held. A client sends the same one with each window of its memory, and may
/// have thousands of them.
#[derive(Debug, Default)]
pub(super) struct Files {
    keys: BTreeMap<FileId, FdKey>,
    ids: BTreeMap<FdKey, FileId>,
}

/// What tells files from each other while they are open, and what may be done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
    access: u32,
}

impl FileId {
    /// None if it is something else than a file, in whose place another descriptor will not do.
    pub(super) fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let stat = fstat(fd).ok()?;
        let flags = fcntl_getfl(fd).ok()?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && !flags.contains(OFlags::PATH)
            && fstatfs(fd).ok()?.f_type.cast_unsigned() != ANON_INODE_FS_MAGIC;
        let access = (flags & OFlags::ACCMODE).bits();
        is_file.then_some(Self { device: stat.st_dev, inode: stat.st_ino, access })
    }
}

impl Files {
    pub(super) fn key(&self, id: FileId) -> Option<FdKey> {
        self.keys.get(&id).copied()
    }

    pub(super) fn insert(&mut self, id: FileId, key: FdKey) {
        self.keys.insert(id, key);
        self.ids.insert(key, id);
    }

    pub(super) fn remove(&mut self, key: FdKey) {
        if let Some(id) = self.ids.remove(&key)
            && self.key(id) == Some(key)
        {
            self.keys.remove(&id);
        }
    }
}
