use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use barkeep_protocol::transport::TransportError;
use barkeep_protocol::wire::limits::{HEADER_SIZE, MAX_MESSAGE_FDS, MAX_MESSAGE_SIZE};
use barkeep_protocol::wire::{Errno, Header, MessageKind, WireError};
use tracing::warn;

use super::files::{FileId, Files};
use super::saved_session::SavedSession;
use super::wiring::Wiring;
use crate::server::function::{Changes, Image};
use crate::server::request_error::RequestError;
use crate::server::served::Served;
use crate::server::session::SessionEnd;
use crate::state::{
    Activity, Commit, FdKey, Flush, Frame, Holder, Journal, MAX_FRAME, SectionId, StreamId,
};

/// How many processes may end by themselves of something before it is given up. Of those that somebody
/// has killed there may be many more ([`Toll`](crate::state::Toll)).
pub(super) const DEATHS_BORNE: u32 = 3;
/// Frames that may wait for a peer that does not read; beyond, it is not read from either.
const MAX_WAITING: usize = 8;
/// Bytes that are looked at first: more than a small request.
const FIRST_LOOK: usize = 4096;
/// How often a socket is looked at for one message before others have their turn: a peer may send it byte
/// by byte, just as fast as we look.
const LOOKS: usize = 16;
/// The key of a client's decode page. Those of what a function keeps are higher, and of what clients send
/// higher still.
pub(super) const PAGE_KEY: FdKey = FdKey((1 << 32) - 1);
/// Stands for descriptors of which there were more than a message may have.
const TOO_MANY: FdKey = FdKey(u64::MAX);

/// Makes transactions of what a session and its function do, and knows what is under which key.
pub(super) struct Recorder {
    name: String,
    journal: Journal,
    holder: Box<dyn Holder>,
    /// Descriptors of messages in progress and of frames that are not sent, by key.
    fds: BTreeMap<FdKey, OwnedFd>,
    image: Image,
    wiring: Wiring,
    files: Files,
    session: Option<SavedSession>,
    /// Frames of each stream that were committed since all was sent.
    waiting: [usize; StreamId::ALL.len()],
    /// The client's decode page is held.
    page_held: bool,
    /// What the holder may forget once the state does not refer to it any more.
    unused: Vec<FdKey>,
}

/// What came out of a socket.
#[derive(Debug)]
pub(super) enum Arrived {
    /// No whole message. If there is more in the socket, an event will tell.
    Nothing,
    /// A whole message is in the inbox.
    Message {
        /// Another one may be behind it. If that is not known, an event will tell.
        more: bool,
    },
    /// The peer closed the connection between two messages.
    Closed,
}

/// A message out of an inbox.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    /// With the header.
    pub(super) bytes: Vec<u8>,
    pub(super) keys: Vec<FdKey>,
    /// Its descriptors, or why they are not here.
    pub(super) fds: Result<Vec<OwnedFd>, RequestError>,
}

/// How something may be done that may have been tried before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    Do,
    /// Nobody has survived it.
    GiveUp,
}

impl Recorder {
    /// Of a state in which nothing is recorded but, perhaps, a message.
    pub(super) fn new(name: String, journal: Journal, holder: Box<dyn Holder>) -> Self {
        Self {
            name,
            journal,
            holder,
            fds: BTreeMap::new(),
            image: Image::default(),
            wiring: Wiring::default(),
            files: Files::default(),
            session: None,
            waiting: [0; StreamId::ALL.len()],
            page_held: false,
            unused: Vec::new(),
        }
    }

    /// What a predecessor has recorded.
    pub(super) fn recall(&mut self, wiring: Wiring, session: SavedSession) {
        self.wiring = wiring;
        self.session = Some(session);
    }

    pub(super) fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    pub(super) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The function's own descriptor with this key was held by the predecessor already, or is now.
    pub(super) fn hold(&mut self, key: FdKey, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.holder.store(key, fd)
    }

    /// Has the client's decode page held, once.
    pub(super) fn hold_page(&mut self, page: BorrowedFd<'_>) -> Result<(), Errno> {
        if !self.page_held {
            let errno = |error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
            self.holder.store(PAGE_KEY, page).map_err(errno)?;
            self.page_held = true;
        }
        Ok(())
    }

    /// A predecessor had it held.
    pub(super) fn inherit_page(&mut self) {
        self.page_held = true;
    }

