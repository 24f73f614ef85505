//! A daemon without memory for requests in flight.

use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::bench::{Bench, ENTRIES, MEMORY, Place, SIZE, bridge, disk};
use super::fake::{Fake, PATIENCE, Traits};
use crate::devices::virtio::spec::feature;

fn forgetful() -> Traits {
    Traits::disk().without(Protocol::INFLIGHT_SHMFD)
}

fn send(bench: &mut Bench, queue: u16, data: &[u8]) {
    bench.send(queue, data);
    bench.notify(queue);
}

#[test]
fn its_rings_are_ours_and_the_data_is_the_guests() {
    let (mut bench, fake, _place) = disk(forgetful());
    let state = fake.state();
    assert_eq!(state.running(), [0, 1]);
    let ring = &state.vrings[&0];
    let guest = MEMORY..MEMORY + SIZE;
    assert_eq!((ring.descriptors, ring.size, ring.base), (MEMORY, ENTRIES.into(), 0));
    assert!(!guest.contains(&ring.available) && !guest.contains(&ring.used));
    assert_eq!(state.features.unwrap() & feature::EVENT_IDX, 0);
    drop(state);

    bench.set_up(feature::VERSION_1);
    for (kick, head) in [(true, 0), (false, 1)] {
        bench.send(0, b"hello");
        if kick {
            bench.notify(0)
        } else {
            bench.ring_doorbell(0)
        }
        bench.serve();
        assert!(fake.state().kicked(0));
        assert_eq!(fake.take(0), Some(head));
        let mut data = [0; 5];
        let state = fake.state();
        state.read(state.buffer(0, head), &mut data);
        drop(state);
        assert_eq!(&data, b"hello");
        fake.give_back(0, head);
        assert_eq!(bench.signals(1), 0, "it passes through here");
        bench.serve();
        assert_eq!(bench.signals(1), 1);
    }
    assert_eq!(bench.used(0), [0, 1]);
}

#[test]
fn another_daemon_gets_exactly_what_the_last_one_had_not_given_back() {
    let (mut bench, mut fake, place) = disk(forgetful());
    for data in ["one", "two", "three", "four"] {
        send(&mut bench, 0, data.as_bytes());
    }
    for head in 0..4 {
        assert_eq!(fake.take(0), Some(head));
    }
    // Much more than the ring has room for, out of order.
    fake.give_back(0, 1);
    bench.serve();
    for _ in 0..3 * ENTRIES {
        bench.make_available(0, 1);
        bench.notify(0);
        assert_eq!(fake.take(0), Some(1));
        fake.give_back(0, 1);
        bench.serve();
    }
    fake.give_back(0, 3);
    fake.die();
    bench.serve();
    assert_eq!(bench.last_used(0), 3, "what the daemon had given back is the driver's");
    send(&mut bench, 0, b"five");
    bench.ring_doorbell(0);

    let fake = Fake::start(&place.socket, forgetful());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    let taken = [fake.take(0), fake.take(0), fake.take(0), fake.take(0)];
    assert_eq!(taken, [Some(0), Some(2), Some(4), None]);
    for head in [4, 0, 2] {
        fake.give_back(0, head);
    }
    bench.serve();
    assert_eq!(bench.last_used(0), 2);
    assert!(!bench.needs_reset());
}

#[test]
fn what_a_daemon_that_is_gone_writes_afterwards_is_nobodys() {
    let (mut bench, mut fake, place) = disk(forgetful());
    send(&mut bench, 0, b"one");
    assert_eq!(fake.take(0), Some(0));
    let state = fake.state();
    let used = state.vrings[&0].used;
    let region =
        state.memory.iter().find(|region| region.user <= used && used < region.user + region.size);
    let (file, at) = (region.unwrap().file.try_clone().unwrap(), used - region.unwrap().user);
    drop(state);
    fake.die();
    bench.serve();
    let fake = Fake::start(&place.socket, forgetful());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    std::os::unix::fs::FileExt::write_all_at(&file, &7_u16.to_le_bytes(), at + 2).unwrap();
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);
    bench.serve();
    assert_eq!(bench.used(0), [0]);
    assert_eq!(fake.state().connections, 1);
}

#[test]
fn rings_are_stopped_when_nothing_is_under_way_any_more() {
    let (mut bench, fake, _place) = disk(forgetful());
    send(&mut bench, 0, b"one");
    assert_eq!(fake.take(0), Some(0));
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| bench.command(false));
        fake.listen();
        std::thread::yield_now();
        assert_eq!(fake.heard(FrontendReq::GET_VRING_BASE), 0);
        fake.give_back(0, 0);
        stopping.join().unwrap();
    });
    assert_eq!(fake.heard(FrontendReq::GET_VRING_BASE), 2);
    assert_eq!(bench.used(0), [] as [u32; 0], "not without bus mastering");
    send(&mut bench, 0, b"two");
    bench.serve();
    bench.command(true);
    assert_eq!(bench.used(0), [0]);
    assert!(bench.signals(1) > 0);
    assert_eq!(fake.state().vrings[&0].base, 1);
    assert_eq!(fake.take(0), Some(1), "what was asked for meanwhile");
}

