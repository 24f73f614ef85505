use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// Descriptors with higher numbers are not followed: what they stand for passes through.
const LIMIT: usize = 1 << 16;
const INDEX_BITS: u32 = 28;

/// What a descriptor of the VMM is to us. The number says which one, in the table of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptor {
    /// A virtual machine of KVM.
    Vm(u32),
    /// A virtual CPU of KVM.
    Vcpu(u32),
    /// A VFIO device.
    Device(u32),
    /// The connection of a vfio-user client.
    Stream(u32),
}

/// What the VMM's descriptors are. Lookups are one load, safe in a signal handler.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// 0 for a descriptor that is none of our business, else kind and index.
    words: Box<[AtomicU32]>,
}

impl Descriptors {
    pub(crate) fn new() -> Self {
        // Zeroed memory that is never touched costs nothing.
        Self { words: (0..LIMIT).map(|_| AtomicU32::new(0)).collect() }
    }

    pub(crate) fn get(&self, fd: RawFd) -> Option<Descriptor> {
        let word = self.word(fd)?.load(Ordering::Acquire);
        let index = word & ((1 << INDEX_BITS) - 1);
        match word >> INDEX_BITS {
            1 => Some(Descriptor::Vm(index)),
            2 => Some(Descriptor::Vcpu(index)),
            3 => Some(Descriptor::Device(index)),
            4 => Some(Descriptor::Stream(index)),
            _ => None,
        }
    }

    /// Notes what a descriptor is. Returns false where it is not followed.
    pub(crate) fn set(&self, fd: RawFd, descriptor: Descriptor) -> bool {
        let (kind, index) = match descriptor {
            Descriptor::Vm(index) => (1, index),
            Descriptor::Vcpu(index) => (2, index),
            Descriptor::Device(index) => (3, index),
            Descriptor::Stream(index) => (4, index),
        };
        let Some(word) = self.word(fd).filter(|_| index >> INDEX_BITS == 0) else { return false };
        word.store(kind << INDEX_BITS | index, Ordering::Release);
        true
    }

    /// Forgets a descriptor, before it is closed. Returns what it was.
    pub(crate) fn clear(&self, fd: RawFd) -> Option<Descriptor> {
        let was = self.get(fd)?;
        self.word(fd)?.store(0, Ordering::Release);
        Some(was)
    }

    /// A descriptor that is this, if there is one.
    pub(crate) fn find(&self, wanted: Descriptor) -> Option<RawFd> {
        let numbers = 0..RawFd::try_from(LIMIT).unwrap_or(RawFd::MAX);
        numbers.into_iter().find(|fd| self.get(*fd) == Some(wanted))
    }

    /// Forgets all descriptors that are something, without a lock.
    pub(crate) fn forget(&self, what: impl Fn(Descriptor) -> bool) {
        for fd in 0..RawFd::try_from(LIMIT).unwrap_or(RawFd::MAX) {
            if self.get(fd).is_some_and(&what) {
                self.clear(fd);
            }
        }
    }

    fn word(&self, fd: RawFd) -> Option<&AtomicU32> {
        self.words.get(usize::try_from(fd).ok()?)
    }
}
