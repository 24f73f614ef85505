//! Readers that are slow or stuck.

use std::io::Write;
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use rustix::time::{Itimerspec, TimerfdTimerFlags, timerfd_gettime, timerfd_settime};

use super::*;

const ENDS: [&str; 2] = ["socket", "pty"];

impl Bench {
    /// Somebody at the host's end, who does not wait.
    fn reader(&mut self, end: &str) -> OwnedFd {
        let reader = if end == "socket" {
            let stream = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
            connect(&stream, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
            rustix::io::ioctl_fionbio(&stream, true).unwrap();
            stream
        } else {
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            open(&self.path, flags, Mode::empty()).unwrap()
        };
        self.settle();
        reader
    }

    /// What is left of the patience, if it runs.
    fn patience(&self) -> Option<Duration> {
        let left = timerfd_gettime(&self.timer).unwrap().it_value;
        let left = Duration::new(left.tv_sec.cast_unsigned(), left.tv_nsec.try_into().unwrap());
        (!left.is_zero()).then_some(left)
    }

    fn set_patience(&self, left: Duration) {
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = left.try_into().unwrap();
        let time = Itimerspec { it_interval, it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time).unwrap();
    }

    /// Ends the patience.
    fn expire(&mut self) {
        assert!(self.patience().is_some(), "nothing waits");
        self.set_patience(Duration::from_nanos(1));
        poll(&mut [PollFd::new(&self.timer, PollFlags::IN)], None).unwrap();
        self.wait();
        self.settle();
    }

    /// Says so much that the reader is stuck, and returns how much. A terminal moves what it has
    /// from one buffer to another after a while, and has room once more.
    fn exhaust(&mut self) -> usize {
        self.say(&pattern(MEBIBYTE));
        self.settle();
        assert_eq!(self.said(), 0);
        while self.patience().is_some() {
            self.expire();
        }
        assert_eq!(self.said(), 1);
        MEBIBYTE
    }
}

/// Reads all that is there, and then `end`, which the guest says last.
fn read_to(bench: &mut Bench, reader: &OwnedFd, end: &[u8]) -> Vec<u8> {
    let mut heard = Vec::new();
    while !heard.ends_with(end) {
        bench.settle();
        heard.extend(read(reader, MEBIBYTE));
    }
    heard
}

/// What is there; some of it may still be on its way through a terminal.
fn drain(reader: &OwnedFd) -> Vec<u8> {
    let mut heard = read(reader, 1);
    let mut bytes = vec![0; MEBIBYTE];
    while let Ok(read) = rustix::io::read(reader, &mut bytes) {
        heard.extend(&bytes[..read]);
    }
    heard
}

/// What is logged while `action` goes on.
fn logged(action: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .without_time()
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, action);
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_stuck_reader_does_not_stop_the_queue() {
    for end in ENDS {
        let mut bench = Bench::new(end);
        let _reader = bench.reader(end);
        for _ in 0..DEPTH {
            bench.say(&pattern(CHUNK));
        }
        bench.settle();
        let mut said = bench.said();
        assert!(said < DEPTH, "{end}");
        while bench.patience().is_some() {
            bench.expire();
        }
        said += bench.said();
        assert_eq!(said, DEPTH, "{end}");
        // It does not wait again for a reader that is still stuck.
        for _ in 0..50 {
            bench.say(&pattern(CHUNK));
        }
        assert_eq!((bench.said(), bench.patience()), (50, None), "{end}");
    }
}

#[test]
fn the_device_itself_waits_for_a_reader_and_not_for_ever() {
    let mut bench = Bench::with_patience("socket", PATIENCE);
    let _reader = bench.reader("socket");
    bench.say(&pattern(MEBIBYTE));
    while bench.said() == 0 {
        bench.wait();
    }
}

#[test]
fn more_output_does_not_prolong_the_patience() {
    let mut bench = Bench::new("socket");
    let _reader = bench.reader("socket");
    bench.say(&pattern(MEBIBYTE));
    assert!(bench.patience().is_some());
    bench.set_patience(FOR_EVER / 2);
    bench.say(b"more");
    assert!(bench.patience().unwrap() <= FOR_EVER / 2);
    bench.expire();
    assert_eq!(bench.said(), 2);
}

#[test]
fn a_reader_that_takes_a_little_in_time_loses_nothing() {
    const LITTLE: usize = 1000;
    let mut bench = Bench::new("socket");
    let reader = bench.reader("socket");
    let expected = pattern(MEBIBYTE);
    bench.say(&expected);
    let mut heard = Vec::new();
    while heard.len() < expected.len() {
        heard.extend(read_exactly(&reader, LITTLE.min(expected.len() - heard.len())));
        bench.settle();
        if bench.patience().is_some() {
            bench.expire();
        }
        // What the kernel holds is less.
        let done = heard.len() >= expected.len() / 2;
        assert!(done || bench.said() == 0, "given up after {}", heard.len());
    }
    assert!(heard == expected);
    assert_eq!((bench.said(), bench.patience()), (1, None));
}

#[test]
fn a_stuck_reader_that_reads_again_hears_again() {
    for end in ENDS {
        let mut bench = Bench::new(end);
        let reader = bench.reader(end);
        for _ in 0..2 {
            bench.exhaust();
            bench.say(b"lost");
            assert_eq!(bench.said(), 1);
            let before = drain(&reader);
            bench.wait();
            bench.say(b"again");
            let heard = [before, read_to(&mut bench, &reader, b"again")].concat();
            let kept = heard.len() - 5;
            assert!(heard[..kept] == pattern(MEBIBYTE)[..kept], "{end}");
            assert_eq!((bench.said(), bench.patience()), (1, None), "{end}");
        }
    }
}

#[test]
fn what_was_lost_is_told_once() {
    let mut kept = 0;
    let mut lost = 0;
    let log = logged(|| {
        let mut bench = Bench::new("socket");
        let reader = bench.reader("socket");
        lost += bench.exhaust();
        bench.say(b"lost");
        bench.device.config_write(8, b"x");
        bench.settle();
        lost += 5;
        kept = drain(&reader).len();
        bench.settle();
        for _ in 0..3 {
            bench.say(b"heard");
        }
    });
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("WARN") && log.contains("/console"), "{log}");
    assert!(log.contains(&format!(" dropped={} ", lost - kept)), "{log}");

