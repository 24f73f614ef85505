use std::num::{NonZeroU32, NonZeroU64};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::config::DeviceSpec;
use crate::devices::virtio::rate_limit::Limit;
use crate::devices::virtio::spec::descriptor;
use crate::devices::virtio::testing::{Driver, Memory, Part};

type Device = dyn Core<Memory>;

fn parse(text: &str) -> Result<Entropy, String> {
    let spec: DeviceSpec = format!("virtio-rng{text}").parse().unwrap();
    let mut parameters = spec.parameters;
    let device = Entropy::from_parameters(&mut parameters).map_err(|error| error.to_string())?;
    parameters.finish().map(|()| device).map_err(|error| error.to_string())
}

fn device(options: &str) -> Box<Device> {
    Box::new(parse(options).unwrap())
}

/// Wakes the device by whatever wakes it, once.
fn wait_and_wake(device: &mut Device, driver: &mut Driver) -> Result<(), DeviceError> {
    let ready: Vec<usize> = {
        let wakes = device.wakes();
        let mut fds: Vec<_> = wakes.iter().map(|wake| PollFd::new(wake, PollFlags::IN)).collect();
        poll(&mut fds, None).unwrap();
        (0..fds.len()).filter(|index| fds[*index].revents().contains(PollFlags::IN)).collect()
    };
    ready.into_iter().try_for_each(|wake| device.woken(wake, driver))
}

fn wakes(device: &Device) -> usize {
    let immediately = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let wakes = device.wakes();
    let mut fds: Vec<_> = wakes.iter().map(|wake| PollFd::new(wake, PollFlags::IN)).collect();
    poll(&mut fds, Some(&immediately)).unwrap()
}

#[test]
fn every_buffer_is_filled_with_other_bytes() {
    let (mut device, mut driver) = (device(""), Driver::new(1));
    let first = driver.send(0, &[Part::Writable(32), Part::Writable(32)]);
    let second = driver.send(0, &[Part::Writable(64)]);
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), Some((first.head, 64)));
    assert_eq!(driver.used(0), Some((second.head, 64)));
    assert!(driver.interrupted(0));
    let pieces = [
        driver.bytes(first.addresses[0], 32),
        driver.bytes(first.addresses[1], 32),
        driver.bytes(second.addresses[0], 32),
        driver.bytes(second.addresses[0] + 32, 32),
        vec![0; 32],
    ];
    for (index, piece) in pieces.iter().enumerate() {
        assert!(!pieces[..index].contains(piece), "{pieces:?}");
    }
}

#[test]
fn a_large_request_gets_a_part_and_nothing_behind_it() {
    let (mut device, mut driver) = (device(""), Driver::new(1));
    let sent = driver.send(0, &[Part::Writable(1 << 20)]);
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), Some((sent.head, 64 << 10)));
    assert_eq!(driver.bytes(sent.addresses[0] + (64 << 10), 64), [0; 64]);
}

#[test]
fn what_a_request_has_for_the_device_to_read_is_ignored() {
    let (mut device, mut driver) = (device(""), Driver::new(1));
    let sent = driver.send(0, &[Part::Readable(b"ignored"), Part::Writable(16)]);
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), Some((sent.head, 16)));
    assert_eq!(driver.bytes(sent.addresses[0], 7), b"ignored");
}

#[test]
fn a_request_without_room_is_an_error() {
    for parts in [&[Part::Readable(b"x")][..], &[Part::Writable(0)]] {
        let (mut device, mut driver) = (device(""), Driver::new(1));
        driver.send(0, parts);
        let error = device.kicked(0, &mut driver).unwrap_err();
        assert_eq!(error.to_string(), "queue 0: a request without room for random bytes");
        assert_eq!(driver.used(0), None);
    }
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let (mut device, mut driver) = (device(""), Driver::new(1));
    driver.send(0, &[Part::Raw(1 << 50, 16, descriptor::WRITE)]);
    let error = device.kicked(0, &mut driver).unwrap_err();
    let expected = matches!(error, DeviceError::Queue { error: QueueError::Memory(_), .. });
    assert!(expected, "{error}");
}

#[test]
fn a_limited_device_gives_what_is_allowed_and_the_rest_when_the_time_has_come() {
    let (mut device, mut driver) = (device(",max-bytes=100,period=20"), Driver::new(1));
    let sent: Vec<_> = (0..4).map(|_| driver.send(0, &[Part::Writable(60)]).head).collect();
    let last = driver.send(0, &[Part::Writable(1000)]).head;
    device.kicked(0, &mut driver).unwrap();
    // Whatever happens to the device in between, nothing is lost.
    device.quiesce();
    assert_eq!(device.in_flight(), []);
    let all = [(sent[0], 60), (sent[1], 60), (sent[2], 60), (sent[3], 60), (last, 100)];
    for expected in all {
        let used = loop {
            if let Some(used) = driver.used(0) {
                break used;
            }
            wait_and_wake(&mut *device, &mut driver).unwrap();
        };
        assert_eq!(used, expected);
    }
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_wake_does_not_lift_the_limit() {
    // A byte in 10 milliseconds, and all in 10 minutes.
    let (mut device, mut driver) = (device(",max-bytes=60000,period=600000"), Driver::new(1));
    let all = driver.send(0, &[Part::Writable(60_000)]);
    let byte = driver.send(0, &[Part::Writable(1)]);
    driver.send(0, &[Part::Writable(60_000)]);
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), Some((all.head, 60_000)));
    let used = loop {
        if let Some(used) = driver.used(0) {
            break used;
        }
        wait_and_wake(&mut *device, &mut driver).unwrap();
    };
    assert_eq!(used, (byte.head, 1));
    // Nor do those without cause.
    for wake in [LIMITER, AGAIN, LIMITER] {
        assert_eq!(driver.used(0), None);
        device.woken(wake, &mut driver).unwrap();
    }
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), None);
    assert_eq!(wakes(&*device), 0);
}

