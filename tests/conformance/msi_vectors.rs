//! "VFIO_USER_DEVICE_SET_IRQS" with more than one vector, on a device of the test's own.

use std::os::fd::AsFd;

use barkeep_backend::devices::{Context, Device};
use barkeep_backend::pci::{
    BarIndex, BarKind, BarSpec, ClassCode, FunctionSpec, Ids, MsiSpec, MsiVectors,
};
use barkeep_tests::backend::Backend;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{Payload, command};
use barkeep_tests::peer::requests::{CONFIG, info, irq::*, pci, set_irqs};
use rustix::io::Errno;

const VECTORS: usize = 8;

/// Sends the MSI whose number is written to its I/O or memory BAR.
struct Bells;

impl Device for Bells {
    fn spec(&self) -> FunctionSpec {
        FunctionSpec {
            bars: vec![BarSpec {
                index: BarIndex::BAR0,
                kind: BarKind::Memory32 { prefetchable: false },
                size: 4096,
            }],
            msi: Some(MsiSpec { vectors: MsiVectors::Eight, per_vector_masking: true }),
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 0xbe11,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    fn bar_read(&mut self, _: BarIndex, _: u64, _: &mut [u8], _: &mut Context<'_>) {}

    fn bar_write(&mut self, _: BarIndex, _: u64, data: &[u8], context: &mut Context<'_>) {
        context.raise_msi(data[0]);
    }

    fn reset(&mut self) {}
}

struct Ringer {
    _backend: Backend,
    peer: Peer,
    counters: [EventCounter; VECTORS],
}

/// A client that has granted all eight vectors and connected them.
fn ringer() -> Ringer {
    let backend = Backend::host(vec![Box::new(Bells)]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
    let control = peer.capability(pci::MSI) + 2;
    peer.set_config_u16(control, 3 << 4 | 1);
    let counters: [EventCounter; VECTORS] = std::array::from_fn(|_| EventCounter::new());
    let fds: Vec<_> = counters.iter().map(AsFd::as_fd).collect();
    let all = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 8, &[]);
    let _ = peer.call_with_fds(command::SET_IRQS, &all, &fds).success();
    Ringer { _backend: backend, peer, counters }
}

impl Ringer {
    fn ring_all(&mut self) {
        for vector in 0..8 {
            self.peer.write(0, 0, &[vector]);
        }
    }

    fn heard(&self) -> [u64; VECTORS] {
        self.counters.each_ref().map(EventCounter::take)
    }

    fn request(&mut self, flags: u32, start: u32, count: u32, data: &[u8]) {
        let body = set_irqs(flags | ACTION_TRIGGER, MSI, start, count, data);
        let _ = self.peer.call(command::SET_IRQS, &body).success();
    }
}

#[test]
fn each_vector_signals_the_eventfd_of_its_place() {
    let mut ringer = ringer();
    let reply = ringer.peer.call(command::GET_IRQ_INFO, &info(16, MSI)).success();
    assert_eq!(reply, Payload::new().u32(16).u32(0b1001).u32(MSI).u32(8).done());
    ringer.peer.write(0, 0, &[5]);
    assert_eq!(ringer.heard(), [0, 0, 0, 0, 0, 1, 0, 0]);
    ringer.ring_all();
    assert_eq!(ringer.heard(), [1; 8]);
}

#[test]
fn a_part_of_the_vectors_can_be_changed() {
    let mut ringer = ringer();
    ringer.request(DATA_EVENTFD, 2, 3, &[]);
    ringer.ring_all();
    assert_eq!(ringer.heard(), [1, 1, 0, 0, 0, 1, 1, 1], "without descriptors: deassigned");

    let other = EventCounter::new();
    let body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 6, 2, &[]);
    let fds = [other.as_fd(), other.as_fd()];
    let _ = ringer.peer.call_with_fds(command::SET_IRQS, &body, &fds).success();
    ringer.ring_all();
    assert_eq!((ringer.heard(), other.take()), ([1, 1, 0, 0, 0, 1, 0, 0], 2));

    ringer.request(DATA_NONE, 0, 0, &[]);
    ringer.ring_all();
    assert_eq!((ringer.heard(), other.take()), ([0; 8], 0), "all disabled");
}

#[test]
fn a_client_triggers_a_part_of_the_vectors() {
    let mut ringer = ringer();
    ringer.request(DATA_NONE, 1, 2, &[]);
    assert_eq!(ringer.heard(), [0, 1, 1, 0, 0, 0, 0, 0]);
    ringer.request(DATA_BOOL, 4, 3, &[1, 0, 7]);
    assert_eq!(ringer.heard(), [0, 0, 0, 0, 1, 0, 1, 0]);
    ringer.request(DATA_BOOL, 3, 0, &[]);
    assert_eq!(ringer.heard(), [0; 8], "none of them");
}

#[test]
fn a_range_that_leaves_the_vectors_changes_nothing() {
    let mut ringer = ringer();
    let other = EventCounter::new();
    for (start, count) in [(7, 2), (8, 1), (0, 9), (u32::MAX, 1), (1, u32::MAX)] {
        for flags in [DATA_NONE, DATA_EVENTFD] {
            let body = set_irqs(flags | ACTION_TRIGGER, MSI, start, count, &[]);
            ringer.peer.expect_errno(command::SET_IRQS, &body, Errno::INVAL);
        }
    }
    let nine = [other.as_fd(); 9];
    let body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 9, &[]);
    ringer.peer.call_with_fds(command::SET_IRQS, &body, &nine).failure(Errno::INVAL);
    ringer.ring_all();
    assert_eq!((ringer.heard(), other.take()), ([1; 8], 0));
}

#[test]
fn a_bad_descriptor_among_good_ones_changes_nothing() {
    let mut ringer = ringer();
    let (pipe, _other_end) = rustix::pipe::pipe().expect("a pipe");
    let other = EventCounter::new();
    let body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 2, &[]);
    let fds = [other.as_fd(), pipe.as_fd()];
    ringer.peer.call_with_fds(command::SET_IRQS, &body, &fds).failure(Errno::INVAL);
    ringer.ring_all();
    assert_eq!((ringer.heard(), other.take()), ([1; 8], 0));
}

#[test]
fn vectors_that_were_not_granted_or_are_masked_are_not_sent() {
    let mut ringer = ringer();
    let msi = ringer.peer.capability(pci::MSI);
    let mask = msi + 0x10;
    ringer.peer.write_u32(CONFIG, mask, 0b10);
    ringer.ring_all();
    assert_eq!(ringer.heard(), [1, 0, 1, 1, 1, 1, 1, 1]);
    ringer.peer.write_u32(CONFIG, mask, 0);
    assert_eq!(ringer.heard(), [0, 1, 0, 0, 0, 0, 0, 0], "it was pending");

    ringer.peer.set_config_u16(msi + 2, 1 << 4 | 1);
    ringer.ring_all();
    assert_eq!(ringer.heard(), [1, 1, 0, 0, 0, 0, 0, 0], "two are granted");
}
