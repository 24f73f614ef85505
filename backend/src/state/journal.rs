use std::sync::Arc;

use super::activity::{self, Activities, Activity, PreviousEnd, Toll};
use super::layout::{CONTROL_WORDS, Layout};
use super::memory::Memory;
use super::outbox::{Frame, Outbox};
use super::progress::{self, Progress};
use super::record::{self, Record};
use super::sections::Sections;
use super::stream::{Inbox, Stream};
use super::{FdKey, Scratch, SectionError, SectionId, StateError, StateFile, StreamId};

/// The state of one function and its session, of which everything is either as before a transaction
/// or as after it.
#[derive(Debug)]
pub struct Journal {
    memory: Arc<Memory>,
    layout: Layout,
    scratch_words: usize,
    record: Record,
    activities: Activities,
    streams: [(Inbox, Outbox); StreamId::ALL.len()],
}

/// What comes of a transaction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Commit<'a> {
    /// What is saved of the function from now on: the sections that have changed.
    pub sections: &'a [(SectionId, &'a [u8])],
    /// The message that this stream has received is done.
    pub taken: Option<StreamId>,
    /// What is to be sent.
    pub send: &'a [(StreamId, Frame<'a>)],
}

/// What a process finds that goes on in another one's place.
#[derive(Debug)]
pub struct Recovered {
    /// What was saved, in the order of [`SectionId::ALL`]: nothing if it never was.
    pub sections: [Result<Option<Vec<u8>>, SectionError>; SectionId::ALL.len()],
    /// What the other one died of, and what that has cost, this one included. Nothing if it did nothing at
    /// the time.
    pub interrupted: Option<(Activity, Toll)>,
}

/// Keys below it are never made here: the caller may give them a meaning.
const FIRST_KEY: u64 = 1 << 33;

// The words that decide, in their area.
const NEXT_KEY: usize = 0;
const ACTIVITIES: usize = 8;
const RECORDS: usize = ACTIVITIES + activity::WORDS;
const PROGRESS: usize = RECORDS + record::WORDS;
const END: usize = PROGRESS + 2 * StreamId::ALL.len() * progress::WORDS;
const _: () = assert!(END <= CONTROL_WORDS);

impl Journal {
    /// Begins anew, in a file that may have had any use: nothing is saved, received or to be sent, and
    /// the words of the scratch are zeros.
    ///
    /// `identity` tells this function from others, and from the same one with other options.
    ///
    /// # Errors
    /// [`StateError::Io`]
    pub fn fresh(
        file: StateFile,
        identity: &str,
        scratch_words: usize,
    ) -> Result<Self, StateError> {
        let (layout, length) = Layout::new(identity, scratch_words);
        let memory = file.map_empty(length)?;
        memory.pin(layout.control_bytes());
        let control = layout.control();
        let record = Record::default();
        record.store(&memory, control + RECORDS);
        memory.set(control + NEXT_KEY, FIRST_KEY);
        let streams = StreamId::ALL.map(|stream| {
            let [receiving, sending] = progress_words(&layout, stream);
            let inbox = Inbox::new(layout.inbox(stream), Progress::new(&memory, receiving));
            let outbox = Outbox::new(layout.outbox(stream), Progress::new(&memory, sending));
            (inbox, outbox)
        });
        layout.store(&memory, identity);
        let activities = Activities::new(control + ACTIVITIES);
        Ok(Self { memory: Arc::new(memory), layout, scratch_words, record, activities, streams })
    }

    /// Goes on in the place of a process that is dead, and ended like this.
    ///
    /// # Errors
    /// [`StateError`], when only [`fresh`](Self::fresh) helps.
    pub fn recover(
        file: StateFile,
        identity: &str,
        scratch_words: usize,
        end: PreviousEnd,
    ) -> Result<(Self, Recovered), StateError> {
        let memory = file.map()?;
        let layout = Layout::load(&memory, identity, scratch_words)?;
        memory.pin(layout.control_bytes());
        let control = layout.control();
        if memory.get(control + NEXT_KEY) < FIRST_KEY {
            return Err(StateError::Damaged("the next key"));
        }
        let record = Record::load(&memory, control + RECORDS)?;
        let [client, twin] = StreamId::ALL.map(|stream| {
            let [receiving, sending] = progress_words(&layout, stream);
            let streams = &record.streams[stream as usize];
            let receiving = Progress::load(&memory, receiving)?;
            let sending = Progress::load(&memory, sending)?;
            let inbox = Inbox::load(&memory, layout.inbox(stream), receiving, streams)?;
            let outbox = Outbox::load(&memory, layout.outbox(stream), sending, streams)?;
            Ok::<_, StateError>((inbox, outbox))
        });
        let streams = [client?, twin?];
        let sections =
            SectionId::ALL.map(|section| Sections(record.sections).read(&memory, &layout, section));
        let (activities, interrupted) =
            Activities::load(&memory, control + ACTIVITIES, &record, end)?;
        let memory = Arc::new(memory);
        let journal = Self { memory, layout, scratch_words, record, activities, streams };
        Ok((journal, Recovered { sections, interrupted }))
    }

    /// The words that a device keeps in order by itself.
    #[must_use]
    pub fn scratch(&self) -> Scratch {
        let first = self.layout.scratch().first_word();
        Scratch::of(self.memory.clone(), first, self.scratch_words)
    }

