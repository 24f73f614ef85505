//! Connections of the VMM's own vfio-user client, and what we say and hear on them besides.
//!
//! A connection shows by its first message, a whole VERSION, which gets barkeep's capability object; the
//! answer reaches the VMM without it. Before the VMM's next message the device is asked what it is: its
//! BARs' files, and the page that shows what it decodes. From then on our commands go between two
//! messages of the VMM, and the answers to them are taken out of what the VMM reads.
//!
//! The VMM sees its own stream, byte by byte. Whatever is not understood ends our part in it for good.

mod connection;
mod hello;
mod incoming;
mod introduce;
mod outgoing;
mod pending;
mod place;
mod plain;
mod socket;
mod turn;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use barkeep_protocol::page::decode::{ShownBar, Space};
use barkeep_protocol::wire::{
    Command, FaultAccess, FaultReport, FaultVerdict, PciRegion, RegionAccess, RegionData,
};
use rustix::net::{AddressFamily, SendFlags, SocketType, sockopt};

use self::connection::Connection;
use self::hello::Hello;
#[cfg(not(test))]
pub(crate) use self::hello::{may_begin, may_begin_length};
use self::introduce::{BARS, Facts, introduce};
use self::pending::Greeting;
use self::place::Place;
pub(crate) use self::place::Streams;
use self::plain::{CONFIG_SPACE, Shadow};
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::device::{Decode, DeviceId, Placement, Source};
use crate::status::{Count, FailOpen};
use crate::system::{Answer, SocketMessage, SocketReceived, System};

/// How long the VMM's first command waits for the device to say what it is.
const INTRODUCTION: Duration = Duration::from_secs(1);
/// How long a backend may take to write its page, in which it has a handful of stores to do.
const WRITING: Duration = Duration::from_millis(1);
/// How long a virtual CPU waits for a backend, once.
const DEADLINE: Duration = Duration::from_secs(5);

impl<S: System> Shim<S> {
    /// `sendmsg` of the VMM.
    ///
    /// # Errors
    /// Those of `sendmsg`.
    pub(crate) fn sendmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<usize> {
        let Some((stream, connection)) = self.connection_of(fd) else {
            return match self.greet(fd, message, flags) {
                Some(answer) => answer,
                None => self.system.sendmsg(fd, message, flags),
            };
        };
        if flags & libc::MSG_OOB != 0 {
            self.lose(&connection);
        }
        if connection.is_passing() {
            return self.system.sendmsg(fd, message, flags);
        }
        let mut writer = connection.writer();
        if connection.may_introduce(&writer) {
            writer.introduced = true;
            let Greeting::Answered(extensions) = connection.pending().greeting else {
                return self.system.sendmsg(fd, message, flags);
            };
            let deadline = Instant::now() + INTRODUCTION;
            let facts = introduce(&connection, &mut writer, extensions, deadline);
            // The devices' lock is not taken with this turn.
            drop(writer);
            match facts {
                Some(facts) => self.introduced(stream, &connection, &facts),
                None => self.status.fail_open(FailOpen::StreamSetup),
            }
            writer = connection.writer();
        }
        let about_to = || self.about_to_configure(stream);
        let (sent, configured) =
            connection.send(&self.system, &mut writer, fd, message, flags, about_to);
        self.tell_lost(&connection);
        // With the turn still, so that whoever asks now asks behind this.
        if let Some(configured) = configured
            && let Some(place) = self.streams.place(stream)
        {
            place.shadow.configured(configured);
        }
        sent
    }

    /// `recvmsg` of the VMM.
    ///
    /// # Errors
    /// Those of `recvmsg`.
    pub(crate) fn recvmsg(
        &self,
        fd: RawFd,
        message: &SocketMessage,
        flags: i32,
    ) -> Answer<SocketReceived> {
        let Some((stream, connection)) = self.connection_of(fd) else {
            return self.system.recvmsg(fd, message, flags);
        };
        if flags & libc::MSG_OOB != 0 {
            self.lose(&connection);
        }
        if connection.is_passing() || flags & libc::MSG_ERRQUEUE != 0 {
            return self.system.recvmsg(fd, message, flags);
        }
        let answer = connection.receive(&self.system, fd, message, flags);
        self.tell_lost(&connection);
        let (got, configured) = answer?;
        if let Some(before) = configured {
            self.configured(stream, before);
        }
        Ok(got)
    }

    /// The VMM is about to send something that may change what a device decodes. Returns what it decodes.
    fn about_to_configure(&self, stream: u32) -> Decode {
        let decode = self.function_decode(stream);
        if decode == Decode::Off
            && let Some(device) = self.streams.place(stream).and_then(Place::device)
        {
            self.decode_may_come_back(device);
        }
        decode
    }

