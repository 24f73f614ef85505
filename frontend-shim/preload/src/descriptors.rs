use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::Shim;
use crate::status::FailOpen;
use crate::system::{Answer, Duplicate, System};

/// Descriptors with higher numbers are not followed: what they stand for passes through.
const LIMIT: usize = 1 << 16;
const INDEX_BITS: u32 = 28;
/// Where descriptors of our own begin: no program counts on such numbers. The usual limit is 1024.
pub(crate) const HIGH: RawFd = 1000;

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
    /// Words from here on were never anything else than 0.
    used: AtomicUsize,
}

impl Descriptors {
    pub(crate) fn new() -> Self {
        let words = (0..LIMIT).map(|_| AtomicU32::new(0)).collect();
        Self { words, used: AtomicUsize::new(0) }
    }

    pub(crate) fn get(&self, fd: RawFd) -> Option<Descriptor> {
        decoded(self.word(fd)?.load(Ordering::Acquire))
    }

    /// Another descriptor of the same thing.
    pub(crate) fn another(&self, than: RawFd, of: Descriptor) -> Option<RawFd> {
        let word = encoded(of)?;
        let used = self.used.load(Ordering::Acquire).min(LIMIT);
        let is = |(fd, found): (RawFd, &AtomicU32)| {
            (fd != than && found.load(Ordering::Acquire) == word).then_some(fd)
        };
        (0..).zip(&self.words[..used]).find_map(is)
    }

    /// Notes what a descriptor is. Returns false where it is not followed.
    pub(crate) fn set(&self, fd: RawFd, descriptor: Descriptor) -> bool {
        let Some((word, encoded)) = self.word(fd).zip(encoded(descriptor)) else { return false };
        self.used.fetch_max(fd.unsigned_abs() as usize + 1, Ordering::Release);
        word.store(encoded, Ordering::Release);
        true
    }

    /// Forgets a descriptor, before it is closed. Returns what it was.
    pub(crate) fn clear(&self, fd: RawFd) -> Option<Descriptor> {
        let was = self.get(fd)?;
        self.word(fd)?.store(0, Ordering::Release);
        Some(was)
    }

    /// Forgets all descriptors that are something, without a lock.
    pub(crate) fn forget(&self, what: impl Fn(Descriptor) -> bool) {
        let used = self.used.load(Ordering::Acquire).min(LIMIT);
        for fd in 0..RawFd::try_from(used).unwrap_or(RawFd::MAX) {
            if self.get(fd).is_some_and(&what) {
                self.clear(fd);
            }
        }
    }

    fn word(&self, fd: RawFd) -> Option<&AtomicU32> {
        self.words.get(usize::try_from(fd).ok()?)
    }
}

fn decoded(word: u32) -> Option<Descriptor> {
    let index = word & ((1 << INDEX_BITS) - 1);
    match word >> INDEX_BITS {
        1 => Some(Descriptor::Vm(index)),
        2 => Some(Descriptor::Vcpu(index)),
        3 => Some(Descriptor::Device(index)),
        4 => Some(Descriptor::Stream(index)),
        _ => None,
    }
}

/// `None` if the index is too high.
fn encoded(descriptor: Descriptor) -> Option<u32> {
    let (kind, index) = match descriptor {
        Descriptor::Vm(index) => (1, index),
        Descriptor::Vcpu(index) => (2, index),
        Descriptor::Device(index) => (3, index),
        Descriptor::Stream(index) => (4, index),
    };
    (index >> INDEX_BITS == 0).then_some(kind << INDEX_BITS | index)
}

impl<S: System> Shim<S> {
    /// `close`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn close(&self, fd: RawFd) -> Answer<()> {
        self.shielded(|| self.closed(self.forget(fd)));
        // The number is gone whatever the kernel answers, but for one that was not open.
        self.system.close(fd)
    }

    /// `close_range`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn close_range(&self, first: u32, last: u32, flags: i32) -> Answer<()> {
        // With a flag nothing is closed, or in a copy of the table that is the thread's own.
        if flags == 0 && self.follows_any(first) && self.closes_ranges() {
            self.shielded(|| self.forget_range(first, last));
        }
        self.system.close_range(first, last, flags)
    }

    /// Whether the kernel has `close_range` and lets it be called: what is forgotten is to be closed. The
    /// number is no descriptor's.
    fn closes_ranges(&self) -> bool {
        self.system.close_range(u32::MAX, u32::MAX, 0).is_ok()
    }

    fn follows_any(&self, first: u32) -> bool {
        usize::try_from(first)
            .is_ok_and(|first| first < self.descriptors.used.load(Ordering::Acquire))
    }

    /// `dup`, `dup2`, `dup3`, and the commands of `fcntl` that do the same.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn duplicate(&self, fd: RawFd, how: Duplicate) -> Answer<RawFd> {
        let over = match how {
            Duplicate::Over(to) | Duplicate::OverWith(to, _) if to != fd => Some(to),
            _ => None,
        };
        let was = self.shielded(|| self.forget(over?)).flatten();
        let answer = self.system.duplicate(fd, how);
        self.shielded(|| match answer {
            Ok(new) if new != fd => self.duplicated(fd, new, was),
            Ok(_) => {}
            Err(_) => self.remember(over, was),
        });
        answer
    }

    /// Forgets a descriptor that the kernel is about to close: the number may be another thread's next.
    fn forget(&self, fd: RawFd) -> Option<Descriptor> {
        let was = self.descriptors.get(fd)?;
        if self.elsewhere() {
            return None;
        }
        if let Descriptor::Device(device) = was {
            self.device_closes(device, fd);
        }
        self.descriptors.clear(fd)
    }

    /// Forgets all descriptors from one to another, both of which are closed as well.
    pub(crate) fn forget_range(&self, first: u32, last: u32) {
        let used = u32::try_from(self.descriptors.used.load(Ordering::Acquire)).unwrap_or(u32::MAX);
        for fd in first..last.saturating_add(1).min(used) {
            if let Ok(fd) = RawFd::try_from(fd) {
                self.closed(self.forget(fd));
            }
        }
    }

    /// A descriptor that was forgotten is open after all.
    fn remember(&self, fd: Option<RawFd>, was: Option<Descriptor>) {
        let Some((fd, was)) = fd.zip(was) else { return };
        self.descriptors.set(fd, was);
        if let Descriptor::Device(device) = was {
            self.device_opened(device, fd);
        }
    }

    fn duplicated(&self, fd: RawFd, new: RawFd, was: Option<Descriptor>) {
        match self.descriptors.get(fd) {
            Some(descriptor) if !self.elsewhere() => {
                if self.descriptors.set(new, descriptor) {
                    if let Descriptor::Device(device) = descriptor {
                        self.device_opened(device, new);
                    }
                } else {
                    self.status.fail_open(FailOpen::TooManyDescriptors);
                }
            }
            // What was closed without our seeing it.
            _ => self.closed(self.forget(new)),
        }
        self.closed(was);
    }

    /// A descriptor is closed, or about to be: tells those who know the thing, if it was the last.
    fn closed(&self, was: Option<Descriptor>) {
        let Some(was) = was else { return };
        if self.descriptors.another(-1, was).is_some() {
            return;
        }
        match was {
            Descriptor::Vm(vm) => {
                self.belongs_no_more(vm);
                self.vm_closed(vm);
            }
            Descriptor::Vcpu(vcpu) => self.vcpu_closed(vcpu),
            Descriptor::Device(_) => self.device_closed(),
            Descriptor::Stream(stream) => self.stream_closed(stream),
        }
    }
}

#[cfg(test)]
mod tests;
