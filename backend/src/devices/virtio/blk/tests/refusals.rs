//! Requests that get nothing, and what is told of them.

use super::*;

const SECTORS: u64 = MIB / 512;

#[test]
fn a_bad_request_is_refused_by_its_status() {
    let data = [0xaa; 512];
    let segments = |list: &[Vec<u8>]| list.concat();
    let many: Vec<_> = (0..17).map(|_| segment(0, 1, 0)).collect();
    // Name, options, type, sector, data, status.
    type Row = (&'static str, &'static str, u32, u64, Vec<u8>, u8);
    let rows: Vec<Row> = vec![
        ("write past the end", "", OUT, SECTORS, data.into(), IOERR),
        ("write over the end", "", OUT, SECTORS - 1, vec![0; 1024], IOERR),
        ("write of half a sector", "", OUT, 0, vec![0; 256], IOERR),
        ("sector overflows", "", OUT, 1 << 55, data.into(), IOERR),
        ("last sector there is", "", OUT, u64::MAX, data.into(), IOERR),
        ("end overflows", "", OUT, (1 << 55) - 1, data.into(), IOERR),
        ("write to a read-only disk", ",readonly=on", OUT, 0, data.into(), IOERR),
        ("discard on a read-only disk", ",readonly=on", DISCARD, 0, segment(0, 1, 0), IOERR),
        ("zeroes on a read-only disk", ",readonly=on", WRITE_ZEROES, 0, segment(0, 1, 0), IOERR),
        ("half a block", ",logical-block-size=4096", OUT, 0, vec![0; 2048], IOERR),
        ("unaligned block", ",logical-block-size=4096", OUT, 1, vec![0; 4096], IOERR),
        ("unaligned range", ",logical-block-size=4096", DISCARD, 0, segment(1, 8, 0), IOERR),
        ("SCSI command", "", 2, 0, data.into(), UNSUPP),
        ("secure erase", "", 14, 0, segment(0, 1, 0), UNSUPP),
        ("unknown type", "", u32::MAX, 0, vec![], UNSUPP),
        ("discard switched off", ",discard=off", DISCARD, 0, segment(0, 1, 0), UNSUPP),
        ("discard with unmap", "", DISCARD, 0, segment(0, 1, 1), UNSUPP),
        ("discard with a flag", "", DISCARD, 0, segment(0, 1, 1 << 31), UNSUPP),
        ("zeroes with a flag", "", WRITE_ZEROES, 0, segment(0, 1, 3), UNSUPP),
        (
            "flag in the second segment",
            "",
            DISCARD,
            0,
            segments(&[segment(0, 1, 0), segment(0, 1, 2)]),
            UNSUPP,
        ),
        ("no segment", "", DISCARD, 0, vec![], IOERR),
        ("half a segment", "", DISCARD, 0, segment(0, 1, 0)[..8].into(), IOERR),
        ("a segment and a half", "", DISCARD, 0, vec![0; 24], IOERR),
        ("too many segments", "", DISCARD, 0, segments(&many), IOERR),
        ("range over the end", "", DISCARD, 0, segment(SECTORS - 1, 2, 0), IOERR),
        ("range that overflows", "", DISCARD, 0, segment(u64::MAX / 512, 1, 0), IOERR),
        (
            "second range over the end",
            "",
            WRITE_ZEROES,
            0,
            segments(&[segment(0, 1, 0), segment(SECTORS, 1, 0)]),
            IOERR,
        ),
    ];
    for engine in ENGINES {
        for (name, options, kind, sector, data, status) in &rows {
            let mut disk = Fixture::over(filled(MIB), &format!(",aio={engine}{options}"));
            let outcome = disk.request(*kind, *sector, &[Part::Readable(data)]);
            assert_eq!(outcome, Outcome { status: *status, written: 1 }, "{engine}, {name}");
            assert!(disk.stored(0, 1 << 20).iter().all(|byte| *byte == 0x55), "{engine}, {name}");
            assert_eq!(disk.file().metadata().unwrap().len(), MIB, "{engine}, {name}");
        }
    }
}

/// An image of a byte that no request of a test writes.
fn filled(size: u64) -> NamedTempFile {
    let image = image(size);
    image.as_file().write_all_at(&vec![0x55; usize::try_from(size).unwrap()], 0).unwrap();
    image
}

#[test]
fn a_range_longer_than_the_limit_is_refused_even_if_the_disk_has_it() {
    let mut disk = Fixture::new(2 << 30, "");
    let rows = [
        (DISCARD, 1 << 21, OK),
        (DISCARD, (1 << 21) + 1, IOERR),
        (WRITE_ZEROES, 1 << 17, OK),
        (WRITE_ZEROES, (1 << 17) + 1, IOERR),
    ];
    for (kind, sectors, status) in rows {
        let outcome = disk.request(kind, 0, &[Part::Readable(&segment(0, sectors, 0))]);
        assert_eq!(outcome, Outcome { status, written: 1 }, "kind {kind}, {sectors} sectors");
    }
}

