//! virtio-blk (5.2): a file or block device as a disk.

mod config;
mod engine;
mod options;
mod progress;
mod request;
mod requests;
mod sync;
mod syncs;
mod uring;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use vm_memory::Bytes;

use self::config::{Configuration, feature};
use self::engine::{Completion, Engine, Id, Operation};
use self::options::{Aio, Image, Options, SERIAL};
use self::progress::{Next, Progress};
use self::request::{Disk, Request, Status};
use self::requests::{Requests, State, Taken};
use self::sync::SyncEngine;
use self::syncs::{Ended, Step, Syncs};
use self::uring::UringEngine;
use super::rate_limit::{Admission, RateLimiter};
use super::spec::DeviceType;
use super::{Chain, Core, DeviceError, InFlight, Io, MemoryGuard, QueueError, Words};
use crate::config::{ConfigError, Parameters};
use crate::devices::RestoreError;
use crate::irq::EventFd;

/// A disk.
///
/// A request is read once, becomes operations of the engine, one after another, and is given back
/// when the last one is done, in whatever order the kernel finishes them. A flush covers what was
/// given back before it was taken (5.2.6.2), so it waits for no write.
pub struct Block<G> {
    image: Image,
    serial: [u8; SERIAL],
    configuration: Configuration,
    /// The mode of the cache after a reset.
    initial_writeback: bool,
    /// Those negotiated.
    features: u64,
    requests: Requests,
    engine: Box<dyn Engine<G>>,
    /// Operations that the engine has.
    running: usize,
    limiter: RateLimiter,
    /// What waits for the limiter, oldest first.
    waiting: VecDeque<Id>,
    /// What was under way when the device was quiesced, and is not done.
    paused: VecDeque<Id>,
    /// What is to be on stable storage before it goes on.
    syncs: Syncs,
    /// What is to be given back.
    finished: VecDeque<Id>,
    /// Signalled when operations or requests are done.
    wake: Arc<EventFd>,
    /// Requests that failed since the start of the process.
    failures: u64,
    /// Counts what changes in the state.
    revision: u64,
    /// Used again for each request.
    chain: Chain,
}

/// Its wakes: [`Block::wake`] and, if there is a limit, its timer.
const LIMITER: usize = 1;

/// After so many steps of its requests that were done at once, or bytes that they moved, others get
/// their turn.
const MAX_ROUNDS: usize = 16;
const MAX_MOVED: u64 = 64 << 20;

