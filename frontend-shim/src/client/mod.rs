//! The vfio-user client: one connection to the process that owns a function.

mod attendant;
mod connection;
mod dma;
mod error;
mod features;
mod io_fds;
mod posted;
mod twin;
mod waiters;
mod wiring;

#[cfg(test)]
mod tests;

pub use attendant::{Attendant, Attended};
pub use dma::DmaTarget;
pub use error::ClientError;
pub use io_fds::Doorbell;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use barkeep_protocol::wire::{
    BarkeepExtensions, Command, DecodePageInfo, DecodePageQuery, DeviceInfo, DmaMap, DmaUnmap,
    FaultReport, FaultVerdict, InfoQuery, IrqInfo, Offer, RegionAccess, RegionData, RegionInfo,
    RegionState, RegionStateQuery, SetIrqs, Version, WireError,
};

use self::connection::{Connection, Reply};
use self::wiring::{Wired, Wiring};

/// How long a backend may take for one answer. A vCPU is waiting: longer than any device needs, and
/// short enough that a guest survives it.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);

/// How to connect.
#[derive(Clone)]
pub struct ClientOptions {
    /// How long the backend may take for one answer.
    pub deadline: Duration,
    /// Guest memory, for servers that reach it by messages. Without it they are refused.
    pub dma_target: Option<Arc<dyn DmaTarget>>,
    /// Whether the server may bring a socket of its own for its commands. Only an [`Attendant`]
    /// serves that one.
    pub twin_socket: bool,
    /// Whether another session may follow when this one has ended ([`Client::reconnect`]). What is set
    /// up is remembered then, with a duplicate of each file and eventfd.
    pub reconnect: bool,
    /// What becomes of a guest's accesses while there is no session.
    pub dead_backend: DeadBackend,
}

/// What becomes of a guest's accesses while the backend is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeadBackend {
    /// They complete as Unsupported Request, at once.
    #[default]
    UnsupportedRequest,
    /// They wait until there is a session again, and are done there. After so much time without a
    /// backend, or after so long a wait of their own, they complete as Unsupported Request. One that
    /// was sent before the session ended does so at once: it may have been done.
    Stall(Duration),
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            deadline: DEFAULT_DEADLINE,
            dma_target: None,
            twin_socket: false,
            reconnect: false,
            dead_backend: DeadBackend::default(),
        }
    }
}

/// A connected client. All methods may be called from any number of threads at a time. The requests
/// of one thread reach the server in their order: each waits for its answer.
///
/// Once the backend has gone, or has not answered in time, every call fails at once: an answer that
/// comes too late can't be told from the answer to a later question.
pub struct Client {
    path: PathBuf,
    options: ClientOptions,
    /// With [`ClientOptions::reconnect`].
    wiring: Option<Arc<Wiring>>,
    connection: Arc<Connection>,
    extensions: BarkeepExtensions,
    offer: Offer,
    transfer_size: u32,
    message_fds: usize,
}

