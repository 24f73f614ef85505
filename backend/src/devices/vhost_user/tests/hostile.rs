//! Daemons that misbehave. What they can do is to be of no use.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use super::bench::{Bench, Place, bridge, disk};
use super::fake::{Fake, HAS_PROTOCOL, PATIENCE, Traits, Twist, message};
use crate::devices::virtio::spec::feature;

/// Short, for daemons that say nothing.
const SHORT: Duration = Duration::from_millis(50);

fn answer(request: FrontendReq, flags: u32, body: &[u8]) -> Twist {
    Twist::Raw(message(request.into(), flags, body))
}

/// Answers that no daemon may give, with what is asked.
fn nonsense() -> Vec<(FrontendReq, Twist)> {
    use FrontendReq as Req;
    let config = |offset: u32, size: u32, length: usize| {
        let header: Vec<u8> = [offset, size, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        answer(Req::GET_CONFIG, 5, &[header, vec![0; length]].concat())
    };
    let mut nonsense = vec![
        (Req::GET_CONFIG, config(0, 60, 59)),
        (Req::GET_CONFIG, config(0, 60, 61)),
        (Req::GET_CONFIG, config(0, 59, 59)),
        (Req::GET_CONFIG, config(4, 60, 60)),
        (Req::GET_CONFIG, config(0, 0, 0)),
        (Req::GET_CONFIG, config(0, 60, 4000)),
        (Req::GET_CONFIG, answer(Req::GET_CONFIG, 5, &[])),
        (Req::GET_CONFIG, answer(Req::GET_CONFIG, 5, &[0; 7])),
        (Req::GET_CONFIG, Twist::Fds(1)),
    ];
    // With what makes sense as any of these numbers.
    let number = (feature::VERSION_1 | HAS_PROTOCOL | 1 << 9).to_ne_bytes();
    for request in [Req::GET_FEATURES, Req::GET_PROTOCOL_FEATURES, Req::GET_QUEUE_NUM] {
        nonsense.extend([
            (request, answer(request, 5, &[0; 4])),
            (request, answer(request, 5, &[0; 9])),
            (request, answer(request, 1, &number)),
            (request, answer(request, 6, &number)),
            (request, answer(Req::GET_VRING_BASE, 5, &number)),
            (request, Twist::Raw(message(999, 5, &number))),
            (request, Twist::Raw([&message(request.into(), 5, &[])[..8], &[0xff; 4]].concat())),
            (request, Twist::Fds(1)),
            (request, Twist::Fds(12)),
            (request, Twist::HangUp),
        ]);
    }
    nonsense.extend([
        (Req::SET_PROTOCOL_FEATURES, Twist::HangUp),
        (Req::SET_OWNER, Twist::Refuse),
        (Req::SET_BACKEND_REQ_FD, Twist::Refuse),
        (Req::GET_MAX_MEM_SLOTS, answer(Req::GET_MAX_MEM_SLOTS, 5, &[0; 3])),
    ]);
    nonsense
}

#[test]
fn nonsense_at_the_start_is_one_clear_line() {
    for (request, twist) in nonsense() {
        let place = Place::new();
        let fake = Fake::start(&place.socket, Traits::disk());
        fake.twist(request, twist.clone());
        let error = bridge("type=blk", &place, PATIENCE).unwrap_err().to_string();
        assert!(error.starts_with("parameter 'socket': "), "{request:?} {twist:?}: {error}");
        assert!(!error.contains('\n'));
    }
}

#[test]
fn nonsense_of_a_daemon_that_comes_back_costs_the_guest_nothing_but_time() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    for (request, twist) in nonsense().into_iter().step_by(8) {
        fake.die();
        fake = Fake::start(&place.socket, Traits::disk());
        fake.twist(request, twist);
        bench.serve_until(|_| fake.was_left());
        assert!(!bench.needs_reset());
    }
    fake.state().twists.clear();
    bench.serve_until(|_| fake.state().running() == [0, 1]);
}

#[test]
fn a_daemon_that_fails_while_it_is_told_of_a_driver_is_tried_again() {
    use FrontendReq as Req;
    let inflight = |size: u64, queues: u16| {
        let mut body = [0; 24];
        body[..8].copy_from_slice(&size.to_ne_bytes());
        body[16..18].copy_from_slice(&queues.to_ne_bytes());
        answer(Req::GET_INFLIGHT_FD, 5, &body)
    };
    let rows = [
        (Req::SET_FEATURES, Twist::Refuse),
        (Req::GET_INFLIGHT_FD, Twist::Fds(0)),
        (Req::GET_INFLIGHT_FD, Twist::Fds(2)),
        (Req::GET_INFLIGHT_FD, inflight(0, 2)),
        (Req::GET_INFLIGHT_FD, inflight(4096, 9)),
        (Req::GET_INFLIGHT_FD, answer(Req::GET_INFLIGHT_FD, 5, &[1; 20])),
        (Req::SET_INFLIGHT_FD, Twist::HangUp),
        (Req::ADD_MEM_REG, Twist::Refuse),
        (Req::SET_VRING_NUM, Twist::HangUp),
        (Req::SET_VRING_ADDR, Twist::Refuse),
        (Req::SET_VRING_KICK, answer(Req::SET_VRING_CALL, 5, &[0; 8])),
        (Req::SET_VRING_ENABLE, Twist::Fds(1)),
    ];
    for (request, twist) in rows {
        let place = Place::new();
        let fake = Fake::start(&place.socket, Traits::disk());
        fake.twist(request, twist);
        let mut bench = Bench::new("type=blk,queues=2", &place);
        bench.drive();
        bench.serve_until(|_| fake.state().connections >= 2);
        fake.state().twists.clear();
        bench.serve_until(|_| fake.state().running() == [0, 1]);
        assert!(!bench.needs_reset(), "{request:?}");
    }
}