    /// The VMM has the answer, as of now, and goes on when this returns.
    fn configured(&self, stream: u32, before: Decode) {
        let Some(device) = self.streams.place(stream).and_then(Place::device) else { return };
        match (before, self.function_decode(stream)) {
            (Decode::Off, Decode::On) => self.decode_came_back(device),
            (Decode::On, Decode::Off) => self.decode_went(device),
            _ => {}
        }
    }

    /// What all memory BARs of a function do.
    fn function_decode(&self, stream: u32) -> Decode {
        let bars = (0..BARS).filter_map(|bar| u8::try_from(bar).ok());
        let decodes = bars.map(|bar| self.user_decode(stream, bar));
        decodes.into_iter().find(|decode| *decode != Decode::Unknown).unwrap_or(Decode::Unknown)
    }

    fn tell_lost(&self, connection: &Connection) {
        if connection.was_lost() {
            self.status.fail_open(FailOpen::StreamLost);
        }
    }

    /// The last descriptor of a connection is about to be closed, or just was.
    pub(crate) fn stream_closed(&self, stream: u32) {
        // In a child, the parent's threads may have had the locks.
        let Some(place) = self.streams.place(stream).filter(|place| !place.is_lost()) else {
            return;
        };
        let Some((connection, left)) = place.close() else { return };
        connection.pass();
        if left {
            self.forget_connection(place);
        }
        drop(connection);
        if left {
            place.taken.store(false, Ordering::Release);
        }
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
        let answered = self.forward(device, bar, offset, data, write).is_some();
        if !write && !answered {
            data.fill(0xff);
        }
        if write {
            self.status.count(Count::UrWrites);
        } else if data.iter().all(|byte| *byte == 0xff) {
            self.status.count(Count::UrReads);
        }
    }

    fn forward(
        &self,
        device: DeviceId,
        bar: u8,
        offset: u64,
        data: &mut [u8],
        write: bool,
    ) -> Option<()> {
        let connection = self.backend(device)?;
        let count = u32::try_from(data.len()).ok()?;
        let access = RegionAccess { offset, region: u32::from(bar), count };
        if write {
            let body = RegionData { access, data }.to_bytes();
            let reply = self.ask_backend(&connection, Command::RegionWrite, &body)?;
            return reply.body().map(|_| ());
        }
        let reply = self.ask_backend(&connection, Command::RegionRead, &access.to_bytes())?;
        let read = RegionData::parse(reply.body()?).ok()?;
        if read.access != access {
            return None;
        }
        data.copy_from_slice(read.data);
        Some(())
    }

    /// What the backend says about a memory fault. `None` for a device without one that has the
    /// extension, and if it does not answer in time; what decodes is known then, if it can be. Not for signal
    /// handlers, nor with a lock.
    pub(crate) fn verdict(
        &self,
        device: DeviceId,
        bar: u8,
        offset: u64,
        access: FaultAccess,
    ) -> Option<FaultVerdict> {
        if let Source::VfioUser(stream) = self.source(device)? {
            self.user_look(stream);
        }
        let connection = self.backend(device)?;
        let Greeting::Answered(Some(extensions)) = connection.pending().greeting else {
            return None;
        };
        if !extensions.memory_fault {
            return None;
        }
        let report = FaultReport { region: u32::from(bar), access, offset, size: 0 };
        let reply = self.ask_backend(&connection, Command::MemoryFault, &report.to_bytes())?;
        FaultVerdict::parse(reply.body()?).ok()
    }

    fn ask_backend(
        &self,
        connection: &Connection,
        command: Command,
        body: &[u8],
    ) -> Option<incoming::Answer> {
        let reply = self.ask_server(connection, command, body, Instant::now() + DEADLINE)?;
        self.status.count(Count::Forwarded);
        Some(reply)
    }

    fn ask_server(
        &self,
        connection: &Connection,
        command: Command,
        body: &[u8],
        deadline: Instant,
    ) -> Option<incoming::Answer> {
        let was_silent = connection.pending().silent;
        let reply = connection.ask(command, body, deadline);
        if reply.is_none() && !was_silent && connection.pending().silent {
            self.status.fail_open(FailOpen::ServerSilent);
        }
        reply
    }

    /// The connection of a device whose server is a barkeep. Of another one, nothing is known of what
    /// it does with a BAR that does not decode.
    fn backend(&self, device: DeviceId) -> Option<Arc<Connection>> {
        let Source::VfioUser(stream) = self.source(device)? else { return None };
        let connection = self.streams.connection(stream)?;
        let greeting = connection.pending().greeting;
        matches!(greeting, Greeting::Answered(Some(_))).then_some(connection)
    }

