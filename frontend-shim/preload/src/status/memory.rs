#![expect(unsafe_code, reason = "maps the page that other processes read")]

use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use barkeep_protocol::page::wrap::{LENGTH, NAME, WORDS};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::io::{DupFlags, Errno, dup3, fcntl_dupfd_cloexec};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use rustix::process::{Resource, getrlimit};

use crate::descriptors::HIGH;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// The words of a page. They are the process's as long as it lives.
#[derive(Debug)]
pub(super) struct Memory {
    words: &'static [AtomicU64],
    /// What others find, if there is such a thing.
    file: Option<File>,
}

/// A descriptor that the program may close, and whose number it may use again then.
#[derive(Debug)]
struct File {
    number: RawFd,
    /// The file system of all memfds.
    device: u64,
    inode: AtomicU64,
}

impl Memory {
    /// Memory that other processes can map, too.
    pub(super) fn shared() -> Result<Self, Errno> {
        let file = new_file()?;
        let identity = fstat(&file)?;
        // SAFETY: a mapping of its own, where the kernel likes, of a file that has this length.
        let start = unsafe { mmap(null_mut(), LENGTH, READ_WRITE, MapFlags::SHARED, &file, 0) }?;
        seal(&file)?;
        // SAFETY: the mapping has this length and the alignment of a page, and is never unmapped. Sealed as
        // the file is, nobody can take memory from it. Every word is a valid one, and atomic for all of us.
        let words = unsafe { std::slice::from_raw_parts(start.cast::<AtomicU64>(), WORDS) };
        let high = fcntl_dupfd_cloexec(&file, HIGH).unwrap_or(file);
        let inode = AtomicU64::new(identity.st_ino);
        let file = File { number: high.into_raw_fd(), device: identity.st_dev, inode };
        Ok(Self { words, file: Some(file) })
    }

    /// Memory of this process alone.
    pub(super) fn private() -> Self {
        let words: Vec<AtomicU64> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        Self { words: words.leak(), file: None }
    }

    /// In a process that was just forked, and has one thread therefore: shared memory is no longer its
    /// parent's, and says what it said. If the kernel refuses, others can't find it any more.
    pub(super) fn separate(&self) {
        let Some(file) = &self.file else { return };
        let before: [u64; WORDS] = std::array::from_fn(|at| self.words[at].load(Ordering::Relaxed));
        match self.replace() {
            Ok(new) => file.replace(&new),
            Err(_) => {
                self.make_anonymous();
                file.close();
            }
        }
        for (word, before) in self.words.iter().zip(before) {
            word.store(before, Ordering::Relaxed);
        }
    }

    /// Maps a new file in place of the old one.
    fn replace(&self) -> Result<OwnedFd, Errno> {
        let file = new_file()?;
        let start = self.words.as_ptr().cast_mut().cast();
        let flags = MapFlags::SHARED.union(MapFlags::FIXED);
        // SAFETY: takes the place of our own mapping, which has this length; words are words before and after.
        unsafe { mmap(start, LENGTH, READ_WRITE, flags, &file, 0) }?;
        seal(&file)?;
        Ok(file)
    }

    fn make_anonymous(&self) {
        let start = self.words.as_ptr().cast_mut().cast();
        let flags = MapFlags::PRIVATE.union(MapFlags::FIXED);
        // SAFETY: as for a new file.
        let made = unsafe { mmap_anonymous(start, LENGTH, READ_WRITE, flags) };
        // Without memory the child counts in its parent's page: wrong numbers, and nothing else.
        let _ = made;
    }
}

impl AsRef<[AtomicU64]> for Memory {
    fn as_ref(&self) -> &[AtomicU64] {
        self.words
    }
}

impl File {
    /// Has the number stand for another file.
    fn replace(&self, new: &OwnedFd) {
        let (true, Ok(identity)) = (self.is_ours(), fstat(new)) else { return };
        // SAFETY: the number is our own descriptor's, and nothing here closes it.
        let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.number) });
        if dup3(new, &mut number, DupFlags::CLOEXEC).is_ok() {
            self.inode.store(identity.st_ino, Ordering::Relaxed);
        }
    }

    fn close(&self) {
        if self.is_ours() {
            // SAFETY: the number is our own descriptor's, and is not used again: it is no longer ours.
            unsafe { rustix::io::close(self.number) };
        }
    }

    /// Whether the program has let the descriptor be.
    fn is_ours(&self) -> bool {
        // SAFETY: borrowed for one question, which a number that is free answers with an error.
        let fd = unsafe { BorrowedFd::borrow_raw(self.number) };
        fstat(fd).is_ok_and(|found| {
            (found.st_dev, found.st_ino) == (self.device, self.inode.load(Ordering::Relaxed))
        })
    }
}

