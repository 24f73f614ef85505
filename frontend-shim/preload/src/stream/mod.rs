//! Connections of the VMM's own vfio-user client, and what we say and hear on them besides.

use barkeep_protocol::wire::{FaultAccess, FaultVerdict};

use crate::Shim;
use crate::device::{Decode, DeviceId, Placement};
use crate::system::System;

/// All connections of the process.
#[derive(Debug, Default)]
pub(crate) struct Streams {}

impl<S: System> Shim<S> {
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

    /// Which part of which BAR a place in a file is, by the file's device and inode number.
    pub(crate) fn user_bar_file(
        &self,
        identity: (u64, u64),
        offset: u64,
    ) -> Option<(DeviceId, u8, u64)> {
        let _ = (identity, offset);
        None
    }

    /// Whether [`Self::user_bar_file`] may answer at all; one load, asked at every `mmap`.
    pub(crate) fn has_user_bar_files(&self) -> bool {
        false
    }

    /// Whether a BAR decodes, as the backend's decode page says. Safe in a signal handler.
    pub(crate) fn user_decode(&self, stream: u32, bar: u8) -> Decode {
        let _ = (stream, bar);
        Decode::Unknown
    }

    /// Changes whenever [`Self::user_placements`] may have changed; one load, asked at every exit. Takes
    /// no lock.
    pub(crate) fn user_epoch(&self, stream: u32) -> u64 {
        let _ = stream;
        0
    }

    /// Where the BARs are and were, as the backend's decode page says. `None` if it does not tell.
    /// Called with the devices' lock held: takes no lock that is held while devices are called.
    pub(crate) fn user_placements(&self, stream: u32) -> Option<[Placement; 6]> {
        let _ = stream;
        None
    }

    /// The last descriptor of a connection is closed.
    pub(crate) fn stream_closed(&self, stream: u32) {
        let _ = stream;
    }
}
