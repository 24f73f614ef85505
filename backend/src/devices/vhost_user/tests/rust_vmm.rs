//! A daemon of somebody else's making: what most daemons in Rust are built on.

use std::io;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{Listener, VhostUserProtocolFeatures as Protocol};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{
    Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::bench::{Bench, Place};
use super::fake::HAS_PROTOCOL;
use crate::devices::virtio::spec::feature;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Takes what it is given and keeps a copy.
struct Sink {
    memory: Option<Memory>,
    taken: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl VhostUserBackendMut for Sink {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        feature::VERSION_1 | HAS_PROTOCOL
    }

    fn protocol_features(&self) -> Protocol {
        Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        (offset..offset + size).map(|byte| u8::try_from(byte).unwrap()).collect()
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> io::Result<()> {
        let memory: GuestMemoryLoadGuard<_> = self.memory.as_ref().unwrap().memory();
        let mut vring = vrings[usize::from(queue)].get_mut();
        let chains: Vec<_> = vring.get_queue_mut().iter(memory.clone()).unwrap().collect();
        for chain in chains {
            let head = chain.head_index();
            for descriptor in chain {
                let mut data = vec![0; descriptor.len() as usize];
                memory.read_slice(&mut data, descriptor.addr()).unwrap();
                self.taken.lock().unwrap().push(data);
            }
            vring.add_used(head, 0).unwrap();
            vring.signal_used_queue().unwrap();
        }
        Ok(())
    }
}

#[test]
fn a_daemon_of_rust_vmms_making_serves_a_function() {
    for tracking in ["off", "on"] {
        serve(tracking);
    }
}

fn serve(tracking: &str) {
    let place = Place::new();
    let taken = Arc::new(Mutex::new(Vec::new()));
    let sink = Sink { memory: None, taken: Arc::clone(&taken) };
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
    let mut listener = Listener::new(&place.socket, false).unwrap();
    let daemon = std::thread::spawn(move || {
        let mut daemon =
            VhostUserDaemon::new("sink".into(), Arc::new(Mutex::new(sink)), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        let _ = daemon.wait();
    });

    let mut bench = Bench::new(&format!("type=blk,queues=2,tracking={tracking}"), &place);
    assert_eq!(bench.config(0, 4), [0, 1, 2, 3]);
    bench.drive();
    bench.send(0, b"one");
    bench.ring_doorbell(0);
    bench.serve_until(|bench| bench.used(0) == [0]);
    bench.send(1, b"two");
    bench.notify(1);
    bench.serve_until(|bench| bench.used(1) == [0]);
    bench.serve_until(|bench| bench.signals(1) + bench.signals(2) > 0);

    bench.command(false);
    bench.send(0, b"three");
    bench.ring_doorbell(0);
    bench.map(0x8000_0000, 0x1000, 0x2000);
    bench.unmap(0x8000_0000, 0x2000);
    assert_eq!(bench.used(0), [0], "it waits");
    bench.command(true);
    bench.serve_until(|bench| bench.used(0) == [0, 1]);
    assert_eq!(*taken.lock().unwrap(), [&b"one"[..], b"two", b"three"]);

    bench.mask(2, false);
    bench.mask(1, true);
    bench.signals(1);
    bench.send(0, b"four");
    bench.ring_doorbell(0);
    bench.serve_until(|bench| {
        let mut pending = [0];
        bench.function.msix_pending_read(0, &mut pending);
        pending == [0b10]
    });
    assert!(!bench.needs_reset());
    bench.set_status(0);
    drop(bench);
    daemon.join().unwrap();
}
