//! Taking over from a predecessor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use serde::de::DeserializeOwned;
use thiserror::Error;
use tracing::{debug, warn};

use super::port::HANDSHAKE_TIME;
use super::recorder::{Attempt, DEATHS_BORNE, PAGE_KEY, Recorder};
use super::saved_session::{SavedSession, Twin};
use super::session::Session;
use super::windows::{Window, Windows};
use super::wiring::{ReplayError, Wiring};
use crate::server::decode_page::ClientPage;
use crate::server::event_loop::Source;
use crate::server::function::Recorded;
use crate::server::served::ServedFunction;
use crate::state::{
    Activity, FdKey, Holder, Journal, Part, PreviousEnd, Recovered, SectionError, SectionId,
    StateError, StateFile,
};

/// The first key of the descriptors that a function keeps. Those of sessions are higher, and a
/// function has not so many.
const FIRST_KEPT: u64 = 1 << 32;

/// What is left of a function's predecessor, if it had one.
#[derive(Debug)]
pub(in crate::server) struct Legacy {
    /// The state's memory.
    pub(in crate::server) state: OwnedFd,
    /// The client's socket.
    pub(in crate::server) client: Option<OwnedFd>,
    /// What was held under keys.
    pub(in crate::server) fds: BTreeMap<FdKey, OwnedFd>,
    /// How the predecessor ended.
    pub(in crate::server) previous_end: PreviousEnd,
}

/// What came of it.
pub(super) struct Past {
    pub(super) recorder: Recorder,
    pub(super) session: Option<Session>,
    /// What is to be done again.
    pub(super) left_over: Vec<Source>,
    /// There was a session, which could not be gone on with.
    pub(super) lost: bool,
}

/// A session as it was recorded.
struct Record {
    journal: Journal,
    session: SavedSession,
    wiring: Wiring,
    /// The function and its device, or that they can't be read.
    function: Result<[Option<Vec<u8>>; 2], Unusable>,
    interrupted: Option<Activity>,
}

