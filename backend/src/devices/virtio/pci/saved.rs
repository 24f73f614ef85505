//! Moving a virtio function to another process, or going on with it after the death of its process.
//!
//! To another process everything moves as data. After a death, the last state that was saved is older
//! than what happened to the queues: it tells what the driver set up, and the [records](super::Records)
//! and the driver's rings tell where the queues are.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::driver::{DriverState, Slot};
use super::{Records, VirtioFunction, layout};
use crate::devices::virtio::Words;
use crate::devices::virtio::spec::status;
use crate::devices::{Context, RestoreError, Saved};
use crate::state::Scratch;

/// The versions of the state.
#[derive(Serialize, Deserialize)]
enum State {
    V1 {
        driver: Driver,
        queues: Vec<Queue>,
        backing: Vec<u8>,
    },
    /// Of a function with records.
    V2 {
        driver: Driver,
        queues: Vec<Queue>,
        backing: Vec<u8>,
        records: RecordsState,
    },
}

/// What belongs to the records of a function.
#[derive(Serialize, Deserialize)]
struct RecordsState {
    identity: u64,
    starts: u64,
    queues: Vec<QueueStart>,
}

#[derive(Serialize, Deserialize)]
struct QueueStart {
    start: u64,
    /// Whether the rest of the state says where the queue is.
    settled: bool,
}

#[derive(Serialize, Deserialize)]
struct Driver {
    feature_select: [u32; 2],
    accepted: u128,
    status: u8,
    generation: u8,
    config_vector: Option<u16>,
    queue_select: u16,
    isr: u8,
}

#[derive(Serialize, Deserialize)]
struct Queue {
    size: u16,
    enabled: bool,
    vector: Option<u16>,
    rings: [u64; 3],
    next_available: u16,
    next_used: u16,
}

const STATUS_BITS: u8 = status::ACKNOWLEDGE
    | status::DRIVER
    | status::DRIVER_OK
    | status::FEATURES_OK
    | status::DEVICE_NEEDS_RESET
    | status::FAILED;

/// Both interrupts.
const ISR_BITS: u8 = 3;

impl Saved for VirtioFunction {
    fn save(&self) -> Vec<u8> {
        let driver = self.driver.saved();
        let queues = self.driver.slots().map(Slot::saved).collect();
        let backing = self.backing.save().expect("asked of a device that can move");
        let state = match self.backing.records() {
            None => State::V1 { driver, queues, backing },
            Some(records) => {
                let records = self.driver.saved_starts(records);
                State::V2 { driver, queues, backing, records }
            }
        };
        postcard::to_allocvec(&state).expect("plain data serialises")
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.backing.quiesce();
        self.power_on();
        let result = self.take_over(state);
        if result.is_err() {
            self.power_on();
        }
        result
    }

    fn scratch_words(&self) -> usize {
        self.backing.word_count()
    }

    fn set_scratch(&mut self, scratch: Scratch) {
        self.backing.set_words(Words::new(scratch));
        let latest = self.backing.records().map_or(0, Records::latest_start);
        self.driver.starts = self.driver.starts.max(latest);
        self.awaits_own_state = true;
    }

    /// Without records, requests change the state.
    fn revision(&self) -> Option<u64> {
        let driver = self.driver.revision;
        self.backing.records().map(|_| driver.wrapping_add(self.backing.revision()))
    }

    fn resume(&mut self, context: &mut Context<'_>) {
        self.call(context, |backing, world| backing.resume(world));
    }
}

impl VirtioFunction {
    fn take_over(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let (state, rest) = postcard::take_from_bytes(state).map_err(|_| RestoreError)?;
        if !rest.is_empty() {
            return Err(RestoreError);
        }
        let (driver, queues, backing, records) = match state {
            State::V1 { driver, queues, backing } => (driver, queues, backing, None),
            State::V2 { driver, queues, backing, records } => {
                (driver, queues, backing, Some(records))
            }
        };
        self.driver.restore(&driver, &queues)?;
        let here = self.backing.records().map(Records::identity);
        let awaited = std::mem::take(&mut self.awaits_own_state);
        match records {
            Some(records) if awaited && here == Some(records.identity) => {
                self.driver.restore_starts(&records)?;
            }
            records => self.driver.start_anew(records.as_ref())?,
        }
        let set_up = driver.status & status::DRIVER_OK != 0;
        self.backing.restore(&backing, set_up.then(|| self.driver.negotiated()))
    }
}

