//! Commands that a client may use only after it has seen that they are offered: GET_REGION_IO_FDS,
//! REGION_WRITE_MULTI, DEVICE_FEATURE with migration, MIG_DATA_READ and MIG_DATA_WRITE; and those
//! that go the other way.
//!
//! What is malformed gets EINVAL, a feature that is not known ENOTTY as from VFIO, a transition of
//! the migration state that is refused EINVAL, migration data in the wrong state EINVAL.

use barkeep_tests::peer::message::{Payload, command::*};
use barkeep_tests::peer::requests::feature::*;
use barkeep_tests::peer::requests::migration::{ERROR, RESUMING, STOP};
use rustix::io::Errno;

use crate::table::{Expect, Fd, Row, msg, refused, row};

pub(crate) fn rows() -> Vec<Row> {
    [io_fds(), write_multi(), features(), migration_data(), other_direction()].concat()
}

fn io_fds() -> Vec<Row> {
    let query = |argsz, flags, index, count| {
        Payload::new().u32(argsz).u32(flags).u32(index).u32(count).done()
    };
    let mut rows: Vec<Row> = refused(
        GET_REGION_IO_FDS,
        Errno::INVAL,
        [
            ("GET_REGION_IO_FDS: no byte", vec![]),
            ("GET_REGION_IO_FDS: 15 bytes", query(16, 0, 0, 0)[..15].to_vec()),
            ("GET_REGION_IO_FDS: argsz 0", query(0, 0, 0, 0)),
            ("GET_REGION_IO_FDS: argsz 15", query(15, 0, 0, 0)),
            ("GET_REGION_IO_FDS: region 9", query(4096, 0, 9, 0)),
            ("GET_REGION_IO_FDS: region 2^32 - 1", query(4096, 0, u32::MAX, 0)),
        ],
    )
    .collect();
    rows.push(row(
        "GET_REGION_IO_FDS: with a descriptor",
        [msg(GET_REGION_IO_FDS, query(4096, 0, 0, 0)).with([Fd::Eventfd]).fails(Errno::INVAL)],
    ));
    rows
}

fn write_multi() -> Vec<Row> {
    let one = |count: u64, offset, region, length| {
        Payload::new().u64(count).u64(offset).u32(region).u32(length).u64(0).done()
    };
    let mut rows: Vec<Row> = refused(
        REGION_WRITE_MULTI,
        Errno::INVAL,
        [
            ("REGION_WRITE_MULTI: no byte", vec![]),
            ("REGION_WRITE_MULTI: 7 bytes", vec![0; 7]),
            ("REGION_WRITE_MULTI: one write that is not there", vec![1, 0, 0, 0, 0, 0, 0, 0]),
            ("REGION_WRITE_MULTI: a byte too few", one(1, 4, 7, 2)[..31].to_vec()),
            ("REGION_WRITE_MULTI: a byte too many", [one(1, 4, 7, 2), vec![0]].concat()),
            ("REGION_WRITE_MULTI: two, and one is there", one(2, 4, 7, 2)),
            ("REGION_WRITE_MULTI: 2^61 writes", one(1 << 61, 4, 7, 2)),
            ("REGION_WRITE_MULTI: a count that overflows", one(u64::MAX / 24 + 2, 4, 7, 2)),
            ("REGION_WRITE_MULTI: 2^64 - 1 writes", one(u64::MAX, 4, 7, 2)),
            ("REGION_WRITE_MULTI: 9 bytes in one write", one(1, 4, 7, 9)),
            ("REGION_WRITE_MULTI: 2^32 - 1 bytes in one write", one(1, 4, 7, u32::MAX)),
            ("REGION_WRITE_MULTI: region 9", one(1, 4, 9, 2)),
            ("REGION_WRITE_MULTI: region 2^32 - 1", one(1, 4, u32::MAX, 2)),
            ("REGION_WRITE_MULTI: where the BAR ends", one(1, 1 << 20, 0, 4)),
            ("REGION_WRITE_MULTI: an end that overflows", one(1, u64::MAX - 1, 0, 8)),
        ],
    )
    .collect();
    rows.push(row(
        "REGION_WRITE_MULTI: with a descriptor",
        [msg(REGION_WRITE_MULTI, one(1, 4, 7, 2)).with([Fd::Eventfd]).fails(Errno::INVAL)],
    ));
    rows
}