/// Why what was recorded is of no use.
#[derive(Debug, Error)]
enum Unusable {
    #[error("{0}")]
    State(#[from] StateError),
    #[error("its {0:?} section: {1}")]
    Section(SectionId, SectionError),
    #[error("its {0:?} section makes no sense")]
    Garbled(SectionId),
    #[error("a descriptor of it was not kept")]
    NoTwin,
    #[error("the client's decode page was not kept")]
    NoPage,
    #[error("{0}")]
    Wiring(#[from] ReplayError),
    #[error("nobody has survived going on with it")]
    Deadly,
}

impl Legacy {
    /// Makes a function, fresh from its making, what its predecessor was.
    pub(super) fn take_over(
        mut self,
        name: &str,
        function: &mut ServedFunction,
        holder: Box<dyn Holder>,
    ) -> io::Result<Past> {
        let words = function.0.scratch_words();
        let mut lost = false;
        let mut record = None;
        match load(&self.state, name, words, self.previous_end) {
            Ok(loaded) if self.client.is_some() => record = Some(loaded),
            Ok(_) | Err(Unusable::State(StateError::NoState)) => {}
            Err(unusable) => {
                warn!(function = name, "the session can't go on: {unusable}");
                lost = self.client.is_some();
            }
        }
        let Some(Record { journal, session, wiring, function: parts, interrupted }) = record else {
            let journal = fresh(&self.state, name, words)?;
            let client = self.client.take();
            let mut recorder = Recorder::new(name.to_owned(), journal, holder);
            self.adopt_kept(function, &mut recorder)?;
            function.0.set_scratch(recorder.journal().scratch());
            self.end_page(function);
            self.forget_rest(&mut recorder);
            let session = match client {
                Some(client) if lost => {
                    hang_up(&client);
                    None
                }
                // It has not got as far as to its first message.
                client => client.map(|it| Session::new(it, Instant::now() + HANDSHAKE_TIME)),
            };
            return Ok(Past { recorder, session, left_over: Vec::new(), lost });
        };
        let mut recorder = Recorder::new(name.to_owned(), journal, holder);
        self.adopt_kept(function, &mut recorder)?;
        for key in recorder.journal().keys() {
            if let Some(fd) = take(&mut self.fds, key, usize::from(wiring.refers_to(key))) {
                recorder.inherit(key, fd);
            }
        }
        for key in wiring.windows().keys() {
            if let Some(fd) = self.fds.get(&key) {
                recorder.know(key, fd.as_fd());
            }
        }
        recorder.recall(wiring, session.clone());
        match self.restore(name, function, &mut recorder, parts, session) {
            Ok(session) => {
                self.forget_rest(&mut recorder);
                let left_over = left_over(interrupted, function);
                debug!(function = name, "going on with its client");
                Ok(Past { recorder, session: Some(session), left_over, lost: false })
            }
            Err(unusable) => {
                warn!(function = name, "the session can't go on: {unusable}");
                function.0.client_left();
                self.end_page(function);
                erase_scratch(&recorder);
                recorder.clear();
                self.forget_rest(&mut recorder);
                if let Some(client) = &self.client {
                    hang_up(client);
                }
                Ok(Past { recorder, session: None, left_over: Vec::new(), lost: true })
            }
        }
    }

    /// Puts everything back in place: a transaction.
    fn restore(
        &mut self,
        name: &str,
        function: &mut ServedFunction,
        recorder: &mut Recorder,
        parts: Result<[Option<Vec<u8>>; 2], Unusable>,
        saved: SavedSession,
    ) -> Result<Session, Unusable> {
        let attempt = recorder.begin(Activity::Recovery);
        let parts = match (attempt, parts) {
            (Attempt::Do, Ok(parts)) => parts,
            (Attempt::Do, Err(unusable)) => {
                warn!(function = name, "its state is lost, it is reset: {unusable}");
                erase_scratch(recorder);
                [None, None]
            }
            (Attempt::GiveUp, _) => {
                warn!(function = name, "its state is given up, it is reset");
                erase_scratch(recorder);
                [None, None]
            }
        };
        let served = function.0.as_mut();
        served.set_scratch(recorder.journal().scratch());
        let [own, device] = &parts;
        let recorded = Recorded { function: own.as_deref(), device: device.as_deref() };
        if let Err(damaged) = served.recover(recorded) {
            warn!(function = name, "its state is lost, it is reset: {damaged}");
            erase_scratch(recorder);
        }
        let fds = &mut self.fds;
        let wiring = recorder.wiring();
        wiring
            .replay(served, |key| take(fds, key, wiring.windows().uses(key).saturating_sub(1)))?;
        wiring.keys().for_each(|key| drop(fds.remove(&key)));
        served.go_on();
        let twin = match saved.twin() {
            Twin::Open(key) => Some(self.fds.remove(&FdKey(key)).ok_or(Unusable::NoTwin)?),
            Twin::None | Twin::Closed => None,
        };
        let mut page = None;
        if saved.has_page() {
            page = Some(self.page().ok_or(Unusable::NoPage)?);
            recorder.inherit_page();
        }
        let client = self.client.take().ok_or(Unusable::NoTwin)?;
        let deadline = Instant::now() + HANDSHAKE_TIME;
        let mut session = Session::inherited(client, twin, saved, deadline);
        if let Some(page) = page {
            session.set_page(page);
            self.fds.remove(&PAGE_KEY);
        }
        let committed = session.commit(recorder, served, None, None);
        committed.expect("only what is to be sent can be refused");
        Ok(session)
    }

    /// Gives the function the descriptors that its predecessor kept, or has its own held.
    fn adopt_kept(
        &mut self,
        function: &mut ServedFunction,
        recorder: &mut Recorder,
    ) -> io::Result<()> {
        let key = |index: usize| FdKey(FIRST_KEPT + index as u64);
        let wanted = function.0.kept().len();
        if wanted > 0 && (0..wanted).all(|index| self.fds.contains_key(&key(index))) {
            let kept = (0..wanted).filter_map(|index| self.fds.remove(&key(index)));
            return function.0.adopt(kept.collect());
        }
        for (index, fd) in function.0.kept().into_iter().enumerate() {
            self.fds.remove(&key(index));
            recorder.hold(key(index), fd.as_fd())?;
        }
        Ok(())
    }

    /// The page that the client has, if it was kept.
    fn page(&self) -> Option<ClientPage> {
        let file = self.fds.get(&PAGE_KEY)?.try_clone().ok()?;
        ClientPage::adopt(file).ok()
    }

    /// A client whose session is lost sees that on its page as well.
    fn end_page(&self, function: &ServedFunction) {
        if let Some(mut page) = self.page() {
            page.show(function.0.as_ref());
        }
    }

    /// What nothing refers to: a predecessor died before it said so.
    fn forget_rest(&mut self, recorder: &mut Recorder) {
        for key in std::mem::take(&mut self.fds).into_keys() {
            recorder.forget(key);
        }
    }
}

fn load(state: &OwnedFd, name: &str, words: usize, end: PreviousEnd) -> Result<Record, Unusable> {
    let file = StateFile::open(state.try_clone().map_err(StateError::Io)?)?;
    let (journal, recovered) = Journal::recover(file, name, words, end)?;
    let Recovered { sections, interrupted } = recovered;
    let [session, wiring, function, device, windows @ ..] = sections;
    // Not even without what it was.
    if let Some((Activity::Recovery, toll)) = interrupted
        && toll.reaches(2 * DEATHS_BORNE)
    {
        return Err(Unusable::Deadly);
    }
    let session = session.map_err(|error| Unusable::Section(SectionId::Session, error))?;
    let session = session.map_or(Some(SavedSession::default()), |it| SavedSession::parse(&it));
    let session = session.ok_or(Unusable::Garbled(SectionId::Session))?;
    let wiring: Wiring = parse(SectionId::Wiring, wiring)?;
    let mut parts: [BTreeMap<u64, Window>; Part::ALL.len()] = Default::default();
    for (part, bytes) in Part::ALL.into_iter().zip(windows) {
        parts[part.index()] = parse(SectionId::Windows(part), bytes)?;
    }
    let wiring = wiring.with(Windows::recorded(parts));
    let function = function
        .map_err(|error| Unusable::Section(SectionId::Function, error))
        .and_then(|function| {
            let device = device.map_err(|error| Unusable::Section(SectionId::Device, error))?;
            Ok([function, device])
        });
    let interrupted = interrupted.map(|(activity, _)| activity);
    Ok(Record { journal, session, wiring, function, interrupted })
}

/// A descriptor, which others want as well.
fn take(fds: &mut BTreeMap<FdKey, OwnedFd>, key: FdKey, others: usize) -> Option<OwnedFd> {
    if others == 0 { fds.remove(&key) } else { fds.get(&key)?.try_clone().ok() }
}

fn parse<T: DeserializeOwned + Default>(
    id: SectionId,
    bytes: Result<Option<Vec<u8>>, SectionError>,
) -> Result<T, Unusable> {
    match bytes.map_err(|error| Unusable::Section(id, error))? {
        None => Ok(T::default()),
        Some(bytes) => postcard::from_bytes(&bytes).map_err(|_| Unusable::Garbled(id)),
    }
}

fn fresh(state: &OwnedFd, name: &str, words: usize) -> io::Result<Journal> {
    let file = StateFile::open(state.try_clone()?)
        .or_else(|_| StateFile::create(state.try_clone()?))
        .map_err(io::Error::other)?;
    Journal::fresh(file, name, words).map_err(io::Error::other)
}

/// Events that the predecessor has taken and not dealt with. Who died in a recovery may have had any.
fn left_over(interrupted: Option<Activity>, function: &ServedFunction) -> Vec<Source> {
    match interrupted {
        None | Some(Activity::Message(_) | Activity::Work) => Vec::new(),
        Some(Activity::Wake(index)) => {
            let known = usize::from(index) < function.0.wakes().len();
            known.then_some(Source::Wake(index)).into_iter().collect()
        }
        Some(Activity::Unmask) => vec![Source::Unmask],
        Some(Activity::Reload) => vec![Source::Reload],
        Some(Activity::Recovery) => {
            let wakes = u16::try_from(function.0.wakes().len()).unwrap_or(u16::MAX);
            (0..wakes).map(Source::Wake).collect()
        }
    }
}

/// What a device keeps in order by itself belongs to a state that is lost.
fn erase_scratch(recorder: &Recorder) {
    let scratch = recorder.journal().scratch();
    (0..scratch.len()).for_each(|word| scratch.set(word, 0));
}

fn hang_up(client: &OwnedFd) {
    let _ = rustix::net::shutdown(client, rustix::net::Shutdown::Both);
}