impl<G: MemoryGuard> Block<G> {
    /// Creates the device: `virtio-blk,path=FILE[,readonly=on|off][,serial=TEXT]
    /// [,logical-block-size=512|4096][,queues=N][,queue-size=N][,cache=writeback|writethrough]
    /// [,discard=on|off][,iops=N][,bps=SIZE][,aio=io_uring|sync]`.
    ///
    /// # Errors
    /// [`ConfigError`] when a parameter is missing or can't be used, or the image can't: it is
    /// absent, locked by another process, or has no size that a disk can have.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let options = Options::from_parameters(parameters)?;
        let wake = EventFd::create().map_err(|errno| ConfigError::invalid("aio", errno))?;
        let wake = Arc::new(wake);
        let ring = match options.aio {
            Aio::Sync => None,
            Aio::IoUring => {
                let depth = usize::from(options.queues) * usize::from(options.queue_size);
                let file = Arc::clone(&options.image.file);
                Some(UringEngine::new(file, Arc::clone(&wake), depth))
            }
        };
        let engine = choose_engine(&options.image, ring);
        Self::new(options, engine, wake)
    }

    fn new(
        options: Options,
        engine: Box<dyn Engine<G>>,
        wake: Arc<EventFd>,
    ) -> Result<Self, ConfigError> {
        let Options { image, read_only, serial, queues, queue_size, .. } = options;
        let Options { writeback, discard, limits, .. } = options;
        let limiter = RateLimiter::new(limits);
        let limiter = limiter.map_err(|errno| ConfigError::invalid("iops", errno))?;
        let size = image.size().map_err(|reason| ConfigError::invalid("path", reason))?;
        let configuration = Configuration {
            size,
            block_size: image.block_size,
            physical_block_size: image.physical_block_size(),
            read_only,
            discard,
            queues,
            queue_size,
            writeback,
        };
        Ok(Self {
            image,
            serial,
            configuration,
            initial_writeback: writeback,
            features: 0,
            requests: Requests::new(queues, queue_size),
            engine,
            running: 0,
            limiter,
            waiting: VecDeque::new(),
            paused: VecDeque::new(),
            syncs: Syncs::default(),
            finished: VecDeque::new(),
            wake,
            failures: 0,
            revision: 0,
            chain: Chain::default(),
        })
    }

    /// Takes all requests of a queue.
    fn take_all(&mut self, queue: u16, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        let failed = |error| DeviceError::Queue { queue, error };
        let Some(mut access) = io.queue(queue) else { return Ok(()) };
        loop {
            access.disable_kicks().map_err(failed)?;
            while access.pop(&mut self.chain).map_err(failed)? {
                self.take(queue, access.memory())?;
            }
            if !access.rearm().map_err(failed)? {
                return Ok(());
            }
        }
    }

    /// Takes the request in `self.chain`.
    fn take(&mut self, queue: u16, memory: &G) -> Result<(), DeviceError> {
        let refused = |reason| DeviceError::Request { queue, reason };
        let disk = Disk {
            size: self.configuration.size,
            block_size: self.configuration.block_size.into(),
            read_only: self.configuration.read_only,
            features: self.features,
        };
        let request = Request::parse::<G::Target>(&self.chain, memory, &disk);
        let Request { answer, command } =
            request.ok_or_else(|| refused("a request has no byte for its status"))?;
        let id = self.requests.id(InFlight { queue, head: self.chain.head() });
        let id = id.ok_or_else(|| refused("a request is out of range"))?;
        let state = match command {
            Ok(command) => State::Waiting(command),
            Err(status) => State::Finished(status, 0),
        };
        let bytes = match &state {
            State::Waiting(command) => Some(command.bytes()),
            State::Running(_) | State::Paused(..) | State::Finished(..) => None,
        };
        if !self.requests.insert(id, answer, state) {
            return Err(refused("a request is available again before it was given back"));
        }
        match bytes {
            None => self.finished.push_back(id),
            // Nobody overtakes those who wait.
            Some(bytes) if self.waiting.is_empty() && self.admits(bytes) => self.begin(id, memory),
            Some(_) => self.waiting.push_back(id),
        }
        Ok(())
    }

    fn admits(&mut self, bytes: u64) -> bool {
        self.limiter.admit(1, bytes, Instant::now()) == Admission::Now
    }

    /// Goes on with what was paused, and begins what waited for the limiter, as far as that and the
    /// queues allow.
    fn resume(&mut self, io: &mut dyn Io<G>) {
        for _ in 0..self.paused.len() {
            let Some(id) = self.paused.pop_front() else { break };
            let Some(access) = io.queue(self.requests.name(id).queue) else {
                self.paused.push_back(id);
                continue;
            };
            let Some(taken) = self.requests.get_mut(id) else { continue };
            let running = State::Running(Progress::default());
            if let State::Paused(progress, operation) = std::mem::replace(&mut taken.state, running)
            {
                taken.state = State::Running(progress);
                let memory = access.memory().clone();
                self.follow(id, Next::Start(operation.with_memory(memory)));
            }
        }
        let mut kept = VecDeque::new();
        while let Some(id) = self.waiting.pop_front() {
            let queue = self.requests.name(id).queue;
            let Some(access) = io.queue(queue) else {
                kept.push_back(id);
                continue;
            };
            let Some(Taken { state: State::Waiting(command), .. }) = self.requests.get_mut(id)
            else {
                continue;
            };
            let bytes = command.bytes();
            if access.is_stopping() {
                // Nobody would remember it.
                self.limiter.charge(1, bytes);
            } else if !self.admits(bytes) {
                kept.push_back(id);
                break;
            }
            self.begin(id, access.memory());
        }
        kept.append(&mut self.waiting);
        self.waiting = kept;
    }

    /// Begins a request that waits.
    fn begin(&mut self, id: Id, memory: &G) {
        // A driver that knows of no cache finds none: see `start`.
        let durable = !self.configuration.writeback;
        let Some(taken) = self.requests.get_mut(id) else { return };
        let running = State::Running(Progress::default());
        let State::Waiting(command) = std::mem::replace(&mut taken.state, running) else { return };
        // While it waited, the disk may have shrunk.
        if command.end() > self.configuration.size {
            self.follow(id, Next::Finish(Status::IoError));
            return;
        }
        let (progress, next) = Progress::start(command, memory, durable, &self.serial);
        taken.state = State::Running(progress);
        self.follow(id, next);
    }

    /// Goes on with a request.
    fn follow(&mut self, id: Id, next: Next<G>) {
        let status = match next {
            Next::Start(Operation::Sync) => return self.syncs.join(id),
            Next::Start(operation) => {
                self.running += 1;
                self.engine.start(id, operation);
                return;
            }
            Next::Finish(status) => status,
            Next::Fail(failure) => {
                self.failures += 1;
                // The guest may be able to cause it at will: 1, 2, 4, 8...
                if self.failures.is_power_of_two() {
                    let (path, failures) = (&self.image.path, self.failures);
                    tracing::warn!("virtio-blk {path}: {failure} (failures so far: {failures})");
                }
                Status::IoError
            }
        };
        let Some(taken) = self.requests.get_mut(id) else { return };
        let written = match &taken.state {
            State::Running(progress) => progress.written(),
            State::Waiting(_) | State::Paused(..) | State::Finished(..) => 0,
        };
        taken.state = State::Finished(status, written);
        self.finished.push_back(id);
    }

    /// Takes in an operation that is done, if there is one, and lets `then` see to what comes next.
    /// Returns how many bytes were moved.
    fn complete(&mut self, then: fn(&mut Self, Id, Next<G>)) -> Option<u64> {
        let Completion { id, operation, result } = self.engine.completed()?;
        self.running -= 1;
        if !matches!(operation, Operation::Sync | Operation::Ask(_)) {
            self.advance(id, operation, result, then);
            return Some(result.unwrap_or(0));
        }
        let Ended { group, result, loses } = self.syncs.end(&operation, result);
        if loses {
            let path = &self.image.path;
            tracing::error!("virtio-blk {path}: written data was lost; no flush succeeds any more");
        }
        for id in group {
            self.advance(id, Operation::Sync, result, then);
        }
        Some(0)
    }

    fn advance(
        &mut self,
        id: Id,
        operation: Operation<G>,
        result: Result<u64, Errno>,
        then: fn(&mut Self, Id, Next<G>),
    ) {
        if let Some(Taken { state: State::Running(progress), .. }) = self.requests.get_mut(id) {
            let next = progress.advance(operation, result);
            then(self, id, next);
        }
    }

    /// Sees to those who wait for stable storage.
    fn sync(&mut self) {
        match self.syncs.next() {
            Some(Step::Start(id, operation)) => {
                self.running += 1;
                self.engine.start(id, operation);
            }
            Some(Step::Fail(ids)) => {
                for id in ids {
                    self.follow(id, Next::Finish(Status::IoError));
                }
            }
            None => {}
        }
    }

    /// Goes on with a request only if that needs no operation.
    fn pause(&mut self, id: Id, next: Next<G>) {
        let operation = match next {
            Next::Start(operation) if !matches!(operation, Operation::Sync) => operation,
            next => return self.follow(id, next),
        };
        let Some(Taken { state, .. }) = self.requests.get_mut(id) else { return };
        if let State::Running(progress) = state {
            *state = State::Paused(std::mem::take(progress), operation.with_memory(()));
            self.paused.push_back(id);
        }
    }

    /// Hands over what was started, and takes in and gives back what is done.
    fn proceed(&mut self, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        self.resume(io);
        let mut moved = 0;
        for _ in 0..MAX_ROUNDS {
            if moved > MAX_MOVED {
                break;
            }
            self.sync();
            self.engine.submit();
            let mut any = false;
            // One step of each, for what takes no time ends only when the request does.
            for _ in 0..self.running {
                let Some(bytes) = self.complete(Self::follow) else { break };
                moved += bytes;
                any = true;
            }
            if !any {
                return self.give_back(io);
            }
        }
        self.wake.signal();
        self.give_back(io)
    }

    /// Gives back what is finished, as far as its queue can be served.
    fn give_back(&mut self, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        for _ in 0..self.finished.len() {
            let Some(id) = self.finished.pop_front() else { break };
            let InFlight { queue, head } = self.requests.name(id);
            let failed = |error| DeviceError::Queue { queue, error };
            let Some(mut access) = io.queue(queue) else {
                self.finished.push_back(id);
                continue;
            };
            let Some(Taken { state: State::Finished(status, written), answer, .. }) =
                self.requests.remove(id)
            else {
                continue;
            };
            let memory: &G::Target = access.memory();
            let told = memory.write_obj(status as u8, answer.status);
            told.map_err(|error| failed(QueueError::Memory(error)))?;
            // "beginning at the first device-writable buffer" (2.7.8.2): the status counts if all
            // before it was written.
            let written = if written == answer.room { written + 1 } else { written };
            access.push(head, u32::try_from(written).unwrap_or(u32::MAX)).map_err(failed)?;
        }
        Ok(())
    }
}

