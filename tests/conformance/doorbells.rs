//! MSI-X, doorbells and "VFIO_USER_DEVICE_GET_REGION_IO_FDS", on ivshmem with vectors.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::peer::message::{command, u32_at, u64_at};
use barkeep_tests::peer::requests::{CONFIG, info, irq, pci, set_irqs};
use barkeep_tests::peer::{Peer, version_body};
use rustix::io::Errno;

const MSIX: u32 = 2;
const IV_POSITION: u64 = 8;
const DOORBELL: u64 = 12;
const MSIX_ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// A client with MSI-X on and an eventfd for each vector.
struct Node {
    peer: Peer,
    vectors: Vec<EventCounter>,
}

impl Node {
    fn new(backend: &Backend, index: usize, vectors: u32) -> Self {
        let mut peer = Peer::greeted(backend.socket_of(index));
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
        let counters: Vec<EventCounter> = (0..vectors).map(|_| EventCounter::new()).collect();
        for (vector, counter) in (0..).zip(&counters) {
            peer.set_eventfd(MSIX, vector, counter.as_fd());
        }
        let mut node = Self { peer, vectors: counters };
        node.msix(MSIX_ENABLE);
        node
    }

    fn msix(&mut self, control: u16) {
        let at = self.peer.capability(0x11) + 2;
        self.peer.set_config_u16(at, control);
    }

    /// Rings, and comes back when the server has noticed: the wakes of a round precede the requests
    /// of the next.
    fn ring(&mut self, value: u32) {
        self.peer.write_u32(0, DOORBELL, value);
        self.settle();
    }

    fn settle(&mut self) {
        for _ in 0..2 {
            self.peer.read_u32(0, IV_POSITION);
        }
    }

    fn taken(&self) -> Vec<u64> {
        self.vectors.iter().map(EventCounter::take).collect()
    }
}

fn pair() -> (tempfile::NamedTempFile, Backend) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let spec = format!("ivshmem,size=4K,vectors=3,path={}", file.path().display());
    let backend = Backend::serve(&[&spec, &spec, "ivshmem,size=4K,vectors=1", "ivshmem,size=4K"]);
    (file, backend)
}

#[test]
fn peers_over_the_same_file_ring_each_other_and_nobody_else() {
    let (_file, backend) = pair();
    let (mut first, mut second) = (Node::new(&backend, 0, 3), Node::new(&backend, 1, 3));
    let alone = Node::new(&backend, 2, 1);
    assert_eq!(first.peer.read_u32(0, IV_POSITION), 0);
    assert_eq!(second.peer.read_u32(0, IV_POSITION), 1);
    first.ring(1 << 16 | 2);
    second.settle();
    assert_eq!((first.taken(), second.taken()), (vec![0; 3], vec![0, 0, 1]));
    second.ring(1);
    first.settle();
    assert_eq!((first.taken(), second.taken()), (vec![0, 1, 0], vec![0; 3]));
    // Neither peers nor vectors that do not exist.
    for value in [2 << 16, 1 << 16 | 3, 0xffff_ffff, 1 << 16 | 0xffff] {
        first.ring(value);
        second.settle();
    }
    assert_eq!((first.taken(), second.taken(), alone.taken()), (vec![0; 3], vec![0; 3], vec![0]));
}

#[test]
fn messages_wait_for_masks_and_leave_only_with_msix_and_bus_mastering_on() {
    let (_file, backend) = pair();
    let mut node = Node::new(&backend, 0, 3);
    node.msix(MSIX_ENABLE | FUNCTION_MASK);
    node.ring(1);
    assert_eq!(node.taken(), [0; 3]);
    assert_eq!(node.peer.read(1, 0x800, 1), [0b10], "the pending bit");
    node.msix(MSIX_ENABLE);
    assert_eq!(node.taken(), [0, 1, 0]);
    assert_eq!(node.peer.read(1, 0x800, 1), [0]);
    node.peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    node.ring(1);
    assert_eq!(node.taken(), [0; 3], "no bus mastering");
    node.peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
    node.msix(0);
    node.ring(1);
    assert_eq!(node.taken(), [0; 3], "MSI-X off");
}