    // And when they never read again.
    let log = logged(|| {
        let mut bench = Bench::new("socket");
        let _reader = bench.reader("socket");
        bench.exhaust();
    });
    assert_eq!(log.lines().count(), 1, "{log}");

    let log = logged(|| {
        let mut bench = Bench::new("socket");
        let reader = bench.reader("socket");
        say_all_to_a_slow_peer(&mut bench, &reader);
    });
    assert_eq!(log, "");
}

#[test]
fn a_reset_or_a_stopped_queue_ends_the_waiting() {
    type Stop = fn(&mut dyn Core<Memory>);
    let stops: [Stop; 2] = [|device| device.reset(), |device| device.queue_stopped(TRANSMIT)];
    for stop in stops {
        let mut bench = Bench::new("socket");
        let _reader = bench.reader("socket");
        for _ in 0..2 {
            bench.say(&pattern(MEBIBYTE));
            bench.device.queue_stopped(RECEIVE);
            // The second time it is all there again.
            assert!(bench.patience().is_some());
            stop(&mut *bench.device);
            assert_eq!(bench.patience(), None);
            bench.driver = Driver::new(2);
        }
        bench.say(b"waits");
        assert_eq!(bench.said(), 0);
        bench.expire();
        assert_eq!(bench.said(), 1);
        // A reader that is stuck is so for the next guest as well.
        stop(&mut *bench.device);
        bench.driver = Driver::new(2);
        bench.say(b"lost");
        assert_eq!((bench.said(), bench.patience()), (1, None));
    }
}

#[test]
fn a_patience_that_ended_is_forgotten_by_a_reset() {
    let mut bench = Bench::new("socket");
    let _reader = bench.reader("socket");
    bench.say(&pattern(MEBIBYTE));
    bench.driver.paused = true;
    bench.expire();
    bench.device.reset();
    bench.driver = Driver::new(2);
    bench.say(b"waits");
    assert_eq!(bench.said(), 0);
    assert!(bench.patience().is_some());
}

#[test]
fn patience_is_with_the_reader_and_not_with_the_next() {
    for end in ENDS {
        let mut bench = Bench::new(end);
        let stuck = bench.reader(end);
        bench.exhaust();
        drop(stuck);
        bench.settle();
        bench.say(b"to nobody");
        assert_eq!(bench.said(), 1, "{end}");
        let next = bench.reader(end);
        bench.say(&pattern(MEBIBYTE));
        assert!(bench.patience().is_some(), "{end}");
        read(&next, 1);
    }
}

#[test]
fn who_comes_right_after_a_stuck_reader_hears_all() {
    let mut bench = Bench::new("socket");
    let stuck = bench.reader("socket");
    let next = bench.reader("socket");
    bench.exhaust();
    drop(stuck);
    bench.say(b"heard");
    assert_eq!(read_exactly(&next, 5), b"heard");
}

#[test]
fn who_leaves_while_output_waits_is_waited_for_no_longer() {
    for end in ENDS {
        let mut bench = Bench::new(end);
        let reader = bench.reader(end);
        bench.say(&pattern(MEBIBYTE));
        assert!(bench.patience().is_some(), "{end}");
        drop(reader);
        bench.wait();
        bench.settle();
        assert_eq!((bench.said(), bench.patience()), (1, None), "{end}");
    }
}

#[test]
fn a_stuck_reader_that_will_not_hear_any_more_is_replaced() {
    let mut bench = Bench::new("socket");
    let stuck = bench.reader("socket");
    let next = bench.reader("socket");
    bench.exhaust();
    rustix::net::shutdown(&stuck, rustix::net::Shutdown::Read).unwrap();
    bench.say(b"lost");
    bench.wait();
    bench.say(b"heard");
    assert_eq!(read_exactly(&next, 5), b"heard");
}

#[test]
fn an_emergency_write_waits_for_nobody() {
    let mut bench = Bench::new("socket");
    let _reader = bench.reader("socket");
    bench.say(&pattern(MEBIBYTE));
    bench.device.reset();
    bench.device.config_write(8, b"x");
    assert_eq!(bench.patience(), None);
}
