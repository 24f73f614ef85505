//! Queues, and when they are served.

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::layout::common as at;
use super::bench::{ALL_SET, Bench, NO_VECTOR, ring};
use super::core::{QUEUE_SIZE, Told};
use crate::devices::Device;
use crate::devices::virtio::spec::{descriptor, feature, status};
use crate::pci::{BarIndex, spec};

#[test]
fn a_request_is_served_by_a_write_and_by_a_doorbell() {
    let mut bench = Bench::driven(2, 0);
    let head = bench.send(1, b"by write");
    bench.kick(1);
    assert_eq!(bench.used(1), [(head, b"by write".to_vec())]);

    let head = bench.send(1, b"by doorbell");
    let doorbell = bench.device.doorbells(BarIndex::BAR0).remove(1);
    assert_eq!((doorbell.offset, doorbell.width, doorbell.value), (0x5000, 2, None));
    doorbell.eventfd.signal();
    let ready: Vec<usize> = {
        let wakes = bench.device.wakes();
        let mut fds: Vec<_> = wakes.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        (0..fds.len()).filter(|index| !fds[*index].revents().is_empty()).collect()
    };
    assert_eq!(ready, [1]);
    bench.wake(1);
    assert_eq!(bench.used(1), [(head, b"by doorbell".to_vec())]);
}

#[test]
fn only_a_notification_kicks() {
    let mut bench = Bench::driven(1, 0);
    bench.send(0, b"x");
    let before = bench.core.state().calls;
    for (offset, width) in [(0x4000, 1), (0x4000, 8), (0x4002, 2), (0x5000, 2), (0x3ffe, 2)] {
        bench.write(BarIndex::BAR0, offset, &vec![0; width]);
    }
    assert_eq!(bench.core.state().calls, before);
    bench.write(BarIndex::BAR0, 0x4000, &[0; 4]);
    assert_eq!(bench.core.state().calls, before + 1);
}

#[test]
fn nothing_is_served_before_the_driver_is_set_up() {
    let mut bench = Bench::new(1);
    bench.negotiate(feature::VERSION_1);
    bench.set_up_queue(0);
    bench.send(0, b"early");
    bench.kick(0);
    assert!(bench.used(0).is_empty());
    // The kick was not in vain.
    bench.set(at::DEVICE_STATUS, 1, ALL_SET.into());
    assert_eq!(bench.used(0).len(), 1);
}

#[test]
fn a_malformed_chain_stops_the_device_until_its_reset() {
    let mut bench = Bench::driven(2, 0);
    bench.core.take_told();
    let good = bench.send(0, b"before");
    bench.describe(0, 6, ring(0) + 0x3000, 4, descriptor::NEXT, 6);
    bench.make_available(0, 6);
    bench.kick(0);
    // What came before is the driver's, with its interrupt.
    assert_eq!(bench.used(0), [(good, b"before".to_vec())]);
    assert_eq!(bench.messages(), [1, 0, 1]);
    assert_eq!(bench.core.take_told(), [Told::Quiesced]);
    bench.send(1, b"after");
    bench.kick(1);
    bench.wake(1);
    bench.bus_master(false);
    bench.bus_master(true);
    assert!(bench.used(1).is_empty());

    bench.set(at::DEVICE_STATUS, 1, 0);
    assert_eq!(bench.status(), 0);
    bench.drive(0);
    let head = bench.send(1, b"again");
    bench.kick(1);
    assert_eq!(bench.used(1), [(head, b"again".to_vec())]);
}

#[test]
fn rings_that_are_not_in_memory_are_told() {
    let mut bench = Bench::driven(1, 0);
    bench.unmap_memory();
    bench.kick(0);
    assert_eq!(bench.status(), ALL_SET | status::DEVICE_NEEDS_RESET);
}

#[test]
fn memory_that_moves_is_looked_up_anew() {
    let mut bench = Bench::driven(1, 0);
    bench.core.state().holds = true;
    let head = bench.send(0, b"kept");
    bench.kick(0);
    bench.unmap_memory();
    assert_eq!(bench.core.take_told().last(), Some(&Told::Quiesced));
    bench.map_memory();
    bench.wake(bench.core_wake());
    assert_eq!(bench.used(0), [(head, b"kept".to_vec())]);
}

