//! A device that gives back what it gets, at once or when it is woken.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::RestoreError;
use crate::devices::virtio::spec::DeviceType;
use crate::devices::virtio::{Chain, Core, DeviceError, InFlight, Io, QueueError};
use crate::dma::DmaGuard;
use crate::irq::EventFd;

/// Its own feature bit.
pub(super) const FEATURE: u64 = 1 << 3;
pub(super) const QUEUE_SIZE: u16 = 8;

/// What the core was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Started(u64),
    Quiesced,
    Stopped(u16),
    Reset,
    Resubmitted(InFlight),
}

/// What a test sees of the core, and changes.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) told: Vec<Told>,
    /// Whether requests wait until the core is woken.
    pub(super) holds: bool,
    pub(super) held: VecDeque<InFlight>,
    pub(super) config: [u8; 8],
    /// More of it, which is not saved, behind.
    pub(super) capacity: u8,
    /// How often it was written.
    pub(super) writes: u64,
    /// What a reload finds.
    pub(super) surroundings: Option<Result<u8, String>>,
    /// How often it was kicked or woken.
    pub(super) calls: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Echo {
    pub(super) state: Arc<Mutex<State>>,
    pub(super) wake: Arc<EventFd>,
    queues: usize,
}

impl Echo {
    pub(super) fn new(queues: usize) -> Self {
        let wake = Arc::new(EventFd::create().unwrap());
        Self { state: Arc::default(), wake, queues }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_told(&self) -> Vec<Told> {
        std::mem::take(&mut self.state().told)
    }
}

fn finish(request: InFlight, io: &mut dyn Io<DmaGuard>) -> Result<(), QueueError> {
    let mut chain = Chain::default();
    let Some(mut queue) = io.queue(request.queue) else { return Ok(()) };
    queue.chain(request.head, &mut chain)?;
    let memory = queue.memory();
    let length = chain.readable.len().min(chain.writable.len());
    let mut data = vec![0; usize::try_from(length).unwrap()];
    chain.readable.read(&**memory, 0, &mut data)?;
    chain.writable.write(&**memory, 0, &data)?;
    queue.push(request.head, u32::try_from(length).unwrap())
}

fn take(state: &mut State, index: u16, io: &mut dyn Io<DmaGuard>) -> Result<(), QueueError> {
    let mut chain = Chain::default();
    loop {
        let Some(mut queue) = io.queue(index) else { return Ok(()) };
        queue.disable_kicks()?;
        while let Some(mut queue) = io.queue(index)
            && queue.pop(&mut chain)?
        {
            let request = InFlight { queue: index, head: chain.head() };
            if state.holds {
                state.held.push_back(request);
            } else {
                finish(request, io)?;
            }
        }
        let Some(mut queue) = io.queue(index) else { return Ok(()) };
        if !queue.rearm()? {
            return Ok(());
        }
    }
}

impl Core<DmaGuard> for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let config = [&state.config[..], &[state.capacity]].concat();
        let from = config.get(usize::try_from(offset).unwrap()..).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(byte, value)| *byte = *value);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        state.writes += 1;
        let to = state.config.get_mut(usize::try_from(offset).unwrap()..).unwrap_or_default();
        to.iter_mut().zip(data).for_each(|(byte, value)| *byte = *value);
    }

    fn start(&mut self, features: u64) {
        self.state().told.push(Told::Started(features));
    }

    fn kicked(&mut self, queue: u16, io: &mut dyn Io<DmaGuard>) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.calls += 1;
        take(&mut state, queue, io).map_err(|error| DeviceError::Queue { queue, error })
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wake.as_fd()]
    }

    fn woken(&mut self, _: usize, io: &mut dyn Io<DmaGuard>) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.calls += 1;
        while let Some(request) = state.held.pop_front() {
            let queue = request.queue;
            finish(request, io).map_err(|error| DeviceError::Queue { queue, error })?;
        }
        Ok(())
    }

    fn quiesce(&mut self) {
        self.state().told.push(Told::Quiesced);
    }

    fn queue_stopped(&mut self, queue: u16) {
        let mut state = self.state();
        state.told.push(Told::Stopped(queue));
        state.held.retain(|request| request.queue != queue);
    }

    fn reset(&mut self) {
        let mut state = self.state();
        state.told.push(Told::Reset);
        state.held.clear();
    }

    fn reload(&mut self, io: &mut dyn Io<DmaGuard>) -> Result<(), String> {
        let found = self.state().surroundings.clone();
        match found {
            Some(Ok(value)) => {
                self.state().config[0] = value;
                io.config_changed();
                Ok(())
            }
            Some(Err(error)) => Err(error),
            None => Ok(()),
        }
    }

    fn in_flight(&self) -> Vec<InFlight> {
        self.state().held.iter().copied().collect()
    }

    fn resubmit(
        &mut self,
        request: InFlight,
        io: &mut dyn Io<DmaGuard>,
    ) -> Result<(), DeviceError> {
        self.state().told.push(Told::Resubmitted(request));
        let queue = request.queue;
        finish(request, io).map_err(|error| DeviceError::Queue { queue, error })
    }

    fn revision(&self) -> u64 {
        self.state().writes
    }

    fn save(&self) -> Vec<u8> {
        self.state().config.to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.state().config = state.try_into().map_err(|_| RestoreError)?;
        Ok(())
    }
}
