//! What the driver is told.

use super::super::layout::common as at;
use super::bench::{ALL_SET, Bench, DEVICE, NO_VECTOR};
use crate::devices::Device;
use crate::devices::virtio::spec::{feature, status};
use crate::pci::BarIndex;

fn echo(bench: &mut Bench, queue: u16) {
    let head = bench.send(queue, b"abc");
    bench.kick(queue);
    assert_eq!(bench.used(queue), [(head, b"abc".to_vec())]);
}

fn reload(bench: &mut Bench, value: u8) {
    bench.core.state().surroundings = Some(Ok(value));
    bench.with(|device, context| device.reload(context)).unwrap();
}

#[test]
fn each_queue_has_its_message_and_the_pin_is_silent() {
    let mut bench = Bench::driven(2, 0);
    echo(&mut bench, 1);
    assert_eq!(bench.messages(), [0, 1, 0]);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [1, 0, 0]);
    assert_eq!((bench.edges(), bench.isr()), (0, 0));
}

#[test]
fn a_queue_without_a_vector_sends_none() {
    let mut bench = Bench::driven(2, 0);
    bench.set(at::QUEUE_SELECT, 2, 0);
    bench.set(at::QUEUE_MSIX_VECTOR, 2, NO_VECTOR);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0, 0]);
    bench.set(at::QUEUE_MSIX_VECTOR, 2, 2);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0, 1]);
}

#[test]
fn without_msix_the_pin_tells_until_the_isr_is_read() {
    let mut bench = Bench::new(2);
    bench.drive(0);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0, 0]);
    assert!(bench.function.intx_line());
    assert_eq!(bench.edges(), 1);
    assert_eq!(bench.edges(), 1, "still asserted when it is unmasked");
    // Another width clears nothing.
    assert_eq!(bench.field(super::bench::ISR, 2), 0xffff);
    assert_eq!(bench.isr(), 1);
    assert!(!bench.function.intx_line());
    assert_eq!(bench.isr(), 0);
    reload(&mut bench, 1);
    echo(&mut bench, 1);
    assert_eq!(bench.isr(), 3);
}

#[test]
fn a_pending_interrupt_follows_the_way_that_is_enabled() {
    let mut bench = Bench::new(1);
    bench.drive(0);
    echo(&mut bench, 0);
    bench.enable_msix(true);
    assert!(!bench.function.intx_line());
    bench.enable_msix(false);
    assert!(bench.function.intx_line());
    // A reset of the device takes it back.
    bench.set(at::DEVICE_STATUS, 1, 0);
    assert!(!bench.function.intx_line());
    assert_eq!(bench.isr(), 0);
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let mut bench = Bench::driven(1, 0);
    // VIRTQ_AVAIL_F_NO_INTERRUPT
    bench.put(super::bench::ring(0) + 0x1000, &[1, 0]);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0]);
}

#[test]
fn with_event_idx_the_driver_is_interrupted_where_it_asked() {
    let mut bench = Bench::driven(1, feature::EVENT_IDX);
    bench.set_used_event(0, 1);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0]);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [1, 0]);
    // Not again before it asks again.
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0]);
    bench.set_used_event(0, 3);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [1, 0]);
}

#[test]
fn event_idx_holds_for_a_queue_that_was_enabled_before_it_was_agreed_on() {
    let mut bench = Bench::new(1);
    bench.enable_msix(true);
    bench.set_up_queue(0);
    bench.drive(feature::EVENT_IDX);
    bench.set_used_event(0, 1);
    echo(&mut bench, 0);
    assert_eq!(bench.messages(), [0, 0]);
}

#[test]
fn a_configuration_that_changed_is_told_and_has_another_generation() {
    let mut bench = Bench::driven(1, 0);
    reload(&mut bench, 7);
    assert_eq!(bench.messages(), [0, 1]);
    assert_eq!(bench.field(at::CONFIG_GENERATION, 1), 1);
    assert_eq!(bench.field(DEVICE, 1), 7);
    // "Device Configuration Interrupt": with MSI-X as well (4.1.4.5.1).
    assert_eq!(bench.isr(), 2);
    bench.core.state().surroundings = Some(Err("no such file".into()));
    let error = bench.with(|device, context| device.reload(context)).unwrap_err();
    assert_eq!(error, "no such file");
    assert_eq!(bench.messages(), [0, 0]);
}

#[test]
fn a_driver_that_is_not_set_up_is_not_told_but_finds_another_generation() {
    let mut bench = Bench::new(1);
    bench.enable_msix(true);
    bench.set(at::CONFIG_MSIX_VECTOR, 2, 1);
    reload(&mut bench, 7);
    assert_eq!(bench.messages(), [0, 0]);
    assert_eq!((bench.field(at::CONFIG_GENERATION, 1), bench.isr()), (1, 0));
}

#[test]
fn a_malformed_ring_is_told_by_message() {
    let mut bench = Bench::driven(1, 0);
    bench.make_available(0, 0x77);
    bench.kick(0);
    assert_eq!(bench.status(), ALL_SET | status::DEVICE_NEEDS_RESET);
    assert_eq!(bench.messages(), [0, 1]);
    // Once.
    bench.kick(0);
    bench.write(BarIndex::BAR0, DEVICE, &[0]);
    assert_eq!(bench.messages(), [0, 0]);
}

#[test]
fn a_malformed_ring_is_told_by_the_pin() {
    let mut bench = Bench::new(1);
    bench.drive(0);
    bench.make_available(0, 0x77);
    bench.kick(0);
    assert_eq!(bench.status(), ALL_SET | status::DEVICE_NEEDS_RESET);
    assert!(bench.function.intx_line());
    assert_eq!(bench.isr(), 2);
}

#[test]
fn what_failed_before_the_driver_was_set_up_is_told_when_it_is() {
    let mut bench = Bench::new(1);
    bench.enable_msix(true);
    bench.set(at::QUEUE_DESC, 8, 8);
    bench.set(at::QUEUE_ENABLE, 2, 1);
    assert_eq!(bench.field(at::QUEUE_ENABLE, 2), 0);
    assert_eq!(bench.status(), status::DEVICE_NEEDS_RESET);
    bench.set(at::CONFIG_MSIX_VECTOR, 2, 1);
    assert_eq!(bench.messages(), [0, 0]);
    bench.negotiate(feature::VERSION_1);
    bench.set(at::DEVICE_STATUS, 1, ALL_SET.into());
    assert_eq!(bench.messages(), [0, 1]);
    assert!(bench.core.take_told().is_empty(), "it was not started");
}

#[test]
fn the_first_failure_is_told_and_no_other() {
    let mut bench = Bench::driven(1, 0);
    bench.with(|device, context| {
        device.call(context, |_, world| {
            world.needs_reset("first");
            world.needs_reset("second");
        });
    });
    assert_eq!(bench.messages(), [0, 1]);
}

#[test]
fn a_change_that_was_told_by_message_shows_when_msix_is_disabled() {
    let mut bench = Bench::driven(1, 0);
    reload(&mut bench, 7);
    assert!(!bench.function.intx_line());
    bench.enable_msix(false);
    assert!(bench.function.intx_line());
    assert_eq!(bench.isr(), 2);
    assert!(!bench.function.intx_line());
}
