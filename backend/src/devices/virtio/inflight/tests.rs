//! A device that is killed before each of its stores, to its record and to the driver's rings, and
//! one that goes on in its place.

use std::collections::VecDeque;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use virtio_queue::{Queue, QueueT};
use vm_memory::guest_memory::{Error as GuestMemoryError, GuestMemorySliceIterator, Permissions};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::*;
use crate::devices::virtio::crash::tests::{kill_at, point, spare, survives};
use crate::devices::virtio::spec::used;
use crate::devices::virtio::{Chain, QueueAccess, recover};

const SIZE: u16 = 4;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// The queue's only start.
const ENABLED: u64 = 1;

#[derive(Clone, Debug)]
enum Step {
    /// The driver makes a request available, if a descriptor is free, and looks what came back.
    Send(Index),
    Look,
    /// The device takes a request, puts it back at once, or gives some back.
    Take,
    TakeAndPutBack,
    GiveBack(Vec<Index>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => any::<Index>().prop_map(Step::Send),
        2 => Just(Step::Look),
        4 => Just(Step::Take),
        1 => Just(Step::TakeAndPutBack),
        3 => vec(any::<Index>(), 1..=3).prop_map(Step::GiveBack),
    ];
    vec(step, 1..24)
}

/// Guest memory to which each store of the device is one at which it may be killed.
#[derive(Debug)]
struct Mortal(GuestMemoryMmap);

impl GuestMemory for Mortal {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.0, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>, GuestMemoryError> {
        if access == Permissions::Write {
            point();
        }
        GuestMemory::get_slices(&self.0, addr, count, access)
    }
}

/// The driver, and what outlives the device.
struct World {
    memory: Arc<Mortal>,
    scratch: Scratch,
    in_order: bool,
    /// The driver's.
    free: Vec<u16>,
    waiting: Vec<u16>,
    available: u16,
    used: u16,
    /// Requests in the order in which the device took them, without those that it has given back or is
    /// about to.
    taken: Vec<u16>,
}

/// A process.
struct Device {
    queue: Queue,
    record: Record,
    held: VecDeque<u16>,
}

