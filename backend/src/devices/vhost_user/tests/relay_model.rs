//! What may happen to a relayed queue in any order: a driver that reuses descriptors as it likes,
//! daemons that finish requests in any order and are killed at any point.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use virtio_queue::{Queue, QueueT};

use crate::devices::vhost_user::relay::{Relay, Shadow};
use crate::dma::{DmaAccess, DmaTable, Iova};
use crate::irq::EventFd;

/// The driver's rings, from the start of its memory.
const DESCRIPTORS: u64 = 0x0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const MEMORY: u64 = 0x1_0000;
/// The queue's index: it has to do with where our rings are.
const INDEX: u16 = 1;

#[derive(Clone, Debug)]
enum Step {
    /// The driver makes a request available, if a descriptor is free.
    Send(Index),
    /// This process looks at the driver's ring, and at the daemon's.
    Take,
    GiveBack,
    /// The daemon takes a request, or ends one of those that it has.
    Begin,
    End(Index),
    /// The daemon stops when it has ended everything, and starts again.
    Restart,
    /// The daemon is killed, in the middle of ending a request too, and another one comes.
    Kill {
        torn: Option<Index>,
    },
}

struct Model {
    size: u16,
    table: DmaTable,
    memory: File,
    queue: Queue,
    relay: Relay,
    /// The driver's: its heads that are free, and those that it waits for.
    free: Vec<u16>,
    waiting: Vec<u16>,
    available: u16,
    used: u16,
    daemon: Daemon,
}

/// A daemon, and its mapping of our rings.
struct Daemon {
    size: u16,
    shadow: Arc<Shadow>,
    rings: File,
    next: u16,
    used: u16,
    /// What it has, in the order in which it took it.
    begun: VecDeque<u16>,
}

impl Daemon {
    fn new(size: u16, base: u16, shadow: Arc<Shadow>) -> Self {
        let rings = File::from(shadow.region().1.try_clone_to_owned().unwrap());
        let begun = VecDeque::new();
        let mut daemon = Self { size, shadow, rings, next: base, used: 0, begun };
        daemon.used = read_u16(&daemon.rings, daemon.used_ring() + 2);
        daemon
    }

    fn available_ring(&self) -> u64 {
        self.shadow.available(INDEX) - self.shadow.region().0.iova
    }

    fn used_ring(&self) -> u64 {
        self.shadow.used(INDEX) - self.shadow.region().0.iova
    }

    fn take(&mut self) -> Option<u16> {
        let ring = self.available_ring();
        let available = read_u16(&self.rings, ring + 2);
        assert!(available.wrapping_sub(self.next) <= self.size);
        if available == self.next {
            return None;
        }
        let head = read_u16(&self.rings, ring + 4 + 2 * u64::from(self.next % self.size));
        self.next = self.next.wrapping_add(1);
        self.begun.push_back(head);
        Some(head)
    }

    fn write_used(&self, head: u16) {
        let entry = [u32::from(head).to_le_bytes(), [0; 4]].concat();
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.rings.write_all_at(&entry, slot).unwrap();
    }

    fn end(&mut self, which: Index) {
        if self.begun.is_empty() {
            return;
        }
        self.end_at(which.index(self.begun.len()));
    }

    fn end_at(&mut self, place: usize) {
        let head = self.begun.remove(place).unwrap();
        self.write_used(head);
        self.used = self.used.wrapping_add(1);
        self.rings.write_all_at(&self.used.to_le_bytes(), self.used_ring() + 2).unwrap();
    }
}

impl Model {
    fn new(size: u16, start: u16) -> Self {
        let memory =
            File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let mut table = DmaTable::new(4);
        let file = OwnedFd::from(memory.try_clone().unwrap());
        table.map(Iova(0), MEMORY, DmaAccess::all(), Some((file, 0))).unwrap();
        for ring in [AVAILABLE, USED] {
            memory.write_all_at(&start.to_le_bytes(), ring + 2).unwrap();
        }
        let mut queue = Queue::new(size).unwrap();
        let address = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(address(DESCRIPTORS), Some(0));
        queue.set_avail_ring_address(address(AVAILABLE), Some(0));
        queue.set_used_ring_address(address(USED), Some(0));
        queue.set_next_avail(start);
        queue.set_next_used(start);
        queue.set_ready(true);
        let mut relay = Relay::new(INDEX, size, EventFd::create().unwrap());
        let shadow = Arc::new(
            Shadow::new(INDEX + 1, table.windows().collect::<Vec<_>>().into_iter()).unwrap(),
        );
        let base = relay.begin(&shadow, size);
        let daemon = Daemon::new(size, base, shadow);
        let (free, waiting) = ((0..size).collect(), Vec::new());
        Self {
            size,
            table,
            memory,
            queue,
            relay,
            free,
            waiting,
            available: start,
            used: start,
            daemon,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Send(_) if self.free.is_empty() => {}
            Step::Send(which) => self.send(which),
            Step::Take => self.take(),
            Step::GiveBack => self.give_back(),
            Step::Begin => self.begin(),
            Step::End(which) => self.daemon.end(which),
            Step::Restart => self.restart(),
            Step::Kill { torn } => self.kill(torn),
        }
    }

