//! Stops, resets, changes of size and moves, with requests under way.

use rustix::io::Errno;

use super::*;

/// Requests that fill a queue: as many as it has descriptors, each a write of a sector of its own.
fn fill(disk: &mut Fixture, queue: u16, data: &[u8]) -> Vec<(Sent, u64)> {
    let send = |index: u16| {
        let sector = u64::from(queue) * 256 + u64::from(index);
        let (head, place, status) =
            (disk.driver.room(16), disk.driver.room(512), disk.driver.room(1));
        let header = header(OUT, sector);
        disk.driver.memory.write_slice(&header, GuestAddress(head)).unwrap();
        let sector_data = &data[usize::from(index) * 512..][..512];
        disk.driver.memory.write_slice(sector_data, GuestAddress(place)).unwrap();
        disk.driver.memory.write_obj(0xffu8, GuestAddress(status)).unwrap();
        let parts = [(head, 16, 0), (place, 512, 0), (status, 1, descriptor::WRITE)];
        (disk.send_indirect(queue, &parts), status)
    };
    (0..256).map(send).collect()
}

#[test]
fn all_queues_are_used_to_their_full_depth() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine},queues=4"));
        let data: Vec<_> = (0..4).map(|queue| pattern(256 * 512, queue)).collect();
        let sent: Vec<_> =
            (0..4).map(|queue| fill(&mut disk, queue, &data[usize::from(queue)])).collect();
        for queue in 0..4 {
            disk.kick(queue);
        }
        for (queue, sent) in (0..4).zip(sent) {
            let mut heads: Vec<_> = (0..256).map(|_| disk.used(queue)).collect();
            heads.sort_unstable();
            assert_eq!(heads, (0..256).map(|head| (head, 1)).collect::<Vec<_>>(), "{engine}");
            let statuses = sent.iter().map(|(_, status)| disk.driver.bytes(*status, 1)[0]);
            assert!(statuses.into_iter().all(|status| status == OK), "{engine}");
        }
        assert!(disk.stored(0, 512 << 10) == data.concat(), "{engine}");
    }
}

#[test]
fn nothing_limits_what_is_under_way_below_the_depth_of_the_queues() {
    let (mut disk, script) = Fixture::scripted(MIB, ",queues=4");
    let data = pattern(256 * 512, 1);
    for queue in 0..4 {
        fill(&mut disk, queue, &data);
        disk.kick(queue);
    }
    assert_eq!(script.started().len(), 1024);
    assert_eq!(script.submissions(), [256; 4]);
    let expected = |queue| (0..256).map(move |head| InFlight { queue, head });
    assert_eq!(disk.block.in_flight(), (0..4).flat_map(expected).collect::<Vec<_>>());
}

#[test]
fn a_quiesced_device_holds_no_memory_and_loses_no_result() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
        let data = pattern(256 * 512, 11);
        let guards = Arc::strong_count(&disk.driver.memory);
        let sent = fill(&mut disk, 0, &data);
        // They are all under way, and its queue can't be served any more.
        disk.block.take_all(0, &mut disk.driver).unwrap();
        assert!(Arc::strong_count(&disk.driver.memory) > guards, "{engine}");
        disk.driver.paused = true;
        disk.block.quiesce();
        assert_eq!(Arc::strong_count(&disk.driver.memory), guards, "{engine}");
        assert!(disk.stored(0, 256 * 512) == data, "{engine}");
        assert_eq!(disk.driver.used(0), None, "{engine}");
        assert_eq!(disk.block.in_flight().len(), 256, "{engine}");
        assert!(disk.is_woken(), "{engine}");
        // A wake while it is stopped changes nothing.
        disk.wake();
        assert_eq!(disk.driver.used(0), None, "{engine}");
        assert_eq!(disk.block.in_flight().len(), 256, "{engine}");

        disk.driver.paused = false;
        disk.block.woken(0, &mut disk.driver).unwrap();
        for _ in 0..256 {
            let (_, written) = disk.driver.used(0).unwrap();
            assert_eq!(written, 1, "{engine}");
        }
        let statuses = sent.iter().map(|(_, status)| disk.driver.bytes(*status, 1)[0]);
        assert!(statuses.into_iter().all(|status| status == OK), "{engine}");
        assert_eq!(disk.block.in_flight(), [], "{engine}");
    }
}

