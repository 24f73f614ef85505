//! A worker, as simple as can be: it does with a journal what a real one does.

use std::os::fd::AsFd;

use rustix::io::Errno;

use super::peer::{HEADER, Message};
use super::random::bytes;
use super::world::{Begun, KEEP, LONG_REPLY, REPLY, SILENT, World, answer, chain};
use super::{IDENTITY, SCRATCH_WORDS};
use crate::state::{
    Activity, Commit, FdKey, Flush, Frame, Journal, Recovered, SectionId, StateError, StateFile,
    StreamId, Toll,
};

/// What a worker knows, and loses when it dies.
#[derive(Debug)]
pub(super) struct Worker {
    journal: Journal,
    pub(super) function: Function,
    /// From which the content of a device is made.
    device: u64,
    pub(super) kept: Vec<FdKey>,
}

/// As the section has it: for each stream a history and a count of messages, and a count of wakes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) histories: [u64; 2],
    pub(super) counts: [u64; 2],
    pub(super) wakes: u64,
}

/// The session is over.
#[derive(Debug)]
struct Gone;

impl Worker {
    pub(super) fn start(world: &mut World) -> Self {
        let end = world.bury();
        let memfd = || world.memfd.try_clone().unwrap();
        let (journal, recovered) = match StateFile::create(memfd()) {
            Ok(file) => (Journal::fresh(file, IDENTITY, SCRATCH_WORDS).unwrap(), None),
            Err(_) => {
                let file = StateFile::open(memfd()).unwrap();
                match Journal::recover(file, IDENTITY, SCRATCH_WORDS, end) {
                    Ok((journal, recovered)) => (journal, Some(recovered)),
                    Err(StateError::NoState) => {
                        let file = StateFile::open(memfd()).unwrap();
                        (Journal::fresh(file, IDENTITY, SCRATCH_WORDS).unwrap(), None)
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let function = Function::default();
        let mut worker = Self { journal, function, device: 0, kept: Vec::new() };
        match recovered {
            Some(recovered) => {
                check_interrupted(world, recovered.interrupted);
                worker.restore(&recovered);
            }
            None => check_interrupted(world, None),
        }
        // Somebody may have died before it was known of, or forgotten.
        let referred = [worker.journal.keys(), worker.kept.clone()].concat();
        world.held.retain(|key, _| referred.contains(key));
        assert!(referred.iter().all(|key| world.held.contains_key(key)), "{referred:?}");
        worker.begin(world, Activity::Recovery);
        worker.commit(world, Commit::default());
        worker
    }

    fn restore(&mut self, recovered: &Recovered) {
        let section = |id: SectionId| recovered.sections[id.index()].as_ref().unwrap();
        let words = |id| -> Option<Vec<u64>> {
            let bytes = section(id).as_ref()?;
            Some(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
        };
        if let Some(words) = words(SectionId::Function) {
            self.function = Function {
                histories: [words[0], words[1]],
                counts: [words[2], words[3]],
                wakes: words[4],
            };
        }
        if let Some(content) = section(SectionId::Device) {
            self.device = u64::from_le_bytes(*content.first_chunk().unwrap());
            assert_eq!(content, &device(self.device), "content of two devices");
        }
        self.kept = words(SectionId::Wiring).unwrap_or_default().into_iter().map(FdKey).collect();
    }

    /// Does all that there is to do for now. Tells whether it did anything.
    pub(super) fn turn(&mut self, world: &mut World) -> bool {
        let mut done = false;
        loop {
            match self.step(world) {
                Ok(true) => done = true,
                Ok(false) => return done,
                Err(Gone) => {
                    self.end_session(world);
                    return true;
                }
            }
        }
    }

    fn step(&mut self, world: &mut World) -> Result<bool, Gone> {
        let mut done = false;
        let mut empty = true;
        for stream in StreamId::ALL {
            done |= self.flush(world, stream)?;
            empty &= self.journal.stream(stream).is_empty();
        }
        if let Some(wake) = world.session.wakes.front().copied() {
            self.begin(world, Activity::Wake(wake));
            self.function.wakes += 1;
            let function = self.function.to_bytes();
            let sections = [(SectionId::Function, function.as_slice())];
            self.commit(world, Commit { sections: &sections, ..Commit::default() });
            world.session.wakes.pop_front();
            world.wakes_done += 1;
            done = true;
        }
        for stream in StreamId::ALL {
            if empty && self.receive(world, stream)? {
                self.execute(world, stream);
                return Ok(true);
            }
        }
        Ok(done)
    }

    fn flush(&mut self, world: &mut World, stream: StreamId) -> Result<bool, Gone> {
        let mut done = false;
        while let Some(keys) = self.journal.stream(stream).pending().map(<[FdKey]>::to_vec) {
            let fds: Vec<_> = keys.iter().map(|key| world.held[key].as_fd()).collect();
            let room = self.journal.stream(stream).room();
            let sent = self.journal.stream(stream).send(&world.sockets[stream as usize], &fds);
            match sent {
                Ok(Flush::Sent) => done = true,
                Ok(Flush::Blocked) => {
                    // A part of it may have gone.
                    done |= self.journal.stream(stream).room() > room;
                    break;
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Gone),
                Err(errno) => panic!("{errno}"),
            }
            // Some have gone with a first part, before a death or just now.
            let referred = [self.journal.keys(), self.kept.clone()].concat();
            world.held.retain(|key, _| referred.contains(key));
        }
        Ok(done)
    }

    /// Tells whether a message is whole.
    fn receive(&mut self, world: &mut World, stream: StreamId) -> Result<bool, Gone> {
        let left = |journal: &mut Journal| {
            let received = journal.stream(stream).received();
            Message::length(&received).unwrap_or(HEADER) - received.len()
        };
        loop {
            let missing = left(&mut self.journal);
            if missing == 0 {
                return Ok(true);
            }
            let socket = world.sockets[stream as usize].try_clone().unwrap();
            let connection = self.journal.stream(stream);
            let peeked = match connection.peek(&socket, missing + usize::from(missing % 3 == 0)) {
                Ok(peeked) if peeked.bytes.is_empty() => return Err(Gone),
                Ok(peeked) => peeked,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::CONNRESET) => return Err(Gone),
                Err(errno) => panic!("{errno}"),
            };
            assert!(!peeked.fds_missing);
            // Those that are held already are the same ones.
            if self.journal.stream(stream).held().is_empty() {
                let mut keys = Vec::new();
                for fd in peeked.fds {
                    let key = self.journal.new_key();
                    world.store(key, fd);
                    keys.push(key);
                }
                self.journal.stream(stream).hold(&keys).unwrap();
            }
            // Less than there is, if descriptors came with it.
            let taken = self.journal.stream(stream).take(&socket, missing.min(peeked.bytes.len()));
            assert!(matches!(taken, Ok(1..)), "{taken:?}");
        }
    }

    fn execute(&mut self, world: &mut World, stream: StreamId) {
        self.begin(world, Activity::Message(stream));
        let connection = self.journal.stream(stream);
        let message = connection.received();
        let keys = connection.received_keys().to_vec();
        let inodes = world.inodes(&keys);

        let index = stream as usize;
        let history = &mut self.function.histories[index];
        *history = chain(*history, &message, &inodes);
        self.function.counts[index] += 1;

        let operation = Message::operation(&message);
        let (reply, command) = answer(operation, *history);
        let function = self.function.to_bytes();
        let mut sections = vec![(SectionId::Function, function)];
        if operation == SILENT {
            self.device = self.function.histories[index];
            sections.push((SectionId::Device, device(self.device)));
        }
        if operation == KEEP {
            self.kept.extend(&keys);
            let kept = self.kept.iter().flat_map(|key| key.0.to_le_bytes()).collect();
            sections.push((SectionId::Wiring, kept));
        }
        let sections: Vec<_> = sections.iter().map(|(id, bytes)| (*id, bytes.as_slice())).collect();
        let with_keys = operation == REPLY || operation == LONG_REPLY;
        let keys = if with_keys { keys.as_slice() } else { &[] };
        let other = StreamId::ALL[1 - index];
        let reply = reply.iter().map(|reply| (stream, Frame { bytes: &reply.bytes, keys }));
        let command = command.iter().map(|it| (other, Frame { bytes: &it.bytes, keys: &[] }));
        let send: Vec<_> = reply.chain(command).collect();
        self.commit(world, Commit { sections: &sections, taken: Some(stream), send: &send });
        let referred = [self.journal.keys(), self.kept.clone()].concat();
        world.held.retain(|key, _| referred.contains(key));
    }

    fn end_session(&mut self, world: &mut World) {
        let keys = self.journal.clear_session();
        assert_eq!(self.journal.keys(), []);
        world.begun = None;
        for key in keys.iter().chain(&self.kept) {
            world.held.remove(key);
        }
        (self.function, self.device) = (Function::default(), 0);
        self.kept.clear();
        world.next_session();
    }

    fn begin(&mut self, world: &mut World, activity: Activity) {
        let doing = match activity {
            Activity::Message(stream) => {
                let message = self.function.counts[stream as usize];
                (format!("{stream:?}, session {}", world.ended_sessions), message)
            }
            other => (format!("{other:?}"), 0),
        };
        let toll = self.journal.begin(activity);
        assert_eq!(toll, world.deaths.get(&doing).copied().unwrap_or_default(), "{doing:?}");
        world.begun = Some(Begun { activity, doing, committing: false });
        world.interrupted = None;
    }

    fn commit(&mut self, world: &mut World, commit: Commit<'_>) {
        world.begun.as_mut().unwrap().committing = true;
        self.journal.commit(commit);
        if let Some(begun) = world.begun.take() {
            world.deaths.remove(&begun.doing);
        }
    }
}

/// What the journal says of the dead is true.
fn check_interrupted(world: &mut World, interrupted: Option<(Activity, Toll)>) {
    match world.begun.take() {
        None => assert_eq!(interrupted, world.interrupted),
        Some(begun) if begun.committing && interrupted.is_none() => {
            world.deaths.remove(&begun.doing);
        }
        Some(begun) => {
            let deaths = world.deaths.entry(begun.doing).or_default();
            *deaths = deaths.and(world.end);
            assert_eq!(interrupted, Some((begun.activity, *deaths)));
        }
    }
    world.interrupted = interrupted;
}

impl Function {
    fn to_bytes(self) -> Vec<u8> {
        let Self { histories: [client, twin], counts: [requests, answers], wakes } = self;
        [client, twin, requests, answers, wakes]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }
}

/// What a device saves: now more, now less.
fn device(seed: u64) -> Vec<u8> {
    let length = if seed.is_multiple_of(5) { 20_000 } else { usize::try_from(seed % 40).unwrap() };
    [&seed.to_le_bytes(), bytes(seed, length).as_slice()].concat()
}
