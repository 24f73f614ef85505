//! Moving to another process.

use super::super::layout::common as at;
use super::super::{Backing, CoreBacking};
use super::bench::{ALL_SET, Bench, DEVICE};
use super::core::{Echo, FEATURE, Told};
use crate::devices::Device;
use crate::devices::virtio::InFlight;
use crate::devices::virtio::spec::feature;
use crate::pci::BarIndex;

#[test]
fn a_function_goes_on_where_it_was_with_what_was_under_way() {
    let mut from = Bench::driven(2, FEATURE | feature::EVENT_IDX);
    from.write(BarIndex::BAR0, DEVICE, &[0x11, 0x22]);
    let done = from.send(0, b"done");
    from.kick(0);
    assert_eq!(from.used(0), [(done, b"done".to_vec())]);
    from.core.state().holds = true;
    let held = from.send(0, b"held");
    from.kick(0);
    let unseen = from.send(1, b"unseen");

    let mut to = from.moved();
    assert_eq!(
        to.core.take_told(),
        [
            Told::Quiesced,
            Told::Reset,
            Told::Started(FEATURE | feature::EVENT_IDX | feature::VERSION_1)
        ]
    );
    to.set_used_event(0, 1);
    to.resume();
    let request = InFlight { queue: 0, head: held };
    assert_eq!(to.core.take_told(), [Told::Resubmitted(request)]);
    assert_eq!(to.used(0), [(held, b"held".to_vec())]);
    assert_eq!(to.used(1), [(unseen, b"unseen".to_vec())]);
    assert_eq!(to.messages(), [1, 1, 0]);
    assert_eq!(to.status(), ALL_SET);
    assert_eq!(to.field(DEVICE, 2), 0x2211);
    // It goes on from there.
    let next = to.send(0, b"next");
    to.kick(0);
    assert_eq!(to.used(0), [(next, b"next".to_vec())]);
}

#[test]
fn every_register_moves() {
    let mut from = Bench::driven(2, FEATURE);
    from.core.state().surroundings = Some(Ok(1));
    from.with(|device, context| device.reload(context)).unwrap();
    from.set(at::DEVICE_FEATURE_SELECT, 4, 1);
    from.set(at::QUEUE_SELECT, 2, 1);
    let mut to = from.moved();
    to.resume();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let fields = [(0, 4), (4, 4), (8, 4), (12, 4), (0x10, 2), (0x14, 1), (0x15, 1), (0x16, 2)];
    let of_queue = [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8), (0x1000, 1)];
    for (offset, width) in fields.into_iter().chain(of_queue) {
        before.push(from.field(offset, width));
        after.push(to.field(offset, width));
    }
    assert_eq!(before, after);
}

#[test]
fn what_is_under_way_waits_for_bus_mastering() {
    let mut from = Bench::driven(1, 0);
    from.core.state().holds = true;
    let held = from.send(0, b"held");
    from.kick(0);
    from.bus_master(false);
    let mut to = from.moved();
    to.resume();
    assert!(to.used(0).is_empty());
    // And moves on with the function.
    let mut third = to.moved();
    third.resume();
    third.bus_master(true);
    assert_eq!(third.used(0), [(held, b"held".to_vec())]);
}

#[test]
fn a_function_that_stopped_and_goes_on_here_loses_nothing() {
    let mut bench = Bench::driven(1, 0);
    bench.core.state().holds = true;
    let held = bench.send(0, b"held");
    bench.kick(0);
    bench.device.quiesce();
    let missed = bench.send(0, b"missed");
    bench.core.state().holds = false;
    bench.resume();
    let mut used = bench.used(0);
    used.sort();
    assert_eq!(used, [(held, b"held".to_vec()), (missed, b"missed".to_vec())]);
}

#[test]
fn a_device_that_failed_moves_as_it_is() {
    let mut from = Bench::driven(1, 0);
    from.make_available(0, 0x77);
    from.kick(0);
    let status = from.status();
    let mut to = from.moved();
    to.resume();
    assert_eq!(to.status(), status);
}

#[test]
fn a_state_that_no_function_can_have_is_refused() {
    let mut from = Bench::driven(2, FEATURE);
    from.core.state().holds = true;
    from.send(0, b"held");
    from.kick(0);
    let state = from.device.saved().unwrap().save();
    let mut to = from.successor();
    let mut refused = 0;
    for index in 0..state.len() {
        for bit in 0..8 {
            let mut damaged = state.clone();
            damaged[index] ^= 1 << bit;
            if to.device.saved().unwrap().restore(&damaged).is_err() {
                refused += 1;
                assert_eq!(to.status(), 0, "bit {bit} of byte {index}");
            }
            // Whatever it was, it can be lived with.
            to.resume();
            to.kick(0);
            to.wake(to.core_wake());
        }
        let cut = to.device.saved().unwrap().restore(&state[..index]);
        assert!(cut.is_err(), "{index} bytes");
        assert_eq!(to.status(), 0);
    }
    assert!(refused > 0);
    let longer = [&state[..], &[0]].concat();
    assert!(to.device.saved().unwrap().restore(&longer).is_err());
    assert!(to.device.saved().unwrap().restore(&state).is_ok());

    // Of another number of queues.
    for queues in [1, 3] {
        let mut other = Bench::new(queues);
        assert!(other.device.saved().unwrap().restore(&state).is_err(), "{queues}");
    }
}

#[test]
fn requests_that_can_not_be_under_way_are_refused() {
    let features = Some(feature::VERSION_1);
    type Requests = &'static [(u16, u16)];
    let rows: [(Requests, Option<u64>, bool); 7] = [
        (&[], features, true),
        (&[], None, true),
        (&[(0, 7), (1, 7), (0, 0)], features, true),
        (&[(0, 0)], None, false),
        (&[(0, 8)], features, false),
        (&[(2, 0)], features, false),
        (&[(1, 3), (1, 3)], features, false),
    ];
    for (in_flight, features, taken) in rows {
        let mut backing = CoreBacking::new(Box::new(Echo::new(2))).unwrap();
        // The first version, requests, and the core's own state.
        let state = postcard::to_allocvec(&(0_u8, in_flight, vec![0_u8; 8])).unwrap();
        let result = backing.restore(&state, features);
        assert_eq!(result.is_ok(), taken, "{in_flight:?} {features:?}");
    }
}