#[test]
fn quiesce_waits_for_one_step_of_a_request_and_leaves_the_others_for_later() {
    let (mut disk, script) = Fixture::scripted(MIB, ",cache=writethrough");
    let ranges = [segment(0, 1, 0), segment(8, 1, 0)].concat();
    let sent = disk.send(0, WRITE_ZEROES, 0, &[Part::Readable(&ranges)]);
    disk.kick(0);
    assert_eq!(script.started(), ["zero 0+512"]);
    disk.driver.paused = true;
    disk.block.quiesce();
    assert_eq!(script.started(), [""; 0]);
    assert_eq!(disk.block.in_flight(), [InFlight { queue: 0, head: sent.head }]);
    // While its queue can't be served, it stays where it is.
    disk.wake();
    assert_eq!(script.started(), [""; 0]);
    disk.driver.paused = false;
    disk.block.woken(0, &mut disk.driver).unwrap();
    assert_eq!(script.started(), ["zero 4096+512"]);
    disk.block.quiesce();
    disk.wake();
    assert_eq!(script.started(), ["sync"]);
    disk.block.quiesce();
    assert_eq!(disk.outcome(0, &sent), DONE);
}

#[test]
fn what_is_left_of_a_transfer_waits_without_memory_and_is_then_done() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    let guards = Arc::strong_count(&disk.driver.memory);
    let sent = disk.send(0, IN, 0, &[Part::Writable(1536)]);
    disk.kick(0);
    script.end(0, Ok(512));
    disk.block.quiesce();
    assert_eq!(Arc::strong_count(&disk.driver.memory), guards);
    disk.wake();
    assert_eq!(script.started(), ["read 512+1024"]);
    script.end(0, Ok(1024));
    disk.block.quiesce();
    assert_eq!(disk.outcome(0, &sent), Outcome { status: OK, written: 1537 });
}

#[test]
fn what_is_left_of_a_request_is_forgotten_with_its_queue() {
    for reset in [false, true] {
        let (mut disk, script) = Fixture::scripted(MIB, ",queues=2");
        let ranges = [segment(0, 1, 0), segment(8, 1, 0)].concat();
        let sent = disk.send(0, WRITE_ZEROES, 0, &[Part::Readable(&ranges)]);
        disk.kick(0);
        disk.block.quiesce();
        if reset {
            disk.block.reset()
        } else {
            disk.block.queue_stopped(0)
        }
        assert_eq!(disk.block.in_flight(), []);
        disk.block.woken(0, &mut disk.driver).unwrap();
        assert_eq!(script.started(), [""; 0], "{reset}");
        assert_eq!(disk.driver.used(0), None);
        assert_eq!(disk.status(&sent), 0xff);
    }
}

#[test]
fn quiesce_without_work_wakes_nobody() {
    let mut disk = Fixture::new(MIB, ",aio=sync");
    disk.block.quiesce();
    assert!(!disk.is_woken());
}

#[test]
fn a_queue_that_is_stopped_is_forgotten_and_others_go_on() {
    let (mut disk, script) = Fixture::scripted(MIB, ",queues=2");
    let first = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
    let second = disk.send(1, OUT, 1, &[Part::Readable(&[1; 512])]);
    disk.kick(0);
    disk.kick(1);
    disk.block.quiesce();
    disk.block.queue_stopped(0);
    assert_eq!(disk.block.in_flight(), [InFlight { queue: 1, head: second.head }]);
    assert_eq!(disk.outcome(1, &second), DONE);
    assert_eq!(disk.driver.used(0), None);
    assert_eq!(disk.status(&first), 0xff);
    // Its descriptors are free again.
    disk.driver.make_available(0, first.head);
    disk.kick(0);
    assert_eq!(script.started(), ["write 0+512"]);
}

/// A disk with a flush in each of its two queues, of which the second one waits for the first.
fn waiting_flush() -> (Fixture, Script, [Sent; 2]) {
    let (mut disk, script) = Fixture::scripted(MIB, ",queues=2");
    let sent = [disk.send(0, FLUSH, 0, &[]), disk.send(1, FLUSH, 0, &[])];
    disk.kick(0);
    disk.kick(1);
    assert_eq!(script.started(), ["sync"]);
    (disk, script, sent)
}

