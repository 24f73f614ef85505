//! Moving a virtio function to another process.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::driver::{DriverState, Slot};
use super::{VirtioFunction, layout};
use crate::devices::virtio::spec::status;
use crate::devices::{Context, RestoreError, Saved};

/// The first version of the state.
#[derive(Serialize, Deserialize)]
enum State {
    V1 { driver: Driver, queues: Vec<Queue>, backing: Vec<u8> },
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
        let state = State::V1 {
            driver: self.driver.saved(),
            queues: self.driver.slots().map(Slot::saved).collect(),
            backing: self.backing.save().expect("asked of a device that can move"),
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

    fn resume(&mut self, context: &mut Context<'_>) {
        self.call(context, |backing, world| backing.resume(world));
    }
}

impl VirtioFunction {
    fn take_over(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let (state, rest) = postcard::take_from_bytes(state).map_err(|_| RestoreError)?;
        let State::V1 { driver, queues, backing } = state;
        if !rest.is_empty() {
            return Err(RestoreError);
        }
        self.driver.restore(&driver, &queues)?;
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

        let event_idx = self.event_idx();
        self.slots_mut().zip(queues).try_for_each(|(slot, queue)| slot.restore(queue, event_idx))
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
