//! Queues are handed over, stopped and handed over again.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::bench::{Bench, ENTRIES, MEMORY, Place, SIZE, disk};
use super::fake::{Fake, Traits};
use crate::devices::virtio::spec::{feature, status};

#[test]
fn a_queue_is_handed_over_as_the_driver_set_it_up() {
    let (bench, fake, _place) = disk(Traits::disk());
    let state = fake.state();
    assert_eq!(state.running(), [0, 1]);
    for (queue, rings) in [(0, MEMORY), (1, MEMORY + 0x10000)] {
        let ring = &state.vrings[&queue];
        assert_eq!((ring.size, ring.base), (ENTRIES.into(), 0));
        let addresses = [ring.descriptors, ring.available, ring.used];
        assert_eq!(addresses, [rings, rings + 0x4000, rings + 0x8000]);
    }
    drop(state);
    drop(bench);
}

#[test]
fn requests_go_to_the_daemon_and_back_with_nobody_between() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    assert!(fake.state().kicked(0), "the first kick is ours");
    let head = bench.send(0, b"hello");
    bench.ring_doorbell(0);
    assert!(fake.state().kicked(0));
    assert_eq!(fake.take(0), Some(head));
    let mut data = [0; 5];
    let state = fake.state();
    state.read(state.buffer(0, head), &mut data);
    drop(state);
    assert_eq!(&data, b"hello");
    fake.give_back(0, head);
    assert_eq!(bench.signals(1), 1, "the client's own eventfd");
    assert_eq!(bench.used(0), [0]);

    bench.send(1, b"again");
    bench.notify(1);
    assert!(fake.state().kicked(1), "a write that is forwarded is a kick too");
}

#[test]
fn a_daemon_knows_whom_to_signal_before_it_can_begin() {
    let (_bench, fake, _place) = disk(Traits::disk());
    let state = fake.state();
    let first = |request| state.heard.iter().position(|heard| *heard == request).unwrap();
    assert!(first(FrontendReq::SET_VRING_CALL) < first(FrontendReq::SET_VRING_KICK));
}

#[test]
fn rings_run_only_while_the_driver_is_set_up() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, Traits::disk());
    let mut bench = Bench::new("type=blk,queues=2", &place);
    bench.command(true);
    let features = bench.offered();
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    bench.set_up(features);
    assert_eq!(fake.state().running(), [0, 1]);
    bench.set_status(0);
    assert_eq!(fake.state().running(), [] as [u32; 0]);
    assert!(fake.state().memory.is_empty(), "none of the guest's memory is left there");
    bench.set_status(ready);
    assert_eq!(fake.state().running(), [] as [u32; 0]);
}

#[test]
fn without_bus_mastering_the_daemon_waits_and_then_goes_on_where_it_was() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);

    bench.command(false);
    assert_eq!(fake.state().running(), [] as [u32; 0], "when the write is answered");
    bench.send(0, b"two");
    bench.ring_doorbell(0);

    bench.command(true);
    let state = fake.state();
    assert_eq!(state.running(), [0, 1]);
    assert_eq!(state.vrings[&0].base, 1);
    assert!(state.kicked(0), "what came meanwhile is not forgotten");
    drop(state);
    assert_eq!(fake.take(0), Some(1));
    fake.give_back(0, 1);
    assert_eq!(bench.used(0), [0, 1]);
}

#[test]
fn what_a_stopped_daemon_is_still_at_is_waited_for() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| bench.command(false));
        drop(fake.wait(|state| state.running().is_empty()));
        // It has something to signal all the same.
        drop(fake.wait(|state| state.vrings[&0].call.is_some()));
        fake.give_back(0, 0);
        stopping.join().unwrap();
    });
    assert_eq!(bench.used(0), [0]);
    bench.serve();
    bench.command(true);
    assert_eq!(bench.signals(1), 1, "told when it can be");
    let state = fake.state();
    assert_eq!((state.vrings[&0].base, state.connections), (1, 1));
    assert_eq!(state.vrings[&0].resubmitted, [] as [u16; 0]);
}

#[test]
fn memory_is_let_go_of_before_the_client_takes_it() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.map(0x8000_0000, 0, 0x1000);
    fake.listen();
    use crate::devices::Device;
    bench.device.quiesce();
    assert_eq!(fake.state().running(), [] as [u32; 0]);
    assert_eq!(fake.heard(FrontendReq::GET_VRING_BASE), 2);
    bench.rewired();
    assert_eq!(fake.state().running(), [0, 1]);
}

#[test]
fn a_queue_that_is_reset_alone_starts_again_alone() {
    let traits = Traits::disk();
    let traits = Traits { features: traits.features | feature::RING_RESET, ..traits };
    let (mut bench, fake, _place) = disk(traits);
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);
    bench.reset_queue(0);
    assert_eq!(fake.state().running(), [1]);
    bench.enable_queue(0);
    let state = fake.state();
    assert_eq!(state.running(), [0, 1]);
    assert_eq!(state.vrings[&0].base, 0);
}

#[test]
fn a_queue_outside_of_the_daemons_memory_is_not_served() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, Traits::disk());
    let mut bench = Bench::new("type=rng", &place);
    bench.command(true);
    let features = bench.offered();
    bench.set_up_at(features, MEMORY + SIZE - 0x8100);
    assert_eq!(fake.state().running(), [] as [u32; 0]);
    bench.set_up(features);
    assert!(!bench.needs_reset());
    assert_eq!(fake.state().running(), [0]);
}

#[test]
fn a_ring_that_the_daemon_finds_broken_needs_a_reset() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let error = fake.state().vrings[&0].error.as_ref().unwrap().try_clone().unwrap();
    rustix::io::write(&error, &1_u64.to_ne_bytes()).unwrap();
    bench.serve_until(Bench::needs_reset);
    assert_eq!(bench.signals(0), 1, "the driver is told");
    assert_eq!(fake.state().running(), [] as [u32; 0]);

    let features = bench.offered();
    bench.set_up(features);
    rustix::io::write(&error, &1_u64.to_ne_bytes()).unwrap();
    bench.serve();
    assert!(!bench.needs_reset(), "that was another driver's");
    assert_eq!(fake.state().running(), [0, 1]);
}

#[test]
fn a_queue_that_is_not_the_daemons_is_not_handed_over() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, Traits::disk().without(Protocol::CONFIG));
    let mut bench = Bench::new("type=vsock,guest-cid=3", &place);
    bench.drive();
    assert_eq!(bench.queues(), 3);
    assert_eq!(fake.state().running(), [0, 1]);
    bench.notify(2);
    bench.serve();
}