#[test]
fn quiesce_waits_for_the_flush_under_way_and_leaves_those_that_wait_for_later() {
    let (mut disk, script, sent) = waiting_flush();
    disk.block.quiesce();
    assert_eq!(script.started(), [""; 0]);
    assert_eq!(disk.block.in_flight().len(), 2);
    assert_eq!(disk.outcome(0, &sent[0]), DONE);
    assert_eq!(disk.driver.used(1), None);
    assert_eq!(script.started(), ["sync"]);
    // Another one that nobody else would wake it for.
    let third = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    disk.block.quiesce();
    assert_eq!(disk.outcome(1, &sent[1]), DONE);
    disk.block.quiesce();
    assert_eq!(disk.outcome(0, &third), DONE);
}

#[test]
fn a_quiesced_device_is_woken_for_flushes_that_wait() {
    let (mut disk, script, sent) = waiting_flush();
    script.end(0, Err(Errno::AGAIN));
    disk.block.quiesce();
    assert!(disk.is_woken());
    disk.wake();
    assert_eq!(script.started(), ["sync"]);
    script.end(0, Ok(0));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &sent[0]), DONE);
    assert_eq!(disk.outcome(1, &sent[1]), DONE);
}

#[test]
fn flushes_that_wait_are_forgotten_with_their_queue() {
    for reset in [false, true] {
        let (mut disk, script, sent) = waiting_flush();
        if reset {
            disk.block.reset();
        } else {
            disk.block.queue_stopped(1);
        }
        let left = if reset { vec![] } else { vec![InFlight { queue: 0, head: sent[0].head }] };
        assert_eq!(disk.block.in_flight(), left, "{reset}");
        disk.block.woken(0, &mut disk.driver).unwrap();
        assert_eq!(script.started(), [""; 0], "{reset}");
        assert_eq!(disk.driver.used(1), None);
        assert_eq!(disk.status(&sent[1]), 0xff);
        // The next one in the same place is a new one.
        disk.block.start(disk.driver.features | disk.block.features());
        disk.driver.make_available(1, sent[1].head);
        disk.kick(1);
        assert_eq!(script.started(), ["sync"], "{reset}");
    }
}

#[test]
fn flushes_of_a_predecessor_share_theirs_and_begin_behind_its_writes() {
    let (mut first, script) = Fixture::scripted(MIB, ",cache=writethrough");
    let write = first.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
    first.kick(0);
    script.end(0, Ok(512));
    first.kick(0);
    let flushes = [first.send(0, FLUSH, 0, &[]), first.send(0, FLUSH, 0, &[])];
    first.kick(0);
    assert_eq!(script.started(), ["sync"]);
    let in_flight = first.block.in_flight();
    let heads: Vec<_> = in_flight.iter().map(|request| request.head).collect();
    assert_eq!(heads, [write.head, flushes[0].head, flushes[1].head]);

    let (second, script) = Fixture::scripted(MIB, ",cache=writethrough");
    let mut second = Fixture { driver: first.driver, ..second };
    for request in in_flight {
        second.block.resubmit(request, &mut second.driver).unwrap();
    }
    // Its write is done anew, and durable after that only.
    assert_eq!(script.started(), ["write 0+512", "sync"]);
    script.end(0, Ok(512));
    second.kick(0);
    script.end(0, Ok(0));
    second.kick(0);
    assert_eq!(second.outcome(0, &flushes[0]), DONE);
    assert_eq!(second.driver.used(0), None);
    assert_eq!(script.started(), ["sync"]);
    script.end(0, Ok(0));
    second.kick(0);
    assert_eq!(second.outcome(0, &flushes[1]), DONE);
    assert_eq!(second.outcome(0, &write), DONE);
}

#[test]
fn a_reset_forgets_everything_but_the_data() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
        let data = pattern(256 * 512, 12);
        fill(&mut disk, 0, &data);
        disk.block.take_all(0, &mut disk.driver).unwrap();
        disk.block.reset();
        assert_eq!(disk.block.in_flight(), [], "{engine}");
        assert_eq!(disk.driver.used(0), None, "{engine}");
        assert!(disk.stored(0, 256 * 512) == data, "{engine}");

        disk.driver = Driver::new(1);
        disk.block.start(disk.driver.features | disk.block.features());
        assert_eq!(disk.read(0, 512), data[..512], "{engine}");
    }
}