    fn send(&mut self, which: Index) {
        let head = self.free.swap_remove(which.index(self.free.len()));
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_all_at(&head.to_le_bytes(), slot).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_all_at(&self.available.to_le_bytes(), AVAILABLE + 2).unwrap();
        self.waiting.push(head);
    }

    fn take(&mut self) {
        self.relay.take(&mut self.queue, &self.table.handle().memory()).unwrap();
    }

    fn begin(&mut self) {
        if let Some(head) = self.daemon.take() {
            let times = self.daemon.begun.iter().filter(|begun| **begun == head).count();
            assert_eq!(times, 1, "{head} is begun twice by one daemon");
            assert!(self.waiting.contains(&head), "{head} is nothing that the driver waits for");
        }
    }

    fn give_back(&mut self) {
        self.relay.give_back(&mut self.queue, &self.table.handle().memory()).unwrap();
        while self.used != read_u16(&self.memory, USED + 2) {
            let head = read_u16(&self.memory, USED + 4 + 8 * u64::from(self.used % self.size));
            self.used = self.used.wrapping_add(1);
            let waiting = self.waiting.iter().position(|waiting| *waiting == head);
            self.waiting.remove(waiting.expect("the driver waits for what it is given"));
            self.free.push(head);
        }
    }

    fn restart(&mut self) {
        while self.daemon.take().is_some() {}
        while !self.daemon.begun.is_empty() {
            self.daemon.end_at(0);
        }
        assert!(self.relay.is_idle());
        let base = self.relay.begin(&self.daemon.shadow, self.size);
        self.daemon = Daemon::new(self.size, base, Arc::clone(&self.daemon.shadow));
    }

    fn kill(&mut self, torn: Option<Index>) {
        if let Some(which) = torn.filter(|_| !self.daemon.begun.is_empty()) {
            self.daemon.write_used(self.daemon.begun[which.index(self.daemon.begun.len())]);
        }
        let mut left: Vec<u16> = self.daemon.begun.iter().copied().collect();
        while let Some(head) = self.daemon.take() {
            left.push(head);
        }
        // In the order of the bridge: first what the last one left, then what the next one gets.
        self.give_back();
        let windows: Vec<_> = self.table.windows().collect();
        let shadow = Arc::new(Shadow::new(INDEX + 1, windows.into_iter()).unwrap());
        let base = self.relay.begin(&shadow, self.size);
        let last = std::mem::replace(&mut self.daemon, Daemon::new(self.size, base, shadow));
        // It may take its time to die.
        last.write_used(0);
        last.rings.write_all_at(&u16::MAX.to_le_bytes(), last.used_ring() + 2).unwrap();
        for head in left {
            assert_eq!(self.daemon.take(), Some(head), "all that is left, in its order");
        }
        assert_eq!(self.daemon.take(), None);
    }

    fn finish(mut self) {
        self.take();
        self.restart();
        self.give_back();
        assert_eq!(self.waiting, [] as [u16; 0], "nothing is lost");
        assert_eq!(self.used, self.available);
    }
}

fn read_u16(file: &File, at: u64) -> u16 {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, at).unwrap();
    u16::from_le_bytes(bytes)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<Index>().prop_map(Step::Send),
        4 => Just(Step::Take),
        3 => Just(Step::GiveBack),
        6 => Just(Step::Begin),
        5 => any::<Index>().prop_map(Step::End),
        1 => Just(Step::Restart),
        1 => any::<Option<Index>>().prop_map(|torn| Step::Kill { torn }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_killed_when_each_request_ends_once_for_the_driver(
        size in prop::sample::select(vec![2_u16, 4, 8, 16]),
        start in prop_oneof![Just(0), Just(u16::MAX - 5), any::<u16>()],
        steps in vec(step(), 0..300),
    ) {
        let mut model = Model::new(size, start);
        steps.into_iter().for_each(|step| model.step(step));
        model.finish();
    }
}