impl DriverState {
    fn saved(&self) -> Driver {
        let Self {
            feature_select,
            accepted,
            status,
            generation,
            config_vector,
            queue_select,
            isr,
            ..
        } = *self;
        Driver { feature_select, accepted, status, generation, config_vector, queue_select, isr }
    }

    /// The state is as at power-on. It may be anything after an error.
    fn restore(&mut self, saved: &Driver, queues: &[Queue]) -> Result<(), RestoreError> {
        let agreed = saved.status & status::FEATURES_OK != 0;
        let set_up = saved.status & status::DRIVER_OK != 0;
        self.accepted = saved.accepted;
        let possible = saved.status & !STATUS_BITS == 0
            && saved.isr & !ISR_BITS == 0
            && (!agreed || self.features_agree())
            && (agreed || !set_up)
            && self.has_vector(saved.config_vector)
            && queues.len() == usize::from(self.queue_count())
            && queues.iter().all(|queue| self.has_vector(queue.vector));
        if !possible {
            return Err(RestoreError);
        }
        self.feature_select = saved.feature_select;
        self.status = saved.status;
        self.generation = saved.generation;
        self.config_vector = saved.config_vector;
        self.queue_select = saved.queue_select;
        self.isr = saved.isr;
        self.revision += 1;

        let event_idx = self.event_idx();
        self.slots_mut().zip(queues).try_for_each(|(slot, queue)| slot.restore(queue, event_idx))
    }

    fn saved_starts(&self, records: &Records) -> RecordsState {
        let queue = |(index, slot): (u16, &Slot)| QueueStart {
            start: slot.start,
            settled: !slot.queue.ready() || records.is_settled(index, slot.start),
        };
        let queues = (0..).zip(self.slots()).map(queue).collect();
        RecordsState { identity: records.identity(), starts: self.starts, queues }
    }

    /// The state is the one that belongs to the records here.
    fn restore_starts(&mut self, saved: &RecordsState) -> Result<(), RestoreError> {
        if saved.queues.len() != self.slots().count() {
            return Err(RestoreError);
        }
        self.starts = saved.starts;
        for (slot, queue) in self.slots_mut().zip(&saved.queues) {
            slot.start = queue.start;
        }
        Ok(())
    }

    /// The state is from elsewhere, or from another time: the records here know nothing of its queues.
    fn start_anew(&mut self, saved: Option<&RecordsState>) -> Result<(), RestoreError> {
        for index in 0..self.queue_count() {
            let start = self.next_start();
            if let Some(slot) = self.slot_mut(index) {
                slot.start = start;
            }
        }
        let Some(saved) = saved else { return Ok(()) };
        if saved.queues.len() != self.slots().count() {
            return Err(RestoreError);
        }
        // It left where the queue is behind.
        if self.is_started() && saved.queues.iter().any(|queue| !queue.settled) {
            self.fail("it moved before it could go on after the death of its process");
        }
        Ok(())
    }

    fn has_vector(&self, vector: Option<u16>) -> bool {
        vector.is_none_or(|vector| vector < layout::vectors(self.queue_count()))
    }
}

impl Slot {
    fn saved(&self) -> Queue {
        Queue {
            size: self.queue.size(),
            enabled: self.queue.ready(),
            vector: self.vector,
            rings: self.rings,
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    fn restore(&mut self, saved: &Queue, event_idx: bool) -> Result<(), RestoreError> {
        self.vector = saved.vector;
        self.rings = saved.rings;
        self.queue.try_set_size(saved.size).map_err(|_| RestoreError)?;
        if saved.enabled {
            self.enable(event_idx).map_err(|_| RestoreError)?;
        }
        self.queue.set_next_avail(saved.next_available);
        self.queue.set_next_used(saved.next_used);
        Ok(())
    }
}