/// VFIO's clients keep the table to themselves, as QEMU does, so what they never wrote says nothing.
/// Whoever does forward it gets its masks obeyed.
#[test]
fn vector_masks_hold_for_clients_that_forward_the_table() {
    let (_file, backend) = pair();
    let mut node = Node::new(&backend, 0, 3);
    node.ring(0);
    assert_eq!(node.taken(), [1, 0, 0], "never written: the client's own affair");
    assert_eq!(node.peer.read_u32(1, 12), 1, "reads masked as at power-on");
    node.peer.write_u32(1, 16 + 12, 0);
    node.ring(0);
    node.ring(1);
    assert_eq!(node.taken(), [0, 1, 0], "vector 0 is masked");
    node.peer.write_u32(1, 12, 0);
    assert_eq!(node.taken(), [1, 0, 0], "it was pending");
    // Accesses of all widths, across entries and past the table.
    node.peer.write(1, 14, &[1; 6]);
    assert_eq!(node.peer.read(1, 12, 8), [0, 0, 0, 0, 0, 1, 1, 1], "an address is a doubleword's");
    assert_eq!(node.peer.read(1, 44, 8), [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn doorbells_are_offered_as_eventfds_that_ring_without_a_request() {
    let (_file, backend) = pair();
    let (mut first, mut second) = (Node::new(&backend, 0, 3), Node::new(&backend, 1, 3));
    let query = |argsz, index| info(argsz, index);
    let short = first.peer.call(command::GET_REGION_IO_FDS, &query(16, 0)).success();
    assert_eq!((u32_at(&short, 0), short.len()), (16 + 6 * 40, 16));
    let reply = first.peer.call(command::GET_REGION_IO_FDS, &query(4096, 0));
    assert_eq!((u32_at(&reply.body, 12), reply.fds.len()), (6, 6));
    let entries: Vec<_> = reply.body[16..].chunks_exact(40).collect();
    for entry in &entries {
        assert_eq!((u64_at(entry, 0), u64_at(entry, 8)), (DOORBELL, 4));
        assert_eq!((u32_at(entry, 20), u32_at(entry, 24)), (0, 1), "an ioeventfd with datamatch");
    }
    let wanted = 1 << 16 | 1;
    let entry = entries.iter().find(|entry| u64_at(entry, 32) == wanted).expect("its doorbell");
    let eventfd = &reply.fds[u32_at(entry, 16) as usize];
    rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
    second.settle();
    assert_eq!(second.taken(), [0, 1, 0]);
    for (index, count) in [(1, 0), (2, 0), (7, 0), (8, 0)] {
        let reply = first.peer.call(command::GET_REGION_IO_FDS, &query(16, index)).success();
        assert_eq!(u32_at(&reply, 12), count, "region {index}");
    }
    first.peer.expect_errno(command::GET_REGION_IO_FDS, &query(15, 0), Errno::INVAL);
    first.peer.expect_errno(command::GET_REGION_IO_FDS, &query(16, 9), Errno::INVAL);
}

/// "If not specified then the receiver must assume a value of 1": others are left to be forwarded.
#[test]
fn no_more_doorbells_are_offered_than_the_client_takes_descriptors() {
    let (_file, backend) = pair();
    let proposals = [("{}", 1), (r#"{"capabilities":{"max_msg_fds":4}}"#, 4)];
    for (json, most) in proposals {
        let mut peer = Peer::connect(backend.socket());
        let _ = peer.call(command::VERSION, &version_body(0, 1, json)).success();
        let reply = peer.call(command::GET_REGION_IO_FDS, &info(4096, 0));
        assert_eq!((u32_at(&reply.body, 12), reply.fds.len()), (most, most as usize));
    }
}

#[test]
fn msix_vectors_are_counted_set_and_taken_away_in_parts() {
    let (_file, backend) = pair();
    let mut node = Node::new(&backend, 0, 3);
    let reply = node.peer.call(command::GET_IRQ_INFO, &info(16, MSIX)).success();
    assert_eq!((u32_at(&reply, 4), u32_at(&reply, 12)), (1 | 1 << 3, 3), "EVENTFD, NORESIZE");
    let mut plain = Peer::greeted(backend.socket_of(3));
    let reply = plain.call(command::GET_IRQ_INFO, &info(16, MSIX)).success();
    assert_eq!((u32_at(&reply, 4), u32_at(&reply, 12)), (0, 0));

    // Each alone, by number, by flags, and the middle one taken away.
    let trigger = irq::DATA_NONE | irq::ACTION_TRIGGER;
    let _ = node.peer.set_irqs(trigger, MSIX, 1, 2).success();
    assert_eq!(node.taken(), [0, 1, 1]);
    let flags = irq::DATA_BOOL | irq::ACTION_TRIGGER;
    let _ = node.peer.call(command::SET_IRQS, &set_irqs(flags, MSIX, 0, 3, &[1, 0, 7])).success();
    assert_eq!(node.taken(), [1, 0, 1]);
    let _ = node.peer.set_irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, MSIX, 1, 1).success();
    let _ = node.peer.set_irqs(trigger, MSIX, 0, 3).success();
    assert_eq!(node.taken(), [1, 0, 1]);
    let _ = node.peer.set_irqs(trigger, MSIX, 0, 0).success();
    let _ = node.peer.set_irqs(trigger, MSIX, 0, 3).success();
    assert_eq!(node.taken(), [0; 3]);
    node.peer.set_irqs(trigger, MSIX, 3, 1).failure(Errno::INVAL);
    node.peer.set_irqs(trigger, MSIX, 2, 2).failure(Errno::INVAL);
    node.peer.set_irqs(trigger, MSIX, u32::MAX, 1).failure(Errno::INVAL);
    assert_eq!(node.peer.config_u16(0), 0x1af4);
}

#[test]
fn the_error_and_request_interrupts_carry_what_the_client_triggers() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for index in [3, 4] {
        let reply = peer.call(command::GET_IRQ_INFO, &info(16, index)).success();
        assert_eq!(u32_at(&reply, 12), 1);
        let counter = EventCounter::new();
        peer.set_eventfd(index, 0, counter.as_fd());
        // An Unsupported Request is not a reason to stop a VM.
        peer.read_u32(0, 0);
        assert_eq!(counter.take(), 0);
        let _ = peer.set_irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, index, 0, 1).success();
        assert_eq!(counter.take(), 1);
        peer.set_irqs(irq::DATA_NONE | irq::ACTION_MASK, index, 0, 1).failure(Errno::INVAL);
    }
}

#[test]
fn an_eventfd_unmasks_the_pin_without_a_request() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let (pin, unmask, other) = (EventCounter::new(), EventCounter::new(), EventCounter::new());
    peer.set_eventfd(irq::INTX, 0, pin.as_fd());
    let set = irq::DATA_EVENTFD | irq::ACTION_UNMASK;
    let body = set_irqs(set, irq::INTX, 0, 1, &[]);
    for eventfd in [&other, &unmask] {
        let _ = peer.call_with_fds(command::SET_IRQS, &body, &[eventfd.as_fd()]).success();
    }
    barkeep_tests::edu::enable(&mut peer);
    barkeep_tests::edu::raise(&mut peer);
    assert_eq!(pin.take(), 1);
    let signal = |eventfd: &EventCounter, peer: &mut Peer| {
        rustix::io::write(eventfd.as_fd(), &1_u64.to_ne_bytes()).unwrap();
        // The server looks at all that has happened before it looks again.
        (0..2).for_each(|_| _ = peer.read(CONFIG, 0, 4));
    };
    signal(&other, &mut peer);
    assert_eq!(pin.take(), 0, "replaced by the later one");
    for _ in 0..3 {
        signal(&unmask, &mut peer);
        assert_eq!(pin.take(), 1, "the level stays: signalled again");
    }
    barkeep_tests::edu::acknowledge(&mut peer);
    signal(&unmask, &mut peer);
    assert_eq!(pin.take(), 0);
    let _ = peer.set_irqs(set, irq::INTX, 0, 1).success();
    barkeep_tests::edu::raise(&mut peer);
    assert_eq!(pin.take(), 1);
    signal(&unmask, &mut peer);
    assert_eq!(pin.take(), 0, "taken away");
}