#[test]
fn without_bus_mastering_nothing_moves_and_nothing_is_lost() {
    let mut bench = Bench::driven(2, 0);
    bench.core.state().holds = true;
    let held = bench.send(0, b"held");
    bench.kick(0);
    bench.core.take_told();
    bench.bus_master(false);
    assert_eq!(bench.core.take_told(), [Told::Quiesced]);
    let missed = bench.send(1, b"missed");
    bench.core.state().holds = false;
    bench.kick(1);
    bench.wake(1);
    bench.wake(bench.core_wake());
    assert!(bench.used(0).is_empty() && bench.used(1).is_empty());
    assert_eq!(bench.messages(), [0, 0, 0]);
    bench.bus_master(true);
    assert_eq!(bench.used(0), [(held, b"held".to_vec())]);
    assert_eq!(bench.used(1), [(missed, b"missed".to_vec())]);
    assert!(bench.messages()[..2].iter().all(|messages| *messages > 0));
    assert_eq!(bench.status(), ALL_SET);
}

#[test]
fn a_message_from_just_before_bus_mastering_went_off_is_sent_again() {
    let mut bench = Bench::driven(1, feature::EVENT_IDX);
    let head = bench.send(0, b"done");
    bench.kick(0);
    assert_eq!(bench.used(0), [(head, b"done".to_vec())]);
    assert_eq!(bench.messages(), [1, 0]);
    bench.bus_master(false);
    assert_eq!(bench.messages(), [0, 0]);
    bench.bus_master(true);
    assert_eq!(bench.messages(), [1, 0]);
}

#[test]
fn a_function_without_power_serves_nothing() {
    let mut bench = Bench::driven(1, 0);
    let pmcsr = bench.capability(spec::power::CAPABILITY_ID) + spec::power::PMCSR;
    bench.config_write(pmcsr, &[3]);
    let head = bench.send(0, b"cold");
    bench.wake(0);
    assert!(bench.used(0).is_empty());
    bench.config_write(pmcsr, &[0]);
    assert_eq!(bench.used(0), [(head, b"cold".to_vec())]);
}

#[test]
fn a_queue_that_is_reset_forgets_and_the_others_do_not() {
    let mut bench = Bench::driven(2, feature::RING_RESET);
    bench.core.state().holds = true;
    bench.send(0, b"forgotten");
    let kept = bench.send(1, b"kept");
    bench.kick(0);
    bench.kick(1);
    bench.core.take_told();
    bench.set(at::QUEUE_SELECT, 2, 0);
    bench.set(at::QUEUE_SIZE, 2, 4);
    bench.set(at::QUEUE_RESET, 2, 1);
    assert_eq!(bench.core.take_told(), [Told::Quiesced, Told::Stopped(0)]);
    let fields = [
        (at::QUEUE_RESET, 2, 0),
        (at::QUEUE_ENABLE, 2, 0),
        (at::QUEUE_SIZE, 2, QUEUE_SIZE.into()),
        (at::QUEUE_MSIX_VECTOR, 2, NO_VECTOR),
        (at::QUEUE_DESC, 8, 0),
        (at::QUEUE_DEVICE, 8, 0),
    ];
    for (offset, width, value) in fields {
        assert_eq!(bench.field(offset, width), value, "{offset:#x}");
    }
    bench.wake(0);
    bench.wake(bench.core_wake());
    assert!(bench.used(0).is_empty());
    assert_eq!(bench.used(1), [(kept, b"kept".to_vec())]);

    // It starts from the beginning, of its rings as well.
    bench.core.state().holds = false;
    bench.set_up_queue(0);
    let head = bench.send(0, b"new");
    bench.kick(0);
    assert_eq!(bench.used(0), [(head, b"new".to_vec())]);
    assert_eq!(bench.status(), ALL_SET);
}

#[test]
fn a_queue_is_not_reset_unless_that_was_agreed_on() {
    let mut bench = Bench::driven(1, 0);
    bench.core.take_told();
    bench.set(at::QUEUE_RESET, 2, 1);
    assert_eq!(bench.field(at::QUEUE_ENABLE, 2), 1);
    assert!(bench.core.take_told().is_empty());
}

#[test]
fn an_indirect_table_is_served_if_it_was_agreed_on() {
    for (features, served) in [(feature::INDIRECT_DESC, true), (0, false)] {
        let mut bench = Bench::driven(1, features);
        // The two descriptors of a request, as a table.
        bench.send(0, b"table");
        bench.describe(0, 6, ring(0), 32, descriptor::INDIRECT, 0);
        let table = bench.get(ring(0), 32);
        bench.put(ring(0) + 0x8000, &table);
        bench.describe(0, 6, ring(0) + 0x8000, 32, descriptor::INDIRECT, 0);
        bench.make_available(0, 6);
        bench.kick(0);
        let used = bench.used(0).len();
        assert_eq!(used, if served { 2 } else { 1 });
        assert_eq!(bench.status() == ALL_SET, served);
    }
}