fn feature(argsz: u32, flags: u32, data: &[u32]) -> Vec<u8> {
    let data: Vec<u8> = data.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Payload::new().u32(argsz).u32(flags).bytes(&data).done()
}

/// `vfio_device_feature_dma_logging_control` with one range, as words.
fn logging(page_size: u64, ranges: u32, first: u64, length: u64) -> Vec<u8> {
    Payload::new()
        .u32(48)
        .u32(SET | LOGGING_START)
        .u64(page_size)
        .u32(ranges)
        .u32(0)
        .u64(first)
        .u64(length)
        .done()
}

/// `vfio_device_feature_dma_logging_report`
fn report(first: u64, length: u64, page_size: u64) -> Vec<u8> {
    Payload::new().u32(4096).u32(GET | LOGGING_REPORT).u64(first).u64(length).u64(page_size).done()
}

fn features() -> Vec<Row> {
    let mut rows: Vec<Row> = refused(
        DEVICE_FEATURE,
        Errno::INVAL,
        [
            ("DEVICE_FEATURE: no byte", vec![]),
            ("DEVICE_FEATURE: 7 bytes", vec![0; 7]),
            ("DEVICE_FEATURE: argsz 0", feature(0, GET | MIGRATION, &[])),
            ("DEVICE_FEATURE: argsz 7", feature(7, GET | MIGRATION, &[])),
            ("DEVICE_FEATURE: argsz without room for the answer", feature(8, GET | MIGRATION, &[])),
            ("DEVICE_FEATURE: neither get, set nor probe", feature(16, MIGRATION, &[0, 0])),
            ("DEVICE_FEATURE: get and set", feature(16, GET | SET | MIGRATION, &[0, 0])),
            ("DEVICE_FEATURE: flag bit 19", feature(16, GET | MIGRATION | 1 << 19, &[])),
            ("DEVICE_FEATURE: flag bit 31", feature(16, GET | MIGRATION | 1 << 31, &[])),
            ("DEVICE_FEATURE: sets what can only be got", feature(16, SET | MIGRATION, &[0, 0])),
            ("DEVICE_FEATURE: a state without its data", feature(16, SET | STATE, &[])),
            ("DEVICE_FEATURE: half a state", feature(16, SET | STATE, &[STOP])),
            ("DEVICE_FEATURE: state ERROR", feature(16, SET | STATE, &[ERROR, 0])),
            ("DEVICE_FEATURE: state 8", feature(16, SET | STATE, &[8, 0])),
            ("DEVICE_FEATURE: state 2^32 - 1", feature(16, SET | STATE, &[u32::MAX, 0])),
            ("DEVICE_FEATURE: logging without its data", feature(48, SET | LOGGING_START, &[])),
            ("DEVICE_FEATURE: logging of pages of 0 bytes", logging(0, 1, 0, 4096)),
            ("DEVICE_FEATURE: logging of pages of 3 bytes", logging(3, 1, 0, 4096)),
            ("DEVICE_FEATURE: logging of 2^32 - 1 ranges", logging(4096, u32::MAX, 0, 4096)),
            (
                "DEVICE_FEATURE: logging of a range that wraps",
                logging(4096, 1, u64::MAX - 4095, 8192),
            ),
            ("DEVICE_FEATURE: a report without logging", report(0, 4096, 4096)),
            ("DEVICE_FEATURE: a report of pages of 0 bytes", report(0, 4096, 0)),
            ("DEVICE_FEATURE: a report of 2^64 - 1 bytes", report(0, u64::MAX, 4096)),
            ("DEVICE_FEATURE: a report of nothing", report(0, 0, 4096)),
            ("DEVICE_FEATURE: a report that wraps", report(u64::MAX - 4095, 8192, 4096)),
            ("DEVICE_FEATURE: logging is got", feature(48, GET | LOGGING_START, &[])),
            ("DEVICE_FEATURE: logging stops before it starts", feature(8, SET | LOGGING_STOP, &[])),
        ],
    )
    .collect();
    rows.extend(refused(
        DEVICE_FEATURE,
        Errno::NOTTY,
        [
            ("DEVICE_FEATURE: feature 0", feature(16, PROBE | GET, &[])),
            ("DEVICE_FEATURE: feature 99", feature(16, PROBE | GET | 99, &[])),
            ("DEVICE_FEATURE: feature 0xffff", feature(16, GET | 0xffff, &[])),
            ("DEVICE_FEATURE: sets feature 99", feature(16, SET | 99, &[0, 0])),
        ],
    ));
    rows.push(row(
        "DEVICE_FEATURE: with a descriptor",
        [msg(DEVICE_FEATURE, feature(16, SET | STATE, &[STOP, 0]))
            .with([Fd::Eventfd])
            .fails(Errno::INVAL)],
    ));
    rows
}

