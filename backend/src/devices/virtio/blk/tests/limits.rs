//! Requests above a limit wait.

use super::*;

#[test]
fn a_request_over_the_limit_waits_and_nobody_overtakes_it() {
    // A thousand operations, or bytes, a second: they come at once, and the next one waits.
    for limit in ["iops=2", "bps=1024"] {
        let (mut disk, script) = Fixture::scripted(MIB, &format!(",{limit}"));
        let send =
            |disk: &mut Fixture, sector| disk.send(0, OUT, sector, &[Part::Readable(&[1; 512])]);
        let sent: Vec<_> = (0..4).map(|sector| send(&mut disk, sector)).collect();
        let memory = Arc::strong_count(&disk.driver.memory);
        disk.kick(0);
        assert_eq!(script.started(), ["write 0+512", "write 512+512"], "{limit}");
        // Those that wait hold no memory, and are in flight all the same.
        assert_eq!(Arc::strong_count(&disk.driver.memory), memory + 2, "{limit}");
        assert_eq!(disk.block.in_flight().len(), 4, "{limit}");
        // A flush has no bytes, and does not overtake.
        let flush = disk.send(0, FLUSH, 0, &[]);
        disk.kick(0);
        assert_eq!(script.started().len(), 2, "{limit}");
        while script.started().len() < 5 {
            disk.wake();
        }
        let order = ["write 0+512", "write 512+512", "write 1024+512", "write 1536+512", "sync"];
        assert_eq!(script.started(), order, "{limit}");
        disk.block.quiesce();
        disk.block.woken(0, &mut disk.driver).unwrap();
        for sent in sent.iter().chain([&flush]) {
            assert_eq!(disk.outcome(0, sent), DONE, "{limit}");
        }
    }
}

#[test]
fn what_waits_for_a_limit_survives_a_stop_and_not_a_reset() {
    let (mut disk, script) = Fixture::scripted(MIB, ",iops=1,queues=2");
    let first = disk.send(0, FLUSH, 0, &[]);
    let second = disk.send(1, FLUSH, 0, &[]);
    let third = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    disk.kick(1);
    assert_eq!(script.started().len(), 1);
    disk.driver.paused = true;
    disk.block.quiesce();
    // The limit allows the next one, but its queue can't be served.
    disk.wake();
    assert_eq!(script.started(), [""; 0]);
    let in_flight = [(0, &first), (0, &third), (1, &second)];
    let in_flight = in_flight.map(|(queue, sent)| InFlight { queue, head: sent.head });
    assert_eq!(disk.block.in_flight(), in_flight);
    disk.driver.paused = false;
    disk.kick(0);
    assert_eq!(disk.driver.used(0), Some((first.head, 1)));
    while script.started().is_empty() {
        disk.wake();
    }
    disk.block.quiesce();
    disk.block.queue_stopped(1);
    assert_eq!(disk.block.in_flight(), in_flight[1..2]);
    disk.block.reset();
    assert_eq!(disk.block.in_flight(), []);
}

#[test]
fn what_waits_for_a_limit_is_done_before_its_queue_stops_and_counts_all_the_same() {
    let (mut disk, script) = Fixture::scripted(MIB, ",iops=1");
    let first = disk.send(0, FLUSH, 0, &[]);
    let second = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    disk.block.quiesce();
    disk.driver.stopping = true;
    disk.block.woken(0, &mut disk.driver).unwrap();
    disk.block.quiesce();
    disk.block.woken(0, &mut disk.driver).unwrap();
    assert_eq!(disk.driver.used(0), Some((first.head, 1)));
    assert_eq!(disk.driver.used(0), Some((second.head, 1)));
    assert_eq!(disk.block.in_flight(), []);
    disk.driver.stopping = false;
    disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    assert_eq!(script.started(), [""; 0]);
}

#[test]
fn a_disk_without_a_limit_has_no_timer() {
    assert_eq!(Fixture::new(MIB, "").block.wakes().len(), 1);
    assert_eq!(Fixture::new(MIB, ",bps=1M").block.wakes().len(), 2);
}

#[test]
fn what_waited_while_the_disk_shrank_is_measured_anew() {
    let (mut disk, script) = Fixture::scripted(MIB, ",iops=1");
    let flush = disk.send(0, FLUSH, 0, &[]);
    let write = disk.send(0, OUT, 2047, &[Part::Readable(&[1; 512])]);
    let zeroes = disk.send(0, WRITE_ZEROES, 0, &[Part::Readable(&segment(2046, 2, 0))]);
    disk.kick(0);
    disk.block.quiesce();
    assert_eq!(disk.outcome(0, &flush), DONE);
    disk.file().set_len(MIB / 2).unwrap();
    disk.block.reload(&mut disk.driver).unwrap();
    assert_eq!(disk.outcome(0, &write), FAILED);
    assert_eq!(disk.outcome(0, &zeroes), FAILED);
    assert_eq!(script.started(), [""; 0]);
}