#[test]
fn a_read_that_is_refused_says_that_nothing_was_written() {
    for engine in ENGINES {
        let rows = [(SECTORS, 512), (SECTORS - 1, 1024), (0, 100), (1 << 55, 512), (u64::MAX, 512)];
        for (sector, len) in rows {
            let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
            let outcome = disk.request(IN, sector, &[Part::Writable(len)]);
            assert_eq!(outcome, Outcome { status: IOERR, written: 0 }, "{engine}, {sector}+{len}");
        }
    }
}

#[test]
fn a_read_only_disk_reads_and_flushes() {
    for engine in ENGINES {
        let mut disk = Fixture::over(filled(MIB), &format!(",aio={engine},readonly=on"));
        assert_eq!(disk.read(5, 512), [0x55; 512], "{engine}");
        assert_eq!(disk.request(FLUSH, 0, &[]), DONE, "{engine}");
    }
}

#[test]
fn a_disk_of_4096_byte_blocks_works_in_whole_blocks() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine},logical-block-size=4096"));
        let data = pattern(8192, 8);
        disk.write(8, &data);
        assert_eq!(disk.read(16, 4096), data[4096..], "{engine}");
        let outcome = disk.request(IN, 8, &[Part::Writable(512)]);
        assert_eq!(outcome, Outcome { status: IOERR, written: 0 }, "{engine}");
    }
}

#[test]
fn a_request_without_data_is_done() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine}"));
        for kind in [IN, OUT, GET_ID] {
            assert_eq!(disk.request(kind, 0, &[]), DONE, "{engine}, kind {kind}");
        }
    }
}

#[test]
fn a_header_that_is_short_or_not_there_is_an_error_of_the_request() {
    let whole = header(FLUSH, 0);
    let rows: [(&str, &[Part<'_>]); 4] = [
        ("short", &[Part::Readable(&whole[..15]), Part::Writable(1)]),
        ("none", &[Part::Writable(1)]),
        ("not in memory", &[Part::Raw(1 << 40, 16, 0), Part::Writable(1)]),
        (
            "half in memory",
            &[Part::Readable(&whole[..8]), Part::Raw(u64::MAX - 3, 8, 0), Part::Writable(1)],
        ),
    ];
    for (name, parts) in rows {
        let mut disk = Fixture::new(MIB, "");
        let sent = disk.driver.send(0, parts);
        disk.poison(&sent);
        assert_eq!(disk.finish(0, &sent), FAILED, "{name}");
    }
}

#[test]
fn data_that_is_not_in_memory_is_an_error_of_the_request() {
    const WRITE: u16 = descriptor::WRITE;
    for engine in ENGINES {
        let rows = [
            (OUT, vec![Part::Raw(1 << 40, 512, 0)], 1),
            (OUT, vec![Part::Readable(&[1; 512]), Part::Raw((64 << 20) - 256, 512, 0)], 1),
            (OUT, vec![Part::Raw(u64::MAX - 255, 512, 0)], 1),
            (IN, vec![Part::Raw(1 << 40, 512, WRITE)], 0),
            // All or nothing: the first sector is not written either.
            (IN, vec![Part::Writable(512), Part::Raw(1 << 40, 512, WRITE)], 0),
            (DISCARD, vec![Part::Raw(1 << 40, 16, 0)], 1),
            (GET_ID, vec![Part::Raw(1 << 40, 20, WRITE)], 0),
        ];
        for (kind, parts, written) in rows {
            let mut disk = Fixture::over(filled(MIB), &format!(",aio={engine}"));
            let outcome = disk.request(kind, 0, &parts);
            let expected = Outcome { status: IOERR, written };
            assert_eq!(outcome, expected, "{engine}, kind {kind}, {parts:?}");
            assert_eq!(disk.stored(0, 1024), [0x55; 1024], "{engine}, kind {kind}, {parts:?}");
        }
    }
}

#[test]
fn a_request_that_cannot_be_answered_is_an_error_of_the_device() {
    let flush = header(FLUSH, 0);
    let rows: [(&str, &[Part<'_>]); 3] = [
        ("no status", &[Part::Readable(&flush)]),
        ("empty status", &[Part::Readable(&flush), Part::Raw(0, 0, descriptor::WRITE)]),
        ("status not in memory", &[Part::Readable(&flush), Part::Raw(1 << 40, 1, 2)]),
    ];
    for (name, parts) in rows {
        // The synchronous engine answers in the kick.
        let mut disk = Fixture::new(MIB, ",aio=sync");
        disk.driver.send(0, parts);
        let error = disk.block.kicked(0, &mut disk.driver);
        assert!(error.is_err(), "{name}: {error:?}");
        assert_eq!(disk.driver.used(0), None, "{name}");
    }
}

#[test]
fn a_descriptor_in_flight_is_not_taken_again() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    let sent = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    disk.driver.make_available(0, sent.head);
    let error = disk.block.kicked(0, &mut disk.driver).unwrap_err();
    assert!(matches!(error, DeviceError::Request { queue: 0, .. }), "{error}");
    assert_eq!(script.started(), ["sync"]);
}
