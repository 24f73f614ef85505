//! Connections of the VMM's own vfio-user client, and what we say and hear on them besides.

use std::os::fd::RawFd;

use barkeep_protocol::wire::{FaultAccess, FaultVerdict};

use crate::Shim;
use crate::device::{Decode, DeviceId};
use crate::system::{Answer, System};

/// All connections of the process.
#[derive(Debug, Default)]
pub(crate) struct Streams {}

/// Where a BAR of a vfio-user device is. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamBar {
    /// Whether it decodes now.
    pub(crate) decode: Decode,
    /// What the BAR register says: the guest's address, possibly one that is only being sized.
    pub(crate) address: u64,
    /// Where it last decoded. `None` if it never has.
    pub(crate) live: Option<u64>,
    /// Length.
    pub(crate) size: u64,
}

impl<S: System> Shim<S> {
    /// `sendmsg` of the VMM: `message` is the address of its `msghdr`.
    ///
    /// # Errors
    /// Those of `sendmsg`.
    pub(crate) fn sendmsg(&self, fd: RawFd, message: usize, flags: i32) -> Answer<usize> {
        let _ = (fd, message, flags);
        Err(rustix::io::Errno::NOSYS)
    }

    /// `recvmsg` of the VMM, likewise.
    ///
    /// # Errors
    /// Those of `recvmsg`.
    pub(crate) fn recvmsg(&self, fd: RawFd, message: usize, flags: i32) -> Answer<usize> {
        let _ = (fd, message, flags);
        Err(rustix::io::Errno::NOSYS)
    }

    /// The last descriptor of a connection is about to be closed.
    pub(crate) fn stream_closed(&self, stream: u32) {
        let _ = stream;
    }

    /// Completes an access to a BAR that does not decode, and counts it. A vfio-user backend is asked
    /// and answers; where there is none, or it does not answer in time, a read gets all ones and a
    /// write is dropped. Not for signal handlers.
    pub(crate) fn complete(
        &self,
        device: DeviceId,
        bar: u8,
        offset: u64,
        data: &mut [u8],
        write: bool,
    ) {
        let _ = (device, bar, offset);
        if !write {
            data.fill(0xff);
        }
    }

    /// What the backend says about a memory fault. `None` for a device without one that has the
    /// extension, and if it does not answer in time. Not for signal handlers.
    pub(crate) fn verdict(
        &self,
        device: DeviceId,
        bar: u8,
        offset: u64,
        access: FaultAccess,
    ) -> Option<FaultVerdict> {
        let _ = (device, bar, offset, access);
        None
    }

    /// Whether a BAR of a vfio-user device decodes, from its decode page. Safe in a signal handler;
    /// a device without such a page answers [`Decode::Unknown`].
    pub(crate) fn stream_decode(&self, stream: u32, bar: u8) -> Decode {
        let _ = (stream, bar);
        Decode::Unknown
    }

    /// The same where it may take a request: not for signal handlers. Devices without a decode page
    /// answer too, from configuration space.
    pub(crate) fn stream_bar(&self, stream: u32, bar: u8) -> Option<StreamBar> {
        let _ = (stream, bar);
        None
    }

    /// Which BAR a file is that has device and inode number `identity`, and where in the BAR
    /// `file_offset` is.
    pub(crate) fn user_bar_file(
        &self,
        identity: (u64, u64),
        file_offset: u64,
    ) -> Option<(DeviceId, u8, u64)> {
        let _ = (identity, file_offset);
        None
    }
}
