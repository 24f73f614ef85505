//! A virtio device without a transport, and a driver that fills its queues with requests, rubbish and
//! both. The device does not panic and does not hang; it gives back what it took and nothing else;
//! while it has no queue it leaves memory alone; what it can't go on with ends in a reset that helps;
//! a disk keeps its size, and a read-only one its content.
#![no_main]

mod device;

use barkeep_backend::devices::virtio::{DeviceError, spec::feature};
use barkeep_fuzz::Input;
use barkeep_fuzz::guest::{self, Memory, Queues};
use barkeep_fuzz::requests::{self, Table};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use self::device::Device;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let memory = guest::memory();
    let mut run = Run::new(&mut input, memory);
    while !input.is_empty() {
        run.step(&mut input);
    }
    run.finish();
});

struct Run {
    device: Device,
    io: Queues,
}

/// The most descriptors of a queue.
const SIZE: u16 = 16;

impl Run {
    fn new(input: &mut Input<'_>, memory: Memory) -> Self {
        let mut device = Device::new(input.u8());
        let wanted = u64::from(input.u32()) | u64::from(input.u32()) << 32;
        // The driver does not choose what is not there (2.2.1).
        let offered = device.core.features() | feature::TRANSPORT;
        let features = offered & wanted | feature::VERSION_1;
        let count = device.core.queue_sizes().len();
        let queues = (0..count).map(|index| queue(index as u64, features, input)).collect();
        device.core.start(features);
        Self { device, io: Queues::new(&memory, features, queues) }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.u8();
        let index = u16::from(input.u8()) % self.queue_count();
        let (size, table) = {
            let queue = &self.io.queues[usize::from(index)];
            (queue.size(), queue.desc_table())
        };
        match kind % 16 {
            0 => {
                let at = guest::address(input);
                let length = input.u8() % 64;
                let _ = self.io.memory.write_slice(input.bytes(length.into()), GuestAddress(at));
            }
            1 => guest::write_descriptor(&self.io.memory, table, size, input),
            2 => {
                let at = guest::address(input);
                guest::write_descriptor(&self.io.memory, at, 32, input);
            }
            3 => {
                let (head, more) = (input.u16(), u16::from(input.u8()));
                self.make_available(index, head, more);
            }
            4 => self.make_available(index, u16::from(input.u8()) % size, 1),
            5 | 6 => {
                let table = Table { address: table, size };
                let memory = &self.io.memory;
                let made = requests::write(self.device.kind, index, table, input, |at, bytes| {
                    let _ = memory.write_slice(bytes, GuestAddress(at));
                });
                self.make_available(index, made, 1);
            }
            7 | 8 => self.call(|device, io| device.core.kicked(index, io)),
            9 => self.wake(input.u8()),
            10 => {
                let length = input.u16() % 2048;
                self.device.host_says(input.bytes(length.into()));
                self.wake(0xff);
            }
            11 => self.device.host_listens(),
            12 => self.pause(),
            13 => {
                let (offset, length) = (u64::from(input.u16()), input.u8() % 16);
                if input.u8() & 1 == 0 {
                    self.device.core.config_write(offset, input.bytes(length.into()));
                } else {
                    self.device.core.config_read(offset, &mut vec![0; length.into()]);
                }
            }
            14 => self.stop_queue(index, input),
            _ => match input.u8() % 4 {
                0 => self.reset(),
                1 => self.move_it(input),
                2 => {
                    self.device.resize(input.u8());
                    let _ = self.device.core.reload(&mut self.io);
                }
                _ => {
                    let offset = u64::from(input.u16()) << (input.u8() % 50);
                    self.device.core.config_read(offset, &mut [0; 8]);
                }
            },
        }
        self.check();
    }

    fn queue_count(&self) -> u16 {
        u16::try_from(self.io.queues.len()).expect("a few queues")
    }

    fn make_available(&mut self, index: u16, head: u16, more: u16) {
        // What the driver does with memory is its own affair, paused or not.
        let queue = &self.io.queues[usize::from(index)];
        guest::make_available(&self.io.memory, queue, head, more);
    }

    /// Lets the device work, and resets it if it can't go on.
    fn call(&mut self, call: impl FnOnce(&mut Device, &mut Queues) -> Result<(), DeviceError>) {
        if self.io.paused {
            return;
        }
        if call(&mut self.device, &mut self.io).is_err() {
            self.reset();
        }
    }