fn migration_data() -> Vec<Row> {
    let read = |argsz, size| Payload::new().u32(argsz).u32(size).done();
    let write =
        |argsz: u32, size: u32, data: &[u8]| Payload::new().u32(argsz).u32(size).bytes(data).done();
    let to = |state| msg(DEVICE_FEATURE, feature(16, SET | STATE, &[state, 0]));
    let mut rows: Vec<Row> = refused(
        MIG_DATA_READ,
        Errno::INVAL,
        [
            ("MIG_DATA_READ: no byte", vec![]),
            ("MIG_DATA_READ: 7 bytes", vec![0; 7]),
            ("MIG_DATA_READ: argsz 0", read(0, 4096)),
            ("MIG_DATA_READ: while it runs", read(4104, 4096)),
            ("MIG_DATA_READ: no byte of it, while it runs", read(8, 0)),
            ("MIG_DATA_READ: 2^32 - 1 bytes", read(u32::MAX, u32::MAX)),
        ],
    )
    .collect();
    rows.extend(refused(
        MIG_DATA_WRITE,
        Errno::INVAL,
        [
            ("MIG_DATA_WRITE: no byte", vec![]),
            ("MIG_DATA_WRITE: 7 bytes", vec![0; 7]),
            ("MIG_DATA_WRITE: argsz 0", write(0, 4, &[0; 4])),
            ("MIG_DATA_WRITE: while it runs", write(12, 4, &[0; 4])),
            ("MIG_DATA_WRITE: a byte too few", write(12, 4, &[0; 3])),
            ("MIG_DATA_WRITE: a byte too many", write(12, 4, &[0; 5])),
            ("MIG_DATA_WRITE: 2^32 - 1 bytes", write(12, u32::MAX, &[0; 4])),
        ],
    ));
    rows.extend([
        row(
            "MIG_DATA_READ: of what is being resumed",
            [to(RESUMING).succeeds(), msg(MIG_DATA_READ, read(4104, 4096)).fails(Errno::INVAL)],
        ),
        row(
            "MIG_DATA_READ: of what has stopped",
            [to(STOP).succeeds(), msg(MIG_DATA_READ, read(4104, 4096)).fails(Errno::INVAL)],
        ),
        // Only the end of the data tells whether it is whole.
        row(
            "resumes from garbage",
            [
                to(RESUMING).succeeds(),
                msg(MIG_DATA_WRITE, write(72, 64, &[0xff; 64])).expects(Expect::Reply),
                to(STOP).fails(Errno::INVAL),
            ],
        ),
        row("resumes from nothing", [to(RESUMING).succeeds(), to(STOP).fails(Errno::INVAL)]),
        row(
            "resumes from a megabyte of zeros",
            [
                to(RESUMING).succeeds(),
                msg(MIG_DATA_WRITE, write((1 << 20) + 8, 1 << 20, &vec![0; 1 << 20]))
                    .expects(Expect::Reply),
                to(STOP).fails(Errno::INVAL),
            ],
        ),
    ]);
    rows
}

fn other_direction() -> Vec<Row> {
    let access = Payload::new().u64(0).u64(4);
    [("DMA_READ", DMA_READ, access.clone()), ("DMA_WRITE", DMA_WRITE, access.u32(0))]
        .into_iter()
        .flat_map(|(name, command, body)| {
            [
                row(
                    format!("{name} from the client"),
                    [msg(command, body.done()).fails(Errno::NOTSUP)],
                ),
                row(
                    format!("{name} from the client, without a byte"),
                    [msg(command, []).expects(Expect::Refused)],
                ),
                row(
                    format!("{name} from the client, with a descriptor"),
                    [msg(command, [0; 16]).with([Fd::Memory(4096)]).expects(Expect::Refused)],
                ),
            ]
        })
        .collect()
}