impl Client {
    /// Connects to `path` and negotiates the protocol version.
    ///
    /// # Errors
    /// [`ClientError`] when nobody listens, no common version exists or `deadline` passes.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Self, ClientError> {
        Self::connect_with(path, ClientOptions { deadline, ..ClientOptions::default() })
    }

    /// As [`connect`](Self::connect), with more to choose.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect), and [`ClientError::Malformed`] when the server's offer of a
    /// socket for its own commands does not hold together.
    pub fn connect_with(path: &Path, options: ClientOptions) -> Result<Self, ClientError> {
        let wiring = options.reconnect.then(Arc::default);
        Self::open(path, options, wiring)
    }

    fn open(
        path: &Path,
        options: ClientOptions,
        wiring: Option<Arc<Wiring>>,
    ) -> Result<Self, ClientError> {
        let ClientOptions { deadline, ref dma_target, twin_socket, .. } = options;
        let connection = Connection::open(path, deadline)?;
        if let Some(target) = dma_target.clone() {
            connection.dma().set_target(target);
        }
        let mut offer = Offer::WRITE_MULTIPLE | Offer::MIGRATION;
        offer.set(Offer::TWIN_SOCKET, twin_socket);
        let proposal = Version::proposal_with(offer);
        let bytes = |out: &mut Vec<u8>| out.extend(proposal.to_bytes());
        let (answer, fds) = connection.call(Command::Version, bytes, Vec::new(), |reply| {
            Ok((Version::parse(reply.body)?, reply.fds))
        })?;
        if answer.major != proposal.major || answer.minor > proposal.minor {
            return Err(ClientError::Version { major: answer.major, minor: answer.minor });
        }
        if twin_socket && let Some(index) = answer.capabilities.twin_socket_fd(fds.len())? {
            fds.into_iter().nth(index).map_or(Ok(()), |socket| connection.set_twin(socket))?;
        }
        Ok(Self {
            path: path.to_owned(),
            options,
            wiring,
            connection: Arc::new(connection),
            extensions: answer.capabilities.barkeep.unwrap_or_default(),
            offer: answer.capabilities.offer(),
            transfer_size: answer.capabilities.data_xfer_size(),
            message_fds: answer.capabilities.message_fds(),
        })
    }

    /// Connects to the same socket again, with the same options. Nothing is set up in the new session
    /// yet: [`rewire`](Self::rewire) does that, when it is known who answers.
    ///
    /// # Errors
    /// As for [`connect_with`](Self::connect_with).
    pub fn reconnect(&self) -> Result<Self, ClientError> {
        Self::open(&self.path, self.options.clone(), self.wiring.clone())
    }

    /// Sets up what was set up in the sessions before this one: windows of guest memory with their files,
    /// eventfds of interrupts, and masks. Logs of dirty pages and states of migration are lost. A window
    /// that somebody withdraws meanwhile is withdrawn here.
    ///
    /// # Errors
    /// [`ClientError`], as for every request, and [`ClientError::Host`].
    pub fn rewire(&self) -> Result<(), ClientError> {
        let Some(wiring) = &self.wiring else { return Ok(()) };
        let mut wired = wiring.lock();
        for window in wired.windows() {
            let file = window.file.as_ref().map(|file| file.try_clone()).transpose();
            self.announce(&window.map, file.map_err(ClientError::Host)?)?;
        }
        for step in wired.irq_steps(self.message_fds) {
            let fds = step.eventfds.iter().map(|fd| fd.try_clone()).collect::<Result<_, _>>();
            let (body, fds) = (step.set.to_bytes(), fds.map_err(ClientError::Host)?);
            self.call_with_fds(Command::SetIrqs, |out| out.extend(body), fds, |_| Ok(()))?;
        }
        wired.set_latest(&self.connection);
        Ok(())
    }

    /// How it was connected.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.options
    }

    /// Who attends to the connection while no request is under way.
    #[must_use]
    pub fn attendant(&self) -> Attendant {
        Attendant::new(Arc::clone(&self.connection))
    }

    /// The socket it is connected to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The barkeep extensions that the server offered.
    #[must_use]
    pub fn extensions(&self) -> BarkeepExtensions {
        self.extensions
    }

    /// How many file descriptors the server takes in one message.
    #[must_use]
    pub fn message_fds(&self) -> usize {
        self.message_fds
    }

    /// Whether the backend is gone for this session.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.connection.has_ended()
    }

    /// Ends the session, whoever waits for an answer.
    pub(crate) fn end_session(&self) {
        self.connection.end();
    }

    /// What the device is ("VFIO_USER_DEVICE_GET_INFO").
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn device_info(&self) -> Result<DeviceInfo, ClientError> {
        let query = InfoQuery { index: 0, argsz: 16 }.to_irq_bytes();
        self.call(Command::GetInfo, |out| out.extend(query), DeviceInfo::parse)
    }

    /// What a region is, with the file to map if it can be mapped.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn region_info(&self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>), ClientError> {
        let mut argsz = RegionInfo::FIXED_SIZE;
        // The first answer may tell that a complete one is larger; the second one is complete.
        for _ in 0..2 {
            let query = InfoQuery { index, argsz }.to_region_bytes();
            let take = |reply: Reply<'_>| {
                let (info, needed) = RegionInfo::parse(reply.body)?;
                Ok((info, needed, reply.fds.into_iter().next()))
            };
            let (info, needed, file) = self.call_with_fds(
                Command::GetRegionInfo,
                |out| out.extend(query),
                Vec::new(),
                take,
            )?;
            if needed <= argsz {
                return Ok((info, file));
            }
            argsz = needed.min(MAX_REGION_INFO);
        }
        self.connection.end();
        Err(ClientError::Protocol("region info does not settle"))
    }

    /// What an interrupt index is.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        let query = InfoQuery { index, argsz: 16 }.to_irq_bytes();
        self.call(Command::GetIrqInfo, |out| out.extend(query), IrqInfo::parse)
    }

    /// Configures interrupts.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn set_irqs(&self, set: &SetIrqs<'_>, eventfds: Vec<OwnedFd>) -> Result<(), ClientError> {
        let body = |out: &mut Vec<u8>| out.extend(set.to_bytes());
        let Some(wiring) = &self.wiring else {
            return self.call_with_fds(Command::SetIrqs, body, eventfds, |_| Ok(()));
        };
        let copies = eventfds.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>();
        let copies = copies.map_err(ClientError::Host)?;
        let mut wired = wiring.lock();
        self.call_with_fds(Command::SetIrqs, body, eventfds, |_| Ok(()))?;
        wired.note_irqs(set, copies);
        Ok(())
    }

    /// Announces a window of guest memory. Without a file, and by a server's choice also with one, the
    /// server reaches it by messages, which the [`DmaTarget`] serves.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn dma_map(&self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), ClientError> {
        let Some(wiring) = &self.wiring else { return self.announce(map, file) };
        let copy = file.as_ref().map(OwnedFd::try_clone).transpose().map_err(ClientError::Host)?;
        let mut wired = wiring.lock();
        self.announce(map, file)?;
        wired.add_window(*map, copy);
        Ok(())
    }

    fn announce(&self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), ClientError> {
        if file.is_none() {
            self.connection.expect_commands();
        }
        // Before the server knows it: it may use the window before its reply has been read.
        let added = self.connection.dma().announce(map);
        let file = file.into_iter().collect();
        let result =
            self.call_with_fds(Command::DmaMap, |out| out.extend(map.to_bytes()), file, |_| Ok(()));
        if result.is_err() && added {
            self.connection.dma().withdraw(&DmaUnmap::range(map.address, map.size));
        }
        result
    }

    /// Withdraws a window of guest memory. When it returns, the backend does not use it any more, and
    /// would not be served. Nor does it come back in another session: where one has followed already,
    /// it is withdrawn there.
    ///
    /// # Errors
    /// [`ClientError`], as for every request. What a backend that refuses has announced to it, it
    /// keeps; one whose session has ended is not served any more either.
    pub fn dma_unmap(&self, unmap: &DmaUnmap) -> Result<(), ClientError> {
        self.dma_unmap_with(unmap, |_| Ok(()))
    }

    /// As [`dma_unmap`](Self::dma_unmap), and asks which of the pages of a window the device has written:
    /// their numbers, in units of `page_size` bytes from `address` on. `page_size` is a power of two.
    ///
    /// # Errors
    /// [`ClientError::Request`] for a range whose bitmap is above the protocol's limits, and as for
    /// every request.
    pub fn dma_unmap_dirty(
        &self,
        address: u64,
        size: u64,
        page_size: u64,
    ) -> Result<Vec<usize>, ClientError> {
        let unmap =
            DmaUnmap::with_bitmap(address, size, page_size).map_err(ClientError::Request)?;
        self.dma_unmap_with(&unmap, |body| {
            let bitmap = unmap.parse_reply(body)?;
            Ok(bitmap.map_or_else(Vec::new, |bitmap| bitmap.pages().collect()))
        })
    }

    fn dma_unmap_with<T>(
        &self,
        unmap: &DmaUnmap,
        parse: impl Fn(&[u8]) -> Result<T, WireError>,
    ) -> Result<T, ClientError> {
        let mut wired = self.wiring.as_ref().map(|wiring| wiring.lock());
        let result = withdraw(&self.connection, unmap, &parse);
        let Some(wired) = &mut wired else { return result };
        let result = match wired.successor(&self.connection) {
            Some(next) if result.as_ref().is_err_and(ClientError::ends_session) => {
                withdraw(&next, unmap, &parse)
            }
            _ => result,
        };
        if is_withdrawn(&result) {
            Wired::remove_windows(wired, unmap);
        }
        result
    }

    /// Reads `data.len()` bytes of a region. On an error, `data` is unchanged.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn region_read(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        if data.is_empty() {
            return Ok(());
        }
        let access = self.access(region, offset, data.len())?;
        self.call_with_fds(
            Command::RegionRead,
            |out| access.write_to(out),
            Vec::new(),
            |reply| {
                let reply = RegionData::parse(reply.body)?;
                if reply.data.len() != data.len() {
                    return Err(ClientError::Protocol("read reply of another length"));
                }
                data.copy_from_slice(reply.data);
                Ok(())
            },
        )
    }

    /// Writes to a region. When it returns, the backend has done it.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        if data.is_empty() {
            return Ok(());
        }
        let access = self.access(region, offset, data.len())?;
        let write = RegionData { access, data };
        self.call(Command::RegionWrite, |out| write.write_to(out), |_| Ok(()))
    }

    /// Resets the function.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    pub fn reset(&self) -> Result<(), ClientError> {
        self.call(Command::Reset, |_| (), |_| Ok(()))
    }

    /// Forwards a memory fault (extension `memory_fault`).
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] when the server lacks the extension, and as for every request.
    pub fn memory_fault(&self, report: &FaultReport) -> Result<FaultVerdict, ClientError> {
        if !self.extensions.memory_fault {
            return Err(ClientError::NotOffered("memory_fault"));
        }
        self.call(Command::MemoryFault, |out| out.extend(report.to_bytes()), FaultVerdict::parse)
    }

    /// Decode, epoch and counters of a region (extension `region_state`).
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] when the server lacks the extension, and as for every request.
    pub fn region_state(&self, region: u32) -> Result<RegionState, ClientError> {
        if !self.extensions.region_state {
            return Err(ClientError::NotOffered("region_state"));
        }
        let query = RegionStateQuery { region }.to_bytes();
        self.call(Command::RegionState, |out| out.extend(query), RegionState::parse)
    }

    /// A file that shows what the function decodes at any moment, and how many bytes of it there are to map
    /// (extension `decode_page`): for `hypervisor::ReadOnlyWords` and a [`DecodeReader`]. It is of this session
    /// alone.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] when the server lacks the extension, and as for every request.
    ///
    /// [`DecodeReader`]: barkeep_protocol::page::decode::DecodeReader
    pub fn decode_page(&self) -> Result<(DecodePageInfo, OwnedFd), ClientError> {
        if !self.extensions.decode_page {
            return Err(ClientError::NotOffered("decode_page"));
        }
        let query = DecodePageQuery.to_bytes();
        let take = |reply: Reply<'_>| {
            let info = DecodePageInfo::parse(reply.body)?;
            Ok((info, reply.fds.into_iter().next()))
        };
        let body = |out: &mut Vec<u8>| out.extend(query);
        let (info, file) = self.call_with_fds(Command::DecodePage, body, Vec::new(), take)?;
        let Some(file) = file else {
            self.connection.end();
            return Err(ClientError::Protocol("a decode page without its file"));
        };
        Ok((info, file))
    }

    fn access(&self, region: u32, offset: u64, length: usize) -> Result<RegionAccess, ClientError> {
        let count = u32::try_from(length).unwrap_or(u32::MAX);
        if count > self.transfer_size {
            return Err(ClientError::TooLarge(length));
        }
        Ok(RegionAccess { offset, region, count })
    }

    fn call<T>(
        &self,
        command: Command,
        body: impl FnOnce(&mut Vec<u8>),
        parse: impl Fn(&[u8]) -> Result<T, WireError>,
    ) -> Result<T, ClientError> {
        self.call_with_fds(command, body, Vec::new(), |reply| Ok(parse(reply.body)?))
    }

    fn call_with_fds<T>(
        &self,
        command: Command,
        body: impl FnOnce(&mut Vec<u8>),
        fds: Vec<OwnedFd>,
        take: impl FnMut(Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        if self.is_dead() {
            return Err(ClientError::Gone);
        }
        self.connection.call(command, body, fds, take)
    }
}

