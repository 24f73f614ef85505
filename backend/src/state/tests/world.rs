//! What outlives a worker: the state, the descriptors that are held, the sockets and their peers, and
//! what is known of those who died.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::fstat;

use super::memfd;
use super::peer::{Message, Peer};
use super::random::{Random, mix};
use crate::state::{Activity, FdKey, PreviousEnd, StreamId, Toll};

/// What one client sends on both of its connections, with numbers of descriptors.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) messages: [Vec<(Message, usize)>; 2],
    /// It goes away when it has sent all, whatever is under way.
    pub(super) abrupt: bool,
    pub(super) wakes: VecDeque<u16>,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) memfd: OwnedFd,
    pub(super) held: BTreeMap<FdKey, OwnedFd>,
    pub(super) sockets: [UnixStream; 2],
    pub(super) peers: [Peer; 2],
    pub(super) session: Session,
    pub(super) wakes_done: u64,
    later: VecDeque<Session>,
    random: Random,
    pub(super) ended_sessions: u64,
    pub(super) deaths: BTreeMap<Doing, Toll>,
    pub(super) begun: Option<Begun>,
    pub(super) interrupted: Option<(Activity, Toll)>,
    /// How the last worker ended: now in this way, now in that.
    pub(super) end: PreviousEnd,
}

/// An activity: one message is not another.
pub(super) type Doing = (String, u64);

#[derive(Clone, Debug)]
pub(super) struct Begun {
    pub(super) activity: Activity,
    pub(super) doing: Doing,
    /// It may be done by now.
    pub(super) committing: bool,
}

pub(super) const REPLY: u8 = 0;
pub(super) const LONG_REPLY: u8 = 1;
pub(super) const SILENT: u8 = 2;
pub(super) const KEEP: u8 = 3;
pub(super) const COMMAND: u8 = 4;
pub(super) const OPERATIONS: u64 = 5;

impl World {
    pub(super) fn new(sessions: &[Session], seed: u64) -> Self {
        let mut later: VecDeque<_> = sessions.iter().cloned().collect();
        let mut random = Random(seed);
        let mut session = later.pop_front().unwrap();
        let (peers, sockets) = connect(&mut session, &mut random);
        Self {
            memfd: memfd(),
            held: BTreeMap::new(),
            sockets,
            peers,
            session,
            wakes_done: 0,
            later,
            random,
            ended_sessions: 0,
            deaths: BTreeMap::new(),
            begun: None,
            interrupted: None,
            end: PreviousEnd::Orderly,
        }
    }

    /// Another worker has ended.
    pub(super) fn bury(&mut self) -> PreviousEnd {
        self.end = match self.end {
            PreviousEnd::FromOutside => PreviousEnd::ByItself,
            PreviousEnd::ByItself | PreviousEnd::Orderly => PreviousEnd::FromOutside,
        };
        self.end
    }

    pub(super) fn store(&mut self, key: FdKey, fd: OwnedFd) {
        let twice = self.held.insert(key, fd);
        assert!(twice.is_none(), "{key:?} is used twice");
    }

    pub(super) fn inodes(&self, keys: &[FdKey]) -> Vec<u64> {
        keys.iter().map(|key| fstat(self.held[key].as_fd()).unwrap().st_ino).collect()
    }

    pub(super) fn is_last_session(&self) -> bool {
        self.later.is_empty()
    }

    /// The peers do something. Tells whether they did.
    pub(super) fn act(&mut self) -> bool {
        let acted = self.peers.iter_mut().map(Peer::act).fold(false, |any, acted| any | acted);
        if self.session.abrupt && self.peers.iter().all(Peer::has_sent_all) {
            self.peers.iter_mut().for_each(Peer::close);
        }
        acted
    }

    /// A worker says that the session is over.
    pub(super) fn next_session(&mut self) {
        self.check_frames();
        self.ended_sessions += 1;
        self.wakes_done = 0;
        if let Some(session) = self.later.pop_front() {
            self.session = session;
            let (peers, sockets) = connect(&mut self.session, &mut self.random);
            (self.peers, self.sockets) = (peers, sockets);
        }
    }

    /// What the peers have got is what they had to get.
    pub(super) fn check_frames(&self) {
        let expected = Expected::of(&self.session);
        for stream in StreamId::ALL {
            let frames = &self.peers[stream as usize].frames;
            let (commands, replies): (Vec<_>, Vec<_>) = frames
                .iter()
                .cloned()
                .partition(|frame| Message::operation(&frame.bytes) == COMMAND);
            let all = [&expected.replies[stream as usize], &expected.commands[stream as usize]];
            for (got, all) in [replies, commands].iter().zip(all) {
                assert!(got.len() <= all.len(), "{} frames of {}", got.len(), all.len());
                for (got, expected) in got.iter().zip(all) {
                    assert_eq!(got.bytes, expected.bytes);
                    assert_eq!(got.inodes, expected.inodes);
                }
                assert!(
                    self.session.abrupt || got.len() == all.len(),
                    "frames are missing: {} of {}",
                    got.len(),
                    all.len()
                );
            }
        }
    }
}

fn connect(session: &mut Session, random: &mut Random) -> ([Peer; 2], [UnixStream; 2]) {
    let [client, twin] = &mut session.messages;
    let (client, client_socket) = Peer::new(client, Random(random.below(u64::MAX)));
    let (twin, twin_socket) = Peer::new(twin, Random(random.below(u64::MAX)));
    ([client, twin], [client_socket, twin_socket])
}

/// How the history of a stream goes on with a message.
pub(super) fn chain(history: u64, message: &[u8], inodes: &[u64]) -> u64 {
    let mut history = mix(history ^ u64::from(crc32fast::hash(message)));
    for inode in inodes {
        history = mix(history ^ inode);
    }
    history
}

/// What a message is answered with, given its history: a reply, and a command on the other stream.
pub(super) fn answer(operation: u8, history: u64) -> (Option<Message>, Option<Message>) {
    let small = usize::try_from(history % 100).unwrap();
    match operation {
        SILENT => (None, None),
        LONG_REPLY => (Some(Message::new(LONG_REPLY, history, 5000 + 40 * small)), None),
        COMMAND => {
            let command = Message::new(COMMAND, history, 10 * small);
            (Some(Message::new(REPLY, history, small)), Some(command))
        }
        _ => (Some(Message::new(operation, history, small)), None),
    }
}

/// What comes of a session, in the end.
#[derive(Debug, Default)]
pub(super) struct Expected {
    pub(super) histories: [u64; 2],
    pub(super) counts: [u64; 2],
    replies: [Vec<Message>; 2],
    /// Which the stream gets, and the other one has caused.
    commands: [Vec<Message>; 2],
    pub(super) kept: Vec<u64>,
}

impl Expected {
    pub(super) fn of(session: &Session) -> Self {
        let mut expected = Self::default();
        for (index, messages) in session.messages.iter().enumerate() {
            for (message, _) in messages {
                let history = &mut expected.histories[index];
                *history = chain(*history, &message.bytes, &message.inodes);
                expected.counts[index] += 1;
                let operation = Message::operation(&message.bytes);
                let (reply, command) = answer(operation, *history);
                if let Some(mut reply) = reply {
                    if operation == REPLY || operation == LONG_REPLY {
                        reply.inodes = message.inodes.clone();
                    }
                    expected.replies[index].push(reply);
                }
                expected.commands[1 - index].extend(command);
                if operation == KEEP {
                    expected.kept.extend(&message.inodes);
                }
            }
        }
        expected.kept.sort_unstable();
        expected
    }
}
