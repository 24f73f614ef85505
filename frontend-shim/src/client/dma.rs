//! The server's own commands: it reads and writes guest memory by messages.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use barkeep_protocol::wire::{
    DmaAccess, DmaData, DmaLayout, DmaMap, DmaTransfer, DmaUnmap, DmaUnmapFlags, Errno, Header,
    ServerRequest,
};

/// Guest memory, as a server reaches it with messages ("VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE").
///
/// Called from whatever thread reads the socket: one that waits for an answer, or an attendant. It
/// must not wait for the same client. Addresses were announced with
/// [`dma_map`](super::Client::dma_map) for this kind of access.
pub trait DmaTarget: Send + Sync {
    /// Copies guest memory at DMA address `address`.
    ///
    /// # Errors
    /// The errno of the error reply.
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes guest memory at DMA address `address`.
    ///
    /// # Errors
    /// The errno of the error reply.
    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno>;
}

/// Serves the server's commands, within the windows that were announced to it.
#[derive(Default)]
pub(super) struct DmaService {
    target: OnceLock<Arc<dyn DmaTarget>>,
    /// Sorted by address, without overlaps. Held for reading around each transfer: when a window
    /// was withdrawn, none is under way in it.
    windows: RwLock<Vec<Window>>,
    /// The session has ended; nothing is begun any more.
    closed: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    address: u64,
    last: u64,
    access: DmaAccess,
}

impl Window {
    fn of(map: &DmaMap) -> Option<Self> {
        let DmaMap { access, address, size, .. } = *map;
        Some(Self { address, last: address.checked_add(size.checked_sub(1)?)?, access })
    }

    /// What lies before `address` and behind `last`.
    fn without(self, address: u64, last: u64) -> impl Iterator<Item = Self> {
        let before = address.checked_sub(1).map(|end| Self { last: self.last.min(end), ..self });
        let behind =
            last.checked_add(1).map(|start| Self { address: self.address.max(start), ..self });
        [before, behind].into_iter().flatten().filter(|part| part.address <= part.last)
    }
}

impl DmaService {
    /// Serves from `target` from now on; the first one stays.
    pub(super) fn set_target(&self, target: Arc<dyn DmaTarget>) -> bool {
        self.target.set(target).is_ok()
    }

    /// Serves a window from now on; `false` for one that overlaps another, which stays as it is.
    pub(super) fn announce(&self, map: &DmaMap) -> bool {
        let Some(window) = Window::of(map) else { return false };
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        let at = windows.partition_point(|other| other.last < window.address);
        if windows.get(at).is_some_and(|other| other.address <= window.last) {
            return false;
        }
        windows.insert(at, window);
        true
    }

    /// Serves windows no more. When it returns, no transfer is under way in them.
    pub(super) fn withdraw(&self, unmap: &DmaUnmap) {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        if unmap.flags.contains(DmaUnmapFlags::ALL) {
            return windows.clear();
        }
        let Some(more) = unmap.size.checked_sub(1) else { return };
        let last = unmap.address.saturating_add(more);
        // A server may agree to a part of a window.
        let left = windows.iter().flat_map(|window| window.without(unmap.address, last));
        *windows = left.collect();
    }

    /// Serves nothing more from now on. What is under way goes on.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Does what a command asks for; the payload of the reply.
    pub(super) fn serve(&self, header: &Header, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let target = self.target.get().ok_or(Errno::NOTSUP)?;
        let request = ServerRequest::parse(header.command, body).map_err(|error| error.errno())?;
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        if self.closed.load(Ordering::Acquire) {
            return Err(Errno::NOTCONN);
        }
        let mut reply = Vec::new();
        match request {
            ServerRequest::DmaRead(transfer) => {
                check(transfer, &windows, DmaAccess::READ)?;
                let fill = |data: &mut [u8]| target.read(transfer.address, data);
                transfer.write_data(DmaLayout::Spec, &mut reply, fill)?;
            }
            ServerRequest::DmaWrite(DmaData { transfer, data }) => {
                check(transfer, &windows, DmaAccess::WRITE)?;
                target.write(transfer.address, data)?;
                transfer.write_to(&mut reply);
            }
        }
        Ok(reply)
    }
}

/// The range may cross windows that lie against each other, as RAM around a hole does not.
fn check(transfer: DmaTransfer, windows: &[Window], access: DmaAccess) -> Result<(), Errno> {
    let Some(more) = transfer.count.checked_sub(1) else { return Ok(()) };
    let last = transfer.address.checked_add(more).ok_or(Errno::FAULT)?;
    let mut next = transfer.address;
    let from = windows.partition_point(|window| window.last < next);
    for window in &windows[from..] {
        if window.address > next || !window.access.contains(access) {
            break;
        }
        if window.last >= last {
            return Ok(());
        }
        next = window.last + 1;
    }
    Err(Errno::FAULT)
}

impl fmt::Debug for DmaService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaService").field("windows", &self.windows).finish_non_exhaustive()
    }
}