impl Drop for Client {
    /// The server sees the end of the session, whoever still holds a handle on its socket. Afterwards no
    /// guest memory is reached, whoever still attends.
    fn drop(&mut self) {
        self.connection.end();
        self.connection.dma().withdraw(&DmaUnmap::all());
    }
}

/// Asks for a withdrawal in one session.
fn withdraw<T>(
    connection: &Connection,
    unmap: &DmaUnmap,
    parse: &impl Fn(&[u8]) -> Result<T, WireError>,
) -> Result<T, ClientError> {
    let body = |out: &mut Vec<u8>| unmap.write_to(out);
    let result = if connection.has_ended() {
        Err(ClientError::Gone)
    } else {
        // The server may finish what it has begun before it answers.
        let take = |reply: Reply<'_>| Ok(parse(reply.body)?);
        connection.call(Command::DmaUnmap, body, Vec::new(), take)
    };
    // Another thread may be serving what came before the end.
    if is_withdrawn(&result) {
        connection.dma().withdraw(unmap);
    }
    result
}

fn is_withdrawn<T>(result: &Result<T, ClientError>) -> bool {
    result.as_ref().map_or_else(ClientError::ends_session, |_| true)
}

/// Room for 256 sparse areas: no BAR needs more, and a server can't ask for more memory.
const MAX_REGION_INFO: u32 = RegionInfo::FIXED_SIZE + 16 + 256 * 16;

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { deadline, twin_socket, reconnect, dead_backend, .. } = self;
        f.debug_struct("ClientOptions")
            .field("deadline", deadline)
            .field("twin_socket", twin_socket)
            .field("reconnect", reconnect)
            .field("dead_backend", dead_backend)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("path", &self.path).finish_non_exhaustive()
    }
}