#[test]
fn a_daemon_that_does_not_stop_its_rings_as_it_should_counts_as_gone() {
    use FrontendReq as Req;
    let base = |index: u32, base: u32| {
        answer(Req::GET_VRING_BASE, 5, &[index.to_ne_bytes(), base.to_ne_bytes()].concat())
    };
    for twist in [base(7, 0), base(0, 0x1_0000), Twist::HangUp, Twist::Fds(1)] {
        let (mut bench, fake, _place) = disk(Traits::disk());
        fake.twist(Req::GET_VRING_BASE, twist);
        bench.command(false);
        drop(fake.wait(|state| state.vrings.is_empty()));
        fake.state().twists.clear();
        bench.command(true);
        bench.serve_until(|_| fake.state().running() == [0, 1]);
    }
}

/// Only that it ends, whatever is done and whoever does it.
#[test]
fn a_daemon_that_says_nothing_does_not_hold_anybody_up() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, Traits::disk());
    let bridge = bridge("type=blk,queues=2", &place, Duration::from_secs(1)).unwrap();
    let mut bench = Bench::behind(bridge);
    bench.drive();
    fake.twist(FrontendReq::GET_VRING_BASE, Twist::Silence);
    bench.command(false);
    drop(fake.wait(|state| state.vrings.is_empty()));
    bench.command(true);
    assert!(!bench.needs_reset());
    fake.state().twists.clear();
    bench.serve_until(|_| fake.state().running() == [0, 1]);
}

/// It stops its rings and goes on with what it has.
#[test]
fn a_daemon_that_never_ends_what_it_has_begun_counts_as_gone() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, Traits::disk());
    let bridge = bridge("type=blk,queues=2", &place, Duration::from_secs(1)).unwrap();
    let mut bench = Bench::behind(bridge);
    bench.drive();
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    bench.command(false);
    drop(fake.wait(|state| state.vrings.is_empty()));
    bench.command(true);
    bench.serve_until(|_| fake.state().running() == [0, 1]);
    assert_eq!(fake.take(0), Some(0), "it is begun anew");
    assert!(!bench.needs_reset());
}

#[test]
fn a_daemon_that_says_nothing_at_the_start_is_one_clear_line() {
    let place = Place::new();
    let fake = Fake::start(&place.socket, Traits::disk());
    fake.twist(FrontendReq::GET_FEATURES, Twist::Silence);
    let error = bridge("type=blk", &place, SHORT).unwrap_err().to_string();
    assert!(error.ends_with(": the daemon does not answer"), "{error}");
}

#[test]
fn a_daemon_that_trickles_its_answers_is_as_bad_as_one_that_says_nothing() {
    let place = Place::new();
    let listener = UnixListener::bind(&place.socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        // One byte short of an answer.
        for byte in &message(1, 5, &[0; 8])[..19] {
            if connection.write_all(&[*byte]).is_err() {
                return;
            }
        }
        let mut end = [0; 64];
        while connection.read(&mut end).is_ok_and(|count| count > 0) {}
    });
    let error = bridge("type=blk", &place, SHORT).unwrap_err().to_string();
    assert!(error.ends_with(": the daemon does not answer"), "{error}");
    thread.join().unwrap();
}

/// The kernel accepts connections for it; nothing waits for it to look at them.
#[test]
fn a_daemon_that_comes_back_and_says_nothing_is_waited_for_without_waiting() {
    let (mut bench, mut fake, place) = disk(Traits::disk());
    fake.die();
    bench.serve();
    let listener = UnixListener::bind(&place.socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    bench.serve_until(|_| {
        accepted = accepted.take().or_else(|| listener.accept().ok());
        accepted.is_some()
    });
    // With the patience of these tests, a wait for it would be noticed.
    bench.command(false);
    bench.command(true);
    bench.serve();
    drop((accepted, listener));
    std::fs::remove_file(&place.socket).unwrap();
    let fake = Fake::start(&place.socket, Traits::disk());
    bench.serve_until(|_| fake.state().running() == [0, 1]);
}

#[test]
fn a_daemon_that_answers_what_nobody_asked_is_left() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    fake.shout(&message(1, 5, &[0; 8]));
    bench.serve_until(|_| fake.state().connections >= 2);
    bench.serve_until(|_| fake.state().running() == [0, 1]);
}

#[test]
fn a_channel_that_is_misused_is_given_up_and_the_daemon_goes_on() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let mut channel = fake.state().channel.as_ref().unwrap().try_clone().unwrap();
    let endless = [2_u32, 1, 0xffff_ffff].into_iter().flat_map(u32::to_ne_bytes);
    channel.write_all(&endless.collect::<Vec<_>>()).unwrap();
    bench.serve_until(|_| channel.write_all(&[0]).is_err());
    assert_eq!(fake.state().connections, 1);
    assert_eq!(fake.state().running(), [0, 1]);
    fake.change_config(0, &1_u64.to_le_bytes());
    bench.reload();
    assert_eq!(bench.config(0, 8), 1_u64.to_le_bytes());
}

#[test]
fn a_flood_of_requests_is_served_in_turns() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let mut channel = fake.state().channel.as_ref().unwrap().try_clone().unwrap();
    channel.set_nonblocking(true).unwrap();
    // Much more than is read at a time.
    let flood = [message(2, 1, &[]).repeat(8_000), message(2, 9, &[])].concat();
    channel.write_all(&flood).unwrap();
    fake.change_config(0, &9_u64.to_le_bytes());
    let mut reply = [0; 20];
    bench.serve_until(|_| channel.read(&mut reply).is_ok());
    assert_eq!(bench.config(0, 8), 9_u64.to_le_bytes());
}