    /// Which part of which BAR a place in a file is, by the file's device and inode number.
    pub(crate) fn user_bar_file(
        &self,
        identity: (u64, u64),
        offset: u64,
    ) -> Option<(DeviceId, u8, u64)> {
        for stream in 0.. {
            let place = self.streams.place(stream)?;
            let Some(files) = place.readable_files() else { continue };
            let file = files
                .iter()
                .find(|file| file.identity == identity && file.offset(offset).is_some());
            if let Some(file) = file {
                return Some((place.device()?, file.bar, file.offset(offset)?));
            }
        }
        None
    }

    /// Whether [`Self::user_bar_file`] may answer at all; one load, asked at every `mmap`.
    pub(crate) fn has_user_bar_files(&self) -> bool {
        self.streams.files.load(Ordering::Acquire) != 0
    }

    /// Whether a BAR decodes, as the backend's decode page says. Safe in a signal handler.
    pub(crate) fn user_decode(&self, stream: u32, bar: u8) -> Decode {
        let Some(place) = self.streams.place(stream) else { return Decode::Unknown };
        let Some(page) = place.page() else { return place.shadow.decode(bar) };
        let shown = patiently(|| page.bar(usize::from(bar)));
        match shown {
            Some(Some(ShownBar { bar, .. })) if bar.space == Space::Memory => {
                if bar.decodes {
                    Decode::On
                } else {
                    Decode::Off
                }
            }
            _ => Decode::Unknown,
        }
    }

    /// Changes whenever [`Self::user_placements`] may have changed; asked at every exit. Takes no lock.
    pub(crate) fn user_epoch(&self, stream: u32) -> u64 {
        let Some(place) = self.streams.place(stream) else { return 0 };
        let generation = place.generation.load(Ordering::Acquire);
        let changes = match place.page() {
            // While it is being written it never looks as it did before.
            Some(page) => page.sequence().unwrap_or(u64::MAX),
            None => place.shadow.epoch(),
        };
        generation.wrapping_shl(48) ^ changes
    }

    /// Where the BARs are and were, as the backend's decode page says. `None` if it does not tell.
    ///
    /// A server without a page is not asked here, where locks are held: what it said when it last was counts
    /// ([`Self::user_look`]).
    pub(crate) fn user_placements(&self, stream: u32) -> Option<[Placement; BARS]> {
        let place = self.streams.place(stream)?;
        let Some(page) = place.page() else {
            let known = !place.is_lost() && place.device().is_some();
            return known.then(|| place.shadow.placements());
        };
        let shown = patiently(|| page.read())?;
        Some(shown.bars.map(|bar| match bar {
            Some(ShownBar { bar, decoded_at }) if bar.space == Space::Memory => {
                Placement { size: bar.size, address: bar.address, live: decoded_at.unwrap_or(0) }
            }
            _ => Placement::default(),
        }))
    }

    /// Whether [`Self::user_look`] would ask. Takes no lock.
    pub(crate) fn user_wants_look(&self, stream: u32) -> bool {
        self.shadow_to_look_at(stream).is_some()
    }

    /// Asks a server that has no page what its device decodes, if that may have changed. It may let us
    /// wait: nobody who calls this holds a lock, of ours or of the VMM's.
    pub(crate) fn user_look(&self, stream: u32) {
        let Some(shadow) = self.shadow_to_look_at(stream) else { return };
        shadow.look(|deadline| self.config_space(stream, deadline));
        if shadow.is_given_up() {
            self.status.fail_open(FailOpen::ServerSilent);
        }
    }

    fn shadow_to_look_at(&self, stream: u32) -> Option<&Shadow> {
        let place = self.streams.place(stream)?;
        let asked = place.page().is_none() && place.shadow.wants_look() && !place.is_lost();
        asked.then_some(&place.shadow)
    }

    /// The configuration space of a device, from its server.
    fn config_space(&self, stream: u32, deadline: Instant) -> Option<[u8; CONFIG_SPACE]> {
        let connection = self.streams.connection(stream)?;
        let region = PciRegion::Config.index();
        let access = RegionAccess { offset: 0, region, count: CONFIG_SPACE.try_into().ok()? };
        let read = &access.to_bytes();
        let reply = self.ask_server(&connection, Command::RegionRead, read, deadline)?;
        let read = RegionData::parse(reply.body()?).ok()?;
        read.data.first_chunk().copied()
    }

