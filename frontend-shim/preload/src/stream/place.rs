use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use barkeep_protocol::page::decode::DecodeReader;

use super::connection::Connection;
use super::introduce::BarFile;
use super::plain::Shadow;
use crate::device::DeviceId;
use crate::system::{PageWords, System};

/// More connections are left to the VMM.
const MOST: usize = 256;

/// All connections of the process.
pub(crate) struct Streams {
    places: Box<[Place]>,
    /// Files that are BARs.
    pub(super) files: AtomicUsize,
}

/// A connection's place. Its memory for a page stays when the connection goes, so that a signal handler
/// may look at any time.
#[derive(Default)]
pub(super) struct Place {
    pub(super) taken: AtomicBool,
    /// It was taken by a parent of this process, for ever. A lock in it may be held by nobody.
    lost: AtomicBool,
    /// `None` as long as there is none, and when it is gone.
    pub(super) connection: Mutex<Option<Arc<Connection>>>,
    /// A thread is noting what the device is. It changes with `connection` locked.
    introducing: AtomicBool,
    /// The device's number and 1, or 0.
    pub(super) device: AtomicU32,
    pub(super) page: OnceLock<PageWords>,
    /// Whether the page is this connection's.
    pub(super) shown: AtomicBool,
    /// Moves when the page becomes another's.
    pub(super) generation: AtomicU64,
    /// For a server without a page.
    pub(super) shadow: Shadow,
    pub(super) files: Mutex<Vec<BarFile>>,
}

impl Streams {
    /// In a child: the connections are the parent's, and it may have others of its own. Takes no lock, as
    /// other threads of the parent may have had any.
    pub(crate) fn forked(&self, system: &impl System) {
        for place in &self.places {
            // Whatever happens to the VMM's, ours would keep the connection from ending.
            let ours =
                place.connection.try_lock().ok().and_then(|mut connection| connection.take());
            if let Some(ours) = ours {
                ours.let_go(system);
                // A thread that is not here may have it as well: the last one is never dropped.
                std::mem::forget(ours);
            }
            if place.taken.load(Ordering::Acquire) || place.is_held() {
                place.lost.store(true, Ordering::Release);
                place.taken.store(true, Ordering::Release);
            }
        }
    }

    pub(super) fn place(&self, stream: u32) -> Option<&Place> {
        self.places.get(usize::try_from(stream).ok()?)
    }

    pub(super) fn connection(&self, stream: u32) -> Option<Arc<Connection>> {
        let place = self.place(stream).filter(|place| !place.is_lost())?;
        place.connection().clone()
    }

    pub(super) fn free_place(&self) -> Option<u32> {
        let free =
            (0..).zip(&self.places).find(|(_, place)| !place.taken.swap(true, Ordering::AcqRel));
        free.map(|(stream, _)| stream)
    }
}

impl Default for Streams {
    fn default() -> Self {
        Self { places: (0..MOST).map(|_| Place::default()).collect(), files: AtomicUsize::new(0) }
    }
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = self.places.iter().filter(|place| place.taken.load(Ordering::Relaxed));
        f.debug_struct("Streams").field("taken", &taken.count()).finish_non_exhaustive()
    }
}

impl Place {
    /// Whether it is a parent's.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Whether a connection is still the one that is here. It stays here until the introduction's end.
    pub(super) fn begin_introduction(&self, of: &Arc<Connection>) -> bool {
        let connection = self.connection();
        let here = connection.as_ref().is_some_and(|connection| Arc::ptr_eq(connection, of));
        if here {
            self.introducing.store(true, Ordering::Relaxed);
        }
        here
    }

    /// Whether the connection was closed meanwhile, so that it is to be forgotten.
    pub(super) fn end_introduction(&self) -> bool {
        let connection = self.connection();
        self.introducing.store(false, Ordering::Relaxed);
        connection.is_none()
    }

    /// Takes the connection away, and tells whether it is to be forgotten by who does this.
    pub(super) fn close(&self) -> Option<(Arc<Connection>, bool)> {
        let mut connection = self.connection();
        let introducing = self.introducing.load(Ordering::Relaxed);
        connection.take().map(|connection| (connection, !introducing))
    }

    /// Whether somebody has one of its locks.
    fn is_held(&self) -> bool {
        self.connection.try_lock().is_err()
            || self.files.try_lock().is_err()
            || self.shadow.is_held()
    }

    /// The files that are its device's BARs. `None` if they can't be looked at any more.
    pub(super) fn readable_files(&self) -> Option<MutexGuard<'_, Vec<BarFile>>> {
        if self.is_lost() { self.files.try_lock().ok() } else { Some(self.files()) }
    }

    pub(super) fn connection(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn files(&self) -> MutexGuard<'_, Vec<BarFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn device(&self) -> Option<DeviceId> {
        self.device.load(Ordering::Acquire).checked_sub(1).map(DeviceId)
    }

    /// What the device decodes. Safe in a signal handler.
    pub(super) fn page(&self) -> Option<DecodeReader<PageWords>> {
        if !self.shown.load(Ordering::Acquire) {
            return None;
        }
        DecodeReader::new(*self.page.get()?)
    }

    pub(super) fn show(&self, system: &impl System, file: BorrowedFd<'_>) {
        let Ok(page) = system.page(Some(file), self.page.get().copied()) else { return };
        let _ = self.page.set(page);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.shown.store(true, Ordering::Release);
    }
}

impl BarFile {
    /// Where in the BAR a place in the file is.
    pub(super) fn offset(&self, in_file: u64) -> Option<u64> {
        in_file.checked_sub(self.start).filter(|offset| *offset < self.len)
    }
}
