use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use rustix::io::fcntl_dupfd_cloexec;

use super::Answer;
use crate::descriptors::HIGH;

/// A page of memory that others write.
pub(crate) type PageWords = &'static [AtomicU64];

/// A duplicate with a high number, if the limit permits one.
pub(crate) fn duplicate(file: impl AsFd) -> Answer<OwnedFd> {
    fcntl_dupfd_cloexec(&file, HIGH).or_else(|_| fcntl_dupfd_cloexec(&file, 0))
}

/// Bytes of the VMM's memory, laid out as a `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Extent {
    pub(crate) address: usize,
    /// In bytes.
    pub(crate) len: usize,
}

/// What `sendmsg` and `recvmsg` are given, all of it in the VMM's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SocketMessage {
    /// Address of a socket address, or 0.
    pub(crate) name: usize,
    pub(crate) name_len: u32,
    pub(crate) extents: Vec<Extent>,
    /// Address of ancillary data, or of room for it, or 0.
    pub(crate) control: usize,
    pub(crate) control_len: usize,
}

/// What `recvmsg` leaves in its message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SocketReceived {
    /// Bytes of data.
    pub(crate) count: usize,
    pub(crate) name_len: u32,
    pub(crate) control_len: usize,
    pub(crate) flags: i32,
}

impl SocketMessage {
    /// Bytes of data that there are, or that there is room for.
    pub(crate) fn len(&self) -> usize {
        self.extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.len))
    }

    /// The part of its data, or of its room, that is `len` bytes from `from` on. Name and ancillary data
    /// go with the beginning.
    pub(crate) fn part(&self, from: usize, len: usize) -> Self {
        let mut skip = from;
        let mut left = len;
        let mut extents = Vec::with_capacity(self.extents.len());
        for extent in &self.extents {
            let skipped = skip.min(extent.len);
            skip -= skipped;
            let len = left.min(extent.len - skipped);
            left -= len;
            if len > 0 {
                extents.push(Extent { address: extent.address.wrapping_add(skipped), len });
            }
        }
        if from == 0 {
            Self { extents, ..self.clone() }
        } else {
            Self { extents, ..Self::default() }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;

    #[test]
    fn duplicates_stay_out_of_the_programs_way_as_far_as_they_can() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(duplicate(&file).unwrap().as_raw_fd() >= HIGH);
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(500), ..limit }).unwrap();
        let low = duplicate(&file);
        setrlimit(Resource::Nofile, limit).unwrap();
        assert!(low.unwrap().as_raw_fd() < 500);
    }
}
