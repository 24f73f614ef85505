//! What requests do to a real image, with both engines.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::*;

#[test]
fn what_is_written_is_stored_and_read_back() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
        let data = pattern(8192, 1);
        let parts = [Part::Readable(&data[..512]), Part::Readable(&data[512..])];
        assert_eq!(disk.request(OUT, 7, &parts), DONE, "{engine}");
        assert_eq!(disk.request(FLUSH, 0, &[]), DONE, "{engine}");
        assert_eq!(disk.stored(7 * 512, 8192), data, "{engine}");
        assert_eq!(disk.read(7, 8192), data, "{engine}");
        // The last sectors are part of the disk.
        disk.write(MIB / 512 - 1, &data[..512]);
        assert_eq!(disk.read(MIB / 512 - 2, 1024), [&[0; 512], &data[..512]].concat(), "{engine}");
    }
}

#[test]
fn a_request_may_be_laid_out_in_any_way() {
    let write = header(OUT, 3);
    let read = header(IN, 3);
    let data = pattern(1024, 2);
    let all = [&write[..], &data].concat();
    let writes: [(&str, &[Part<'_>]); 4] = [
        ("one buffer", &[Part::Readable(&all), Part::Writable(1)]),
        (
            "header in three",
            &[
                Part::Readable(&write[..1]),
                Part::Readable(&write[1..15]),
                Part::Readable(&all[15..]),
                Part::Writable(1),
            ],
        ),
        (
            "data in uneven pieces",
            &[
                Part::Readable(&all[..17]),
                Part::Readable(&all[17..600]),
                Part::Readable(&all[600..]),
                Part::Writable(1),
            ],
        ),
        ("empty buffers", &[Part::Readable(&[]), Part::Readable(&all), Part::Writable(1)]),
    ];
    let reads: [(&str, &[Part<'_>]); 4] = [
        ("status of its own", &[Part::Readable(&read), Part::Writable(1024), Part::Writable(1)]),
        ("status behind data", &[Part::Readable(&read), Part::Writable(1025)]),
        (
            "status behind a piece",
            &[Part::Readable(&read), Part::Writable(1000), Part::Writable(25)],
        ),
        (
            "header in two",
            &[
                Part::Readable(&read[..8]),
                Part::Readable(&read[8..]),
                Part::Writable(1),
                Part::Writable(1024),
            ],
        ),
    ];
    for engine in ENGINES {
        for (write_name, write) in writes {
            let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
            let sent = disk.driver.send(0, write);
            disk.poison(&sent);
            assert_eq!(disk.finish(0, &sent), DONE, "{engine}, {write_name}");
            assert_eq!(disk.stored(3 * 512, 1024), data, "{engine}, {write_name}");
        }
        for (name, read) in reads {
            let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
            disk.write(3, &data);
            let sent = disk.driver.send(0, read);
            disk.kick(0);
            assert_eq!(disk.used(0), (sent.head, 1025), "{engine}, {name}");
            let mut found = Vec::new();
            for (part, address) in read.iter().zip(&sent.addresses) {
                if let Part::Writable(len) = part {
                    found.extend(disk.driver.bytes(*address, *len as usize));
                }
            }
            assert_eq!(found[..1024], data, "{engine}, {name}");
            assert_eq!(found[1024], OK, "{engine}, {name}");
        }
    }
}

#[test]
fn the_serial_number_is_told_padded_and_cut() {
    let rows: [(&str, &[u32], &[u8], u32); 4] = [
        ("abc", &[20], b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 21),
        ("12345678901234567890", &[13, 7], b"12345678901234567890", 21),
        ("12345678901234567890", &[3], b"123", 4),
        // What lies behind it is not written, nor said to be.
        ("x", &[24], b"x\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20),
    ];
    for (serial, rooms, expected, written) in rows {
        let mut disk = Fixture::new(MIB, &format!(",serial={serial}"));
        let parts: Vec<_> = rooms.iter().map(|room| Part::Writable(*room)).collect();
        let sent = disk.send(0, GET_ID, 0, &parts);
        assert_eq!(disk.finish(0, &sent), Outcome { status: OK, written }, "{serial} {rooms:?}");
        let places = sent.addresses[1..].iter().zip(rooms);
        let found = places.map(|(address, room)| disk.driver.bytes(*address, *room as usize));
        assert_eq!(found.collect::<Vec<_>>().concat(), expected, "{serial} {rooms:?}");
    }
}

#[test]
fn zeroed_sectors_read_as_zeros_and_their_neighbours_stay() {
    for engine in ENGINES {
        for flags in [0, 1] {
            let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
            let data = pattern(64 << 10, 3);
            disk.write(0, &data);
            let segments = [segment(1, 2, flags), segment(16, 64, flags), segment(9, 0, flags)];
            let outcome = disk.request(WRITE_ZEROES, 0, &[Part::Readable(&segments.concat())]);
            assert_eq!(outcome, DONE, "{engine}, flags {flags}");
            let mut expected = data;
            expected[512..3 * 512].fill(0);
            expected[16 * 512..80 * 512].fill(0);
            assert!(disk.read(0, 64 << 10) == expected, "{engine}, flags {flags}");
            assert!(disk.stored(0, 64 << 10) == expected, "{engine}, flags {flags}");
        }
    }
}

#[test]
fn space_is_given_back_when_that_is_asked_for_and_allowed() {
    // Kind, flags, option, whether blocks go away.
    let rows = [
        (DISCARD, 0, "discard=on", true),
        (WRITE_ZEROES, 1, "discard=on", true),
        (WRITE_ZEROES, 0, "discard=on", false),
        (WRITE_ZEROES, 1, "discard=off", false),
    ];
    for engine in ENGINES {
        for (kind, flags, option, freed) in rows {
            let name = format!("{engine}, kind {kind}, flags {flags}, {option}");
            let mut disk = Fixture::new(MIB, &format!(",aio={engine},{option}"));
            disk.write(0, &pattern(256 << 10, 4));
            disk.file().sync_all().unwrap();
            let before = disk.file().metadata().unwrap().blocks();
            let segments = [segment(0, 128, flags), segment(256, 128, flags)].concat();
            assert_eq!(disk.request(kind, 0, &[Part::Readable(&segments)]), DONE, "{name}");
            let after = disk.file().metadata().unwrap().blocks();
            assert_eq!(after < before, freed, "{name}: {before} blocks before, {after} after");
            assert_eq!(disk.file().metadata().unwrap().len(), MIB, "{name}");
        }
    }
}

#[test]
fn a_file_system_that_cannot_zero_a_range_gets_zeros() {
    // tmpfs punches holes, and does nothing else of the kind.
    let Ok(image) = NamedTempFile::new_in("/dev/shm") else {
        crate::skip::skip("no /dev/shm");
        return;
    };
    drop(image);
    for engine in ENGINES {
        let image = NamedTempFile::new_in("/dev/shm").unwrap();
        image.as_file().set_len(4 * MIB).unwrap();
        let mut disk = Fixture::over(image, &format!(",aio={engine}"));
        let data = pattern(3 << 20, 5);
        disk.write(0, &data);
        // More than the kernel is given at once.
        let segments = [segment(1, 4000, 0), segment(5000, 1, 0)].concat();
        assert_eq!(disk.request(WRITE_ZEROES, 0, &[Part::Readable(&segments)]), DONE, "{engine}");
        let mut expected = data;
        expected[512..4001 * 512].fill(0);
        expected[5000 * 512..5001 * 512].fill(0);
        assert!(disk.stored(0, 3 << 20) == expected, "{engine}");
    }
}

#[test]
fn a_request_may_have_as_many_pieces_as_the_longest_queue_has_descriptors() {
    for engine in ENGINES {
        for (count, status) in [(1024, OK), (1025, IOERR)] {
            let name = format!("{engine}, {count} pieces");
            let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
            let data = pattern(512 * 1025, 6);
            let (place, end) = (disk.driver.room(data.len() as u64), disk.driver.room(1));
            for (kind, flags) in [(OUT, 0), (IN, descriptor::WRITE)] {
                let head = disk.driver.room(16);
                disk.driver.memory.write_slice(&header(kind, 1), GuestAddress(head)).unwrap();
                let from = if kind == OUT { &data[..] } else { &[0; 512 * 1025] };
                disk.driver.memory.write_slice(from, GuestAddress(place)).unwrap();
                let piece = |index: u64| (place + index * 512, 512, flags);
                let mut parts = vec![(head, 16, 0)];
                parts.extend((0..count).map(piece));
                parts.push((end, 1, descriptor::WRITE));
                let sent = disk.send_indirect(0, &parts);
                disk.kick(0);
                assert_eq!(disk.used(0).0, sent.head, "{name}");
                assert_eq!(disk.driver.bytes(end, 1), [status], "{name}");
            }
            if status == OK {
                assert!(disk.driver.bytes(place, 512 << 10) == data[..512 << 10], "{name}");
                assert!(disk.stored(512, 512 << 10) == data[..512 << 10], "{name}");
            }
        }
    }
}

#[test]
fn a_full_disk_is_an_error_of_the_request_alone() {
    for engine in ENGINES {
        let folder = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "none"])
            .arg(folder.path())
            .output();
        if !mount.is_ok_and(|output| output.status.success()) {
            crate::skip::skip("may not mount a small tmpfs");
            return;
        }
        let image = File::create_new(folder.path().join("image"));
        // What is open stays, and nothing is left behind whatever becomes of this test.
        let umount = std::process::Command::new("umount").arg("-l").arg(folder.path()).status();
        assert!(umount.unwrap().success());
        let image = image.unwrap();
        image.set_len(4 * MIB).unwrap();
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let block = create(&format!("virtio-blk,path={path},aio={engine}")).unwrap();
        let mut disk = Fixture::started(block, NamedTempFile::new().unwrap());
        let data = pattern(1 << 20, 7);
        assert_eq!(disk.request(OUT, 0, &[Part::Readable(&data)]), FAILED, "{engine}");
        // Space that is given back can be written again.
        let all = segment(0, 8192, 0);
        assert_eq!(disk.request(DISCARD, 0, &[Part::Readable(&all)]), DONE, "{engine}");
        disk.write(100, &data[..4096]);
        assert_eq!(disk.read(100, 4096), data[..4096], "{engine}");
    }
}