    /// The connection that a descriptor of the VMM's is.
    fn connection_of(&self, fd: RawFd) -> Option<(u32, Arc<Connection>)> {
        let Some(Descriptor::Stream(stream)) = self.descriptors.get(fd) else { return None };
        let connection = self.streams.connection(stream)?;
        Some((stream, connection))
    }

    fn lose(&self, connection: &Connection) {
        if !connection.is_passing() {
            connection.pass();
            self.status.fail_open(FailOpen::StreamLost);
        }
    }

    /// If this is a VERSION on a socket that nothing is known of: sends it with ours in it.
    pub(crate) fn greet(
        &self,
        fd: RawFd,
        message: &SocketMessage,
        flags: i32,
    ) -> Option<Answer<usize>> {
        let len = message.len();
        let plain = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let flags = SendFlags::from_bits_retain(flags.cast_unsigned());
        let shaped = hello::may_begin_length(len)
            && message.control_len == 0
            && message.name == 0
            && plain.contains(flags);
        if !shaped {
            return None;
        }
        let mut start = [0; 8];
        if !connection::read(&self.system, message, 0, &mut start) || !hello::may_begin(start, len)
        {
            return None;
        }
        let mut bytes = vec![0; len];
        if !connection::read(&self.system, message, 0, &mut bytes) {
            return None;
        }
        let hello = Hello::with_ours(&bytes)?;
        let Some(stream) = self.streams.free_place() else {
            self.status.fail_open(FailOpen::TooManyStreams);
            return None;
        };
        let answer = self.follow_connection(fd, stream, &hello, flags);
        if !matches!(answer, Some(Ok(())))
            && let Some(place) = self.streams.place(stream)
        {
            place.taken.store(false, Ordering::Release);
        }
        Some(answer?.map(|()| len))
    }

    fn follow_connection(
        &self,
        fd: RawFd,
        stream: u32,
        hello: &Hello,
        flags: SendFlags,
    ) -> Option<Answer<()>> {
        let socket = self.system.keep(fd).ok().filter(is_unix_stream)?;
        // Known before the first byte is sent: the answer may be read by another thread.
        let connection = Arc::new(Connection::new(socket, hello).ok()?);
        let place = self.streams.place(stream)?;
        *place.connection() = Some(Arc::clone(&connection));
        if !self.descriptors.set(fd, Descriptor::Stream(stream)) {
            self.status.fail_open(FailOpen::TooManyDescriptors);
            *place.connection() = None;
            return None;
        }
        let greeted = connection.greet(hello, flags);
        if greeted.is_err() {
            self.descriptors.clear(fd);
            connection.pass();
            *place.connection() = None;
        }
        Some(greeted)
    }

    fn introduced(&self, stream: u32, connection: &Arc<Connection>, facts: &Facts) {
        let Some(place) = self.streams.place(stream) else { return };
        if !place.begin_introduction(connection) {
            return;
        }
        self.introduce_device(stream, place, facts);
        if place.end_introduction() {
            self.forget_connection(place);
            place.taken.store(false, Ordering::Release);
        }
    }

    fn introduce_device(&self, stream: u32, place: &Place, facts: &Facts) {
        place.shadow.clear(&facts.sizes);
        if let Some(file) = &facts.page {
            place.show(&self.system, file.as_fd());
        }
        let Some(device) = self.add_device(Source::VfioUser(stream)) else { return };
        place.device.store(device.0 + 1, Ordering::Release);
        *place.files() = facts.files.clone();
        self.streams.files.fetch_add(facts.files.len(), Ordering::AcqRel);
    }

    fn forget_connection(&self, place: &Place) {
        let files = std::mem::take(&mut *place.files());
        self.streams.files.fetch_sub(files.len(), Ordering::AcqRel);
        place.shown.store(false, Ordering::Release);
        place.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(page) = place.page.get() {
            // Zeros in its place, so that the server's file is let go. If not, it stays mapped.
            let _ = self.system.page(None, Some(page));
        }
        place.shadow.clear(&[0; BARS]);
        if let Some(device) = place.device.swap(0, Ordering::AcqRel).checked_sub(1) {
            self.remove_device(DeviceId(device));
        }
    }
}

/// Looks at a page until it can be read. Who writes it may have to wait for this very processor. Safe
/// in a signal handler.
fn patiently<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let shown = look();
    if shown.is_some() {
        return shown;
    }
    let begin = Instant::now();
    while begin.elapsed() < WRITING {
        rustix::thread::sched_yield();
        let shown = look();
        if shown.is_some() {
            return shown;
        }
    }
    None
}

fn is_unix_stream(socket: &OwnedFd) -> bool {
    sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
}
