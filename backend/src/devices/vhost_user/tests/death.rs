//! A daemon goes away, and another one comes.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::bench::{Bench, MEMORY, Place, SIZE, disk};
use super::fake::{Fake, Traits, Twist};
use crate::devices::virtio::spec::feature;

#[test]
fn a_daemon_that_comes_back_gets_everything_and_begins_anew_what_was_in_flight() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    for data in ["one", "two", "three"] {
        bench.send(0, data.as_bytes());
    }
    assert_eq!((fake.take(0), fake.take(0), fake.take(0)), (Some(0), Some(1), Some(2)));
    // Out of order: what is left is known by the memory in flight alone.
    fake.give_back(0, 1);
    assert_eq!(bench.signals(1), 1);
    fake.die();
    bench.serve();
    bench.send(0, b"four");
    bench.ring_doorbell(0);
    assert!(!bench.needs_reset());

    let fake = Fake::start(&place.socket, Traits::disk());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    let state = fake.state();
    assert_eq!((state.memory[0].guest, state.memory[0].size), (MEMORY, SIZE));
    assert!(state.kicked(0) && state.kicked(1), "every queue is kicked");
    drop(state);
    assert_eq!(fake.heard(FrontendReq::GET_INFLIGHT_FD), 0, "the last one's is handed on");
    let taken = [fake.take(0), fake.take(0), fake.take(0), fake.take(0)];
    assert_eq!(taken, [Some(0), Some(2), Some(3), None]);
    for head in [0, 2, 3] {
        fake.give_back(0, head);
    }
    assert_eq!(bench.used(0), [1, 0, 2, 3]);
    assert_eq!(bench.signals(1), 1 + 3, "the last one may not have come to that");
}

#[test]
fn the_function_stays_and_its_configuration_with_it() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    fake.die();
    bench.serve();
    assert_eq!(bench.config(0, 8), 64_u64.to_le_bytes());
    bench.write_config(32, &[1]);
    assert_eq!(bench.config(32, 1), [0], "there is nobody to write it to");
    bench.notify(0);
    bench.command(false);
    bench.command(true);
    bench.mask(1, true);
    bench.map(0x8000_0000, 0, 0x1000);

    let mut traits = Traits::disk();
    traits.config[..8].copy_from_slice(&65_u64.to_le_bytes());
    let fake = Fake::start(&place.socket, traits);
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    assert_eq!(bench.config(0, 8), 65_u64.to_le_bytes());
    assert_eq!(bench.signals(0), 1, "the driver is told of another configuration");
    assert_eq!(fake.state().memory.len(), 2, "what happened meanwhile has happened");
}

#[test]
fn a_daemon_that_is_missed_in_the_middle_of_something_is_waited_for() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    fake.die();
    // Without a look at the connection before.
    bench.command(false);
    bench.command(true);
    assert!(!bench.needs_reset());
    let fake = Fake::start(&place.socket, Traits::disk());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
}

#[test]
fn a_driver_that_comes_while_the_daemon_is_away_is_served_when_it_is_back() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.die();
    bench.serve();
    let features = bench.offered();
    bench.set_up(features);
    let fake = Fake::start(&place.socket, Traits::disk());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    assert_eq!(fake.heard(FrontendReq::GET_INFLIGHT_FD), 1, "nothing of another driver's");
    assert_eq!(fake.take(0), None);
}

#[test]
fn without_track_of_requests_only_an_idle_queue_goes_on() {
    for (busy, failed) in [(false, false), (true, true)] {
        let traits = Traits::disk().without(Protocol::INFLIGHT_SHMFD);
        let place = Place::new();
        let mut fake = Fake::start(&place.socket, traits.clone());
        let mut bench = Bench::new("type=blk,queues=2,tracking=off", &place);
        bench.drive();
        bench.send(0, b"one");
        assert_eq!(fake.take(0), Some(0));
        if !busy {
            fake.give_back(0, 0);
        }
        fake.die();
        bench.serve();
        bench.send(0, b"two");
        let fake = Fake::start(&place.socket, traits);
        bench.serve_until(|bench| bench.needs_reset() || fake.state().running() == [0, 1]);
        assert_eq!(bench.needs_reset(), failed);
        if !failed {
            assert_eq!(fake.take(0), Some(1));
        }
    }
}

#[test]
fn a_type_that_may_repeat_itself_begins_at_the_first_buffer_that_was_not_given_back() {
    let place = Place::new();
    let traits = Traits::disk().without(Protocol::INFLIGHT_SHMFD);
    let mut fake = Fake::start(&place.socket, traits.clone());
    let mut bench = Bench::new("type=net", &place);
    bench.drive();
    for data in ["one", "two", "three"] {
        bench.send(1, data.as_bytes());
    }
    assert_eq!((fake.take(1), fake.take(1)), (Some(0), Some(1)));
    fake.give_back(1, 0);
    fake.die();
    bench.serve();
    let fake = Fake::start(&place.socket, traits);
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    assert_eq!((fake.take(1), fake.take(1), fake.take(1)), (Some(1), Some(2), None));
}

#[test]
fn a_daemon_that_comes_back_with_less_needs_a_reset() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    fake.die();
    bench.serve();
    let less = Traits { features: Traits::disk().features & !(1 << 9), ..Traits::disk() };
    let _fake = Fake::start(&place.socket, less.clone());
    bench.serve_until(Bench::needs_reset);
    assert_eq!(bench.signals(0), 1);

    bench.set_up(feature::VERSION_1);
    assert!(!bench.needs_reset(), "with what it has it can be used");
}

#[test]
fn a_daemon_that_keeps_no_track_any_more_cannot_take_over() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.die();
    bench.serve();
    let _fake = Fake::start(&place.socket, Traits::disk().without(Protocol::INFLIGHT_SHMFD));
    bench.serve_until(Bench::needs_reset);
}

#[test]
fn a_queue_cannot_be_reset_while_the_daemon_that_tracks_it_is_away() {
    let traits = Traits::disk();
    let traits = Traits { features: traits.features | feature::RING_RESET, ..traits };
    let (mut bench, mut fake, _place) = disk(traits);
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.die();
    bench.serve();
    bench.reset_queue(0);
    assert!(bench.needs_reset());
}

#[test]
fn a_daemon_that_fails_again_and_again_is_tried_again_and_again() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    fake.die();
    bench.serve();
    let fake = Fake::start(&place.socket, Traits::disk());
    fake.twist(FrontendReq::GET_PROTOCOL_FEATURES, Twist::HangUp);
    bench.serve_until(|_| fake.state().connections >= 3);
    fake.state().twists.clear();
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    assert!(!bench.needs_reset());
}
