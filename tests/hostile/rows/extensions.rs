//! MEMORY_FAULT, REGION_STATE and DECODE_PAGE.

use barkeep_tests::peer::message::{Payload, command::*};
use barkeep_tests::peer::requests::{decode_page, memory_fault, region_state};
use rustix::io::Errno;

use crate::table::{Expect, Row, msg, refused, row};

const BAR: u64 = 1 << 20;

fn fault_argsz(argsz: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(1).u32(0).u32(0).u64(0).u64(0).done()
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = refused(
        MEMORY_FAULT,
        Errno::INVAL,
        [
            ("MEMORY_FAULT: argsz 0", fault_argsz(0)),
            ("MEMORY_FAULT: argsz 31", fault_argsz(31)),
            ("MEMORY_FAULT: 31 bytes", fault_argsz(32)[..31].to_vec()),
            ("MEMORY_FAULT: 33 bytes", [fault_argsz(32), vec![0]].concat()),
            ("MEMORY_FAULT: access bit 3", memory_fault(1 << 3, 0, 0, 0)),
            ("MEMORY_FAULT: all access bits", memory_fault(u32::MAX, 0, 0, 0)),
            ("MEMORY_FAULT: region 1", memory_fault(1, 1, 0, 0)),
            ("MEMORY_FAULT: the ROM", memory_fault(1, 6, 0, 0)),
            ("MEMORY_FAULT: configuration space", memory_fault(1, 7, 0, 0)),
            ("MEMORY_FAULT: region 9", memory_fault(1, 9, 0, 0)),
            ("MEMORY_FAULT: region 2^32 - 1", memory_fault(1, u32::MAX, 0, 0)),
            ("MEMORY_FAULT: where the BAR ends", memory_fault(1, 0, BAR, 0)),
            ("MEMORY_FAULT: offset 2^64 - 1", memory_fault(1, 0, u64::MAX, 0)),
        ],
    )
    .collect();
    rows.extend(refused(
        REGION_STATE,
        Errno::INVAL,
        [
            ("REGION_STATE: argsz 0", region_state(0, 0, 0)),
            ("REGION_STATE: argsz 55", region_state(55, 0, 0)),
            ("REGION_STATE: 15 bytes", region_state(56, 0, 0)[..15].to_vec()),
            ("REGION_STATE: 17 bytes", [region_state(56, 0, 0), vec![0]].concat()),
            ("REGION_STATE: flag bit 0", region_state(56, 1, 0)),
            ("REGION_STATE: all flags", region_state(56, u32::MAX, 0)),
            ("REGION_STATE: region 1", region_state(56, 0, 1)),
            ("REGION_STATE: region 9", region_state(56, 0, 9)),
            ("REGION_STATE: region 2^32 - 1", region_state(56, 0, u32::MAX)),
        ],
    ));
    rows.extend(refused(
        DECODE_PAGE,
        Errno::INVAL,
        [
            ("DECODE_PAGE: argsz 0", decode_page(0, 0)),
            ("DECODE_PAGE: argsz 15", decode_page(15, 0)),
            ("DECODE_PAGE: flag bit 0", decode_page(16, 1)),
            ("DECODE_PAGE: all flags", decode_page(16, u32::MAX)),
            ("DECODE_PAGE: 7 bytes", decode_page(16, 0)[..7].to_vec()),
            ("DECODE_PAGE: 9 bytes", [decode_page(16, 0), vec![0]].concat()),
            ("DECODE_PAGE: empty", vec![]),
        ],
    ));
    rows.extend([
        row(
            "DECODE_PAGE: argsz 2^32 - 1",
            [msg(DECODE_PAGE, decode_page(u32::MAX, 0)).expects(Expect::Payload(16))],
        ),
        row(
            "DECODE_PAGE that was not negotiated",
            [msg(DECODE_PAGE, decode_page(16, 0)).fails(Errno::NOTSUP)],
        )
        .plain(),
        row(
            "MEMORY_FAULT: a size of 2^64 - 1",
            [msg(MEMORY_FAULT, memory_fault(0, 0, BAR - 1, u64::MAX)).expects(Expect::Payload(16))],
        ),
        row(
            "REGION_STATE: argsz 2^32 - 1",
            [msg(REGION_STATE, region_state(u32::MAX, 0, 7)).expects(Expect::Payload(56))],
        ),
        row(
            "MEMORY_FAULT that was not negotiated",
            [msg(MEMORY_FAULT, memory_fault(1, 0, 0, 0)).fails(Errno::NOTSUP)],
        )
        .plain(),
        row(
            "REGION_STATE that was not negotiated",
            [msg(REGION_STATE, region_state(56, 0, 0)).fails(Errno::NOTSUP)],
        )
        .plain(),
        row(
            "MEMORY_FAULT that was not negotiated, malformed",
            [msg(MEMORY_FAULT, []).expects(Expect::Refused)],
        )
        .plain(),
    ]);
    rows
}
