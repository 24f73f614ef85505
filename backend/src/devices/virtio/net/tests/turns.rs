//! Turns, and limits.

use super::*;

#[test]
fn a_driver_with_much_to_send_lets_others_have_their_turn() {
    let mut rig = Rig::new();
    let mut arrived = 0;
    for _ in 0..TURN + 3 {
        rig.send(NO_HEADER, &frame(60));
    }
    rig.kick(TRANSMIT);
    assert_eq!(std::iter::from_fn(|| rig.driver.used(TRANSMIT)).count(), TURN);
    arrived += std::iter::from_fn(|| rig.arrived()).count();
    assert!(is_signalled(&rig.net.more));
    rig.wake(MORE);
    assert_eq!(std::iter::from_fn(|| rig.driver.used(TRANSMIT)).count(), 3);
    arrived += std::iter::from_fn(|| rig.arrived()).count();
    assert!(!is_signalled(&rig.net.more));
    // The kernel's queue may hold less than a turn.
    assert!((1..=TURN + 3).contains(&arrived));
}

#[test]
fn a_driver_with_many_commands_lets_others_have_their_turn() {
    let mut rig = Rig::new();
    for _ in 0..TURN + 1 {
        rig.driver.send(CONTROL, &[Part::Readable(&[0, 0, 1]), Part::Writable(1)]);
    }
    rig.kick(CONTROL);
    assert_eq!(std::iter::from_fn(|| rig.driver.used(CONTROL)).count(), TURN);
    assert!(is_signalled(&rig.net.more));
    rig.wake(MORE);
    assert_eq!(std::iter::from_fn(|| rig.driver.used(CONTROL)).count(), 1);
    assert!(!is_signalled(&rig.net.more));
}

#[test]
fn kicks_are_wanted_when_the_queue_is_empty_and_not_before() {
    let mut rig = Rig::new();
    for _ in 0..=TURN {
        rig.send(NO_HEADER, &frame(60));
    }
    rig.kick(TRANSMIT);
    assert!(!rig.driver.wants_kicks(TRANSMIT));
    rig.wake(MORE);
    assert!(rig.driver.wants_kicks(TRANSMIT));
    // A receive queue wants them while a frame waits.
    rig.wake(PORT);
    assert!(!rig.driver.wants_kicks(RECEIVE));
    rig.deliver(&frame(60));
    rig.wake(PORT);
    assert!(rig.driver.wants_kicks(RECEIVE));
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.kick(RECEIVE);
    assert!(!rig.driver.wants_kicks(RECEIVE));
}

#[test]
fn what_is_over_the_limit_waits_for_its_timer_in_each_direction() {
    // So little a second that the test is over before more is allowed.
    for limit in [",iops=1", ",bps=60"] {
        let mut rig = Rig::with(limit, 1, u64::MAX);
        let wakes = Core::<Memory>::wakes(&rig.net).len();
        assert_eq!(wakes, 4, "two timers");
        let port = wakes - 1;
        for _ in 0..2 {
            rig.send(NO_HEADER, &frame(60));
            rig.driver.send(RECEIVE, &[Part::Writable(100)]);
            rig.deliver(&frame(60));
        }
        rig.kick(TRANSMIT);
        rig.wake(port);
        let used = |rig: &mut Rig, queue| std::iter::from_fn(|| rig.driver.used(queue)).count();
        assert_eq!((used(&mut rig, TRANSMIT), used(&mut rig, RECEIVE)), (1, 1), "{limit}");
        assert!(!is_signalled(&rig.net.more), "it is the timer that goes on");

        for (timer, queue) in [(1, RECEIVE), (2, TRANSMIT)] {
            let timer_fd = Core::<Memory>::wakes(&rig.net)[timer].try_clone_to_owned().unwrap();
            let mut fds = [rustix::event::PollFd::new(&timer_fd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            rig.wake(timer);
            assert_eq!(used(&mut rig, queue), 1, "{limit}");
        }
        let counts = (rig.net.transmitters[0].lost, rig.net.receivers[0].lost);
        assert_eq!(counts, (0, 0));
    }
}