#[test]
fn a_reset_does_not_lift_the_limit() {
    let (mut device, mut driver) = (device(",max-bytes=16,period=3600000"), Driver::new(1));
    let sent = driver.send(0, &[Part::Writable(16)]);
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), Some((sent.head, 16)));
    device.reset();
    device.start(0);
    driver.send(0, &[Part::Writable(16)]);
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_long_queue_is_served_in_turns() {
    let (mut device, mut driver) = (device(""), Driver::new(1));
    for _ in 0..2 * TURN + 1 {
        driver.send(0, &[Part::Writable(16)]);
    }
    device.kicked(0, &mut driver).unwrap();
    let count = |driver: &mut Driver| std::iter::from_fn(|| driver.used(0)).count();
    assert_eq!(count(&mut driver), TURN);
    wait_and_wake(&mut *device, &mut driver).unwrap();
    assert_eq!(count(&mut driver), TURN);
    wait_and_wake(&mut *device, &mut driver).unwrap();
    assert_eq!(count(&mut driver), 1);
    assert_eq!(wakes(&*device), 0);
}

#[test]
fn a_queue_that_can_not_be_served_is_left_alone() {
    let (mut device, mut driver) = (device(""), Driver::new(1));
    let sent = driver.send(0, &[Part::Writable(16)]);
    driver.paused = true;
    device.kicked(0, &mut driver).unwrap();
    device.woken(AGAIN, &mut driver).unwrap();
    assert_eq!(driver.used(0), None);
    driver.paused = false;
    device.kicked(0, &mut driver).unwrap();
    assert_eq!(driver.used(0), Some((sent.head, 16)));
}

#[test]
fn the_options_are_those_of_qemu_and_bad_ones_are_told() {
    let options = |text: &str| {
        let spec: DeviceSpec = format!("virtio-rng{text}").parse().unwrap();
        let mut parameters = spec.parameters;
        Options::from_parameters(&mut parameters)
    };
    let limit = |amount, period| Options {
        limit: Some(Limit {
            amount: NonZeroU64::new(amount).unwrap(),
            period: NonZeroU32::new(period).unwrap(),
        }),
    };
    assert_eq!(options(""), Ok(Options::default()));
    assert_eq!(options(",max-bytes=1K"), Ok(limit(1024, 65536)));
    assert_eq!(options(",max-bytes=7,period=1000"), Ok(limit(7, 1000)));
    let refused = |text: &str| parse(text).unwrap_err();
    assert_eq!(refused(",max-bytes=0"), "parameter 'max-bytes': 0 bytes are nothing at all");
    assert_eq!(refused(",max-bytes=x"), "parameter 'max-bytes': 'x' is no size such as 4M");
    assert_eq!(refused(",period=10"), "parameter 'period': without max-bytes");
    for period in ["0", "4294967296"] {
        let reason = format!("{period} is not 1 to 4294967295 milliseconds");
        let refused = parse(&format!(",max-bytes=1,period={period}")).unwrap_err();
        assert_eq!(refused, format!("parameter 'period': {reason}"));
    }
    assert_eq!(refused(",source=/dev/random"), "unknown parameter 'source'");
}

proptest! {
    /// Whatever a driver makes available, every request is answered with one byte or more, or the
    /// device needs a reset.
    #[test]
    fn no_chain_is_too_much(
        chains in prop::collection::vec(
            prop::collection::vec((any::<u64>(), any::<u32>(), 0..8u16, any::<bool>()), 1..5),
            1..20,
        ),
    ) {
        let (mut device, mut driver) = (device(""), Driver::new(1));
        for chain in chains {
            let part = |&(address, len, flags, wild): &(u64, u32, u16, bool)| {
                let (address, flags) = if wild { (address, flags & !descriptor::NEXT) }
                    else { (address % (1 << 24), descriptor::WRITE) };
                Part::Raw((1 << 22) + (address >> 1), len, flags & !descriptor::NEXT)
            };
            let parts: Vec<_> = chain.iter().map(part).collect();
            let sent = driver.send(0, &parts);
            let result = device.kicked(0, &mut driver);
            let used = driver.used(0);
            match result {
                Ok(()) => {
                    let (head, written) = used.unwrap();
                    prop_assert_eq!(head, sent.head);
                    prop_assert!((1..=64 << 10).contains(&written));
                }
                Err(_) => {
                    prop_assert_eq!(used, None);
                    break;
                }
            }
        }
    }
}