    /// Wakes it by what is readable, and by some that are not.
    fn wake(&mut self, mask: u8) {
        for (index, readable) in self.device.readable_wakes().into_iter().enumerate() {
            if readable || mask & 1 << (index % 8) != 0 {
                self.call(|device, io| device.core.woken(index, io));
            }
        }
    }

    /// Takes the queues away, or gives them back.
    fn pause(&mut self) {
        self.io.paused = !self.io.paused;
        if self.io.paused {
            self.device.core.quiesce();
            let before = guest::snapshot(&self.io.memory);
            for index in 0..self.queue_count() {
                let _ = self.device.core.kicked(index, &mut self.io);
            }
            for index in 0..self.device.readable_wakes().len() {
                let _ = self.device.core.woken(index, &mut self.io);
            }
            assert!(guest::snapshot(&self.io.memory) == before, "it has no queue");
            return;
        }
        for index in 0..self.queue_count() {
            self.call(|device, io| device.core.kicked(index, io));
        }
        self.wake(0xff);
    }

    fn stop_queue(&mut self, index: u16, input: &mut Input<'_>) {
        self.device.core.quiesce();
        self.io.queues[usize::from(index)] = queue(index.into(), self.io.features, input);
        self.device.core.queue_stopped(index);
    }

    fn reset(&mut self) {
        self.device.core.quiesce();
        self.device.core.reset();
        assert!(self.device.core.in_flight().is_empty(), "a reset forgets requests");
        for (index, queue) in (0..).zip(&mut self.io.queues) {
            *queue = self::queue(index, self.io.features, &mut Input::new(&[]));
        }
        self.clear_rings();
        self.io.paused = false;
        self.device.core.start(self.io.features);
    }

    fn clear_rings(&mut self) {
        for queue in &self.io.queues {
            let rings = [(queue.avail_ring(), 6 + 2 * 16), (queue.used_ring(), 6 + 8 * 16)];
            for (ring, length) in rings {
                let _ = self.io.memory.write_slice(&vec![0; length], GuestAddress(ring));
            }
        }
    }

    /// Its state goes out and in again, perhaps not as it was.
    fn move_it(&mut self, input: &mut Input<'_>) {
        self.device.core.quiesce();
        let requests = self.device.core.in_flight();
        let mut state = self.device.core.save();
        let (at, flip) = (usize::from(input.u8()), input.u8());
        if let Some(byte) = state.get_mut(at) {
            *byte ^= flip;
        }
        self.device.core.reset();
        self.device.core.start(self.io.features);
        if self.device.core.restore(&state).is_err() {
            assert_ne!(flip, 0, "it takes its own state");
            return self.reset();
        }
        if self.io.paused {
            // They are lost with this, as with a reset.
            return self.reset();
        }
        for request in requests {
            self.call(|device, io| device.core.resubmit(request, io));
        }
    }

    /// Holds between any two steps.
    fn check(&self) {
        for queue in &self.io.queues {
            let taken = queue.next_avail().wrapping_sub(queue.next_used());
            assert!(taken <= 256, "{taken} requests are taken and not given back");
        }
        self.device.check();
    }

    /// In the end, everything that was taken comes back, if the driver gives the device its way.
    fn finish(mut self) {
        if self.io.paused {
            self.pause();
        }
        if self.device.gives_everything_back() {
            let mut rounds = 0;
            while !self.device.core.in_flight().is_empty() {
                rounds += 1;
                assert!(rounds < 1000, "requests do not come to an end");
                self.device.await_wake();
                self.wake(0);
            }
            for queue in &self.io.queues {
                assert_eq!(queue.next_avail(), queue.next_used(), "a request is lost");
            }
        }
        self.device.core.quiesce();
        self.device.core.reset();
    }
}

/// A queue in a place of its own, unless the input wants something else.
fn queue(index: u64, features: u64, input: &mut Input<'_>) -> Queue {
    let mut queue = if input.u8() & 0xe0 == 0xe0 {
        guest::queue(input)
    } else {
        let mut queue = Queue::new(256).expect("a power of two");
        let base = index % 5 * 0x400;
        queue.try_set_size(SIZE).expect("a power of two");
        queue.try_set_desc_table_address(GuestAddress(base)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(base + 0x200)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(base + 0x300)).expect("aligned");
        queue.set_ready(true);
        queue
    };
    queue.set_event_idx(features & feature::EVENT_IDX != 0);
    queue
}