impl World {
    fn new(in_order: bool) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        for head in 0..SIZE {
            // A byte to write.
            let at = u64::from(head) * 16;
            memory.write_obj(0x8000_u64, GuestAddress(at)).unwrap();
            memory.write_obj(1_u32, GuestAddress(at + 8)).unwrap();
            memory.write_obj(2_u16, GuestAddress(at + 12)).unwrap();
        }
        Self {
            memory: Arc::new(Mortal(memory)),
            scratch: Scratch::private(record_words(SIZE, in_order)).unwrap(),
            in_order,
            free: (0..SIZE).collect(),
            waiting: Vec::new(),
            available: 0,
            used: 0,
            taken: Vec::new(),
        }
    }

    fn send(&mut self, which: Index) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.remove(which.index(self.free.len()));
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.0.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.0.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        self.waiting.push(head);
    }

    /// The driver takes what came back: only what it waits for, and each but once.
    fn look(&mut self) {
        let index: u16 = self.memory.0.read_obj(GuestAddress(USED + used::INDEX)).unwrap();
        while self.used != index {
            let slot = USED + used::RING + used::SIZE * u64::from(self.used % SIZE);
            let head: u32 = self.memory.0.read_obj(GuestAddress(slot)).unwrap();
            let place = self.waiting.iter().position(|waiting| u32::from(*waiting) == head);
            self.free.push(self.waiting.remove(place.expect("the driver waits for it")));
            self.used = self.used.wrapping_add(1);
        }
    }

    /// A process begins where the last one ended.
    fn device(&self) -> Device {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let words = Words::new(self.scratch.clone());
        let record = Record::new(words, Arc::default());
        let held = match record.about(ENABLED) {
            About::Earlier => {
                record.begin(ENABLED, 0, std::iter::empty());
                VecDeque::new()
            }
            About::This => {
                let found = recover(&mut queue, &self.memory, &record).unwrap();
                found.into_iter().map(|(_, head)| head).collect()
            }
            About::Later => panic!("there is no later start"),
        };
        Device { queue, record, held }
    }

    fn step(&mut self, device: &mut Device, step: &Step) {
        match step {
            Step::Send(which) => self.send(*which),
            Step::Look => self.look(),
            Step::Take => {
                if let Some(head) = self.pop(device) {
                    device.held.push_back(head);
                    self.taken.push(head);
                }
            }
            Step::TakeAndPutBack => {
                if let Some(head) = self.pop(device) {
                    device.access(&self.memory, |queue| queue.unpop(head));
                }
            }
            Step::GiveBack(which) => {
                let mut requests = Vec::new();
                for which in which {
                    if !device.held.is_empty() {
                        let place = if self.in_order { 0 } else { which.index(device.held.len()) };
                        requests.push((device.held.remove(place).unwrap(), 1));
                    }
                }
                // The driver may look before the device notes that it did.
                self.taken.retain(|head| requests.iter().all(|(given, _)| given != head));
                device.access(&self.memory, |queue| queue.push_all(&requests)).unwrap();
            }
        }
    }

    fn pop(&mut self, device: &mut Device) -> Option<u16> {
        let mut chain = Chain::default();
        let popped = device.access(&self.memory, |queue| queue.pop(&mut chain)).unwrap();
        popped.then(|| chain.head())
    }

    /// What the device has and what it has yet to take is what the driver waits for.
    fn check(&mut self, device: &Device) {
        self.look();
        let mut found: Vec<_> = device.held.iter().copied().collect();
        if !self.in_order {
            let known: Vec<_> =
                found.iter().copied().filter(|head| self.taken.contains(head)).collect();
            let still: Vec<_> =
                self.taken.iter().copied().filter(|head| self.waiting.contains(head)).collect();
            assert_eq!(known, still, "what was taken, in this order");
        }
        let mut next = device.queue.next_avail();
        while next != self.available {
            let slot = AVAILABLE + 4 + 2 * u64::from(next % SIZE);
            found.push(self.memory.0.read_obj(GuestAddress(slot)).unwrap());
            next = next.wrapping_add(1);
        }
        assert_eq!(device.queue.next_used(), self.used);
        if self.in_order {
            assert_eq!(found, self.waiting, "in this order");
        }
        let mut waiting = self.waiting.clone();
        found.sort_unstable();
        waiting.sort_unstable();
        assert_eq!(found, waiting);
        self.taken = device.held.iter().copied().collect();
    }

    /// Everything ends once.
    fn finish(&mut self, mut device: Device) {
        self.look();
        while !self.waiting.is_empty() {
            while let Some(head) = self.pop(&mut device) {
                device.held.push_back(head);
            }
            let requests: Vec<_> = device.held.drain(..).map(|head| (head, 1)).collect();
            assert!(!requests.is_empty(), "a request is lost");
            device.access(&self.memory, |queue| queue.push_all(&requests)).unwrap();
            self.look();
        }
    }
}

impl Device {
    fn access<R>(
        &mut self,
        memory: &Arc<Mortal>,
        access: impl FnOnce(&mut QueueAccess<'_, Arc<Mortal>>) -> R,
    ) -> R {
        let mut used = false;
        let queue = QueueAccess::new(&mut self.queue, memory, 0, &mut used);
        access(&mut queue.recorded(Some(&self.record)))
    }
}

/// Goes through the steps in processes of which each is killed at its point. Returns how many were.
fn run(steps: &[Step], in_order: bool, kills: &[u64]) -> usize {
    let mut world = World::new(in_order);
    let mut kills = kills.iter();
    let (mut done, mut killed) = (0, 0);
    loop {
        kill_at(kills.next().copied().unwrap_or(u64::MAX));
        let device = survives(|| {
            let mut device = world.device();
            world.check(&device);
            while let Some(step) = steps.get(done) {
                // What a process was at when it was killed, nobody does again.
                done += 1;
                world.step(&mut device, step);
            }
            device
        });
        spare();
        match device {
            Some(device) => {
                world.finish(device);
                return killed;
            }
            None => killed += 1,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_or_done_twice_wherever_the_process_is_killed(
        steps in steps(),
        in_order in any::<bool>(),
    ) {
        let mut first = 0;
        while run(&steps, in_order, &[first]) == 1 {
            // And once more, in the recovery or later.
            let mut second = 0;
            while run(&steps, in_order, &[first, second]) == 2 {
                second += 1;
            }
            first += 1;
        }
    }
}
