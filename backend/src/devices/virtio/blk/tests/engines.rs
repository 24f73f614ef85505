//! What the device makes of an engine that has troubles.

use rustix::io::Errno;

use super::*;

#[test]
fn a_kick_is_one_submission() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    for sector in 0..5 {
        disk.send(0, OUT, sector, &[Part::Readable(&[1; 512])]);
    }
    disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    assert_eq!(script.submissions(), [6]);
}

#[test]
fn a_short_transfer_goes_on_where_it_ended() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    let read = disk.send(0, IN, 2, &[Part::Writable(1000), Part::Writable(536)]);
    let write = disk.send(0, OUT, 2, &[Part::Readable(&[1; 1024])]);
    disk.kick(0);
    assert_eq!(script.started(), ["read 1024+1536", "write 1024+1024"]);
    script.end(0, Ok(1));
    script.end(0, Ok(1023));
    disk.kick(0);
    assert_eq!(script.started(), ["read 1025+1535", "write 2047+1"]);
    script.end(0, Ok(999));
    disk.kick(0);
    assert_eq!(script.started(), ["write 2047+1", "read 2024+536"]);
    assert_eq!(disk.driver.used(0), None);
    script.end(0, Ok(1));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &write), DONE);
    script.end(0, Ok(536));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &read), Outcome { status: OK, written: 1537 });
}

#[test]
fn a_transfer_that_comes_to_an_end_too_early_is_an_error() {
    for end in [Ok(0), Err(Errno::IO), Err(Errno::NOSPC), Err(Errno::FAULT)] {
        let (mut disk, script) = Fixture::scripted(MIB, "");
        let read = disk.send(0, IN, 0, &[Part::Writable(512)]);
        let write = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
        disk.kick(0);
        script.end(0, Ok(100));
        script.end(0, Ok(100));
        disk.kick(0);
        script.end(0, end);
        script.end(0, end);
        disk.kick(0);
        // So much was read, and the status lies behind bytes that were not.
        assert_eq!(disk.outcome(0, &read), Outcome { status: IOERR, written: 100 }, "{end:?}");
        assert_eq!(disk.outcome(0, &write), FAILED, "{end:?}");
        assert_eq!(script.started(), [""; 0], "{end:?}");
    }
}

#[test]
fn what_the_kernel_wants_to_be_asked_again_is_asked_again_for_a_while() {
    for errno in [Errno::INTR, Errno::AGAIN, Errno::CANCELED] {
        let (mut disk, script) = Fixture::scripted(MIB, "");
        let first = disk.send(0, FLUSH, 0, &[]);
        disk.kick(0);
        script.end(0, Err(errno));
        disk.kick(0);
        assert_eq!(script.started(), ["sync"], "{errno}");
        script.end(0, Ok(0));
        disk.kick(0);
        assert_eq!(disk.outcome(0, &first), DONE, "{errno}");

        let second = disk.send(0, FLUSH, 0, &[]);
        disk.kick(0);
        let mut tries = 0;
        while !script.started().is_empty() {
            tries += 1;
            assert!(tries < 100, "{errno}: for ever");
            script.end(0, Err(errno));
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &second), FAILED, "{errno}");
    }
}

#[test]
fn a_range_is_cleared_in_the_best_way_there_is() {
    const REFUSED: [Errno; 3] = [Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL];
    for refused in REFUSED {
        let (mut disk, script) = Fixture::scripted(MIB, "");
        let zeroes = [segment(0, 2, 1), segment(8, 2, 0)].concat();
        let zeroes = disk.send(0, WRITE_ZEROES, 0, &[Part::Readable(&zeroes)]);
        disk.kick(0);
        let steps = [
            ("punch 0+1024", Err(refused)),
            ("zero 0+1024", Err(refused)),
            ("zeros 0+1024", Ok(1000)),
            ("zeros 1000+24", Ok(24)),
            // The next range gets its chance.
            ("zero 4096+1024", Err(refused)),
            ("zeros 4096+1024", Ok(1024)),
        ];
        for (operation, result) in steps {
            assert_eq!(script.started(), [operation], "{refused}");
            assert_eq!(disk.driver.used(0), None, "{refused}");
            script.end(0, result);
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &zeroes), DONE, "{refused}");

        // A discard is a hint.
        let ranges = [segment(0, 1, 0), segment(8, 1, 0)].concat();
        let discard = disk.send(0, DISCARD, 0, &[Part::Readable(&ranges)]);
        disk.kick(0);
        for operation in ["punch 0+512", "punch 4096+512"] {
            assert_eq!(script.started(), [operation], "{refused}");
            script.end(0, Err(refused));
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &discard), DONE, "{refused}");
    }
}

#[test]
fn a_range_that_cannot_be_cleared_is_an_error() {
    for kind in [DISCARD, WRITE_ZEROES] {
        let (mut disk, script) = Fixture::scripted(MIB, "");
        let ranges = [segment(0, 1, 0), segment(8, 1, 0)].concat();
        let sent = disk.send(0, kind, 0, &[Part::Readable(&ranges)]);
        disk.kick(0);
        script.end(0, Err(Errno::IO));
        disk.kick(0);
        assert_eq!(disk.outcome(0, &sent), FAILED, "kind {kind}");
        assert_eq!(script.started(), [""; 0], "kind {kind}");
    }
}