fn new_file() -> Result<OwnedFd, Errno> {
    // A file that grows beyond the limit is a signal, which would end the program.
    if getrlimit(Resource::Fsize).current.is_some_and(|limit| limit < LENGTH as u64) {
        return Err(Errno::FBIG);
    }
    let file = memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, LENGTH as u64)?;
    Ok(file)
}

/// Has the file keep its length, and nobody write to it but through the mapping that there is.
fn seal(file: &OwnedFd) -> Result<(), Errno> {
    fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW)?;
    // Linux 5.1. Without it, whoever may trace this process can write.
    let _ = fcntl_add_seals(file, SealFlags::FUTURE_WRITE | SealFlags::SEAL);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    fn link(memory: &Memory) -> String {
        format!("/proc/self/fd/{}", number(memory))
    }

    fn number(memory: &Memory) -> RawFd {
        memory.file.as_ref().expect("a file").number
    }

    fn first_word(link: &str) -> u64 {
        let mut word = [0; 8];
        fs::File::open(link).expect("our own").read_exact_at(&mut word, 0).expect("a page");
        u64::from_ne_bytes(word)
    }

    #[test]
    fn others_read_what_is_written_and_write_nothing() {
        let memory = Memory::shared().expect("a memfd");
        memory.words[0].store(7, Ordering::Relaxed);
        let link = link(&memory);
        assert_eq!(first_word(&link), 7);
        assert_eq!(fs::metadata(&link).expect("our own").len(), LENGTH as u64);
        let writable = fs::OpenOptions::new().write(true).open(&link).expect("our own");
        assert!(writable.write_at(&[1], 0).is_err(), "sealed");
        assert!(writable.set_len(0).is_err(), "sealed");
        assert!(number(&memory) >= HIGH, "{link}");
    }

    #[test]
    fn a_child_goes_on_in_a_file_of_its_own() {
        let memory = Memory::shared().expect("a memfd");
        memory.words[0].store(7, Ordering::Relaxed);
        let parents = fs::File::open(link(&memory)).expect("our own");
        memory.separate();
        assert_eq!(memory.words[0].load(Ordering::Relaxed), 7, "it says what it said");
        memory.words[0].store(8, Ordering::Relaxed);
        assert_eq!(first_word(&link(&memory)), 8);
        let mut word = [0; 8];
        parents.read_exact_at(&mut word, 0).expect("a page");
        assert_eq!(u64::from_ne_bytes(word), 7, "the parent's is as it was");
        memory.separate();
        memory.words[0].store(9, Ordering::Relaxed);
        assert_eq!(first_word(&link(&memory)), 9, "and so does the child's child");
    }

    #[test]
    fn a_descriptor_that_the_program_uses_for_something_else_is_left_alone() {
        let memory = Memory::shared().expect("a memfd");
        let other = tempfile().expect("a memfd");
        // SAFETY: the number is the page's, which has no owner.
        let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number(&memory)) });
        dup3(&other, &mut number, DupFlags::CLOEXEC).expect("a descriptor");
        memory.separate();
        memory.words[0].store(7, Ordering::Relaxed);
        let found = fs::metadata(link(&memory)).expect("still there");
        assert_eq!(found.ino(), fstat(&other).expect("ours").st_ino);
        memory.file.as_ref().expect("a file").close();
        assert!(fs::metadata(link(&memory)).is_ok());
    }

    fn tempfile() -> Result<OwnedFd, Errno> {
        memfd_create("something-else", MemfdFlags::CLOEXEC)
    }

    #[test]
    fn memory_without_a_file_has_words_as_well() {
        let memory = Memory::private();
        memory.words[WORDS - 1].store(7, Ordering::Relaxed);
        memory.separate();
        assert_eq!(memory.as_ref()[WORDS - 1].load(Ordering::Relaxed), 7);
        let memory = Memory::shared().expect("a memfd");
        memory.words[0].store(7, Ordering::Relaxed);
        memory.make_anonymous();
        assert_eq!(memory.words[0].load(Ordering::Relaxed), 0);
        memory.words[0].store(8, Ordering::Relaxed);
        assert_eq!(first_word(&link(&memory)), 7, "nobody else's any more");
    }
}
