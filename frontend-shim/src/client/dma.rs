//! The server's own commands: it reads and writes guest memory by messages.

use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use barkeep_protocol::wire::limits::MAX_DATA_XFER_SIZE;
use barkeep_protocol::wire::{
    Command, DmaAccess, DmaMap, DmaUnmap, DmaUnmapFlags, Errno, Header, WireError,
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
        let end = unmap.address.checked_add(unmap.size);
        windows.retain(|window| {
            window.address < unmap.address || end.is_some_and(|end| window.last >= end)
        });
    }

    /// Does what a command asks for; the payload of the reply.
    pub(super) fn serve(&self, header: &Header, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let target = self.target.get().ok_or(Errno::NOTSUP)?;
        let command = Command::try_from(header.command).map_err(|error| error.errno())?;
        let (transfer, data) = Transfer::parse(body).map_err(|error| error.errno())?;
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        match command {
            Command::DmaRead if data.is_empty() => {
                transfer.check(&windows, DmaAccess::READ)?;
                let mut reply = transfer.to_bytes();
                let fixed = reply.len();
                reply.resize(fixed + transfer.count, 0);
                target.read(transfer.address, &mut reply[fixed..])?;
                Ok(reply)
            }
            Command::DmaWrite if data.len() == transfer.count => {
                transfer.check(&windows, DmaAccess::WRITE)?;
                target.write(transfer.address, data)?;
                Ok(transfer.to_bytes())
            }
            Command::DmaRead | Command::DmaWrite => Err(Errno::INVAL),
            _ => Err(Errno::NOTSUP),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Transfer {
    address: u64,
    count: usize,
}

impl Transfer {
    fn parse(body: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let short = WireError::Length { expected: 16, actual: body.len() };
        let (address, rest) = body.split_first_chunk::<8>().ok_or(short.clone())?;
        let (count, data) = rest.split_first_chunk::<8>().ok_or(short)?;
        let (address, count) = (u64::from_ne_bytes(*address), u64::from_ne_bytes(*count));
        let fits = u32::try_from(count).ok().filter(|count| *count <= MAX_DATA_XFER_SIZE);
        let count = fits.ok_or(WireError::Transfer(u32::MAX))? as usize;
        Ok((Self { address, count }, data))
    }

    /// The range may cross windows that lie against each other, as RAM around a hole does not.
    fn check(self, windows: &[Window], access: DmaAccess) -> Result<(), Errno> {
        let Some(more) = (self.count as u64).checked_sub(1) else { return Ok(()) };
        let last = self.address.checked_add(more).ok_or(Errno::FAULT)?;
        let mut next = self.address;
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

    fn to_bytes(self) -> Vec<u8> {
        [self.address.to_ne_bytes(), (self.count as u64).to_ne_bytes()].concat()
    }
}

impl fmt::Debug for DmaService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaService").field("windows", &self.windows).finish_non_exhaustive()
    }
}