#[test]
fn a_flush_is_done_when_the_kernel_says_so_and_waits_for_no_write_under_way() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    let before = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
    disk.kick(0);
    script.end(0, Ok(512));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &before), DONE);
    let beside = disk.send(0, OUT, 1, &[Part::Readable(&[2; 512])]);
    let flush = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    // It starts when the completed write is in the kernel, not before.
    assert_eq!(script.started(), ["write 512+512", "sync"]);
    disk.kick(0);
    assert_eq!(disk.driver.used(0), None);
    script.end(1, Ok(0));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &flush), DONE);
    script.end(0, Ok(512));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &beside), DONE);

    let failing = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    script.end(0, Err(Errno::IO));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &failing), FAILED);
}

/// Those who come while one is under way share the next one, which begins behind what they are about.
#[test]
fn there_is_one_fdatasync_at_a_time() {
    let (mut disk, script) = Fixture::scripted(MIB, ",queues=2");
    let first = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    let write = disk.send(1, OUT, 0, &[Part::Readable(&[1; 512])]);
    disk.kick(1);
    script.end(1, Ok(512));
    disk.kick(1);
    assert_eq!(disk.outcome(1, &write), DONE);
    let second = [disk.send(0, FLUSH, 0, &[]), disk.send(1, FLUSH, 0, &[])];
    disk.kick(0);
    disk.kick(1);
    assert_eq!(script.started(), ["sync"]);
    script.end(0, Ok(0));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &first), DONE);
    assert_eq!(disk.driver.used(0), None, "that one began before the write was done");
    assert_eq!(disk.driver.used(1), None);
    assert_eq!(script.started(), ["sync"]);
    script.end(0, Ok(0));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &second[0]), DONE);
    assert_eq!(disk.outcome(1, &second[1]), DONE);
    assert_eq!(script.started(), [""; 0]);
}

#[test]
fn durable_writes_share_a_sync() {
    let (mut disk, script) = Fixture::scripted(MIB, ",cache=writethrough");
    let mut sent = Vec::new();
    for sector in 0..4 {
        sent.push(disk.send(0, OUT, sector, &[Part::Readable(&[1; 512])]));
    }
    disk.kick(0);
    script.end(1, Ok(512));
    script.end(0, Ok(512));
    disk.kick(0);
    assert_eq!(script.started(), ["write 1024+512", "write 1536+512", "sync"]);
    script.end(0, Ok(512));
    disk.kick(0);
    // A write that the kernel took after the beginning of a sync needs another one.
    script.end(1, Ok(0));
    disk.kick(0);
    for index in [1, 0] {
        assert_eq!(disk.outcome(0, &sent[index]), DONE);
    }
    assert_eq!(disk.driver.used(0), None);
    assert_eq!(script.started(), ["write 1536+512", "sync"]);
    script.end(1, Ok(0));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &sent[2]), DONE);
    assert_eq!(script.started(), ["write 1536+512"]);
}

#[test]
fn requests_are_given_back_in_the_order_in_which_they_end() {
    let (mut disk, script) = Fixture::scripted(MIB, ",queues=2");
    let first = disk.send(0, IN, 0, &[Part::Writable(512)]);
    let second = disk.send(0, IN, 1, &[Part::Writable(512)]);
    let other = disk.send(1, IN, 2, &[Part::Writable(512)]);
    disk.kick(0);
    disk.kick(1);
    script.end(2, Ok(512));
    script.end(1, Ok(512));
    // Whatever wakes the device.
    disk.kick(0);
    assert_eq!(disk.driver.used(1), Some((other.head, 513)));
    assert_eq!(disk.driver.used(0), Some((second.head, 513)));
    assert_eq!(disk.driver.used(0), None);
    script.end(0, Ok(512));
    disk.kick(1);
    assert_eq!(disk.driver.used(0), Some((first.head, 513)));
}

#[test]
fn a_request_of_many_steps_lets_others_have_their_turn() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    script.hurry(1);
    let sent = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
    disk.kick(0);
    assert_eq!(disk.driver.used(0), None);
    // Nobody else wakes it.
    assert_eq!(disk.outcome(0, &sent), DONE);
}

#[test]
fn a_long_request_that_is_done_at_once_lets_others_have_their_turn() {
    let (mut disk, script) = Fixture::scripted(256 * MIB, "");
    script.hurry(32 * MIB);
    let (head, end) = (disk.driver.room(16), disk.driver.room(1));
    disk.driver.memory.write_slice(&header(IN, 0), GuestAddress(head)).unwrap();
    let piece = (MIB, 32 << 20, descriptor::WRITE);
    let mut parts = vec![(head, 16, 0)];
    parts.extend([piece; 6]);
    parts.push((end, 1, descriptor::WRITE));
    let sent = disk.send_indirect(0, &parts);
    disk.kick(0);
    assert_eq!(disk.driver.used(0), None);
    assert_eq!(disk.used(0).0, sent.head);
    assert_eq!(disk.driver.bytes(end, 1), [OK]);
}
