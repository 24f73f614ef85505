//! GET_INFO, GET_REGION_INFO, GET_IRQ_INFO and RESET.

use barkeep_tests::peer::message::{Payload, command::*};
use barkeep_tests::peer::requests::{info, region_info};
use rustix::io::Errno;

use crate::table::{Expect, Row, msg, refused, row};

pub(crate) fn rows() -> Vec<Row> {
    let region = |index| region_info(32, index);
    let mut rows: Vec<Row> = refused(
        GET_INFO,
        Errno::INVAL,
        [
            ("GET_INFO: 15 bytes", info(16, 0)[..15].to_vec()),
            ("GET_INFO: argsz 0", info(0, 0)),
            ("GET_INFO: argsz 15", info(15, 0)),
        ],
    )
    .collect();
    rows.extend(refused(
        GET_REGION_INFO,
        Errno::INVAL,
        [
            ("GET_REGION_INFO: 31 bytes", region(0)[..31].to_vec()),
            ("GET_REGION_INFO: argsz 0", region_info(0, 0)),
            ("GET_REGION_INFO: argsz 31", region_info(31, 0)),
            ("GET_REGION_INFO: region 9", region(9)),
            ("GET_REGION_INFO: region 10", region(10)),
            ("GET_REGION_INFO: region 256", region(256)),
            ("GET_REGION_INFO: region 2^31", region(1 << 31)),
            ("GET_REGION_INFO: region 2^32 - 1", region(u32::MAX)),
        ],
    ));
    rows.extend(refused(
        GET_IRQ_INFO,
        Errno::INVAL,
        [
            ("GET_IRQ_INFO: 15 bytes", info(16, 0)[..15].to_vec()),
            ("GET_IRQ_INFO: argsz 0", info(0, 0)),
            ("GET_IRQ_INFO: argsz 15", info(15, 0)),
            ("GET_IRQ_INFO: index 5", info(16, 5)),
            ("GET_IRQ_INFO: index 256", info(16, 256)),
            ("GET_IRQ_INFO: index 2^32 - 1", info(16, u32::MAX)),
        ],
    ));
    rows.extend(refused(
        RESET,
        Errno::INVAL,
        [
            ("RESET: 1 byte", vec![0]),
            ("RESET: 16 bytes", vec![0; 16]),
            ("RESET: 4096 bytes", vec![0xff; 4096]),
        ],
    ));
    let garbage = Payload::new().u32(32).u32(u32::MAX).u32(7).u32(u32::MAX);
    let garbage = garbage.u64(u64::MAX).u64(u64::MAX).done();
    let accepted = [
        ("GET_INFO: argsz 2^32 - 1", GET_INFO, info(u32::MAX, 0), 16),
        ("GET_INFO: 4096 bytes", GET_INFO, [info(16, 0), vec![0xff; 4080]].concat(), 16),
        ("GET_REGION_INFO: argsz 2^32 - 1", GET_REGION_INFO, region_info(u32::MAX, 0), 32),
        ("GET_REGION_INFO: garbage where the answer goes", GET_REGION_INFO, garbage, 32),
        ("GET_REGION_INFO: 4096 bytes", GET_REGION_INFO, [region(0), vec![9; 4064]].concat(), 32),
        ("GET_REGION_INFO: the VGA region", GET_REGION_INFO, region(8), 32),
        ("GET_IRQ_INFO: 4096 bytes", GET_IRQ_INFO, [info(16, 1), vec![9; 4080]].concat(), 16),
        ("GET_IRQ_INFO: an index without interrupts", GET_IRQ_INFO, info(16, 4), 16),
    ];
    rows.extend(accepted.map(|(name, command, body, length)| {
        row(name, [msg(command, body).expects(Expect::Payload(length))])
    }));
    rows
}