#[test]
fn what_was_given_back_waits_for_the_memory_of_the_drivers_rings() {
    let (mut bench, fake, _place) = disk(forgetful());
    send(&mut bench, 0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);
    bench.unmap(MEMORY, SIZE);
    bench.serve();
    assert_eq!(bench.used(0), [] as [u32; 0]);
    bench.map(MEMORY, 0, SIZE);
    assert_eq!(bench.used(0), [0]);
    assert!(bench.signals(1) > 0);
    assert!(!bench.needs_reset());
}

#[test]
fn a_queue_that_is_reset_alone_begins_anew() {
    let traits = Traits { features: forgetful().features | feature::RING_RESET, ..forgetful() };
    let (mut bench, fake, _place) = disk(traits);
    for head in 0..3 {
        send(&mut bench, 0, b"data");
        assert_eq!(fake.take(0), Some(head));
        fake.give_back(0, head);
        bench.serve();
    }
    bench.reset_queue(0);
    bench.enable_queue(0);
    assert_eq!(fake.state().vrings[&0].base, 0);
    send(&mut bench, 0, b"data");
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);
    bench.serve();
    assert_eq!(bench.used(0), [0]);
}

#[test]
fn another_driver_inherits_nothing() {
    let (mut bench, mut fake, place) = disk(forgetful());
    send(&mut bench, 0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.die();
    bench.serve();
    bench.set_up(feature::VERSION_1);
    let fake = Fake::start(&place.socket, forgetful());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    assert_eq!(fake.take(0), None);
}

#[test]
fn a_daemon_that_gives_back_what_it_does_not_have_is_left() {
    for (head, index) in [(7_u32, 1_u16), (0x1_0000, 1), (u32::MAX, 1), (0, 2), (0, 0x8000)] {
        let (mut bench, fake, _place) = disk(forgetful());
        send(&mut bench, 0, b"one");
        assert_eq!(fake.take(0), Some(0));
        let state = fake.state();
        let used = state.vrings[&0].used;
        state.write(used + 4, &head.to_le_bytes());
        state.write(used + 2, &index.to_le_bytes());
        state.signal(0);
        drop(state);
        bench.serve_until(|_| fake.state().connections == 2 && fake.state().running() == [0, 1]);
        assert!(!bench.needs_reset());
        let again = if head == 0 { None } else { Some(0) };
        assert_eq!(fake.take(0), again, "{head} {index}");
    }
}

#[test]
fn a_driver_that_asks_for_nonsense_needs_a_reset() {
    type Ask = fn(&mut Bench);
    let rows: [(&str, Ask); 3] = [
        ("a descriptor that is not there", |bench| bench.make_available(0, ENTRIES)),
        ("the same request twice", |bench| {
            bench.send(0, b"one");
            bench.make_available(0, 0);
        }),
        ("more requests than there is room for", |bench| bench.overstate(0, ENTRIES + 1)),
    ];
    for (name, ask) in rows {
        let place = Place::new();
        let fake = Fake::start(&place.socket, forgetful());
        // The daemon may have requests by then, and gives none of them back.
        let bridge = bridge("type=blk", &place, Duration::from_secs(1)).unwrap();
        let mut bench = Bench::behind(bridge);
        bench.drive();
        ask(&mut bench);
        bench.notify(0);
        assert!(bench.needs_reset(), "{name}");
        drop(fake.wait(|state| state.running().is_empty()));
        let features = bench.offered();
        bench.set_up(features);
        assert!(!bench.needs_reset());
    }
}

#[test]
fn a_driver_that_does_not_want_interrupts_gets_none() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, forgetful());
    let mut bench = Bench::new("type=blk", &place);
    bench.drive();
    bench.set_up(feature::VERSION_1);
    bench.set_avail_flags(0, 1);
    send(&mut bench, 0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);
    bench.serve();
    assert_eq!(bench.used(0), [0]);
    assert_eq!(bench.signals(1), 0);
}

#[test]
fn an_operator_may_want_the_drivers_rings_to_be_the_daemons_all_the_same() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, forgetful());
    let mut bench = Bench::new("type=blk,tracking=off", &place);
    bench.drive();
    assert_eq!(fake.state().vrings[&0].available, MEMORY + 0x4000);

    let refused = |text: &str| bridge(text, &place, PATIENCE).unwrap_err().to_string();
    let line = "parameter 'tracking': 'perhaps' is neither on nor off";
    assert_eq!(refused("type=blk,tracking=perhaps"), line);
    assert_eq!(refused("type=rng,tracking=off"), "unknown parameter 'tracking'");
}

#[test]
fn a_window_in_the_way_moves_our_rings() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, forgetful());
    let mut bench = Bench::new("type=blk", &place);
    bench.map(1 << 46, 0, 0x1000);
    bench.drive();
    let state = fake.state();
    assert_eq!(state.running(), [0]);
    assert_eq!(state.vrings[&0].available, 1 << 47);
}