    /// A key that was never used before, not even by a process that has died since.
    pub fn new_key(&mut self) -> FdKey {
        let word = self.layout.control() + NEXT_KEY;
        let key = self.memory.get(word);
        self.memory.set(word, key.wrapping_add(1).max(FIRST_KEY));
        FdKey(key)
    }

    /// Something is about to be done, and this process may die of it. Returns what the same has cost
    /// others, the same message if it is one.
    pub fn begin(&mut self, activity: Activity) -> Toll {
        self.activities.begin(&self.memory, &self.record, activity)
    }

    /// What was begun is done, and all that came of it is true from here on.
    ///
    /// A section that is longer than [`SectionId::room`] is lost: recovery says so.
    ///
    /// # Panics
    /// If a frame is empty, or there is no room for it: whoever commits has asked
    /// [`Stream::room`].
    pub fn commit(&mut self, commit: Commit<'_>) {
        let Commit { sections, taken, send } = commit;
        if sections.is_empty() && taken.is_none() && send.is_empty() {
            self.activities.end(&self.memory, &self.record);
            return;
        }
        let mut record = self.finished_record();
        let committed = Sections(record.sections);
        let mut states = Sections(record.sections);
        for (section, bytes) in sections {
            states.write(&committed, (&self.memory, &self.layout), *section, bytes);
        }
        record.sections = states.0;
        if let Some(stream) = taken {
            let (inbox, _) = &mut self.streams[stream as usize];
            record.streams[stream as usize].taken = inbox.position();
            record.streams[stream as usize].messages += 1;
        }
        let staged = StreamId::ALL.map(|stream| {
            let mut frames = send.iter().filter(|(to, _)| *to == stream).map(|(_, frame)| *frame);
            let (_, outbox) = &self.streams[stream as usize];
            let next = frames.next()?;
            let frames = std::iter::once(next).chain(frames);
            let record = &mut record.streams[stream as usize];
            Some(outbox.stage(&self.memory, None, frames, record))
        });
        self.flip(record);
        for ((_, outbox), (staged, record)) in
            self.streams.iter_mut().zip(staged.into_iter().zip(&self.record.streams))
        {
            if let Some(staged) = staged {
                outbox.adopt(staged, record);
            }
        }
        if let Some(stream) = taken {
            self.streams[stream as usize].0.clear();
        }
        self.activities.forgive(&self.memory, &self.record);
    }

    /// Sends something else in the place of the next frame, of which nothing is on its way.
    ///
    /// # Panics
    /// If there is no such frame, and as [`commit`](Self::commit).
    pub fn replace_next(&mut self, stream: StreamId, frame: Frame<'_>) {
        let (_, outbox) = &self.streams[stream as usize];
        assert!(outbox.next_is_whole(), "a frame that is on its way can't be replaced");
        let mut record = self.next_record();
        let staged = outbox.stage(
            &self.memory,
            Some(frame),
            std::iter::empty(),
            &mut record.streams[stream as usize],
        );
        self.flip(record);
        self.streams[stream as usize].1.adopt(staged, &self.record.streams[stream as usize]);
    }

    /// The session is over: nothing is saved, received or to be sent any more. Returns the keys that
    /// were referred to by that.
    pub fn clear_session(&mut self) -> Vec<FdKey> {
        let keys = self.keys();
        let mut record = self.finished_record();
        record.sections = 0;
        let streams = record.streams.iter_mut().zip(&self.streams);
        let staged: Vec<_> = streams
            .map(|(record, (inbox, outbox))| {
                record.taken = inbox.position();
                record.messages += 1;
                outbox.stage_empty(record)
            })
            .collect();
        self.flip(record);
        let streams = self.streams.iter_mut().zip(&self.record.streams);
        for (((inbox, outbox), record), staged) in streams.zip(staged) {
            inbox.disconnect();
            outbox.adopt(staged, record);
        }
        self.activities.forgive(&self.memory, &self.record);
        keys
    }

    /// One of the connections.
    pub fn stream(&mut self, stream: StreamId) -> Stream<'_> {
        let (inbox, outbox) = &mut self.streams[stream as usize];
        Stream { memory: &self.memory, inbox, outbox }
    }

    /// All keys of what is received or to be sent. Those in sections are whose they are.
    #[must_use]
    pub fn keys(&self) -> Vec<FdKey> {
        let of = |(inbox, outbox): &(Inbox, Outbox)| {
            inbox.keys().chain(outbox.keys()).collect::<Vec<_>>()
        };
        self.streams.iter().flat_map(of).collect()
    }

    fn next_record(&self) -> Record {
        let mut record = self.record.clone();
        record.generation = record.generation.wrapping_add(1);
        record
    }

    /// As [`next_record`](Self::next_record), where what is under way is done.
    fn finished_record(&self) -> Record {
        Record { finished: self.activities.serial(), ..self.next_record() }
    }

    fn flip(&mut self, record: Record) {
        record.store(&self.memory, self.layout.control() + RECORDS);
        self.record = record;
    }
}

/// The first words of a stream's progress: receiving, and sending.
fn progress_words(layout: &Layout, stream: StreamId) -> [usize; 2] {
    let first = layout.control() + PROGRESS + 2 * stream as usize * progress::WORDS;
    [first, first + progress::WORDS]
}
