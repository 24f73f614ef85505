//! REGION_READ and REGION_WRITE.

use barkeep_tests::peer::message::{Payload, command::*};
use barkeep_tests::peer::requests::{CONFIG, access, write};
use rustix::io::Errno;

use crate::table::{Expect, Row, msg, refused, row};

const MAX: u32 = 1 << 20;
/// BAR0 of the edu.
const BAR: u64 = 1 << 20;
const CONFIG_SIZE: u64 = 4096;

/// REGION_WRITE whose count is not the length of its data.
fn lying(region: u32, offset: u64, count: u32, length: usize) -> Vec<u8> {
    Payload::new().u64(offset).u32(region).u32(count).bytes(&vec![0; length]).done()
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    // What is wrong with a place is wrong for both directions.
    let places = [
        ("BAR 1, which is not there", 1, 0, 1),
        ("BAR 5, which is not there", 5, 0, 1),
        ("the ROM, which is not there", 6, 0, 1),
        ("the VGA region", 8, 0, 1),
        ("region 9", 9, 0, 1),
        ("region 256", 256, 0, 1),
        ("region 2^31", 1 << 31, 0, 1),
        ("region 2^32 - 1", u32::MAX, 0, 1),
        ("no byte of region 9", 9, 0, 0),
        ("a byte where the BAR ends", 0, BAR, 1),
        ("two bytes at the last one", 0, BAR - 1, 2),
        ("no byte behind the end", 0, BAR + 1, 0),
        ("a byte at 2^63", 0, 1 << 63, 1),
        ("a byte at 2^64 - 1", 0, u64::MAX, 1),
        ("no byte at 2^64 - 1", 0, u64::MAX, 0),
        ("an end that overflows", 0, u64::MAX - 3, 8),
        ("a byte where configuration space ends", CONFIG, CONFIG_SIZE, 1),
        ("a byte more than configuration space", CONFIG, 0, 4097),
        ("4 bytes across its end", CONFIG, CONFIG_SIZE - 2, 4),
        ("configuration space at 2^64 - 4", CONFIG, u64::MAX - 3, 4),
    ];
    for (name, region, offset, count) in places {
        rows.push(row(
            format!("REGION_READ: {name}"),
            [msg(REGION_READ, access(region, offset, count)).fails(Errno::INVAL)],
        ));
        rows.push(row(
            format!("REGION_WRITE: {name}"),
            [msg(REGION_WRITE, write(region, offset, &vec![0; count as usize]))
                .fails(Errno::INVAL)],
        ));
    }
    rows.extend(refused(
        REGION_READ,
        Errno::INVAL,
        [
            ("REGION_READ: 15 bytes", access(CONFIG, 0, 4)[..15].to_vec()),
            ("REGION_READ: 17 bytes", [access(CONFIG, 0, 4), vec![0]].concat()),
            ("REGION_READ: with data", write(CONFIG, 0, &[0; 4])),
            ("REGION_READ: count max + 1", access(0, 0, MAX + 1)),
            ("REGION_READ: count 2^31", access(0, 0, 1 << 31)),
            ("REGION_READ: count 4 GiB - 1", access(0, 0, u32::MAX)),
            ("REGION_READ: offset and count overflow", access(0, u64::MAX, u32::MAX)),
        ],
    ));
    rows.extend(refused(
        REGION_WRITE,
        Errno::INVAL,
        [
            ("REGION_WRITE: 15 bytes", access(CONFIG, 4, 0)[..15].to_vec()),
            ("REGION_WRITE: count 4 without data", lying(CONFIG, 4, 4, 0)),
            ("REGION_WRITE: a byte less than count", lying(CONFIG, 4, 4, 3)),
            ("REGION_WRITE: a byte more than count", lying(CONFIG, 4, 4, 5)),
            ("REGION_WRITE: count 0 with data", lying(CONFIG, 4, 0, 4)),
            ("REGION_WRITE: count 4 GiB - 1 with 4 bytes", lying(CONFIG, 4, u32::MAX, 4)),
            ("REGION_WRITE: count max + 1 with 4 bytes", lying(0, 0, MAX + 1, 4)),
            ("REGION_WRITE: count max + 1", lying(0, 0, MAX + 1, MAX as usize + 1)),
            ("REGION_WRITE: count max, and 4096 bytes more", lying(0, 0, MAX, MAX as usize + 4064)),
        ],
    ));
    rows.extend(accepted());
    rows
}

fn accepted() -> Vec<Row> {
    let read = |region, offset, count| {
        let payload = 16 + usize::try_from(count).expect("small");
        msg(REGION_READ, access(region, offset, count)).expects(Expect::Payload(payload))
    };
    let write = |region, offset, data: &[u8]| {
        msg(REGION_WRITE, write(region, offset, data)).expects(Expect::Payload(16))
    };
    vec![
        row("REGION_READ: no byte", [read(0, 0, 0), read(0, BAR, 0), read(CONFIG, 0, 0)]),
        row("REGION_WRITE: no byte", [write(0, 0, &[]), write(0, BAR, &[]), write(CONFIG, 0, &[])]),
        row("REGION_READ: count max of a BAR that does not decode", [read(0, 0, MAX)]),
        row(
            "REGION_WRITE: count max to a BAR that does not decode",
            [write(0, 0, &vec![0xaa; MAX as usize])],
        ),
        row(
            "REGION_READ: everything at once",
            [write(CONFIG, 4, &[6, 0]), read(0, 0, MAX), read(CONFIG, 0, 4096)],
        ),
        row(
            "REGION_WRITE: ones over configuration space",
            [write(CONFIG, 0, &[0xff; 4096]), read(0, 0, 4), write(CONFIG, 0, &[0; 4096])],
        ),
        row(
            "REGION_WRITE: ones over all registers",
            [write(CONFIG, 4, &[6, 0]), write(0, 0, &vec![0xff; MAX as usize])],
        ),
        row(
            "REGION_READ: odd widths",
            [write(CONFIG, 4, &[6, 0]), read(0, 1, 3), read(0, BAR - 3, 3), read(0, 0x7d, 7)],
        ),
        row(
            "REGION_READ: across the end of the shared memory",
            [msg(REGION_READ, access(2, 0xffff, 2)).fails(Errno::INVAL)],
        )
        .of_ivshmem(),
        row(
            "REGION_WRITE: across the end of the shared memory",
            [msg(REGION_WRITE, barkeep_tests::peer::requests::write(2, 0xfffd, &[0; 4]))
                .fails(Errno::INVAL)],
        )
        .of_ivshmem(),
        row(
            "REGION_READ: the upper half of a 64-bit BAR",
            [msg(REGION_READ, access(3, 0, 4)).fails(Errno::INVAL)],
        )
        .of_ivshmem(),
    ]
}
