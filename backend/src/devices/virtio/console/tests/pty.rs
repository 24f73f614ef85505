use rustix::fs::{Mode, OFlags, open};

use super::*;

impl Bench {
    fn open(&mut self) -> OwnedFd {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let terminal = open(&self.path, flags, Mode::empty()).unwrap();
        self.settle();
        terminal
    }
}

#[test]
fn every_byte_passes_as_it_is_in_both_directions() {
    let mut bench = Bench::new("pty");
    let terminal = bench.open();
    let all: Vec<u8> = (0..=255).collect();
    bench.say(&all);
    assert_eq!(bench.said(), 1);
    assert_eq!(read_exactly(&terminal, 256), all);
    rustix::io::write(&terminal, &all).unwrap();
    let mut heard = Vec::new();
    while heard.len() < 256 {
        bench.listen(256);
        heard.extend(bench.hear());
    }
    assert_eq!(heard, all);
    // No echo.
    assert!(is_quiet(&terminal));
}

#[test]
fn nothing_is_lost_to_a_terminal_that_reads_slowly() {
    let mut bench = Bench::new("pty");
    let terminal = bench.open();
    say_all_to_a_slow_peer(&mut bench, &terminal);
}

#[test]
fn nothing_is_lost_of_a_terminal_that_is_faster_than_the_guest() {
    let mut bench = Bench::new("pty");
    let terminal = bench.open();
    hear_all_of_a_fast_peer(&mut bench, &terminal);
}

#[test]
fn while_nobody_has_it_open_the_guest_goes_on() {
    let mut bench = Bench::new("pty");
    bench.settle();
    for _ in 0..2 {
        for _ in 0..40 {
            bench.say(&pattern(CHUNK));
        }
        assert_eq!(bench.said(), 40);
        let terminal = bench.open();
        bench.say(b"now");
        assert_eq!(bench.said(), 1);
        assert_eq!(read_exactly(&terminal, 3), b"now");
        drop(terminal);
        bench.settle();
    }
}

#[test]
fn a_terminal_that_is_closed_without_reading_holds_nothing_up() {
    let mut bench = Bench::new("pty");
    let terminal = bench.open();
    bench.say(&pattern(MEBIBYTE));
    bench.say(b"more");
    bench.settle();
    assert_eq!(bench.said(), 0);
    drop(terminal);
    bench.wait();
    bench.settle();
    assert_eq!(bench.said(), 2);
}

#[test]
fn what_was_said_before_the_terminal_was_closed_is_heard() {
    let mut bench = Bench::new("pty");
    let terminal = bench.open();
    rustix::io::write(&terminal, b"root\n").unwrap();
    drop(terminal);
    bench.settle();
    bench.listen(10);
    assert_eq!(bench.heard(), b"root\n");
}

#[test]
fn a_link_leads_there_for_as_long_as_the_device_is() {
    let bench = Bench::new("pty");
    let Bench { device, path, _directory, .. } = bench;
    let name = std::fs::read_link(&path).unwrap();
    assert!(name.starts_with("/dev/pts"), "{name:?}");
    let text = format!(",pty={}", path.display());
    let expected = format!("parameter 'pty': {}: in use by another process", path.display());
    assert_eq!(parse(&text).unwrap_err(), expected);
    drop(device);
    assert!(path.symlink_metadata().is_err());

    // As after SIGKILL: the terminal is gone, the link is not.
    std::os::unix::fs::symlink("/dev/pts/1234567", &path).unwrap();
    let device = parse(&text).unwrap();
    assert_ne!(std::fs::read_link(&path).unwrap(), Path::new("/dev/pts/1234567"));
    drop(device);
    assert!(path.symlink_metadata().is_err());
}

#[test]
fn a_link_that_somebody_replaced_is_left_to_them() {
    let Bench { device, path, _directory, .. } = Bench::new("pty");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("elsewhere", &path).unwrap();
    drop(device);
    assert_eq!(std::fs::read_link(&path).unwrap(), Path::new("elsewhere"));
}