#[test]
fn a_device_that_goes_away_waits_for_the_kernel() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
        let data = pattern(256 * 512, 13);
        fill(&mut disk, 0, &data);
        disk.block.take_all(0, &mut disk.driver).unwrap();
        let Fixture { driver, mut block, image } = disk;
        block.engine.submit();
        drop(block);
        assert_eq!(Arc::strong_count(&driver.memory), 1, "{engine}");
        let mut stored = vec![0; 256 * 512];
        image.as_file().read_exact_at(&mut stored, 0).unwrap();
        if engine == "io_uring" {
            assert!(stored == data, "{engine}");
        }
    }
}

#[test]
fn an_image_that_changes_its_size_changes_the_capacity() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
        let capacity = |disk: &Fixture| {
            let mut bytes = [0; 8];
            disk.block.config_read(0, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let reload = |disk: &mut Fixture| disk.block.reload(&mut disk.driver);
        reload(&mut disk).unwrap();
        assert_eq!(disk.driver.config_changes, 0, "{engine}");

        disk.file().set_len(2 * MIB).unwrap();
        assert_eq!(capacity(&disk), 2048, "{engine}: not before it is told");
        reload(&mut disk).unwrap();
        assert_eq!((capacity(&disk), disk.driver.config_changes), (4096, 1), "{engine}");
        disk.write(4095, &[7; 512]);

        disk.file().set_len(MIB / 2).unwrap();
        // It is an error already, though the device does not know yet.
        let outcome = disk.request(IN, 1024, &[Part::Writable(512)]);
        assert_eq!(outcome, Outcome { status: IOERR, written: 0 }, "{engine}");
        reload(&mut disk).unwrap();
        assert_eq!((capacity(&disk), disk.driver.config_changes), (1024, 2), "{engine}");
        assert_eq!(disk.request(OUT, 1024, &[Part::Readable(&[1; 512])]), FAILED, "{engine}");

        for (size, reason) in [(0, "is empty"), (777, "777 bytes, no multiple of 512")] {
            disk.file().set_len(size).unwrap();
            let expected = format!("{}: {reason}", disk.image.path().display());
            assert_eq!(reload(&mut disk), Err(expected), "{engine}");
            assert_eq!((capacity(&disk), disk.driver.config_changes), (1024, 2), "{engine}");
        }
    }
}

#[test]
fn what_was_in_flight_is_done_by_another_instance() {
    for engine in ENGINES {
        let (mut first, _script) = Fixture::scripted(MIB, ",queues=2");
        let data = pattern(512, 14);
        let write = first.send(1, OUT, 3, &[Part::Readable(&data)]);
        let read = first.send(0, IN, 3, &[Part::Writable(512)]);
        first.kick(1);
        first.kick(0);
        let in_flight = first.block.in_flight();
        let expected =
            [InFlight { queue: 1, head: write.head }, InFlight { queue: 0, head: read.head }];
        assert_eq!(in_flight, expected, "{engine}");

        let other = image(MIB);
        let text = format!("virtio-blk,path={},queues=2,aio={engine}", other.path().display());
        let mut block = create(&text).unwrap();
        block.start(first.driver.features | block.features());
        let Fixture { driver, block: dead, .. } = first;
        // The first instance is gone without a word.
        std::mem::forget(dead);
        let mut second = Fixture { driver, block, image: other };
        second.block.resubmit(in_flight[0], &mut second.driver).unwrap();
        assert_eq!(second.outcome(1, &write), DONE, "{engine}");
        second.block.resubmit(in_flight[1], &mut second.driver).unwrap();
        assert_eq!(second.outcome(0, &read), Outcome { status: OK, written: 513 }, "{engine}");
        assert_eq!(second.driver.bytes(read.addresses[1], 512), data, "{engine}");
        // Again, as after a crash between the write and its acknowledgement.
        second.block.resubmit(in_flight[0], &mut second.driver).unwrap();
        assert_eq!(second.outcome(1, &write), DONE, "{engine}");
    }
}

#[test]
fn a_request_that_cannot_be_resubmitted_is_an_error() {
    let (mut disk, _script) = Fixture::scripted(MIB, "");
    let sent = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    for head in [sent.head, 256, u16::MAX] {
        let request = InFlight { queue: 0, head };
        assert!(disk.block.resubmit(request, &mut disk.driver).is_err(), "{head}");
    }
    // A queue that is not there is forgotten.
    let request = InFlight { queue: 7, head: 0 };
    assert!(disk.block.resubmit(request, &mut disk.driver).is_ok());
}