/// The engine of an image: io_uring, if it is wanted and the kernel lets us have it.
fn choose_engine<G: MemoryGuard>(
    image: &Image,
    ring: Option<io::Result<UringEngine<G>>>,
) -> Box<dyn Engine<G>> {
    match ring {
        Some(Ok(ring)) => return Box::new(ring),
        Some(Err(error)) => {
            tracing::warn!("virtio-blk {}: no io_uring ({error}), so aio=sync", image.path);
        }
        None => {}
    }
    Box::new(SyncEngine::new(Arc::clone(&image.file)))
}

impl<G: MemoryGuard> Core<G> for Block<G> {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        self.configuration.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let Configuration { queues, queue_size, .. } = self.configuration;
        vec![queue_size; queues.into()]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.configuration.read(offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        // A driver may choose before it is set up, when its features are not told yet.
        let chooses = self.features == 0 || self.features & feature::CONFIG_WCE != 0;
        if chooses && let Some(writeback) = Configuration::written_mode(offset, data) {
            self.revision += 1;
            self.configuration.writeback = writeback;
        }
    }

    fn start(&mut self, features: u64) {
        self.revision += 1;
        self.features = features;
        // "If VIRTIO_BLK_F_CONFIG_WCE is negotiated but VIRTIO_BLK_F_FLUSH is not, the device MUST
        // initialize writeback to 0" (5.2.5.2).
        if features & feature::FLUSH == 0 {
            self.configuration.writeback = false;
        } else if features & feature::CONFIG_WCE == 0 {
            self.configuration.writeback = self.initial_writeback;
        }
    }