    pub(super) fn forget(&mut self, key: FdKey) {
        self.holder.forget(key);
    }

    /// A descriptor that a predecessor had, which a message or frame refers to.
    pub(super) fn inherit(&mut self, key: FdKey, fd: OwnedFd) {
        self.fds.insert(key, fd);
    }

    /// Has a new descriptor held.
    pub(super) fn keep(&mut self, fd: BorrowedFd<'_>) -> Result<FdKey, Errno> {
        let key = self.journal.new_key();
        let errno = |error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        self.holder.store(key, fd).map_err(errno)?;
        Ok(key)
    }

    /// Takes what the socket has of one message.
    pub(super) fn receive(
        &mut self,
        id: StreamId,
        socket: BorrowedFd<'_>,
    ) -> Result<Arrived, SessionEnd> {
        let mut more = false;
        for _ in 0..LOOKS {
            let received = self.journal.stream(id).received();
            let missing = missing(&received)?;
            if missing == Some(0) {
                return Ok(Arrived::Message { more });
            }
            let room = missing.unwrap_or(FIRST_LOOK);
            let looked = self.journal.stream(id).peek(socket, room);
            let peeked = match looked {
                Ok(peeked) => peeked,
                Err(Errno::AGAIN) => return Ok(Arrived::Nothing),
                Err(Errno::CONNRESET) if received.is_empty() => return Ok(Arrived::Closed),
                Err(errno) => return Err(TransportError::Socket(errno).into()),
            };
            if peeked.bytes.is_empty() {
                let boundary = received.is_empty();
                return if boundary {
                    Ok(Arrived::Closed)
                } else {
                    Err(TransportError::Truncated.into())
                };
            }
            let mut count = peeked.bytes.len();
            if missing.is_none() {
                let seen = [received.as_slice(), &peeked.bytes].concat();
                let of_message = match self::missing(&seen[..seen.len().min(HEADER_SIZE)])? {
                    // All that is here, when that is not even a header.
                    None => count,
                    Some(body) => HEADER_SIZE + body - received.len(),
                };
                more = of_message < count;
                count = count.min(of_message);
            }
            // Those that are held already are found again until their bytes are taken.
            if self.journal.stream(id).held().is_empty() {
                self.hold_arrived(id, peeked.fds, peeked.fds_missing);
            }
            match self.journal.stream(id).take(socket, count) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(Arrived::Nothing),
                Err(errno) => return Err(TransportError::Socket(errno).into()),
            }
        }
        Ok(Arrived::Nothing)
    }

    /// Has descriptors held before the bytes that they come with are taken, whichever these are.
    fn hold_arrived(&mut self, id: StreamId, fds: Vec<OwnedFd>, missing: bool) {
        if missing || fds.len() > MAX_MESSAGE_FDS {
            // Their message will be refused: nobody has to hold them until then.
            let _ = self.journal.stream(id).hold(&[TOO_MANY]);
            return;
        }
        let mut keys = Vec::new();
        for fd in fds {
            match self.keep_arrived(fd.as_fd()) {
                Ok(key) => {
                    keys.push(key);
                    self.fds.insert(key, fd);
                }
                // Under no key is there a descriptor: the message will be refused.
                Err(_) => keys.push(self.journal.new_key()),
            }
        }
        if self.journal.stream(id).hold(&keys).is_err() {
            for key in keys {
                self.fds.remove(&key);
                self.forget_unless_used(key);
            }
            let _ = self.journal.stream(id).hold(&[TOO_MANY]);
        }
    }

    /// Has what a client has sent held: once, if it is a file that a window has already.
    fn keep_arrived(&mut self, fd: BorrowedFd<'_>) -> Result<FdKey, Errno> {
        let id = FileId::of(fd);
        if let Some(key) = id.and_then(|id| self.files.key(id))
            && self.wiring.windows().uses(key) > 0
            && !self.fds.contains_key(&key)
        {
            return Ok(key);
        }
        let key = self.keep(fd)?;
        if let Some(id) = id {
            self.files.insert(id, key);
        }
        Ok(key)
    }

    /// A file that a predecessor had held for windows.
    pub(super) fn know(&mut self, key: FdKey, fd: BorrowedFd<'_>) {
        if let Some(id) = FileId::of(fd) {
            self.files.insert(id, key);
        }
    }

    /// A window may have it, or a message that has not come to its turn.
    fn forget_unless_used(&mut self, key: FdKey) {
        if !self.fds.contains_key(&key) && !self.wiring.refers_to(key) {
            self.files.remove(key);
            self.holder.forget(key);
        }
    }

    /// The message that is in the inbox as a whole.
    pub(super) fn message(&mut self, id: StreamId) -> Result<Message, SessionEnd> {
        let stream = self.journal.stream(id);
        let (bytes, keys) = (stream.received(), stream.received_keys().to_vec());
        let header = header(&bytes)?.ok_or(TransportError::Truncated)?;
        let found: Vec<_> = keys.iter().map(|key| self.fds.remove(key)).collect();
        let too_many = keys.len() > MAX_MESSAGE_FDS || keys.contains(&TOO_MANY);
        let fds = if too_many {
            Err(WireError::TooManyFds.into())
        } else {
            let found: Option<Vec<_>> = found.into_iter().collect();
            found.ok_or(RequestError::Descriptor(Errno::MFILE))
        };
        Ok(Message { header, bytes, keys, fds })
    }

    /// Something is about to be done that may be this process's end.
    pub(super) fn begin(&mut self, activity: Activity) -> Attempt {
        if !self.journal.begin(activity).reaches(DEATHS_BORNE) {
            return Attempt::Do;
        }
        let function = &self.name;
        warn!(function, "{activity:?} has ended too many processes: it is given up");
        Attempt::GiveUp
    }

    /// Notes a request that was successful.
    pub(super) fn note(&mut self, message: &Message) {
        let body = &message.bytes[HEADER_SIZE..];
        self.wiring.note(message.header.command, body, &message.keys, &mut self.unused);
    }

    pub(super) fn note_unmasked(&mut self) {
        self.wiring.unmasked();
    }

    /// The keys of a message that is done: what the wiring has not taken over is not needed.
    pub(super) fn release(&mut self, keys: &[FdKey]) {
        self.unused.extend(keys);
    }

    /// The key is not needed any more once the next commit is done.
    pub(super) fn drop_key(&mut self, key: FdKey) {
        self.unused.push(key);
    }

    /// Makes everything true at once: what has changed, that a message is done, and what is to be sent.
    ///
    /// # Errors
    /// Descriptors of what is to be sent can't be held. Nothing is committed then.
    pub(super) fn commit(
        &mut self,
        function: &mut dyn Served,
        session: Option<SavedSession>,
        taken: Option<StreamId>,
        send: Option<(StreamId, Vec<u8>, Vec<OwnedFd>)>,
    ) -> Result<(), Errno> {
        let send = match send {
            Some((id, bytes, fds)) if !bytes.is_empty() => Some((id, bytes, self.keep_all(fds)?)),
            _ => None,
        };
        let Changes { function, device } = match session {
            Some(_) => function.record(&mut self.image),
            None => Changes::default(),
        };
        let session = session.filter(|session| self.session.as_ref() != Some(session));
        let serialise = "plain data serialises";
        let session_bytes = session.as_ref().map(|it| postcard::to_allocvec(it).expect(serialise));
        let wiring = self.wiring.take_changes();
        if session.is_some() {
            self.session = session;
        }
        let parts = [
            (SectionId::Session, session_bytes),
            (SectionId::Function, function),
            (SectionId::Device, device),
        ];
        let parts = parts.iter().filter_map(|(id, bytes)| Some((*id, bytes.as_deref()?)));
        let wiring = wiring.iter().map(|(id, bytes)| (*id, bytes.as_slice()));
        let sections: Vec<(SectionId, &[u8])> = parts.chain(wiring).collect();
        let frame = send.as_ref().map(|(id, bytes, keys)| (*id, Frame { bytes, keys }));
        self.journal.commit(Commit { sections: &sections, taken, send: frame.as_slice() });
        if let Some((id, _)) = frame {
            self.waiting[id as usize] += 1;
        }
        for key in std::mem::take(&mut self.unused) {
            self.forget_unless_used(key);
        }
        Ok(())
    }

    fn keep_all(&mut self, fds: Vec<OwnedFd>) -> Result<Vec<FdKey>, Errno> {
        let mut keys = Vec::with_capacity(fds.len());
        for fd in fds {
            match self.keep(fd.as_fd()) {
                Ok(key) => {
                    keys.push(key);
                    self.fds.insert(key, fd);
                }
                Err(errno) => {
                    for key in keys {
                        self.fds.remove(&key);
                        self.holder.forget(key);
                    }
                    return Err(errno);
                }
            }
        }
        Ok(keys)
    }

    /// Sends what the socket takes.
    pub(super) fn flush(
        &mut self,
        id: StreamId,
        socket: BorrowedFd<'_>,
    ) -> Result<Flush, TransportError> {
        while let Some(keys) = self.journal.stream(id).pending().map(<[FdKey]>::to_vec) {
            let fds: Vec<BorrowedFd<'_>> =
                keys.iter().filter_map(|key| self.fds.get(key)).map(AsFd::as_fd).collect();
            let sent = if fds.len() == keys.len() {
                self.journal.stream(id).send(socket, &fds)
            } else {
                // A predecessor's, which was lost.
                Err(Errno::TOOMANYREFS)
            };
            let blocked = match sent {
                Ok(flush) => flush == Flush::Blocked,
                Err(Errno::TOOMANYREFS) => {
                    self.refuse_next(id)?;
                    false
                }
                Err(errno) => return Err(TransportError::Socket(errno)),
            };
            // They go with the first byte.
            let first_waits = self.journal.stream(id).pending() == Some(keys.as_slice());
            if !(blocked && first_waits) {
                for key in keys {
                    self.fds.remove(&key);
                    self.holder.forget(key);
                }
            }
            if blocked {
                return Ok(Flush::Blocked);
            }
        }
        self.waiting[id as usize] = 0;
        Ok(Flush::Sent)
    }

    /// Whether a message may be taken: there is room for its answer, beside what the peer has not read.
    /// It may be busy with a request of its own, and read when that is with us.
    pub(super) fn has_room(&mut self, id: StreamId) -> bool {
        self.waiting[id as usize] < MAX_WAITING && self.journal.stream(id).room() >= MAX_FRAME
    }

    /// The kernel does not take the descriptors of the next frame: too many of this user are on their
    /// way. Waiting could be for ever, so its request has failed.
    fn refuse_next(&mut self, id: StreamId) -> Result<(), TransportError> {
        let mut bytes = [0; HEADER_SIZE];
        let bytes = self.journal.stream(id).pending_bytes(&mut bytes);
        let refused = bytes.first_chunk().and_then(|bytes| Header::parse(bytes).ok());
        let Some(Header { id: message, command, kind: MessageKind::Reply { .. }, .. }) = refused
        else {
            return Err(TransportError::Socket(Errno::TOOMANYREFS));
        };
        let kind = MessageKind::Reply { error: Some(Errno::TOOMANYREFS) };
        let refusal = Header { id: message, command, body_size: 0, kind }.to_bytes();
        self.journal.replace_next(id, Frame { bytes: &refusal, keys: &[] });
        Ok(())
    }

    pub(super) fn is_sent(&mut self, id: StreamId) -> bool {
        self.journal.stream(id).is_empty()
    }

    /// Everything of the session is gone, for whoever comes after.
    pub(super) fn clear(&mut self) {
        let in_streams = self.journal.clear_session();
        let twin = self.session.as_ref().and_then(SavedSession::twin_key);
        let keys: Vec<FdKey> = self.wiring.keys().chain(twin).chain(in_streams).collect();
        for key in keys.into_iter().chain(self.unused.drain(..)) {
            self.holder.forget(key);
        }
        if std::mem::take(&mut self.page_held) {
            self.holder.forget(PAGE_KEY);
        }
        self.fds.clear();
        self.image = Image::default();
        self.wiring = Wiring::default();
        self.files = Files::default();
        self.session = None;
        self.waiting = [0; StreamId::ALL.len()];
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How many bytes of a message are missing behind these, if its header is there.
fn missing(received: &[u8]) -> Result<Option<usize>, SessionEnd> {
    let Some(header) = header(received)? else { return Ok(None) };
    let size = header.body_size as usize + HEADER_SIZE;
    if size > MAX_MESSAGE_SIZE as usize {
        let Header { id, command, .. } = header;
        return Err(SessionEnd::TooLong { id, command, size });
    }
    Ok(Some(size.saturating_sub(received.len())))
}

fn header(received: &[u8]) -> Result<Option<Header>, SessionEnd> {
    let Some(bytes) = received.first_chunk() else { return Ok(None) };
    Header::parse(bytes).map(Some).map_err(|(id, error)| {
        let command = u16::from_ne_bytes([bytes[2], bytes[3]]);
        TransportError::Framing { id, command, error }.into()
    })
}