    fn kicked(&mut self, queue: u16, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        let taken = self.take_all(queue, io);
        let done = self.proceed(io);
        taken.and(done)
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        let mut wakes = vec![self.wake.as_fd()];
        wakes.extend(self.limiter.fd());
        wakes
    }

    fn woken(&mut self, wake: usize, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        // Before looking: what comes from now on wakes again.
        if wake == LIMITER {
            self.limiter.acknowledge();
        } else {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        self.proceed(io)
    }

    fn quiesce(&mut self) {
        while self.running > 0 {
            self.engine.submit();
            // What comes next can take very long: zeros of many gigabytes, for instance.
            while self.complete(Self::pause).is_some() {}
            self.engine.wait();
        }
        if !(self.finished.is_empty() && self.paused.is_empty()) || self.syncs.are_waiting() {
            self.wake.signal();
        }
    }

    fn queue_stopped(&mut self, queue: u16) {
        self.quiesce();
        let Self { requests, waiting, paused, finished, syncs, .. } = self;
        for list in [waiting, paused, finished] {
            list.retain(|id| requests.name(*id).queue != queue);
        }
        syncs.retain(|id| requests.name(*id).queue != queue);
        requests.forget(queue);
    }

    fn reset(&mut self) {
        self.quiesce();
        self.requests.clear();
        self.waiting.clear();
        self.paused.clear();
        self.syncs.retain(|_| false);
        self.finished.clear();
        self.features = 0;
        self.revision += 1;
        self.configuration.writeback = self.initial_writeback;
    }

    fn reload(&mut self, io: &mut dyn Io<G>) -> Result<(), String> {
        let size = self.image.size()?;
        if size != self.configuration.size {
            self.configuration.size = size;
            io.config_changed();
        }
        Ok(())
    }

    fn in_flight(&self) -> Vec<InFlight> {
        self.requests.in_order()
    }

    fn resubmit(&mut self, request: InFlight, io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        let InFlight { queue, head } = request;
        let Some(access) = io.queue(queue) else { return Ok(()) };
        let found = access.chain(head, &mut self.chain);
        found.map_err(|error| DeviceError::Queue { queue, error })?;
        self.take(queue, access.memory())?;
        self.proceed(io)
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        self.image.witness.iter().map(AsFd::as_fd).collect()
    }

    fn adopt(&mut self, mut kept: Vec<OwnedFd>) -> io::Result<()> {
        let Some(witness) = &mut self.image.witness else {
            return if kept.is_empty() { Ok(()) } else { Err(io::Error::other("no witness")) };
        };
        let (Some(theirs), true) = (kept.pop(), kept.is_empty()) else {
            return Err(io::Error::other("not one witness"));
        };
        *witness = Arc::new(theirs.into());
        if !self.image.is_opened_by_witness()? {
            let path = &self.image.path;
            return Err(io::Error::other(format!("{path} is another file than it was")));
        }
        self.image.witness.iter().for_each(|witness| self.syncs.ask(witness));
        Ok(())
    }

    fn word_count(&self) -> usize {
        1
    }

    fn set_words(&mut self, words: Words) {
        self.syncs.set_words(words);
    }

    fn revision(&self) -> u64 {
        self.revision
    }

    fn save(&self) -> Vec<u8> {
        vec![self.configuration.writeback.into()]
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.revision += 1;
        self.configuration.writeback = match state {
            [0] => false,
            [1] => true,
            _ => return Err(RestoreError),
        };
        Ok(())
    }
}
