//! SET_IRQS.

use barkeep_tests::peer::message::{Payload, command::*};
use barkeep_tests::peer::requests::{irq::*, set_irqs};
use rustix::io::Errno;

use crate::table::{Bytes, Expect, Fd, Row, msg, refused, row};

const NONE_TRIGGER: u32 = DATA_NONE | ACTION_TRIGGER;
const BOOL_TRIGGER: u32 = DATA_BOOL | ACTION_TRIGGER;
const EVENTFD_TRIGGER: u32 = DATA_EVENTFD | ACTION_TRIGGER;
const MSIX: u32 = 2;

fn set(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    set_irqs(flags, index, start, count, &[])
}

fn argsz(argsz: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(NONE_TRIGGER).u32(INTX).u32(0).u32(1).done()
}

pub(crate) fn rows() -> Vec<Row> {
    let flags = |flags| set(flags, INTX, 0, 1);
    let mut rows: Vec<Row> = refused(
        SET_IRQS,
        Errno::INVAL,
        [
            ("SET_IRQS: argsz 0", argsz(0)),
            ("SET_IRQS: argsz 19", argsz(19)),
            ("SET_IRQS: 19 bytes", argsz(20)[..19].to_vec()),
            ("SET_IRQS: no flags", flags(0)),
            ("SET_IRQS: no action", flags(DATA_NONE)),
            ("SET_IRQS: no data", flags(ACTION_TRIGGER)),
            ("SET_IRQS: data none and bool", flags(DATA_NONE | DATA_BOOL | ACTION_TRIGGER)),
            ("SET_IRQS: data none and eventfd", flags(DATA_NONE | DATA_EVENTFD | ACTION_TRIGGER)),
            ("SET_IRQS: data bool and eventfd", flags(DATA_BOOL | DATA_EVENTFD | ACTION_TRIGGER)),
            ("SET_IRQS: all data", flags(0b111 | ACTION_TRIGGER)),
            ("SET_IRQS: mask and unmask", flags(DATA_NONE | ACTION_MASK | ACTION_UNMASK)),
            ("SET_IRQS: mask and trigger", flags(DATA_NONE | ACTION_MASK | ACTION_TRIGGER)),
            ("SET_IRQS: unmask and trigger", flags(DATA_NONE | ACTION_UNMASK | ACTION_TRIGGER)),
            ("SET_IRQS: all actions", flags(DATA_NONE | 0b11_1000)),
            ("SET_IRQS: all known flags", flags(0b11_1111)),
            ("SET_IRQS: flag bit 6", flags(NONE_TRIGGER | 1 << 6)),
            ("SET_IRQS: flag bit 31", flags(NONE_TRIGGER | 1 << 31)),
            ("SET_IRQS: all flags", flags(u32::MAX)),
            ("SET_IRQS: index 5", set(NONE_TRIGGER, 5, 0, 1)),
            ("SET_IRQS: index 256", set(NONE_TRIGGER, 256, 0, 1)),
            ("SET_IRQS: index 2^32 - 1", set(NONE_TRIGGER, u32::MAX, 0, 1)),
            ("SET_IRQS: INTx 1", set(NONE_TRIGGER, INTX, 1, 1)),
            ("SET_IRQS: two INTx", set(NONE_TRIGGER, INTX, 0, 2)),
            ("SET_IRQS: INTx 2^32 - 1", set(NONE_TRIGGER, INTX, u32::MAX, 1)),
            ("SET_IRQS: 2^32 - 1 INTx", set(NONE_TRIGGER, INTX, 0, u32::MAX)),
            ("SET_IRQS: mask INTx 1", set(DATA_NONE | ACTION_MASK, INTX, 1, 1)),
            ("SET_IRQS: unmask two INTx", set(DATA_NONE | ACTION_UNMASK, INTX, 0, 2)),
            ("SET_IRQS: MSI 1 of 1", set(NONE_TRIGGER, MSI, 1, 1)),
            ("SET_IRQS: two MSI of one", set(NONE_TRIGGER, MSI, 0, 2)),
            ("SET_IRQS: MSI 2^32 - 1", set(NONE_TRIGGER, MSI, u32::MAX, 1)),
            ("SET_IRQS: 2^32 - 1 MSI", set(NONE_TRIGGER, MSI, 0, u32::MAX)),
            ("SET_IRQS: start and count overflow", set(NONE_TRIGGER, MSI, u32::MAX, u32::MAX)),
            ("SET_IRQS: start and count come to 0", set(NONE_TRIGGER, MSI, 1 << 31, 1 << 31)),
            ("SET_IRQS: a bool without a byte", set(BOOL_TRIGGER, INTX, 0, 1)),
            ("SET_IRQS: 2^32 - 1 bools", set_irqs(BOOL_TRIGGER, MSI, 0, u32::MAX, &[1; 64])),
            ("SET_IRQS: 3 bytes for 4 bools", set_irqs(BOOL_TRIGGER, MSI, 0, 4, &[1; 3])),
            ("SET_IRQS: a bool for MSI 1 of 1", set_irqs(BOOL_TRIGGER, MSI, 1, 1, &[1])),
            ("SET_IRQS: take eventfds from MSI 1 of 1", set(EVENTFD_TRIGGER, MSI, 1, 1)),
            ("SET_IRQS: MSI-X that is not there", set(NONE_TRIGGER, MSIX, 0, 1)),
        ],
    )
    .collect();
    rows.extend(refused_descriptors());
    rows.extend(of_ivshmem());
    rows.extend(accepted());
    rows
}

fn with(flags: u32, index: u32, count: u32, fds: impl Into<Vec<Fd>>) -> Bytes {
    msg(SET_IRQS, set(flags, index, 0, count)).with(fds)
}

fn refused_descriptors() -> Vec<Row> {
    let cases = [
        ("an eventfd for none", with(EVENTFD_TRIGGER, MSI, 0, [Fd::Eventfd])),
        ("two eventfds for one", with(EVENTFD_TRIGGER, MSI, 1, [Fd::Eventfd; 2])),
        ("one eventfd for two", with(EVENTFD_TRIGGER, MSI, 2, [Fd::Eventfd])),
        ("16 eventfds for one", with(EVENTFD_TRIGGER, MSI, 1, [Fd::Eventfd; 16])),
        ("16 eventfds for 16 of 1", with(EVENTFD_TRIGGER, MSI, 16, [Fd::Eventfd; 16])),
        ("17 eventfds", with(EVENTFD_TRIGGER, MSI, 17, [Fd::Eventfd; 17])),
        ("an eventfd for 2^32 - 1", with(EVENTFD_TRIGGER, MSI, u32::MAX, [Fd::Eventfd])),
        ("data none with an eventfd", with(NONE_TRIGGER, MSI, 1, [Fd::Eventfd])),
        ("mask with an eventfd too many", with(DATA_NONE | ACTION_MASK, INTX, 1, [Fd::Eventfd])),
        ("memory", with(EVENTFD_TRIGGER, MSI, 1, [Fd::Memory(4096)])),
        ("sealed memory", with(EVENTFD_TRIGGER, INTX, 1, [Fd::Sealed(4096)])),
        ("a socket", with(EVENTFD_TRIGGER, MSI, 1, [Fd::Socket])),
        ("a pipe", with(EVENTFD_TRIGGER, MSI, 1, [Fd::Pipe])),
        ("a directory", with(EVENTFD_TRIGGER, INTX, 1, [Fd::Directory])),
        ("/dev/null", with(EVENTFD_TRIGGER, MSI, 1, [Fd::DevNull])),
        ("a mere place", with(EVENTFD_TRIGGER, MSI, 1, [Fd::PathOnly])),
        ("an eventfd for an index that is not there", with(EVENTFD_TRIGGER, 5, 1, [Fd::Eventfd])),
        (
            "bools with an eventfd",
            msg(SET_IRQS, set_irqs(BOOL_TRIGGER, MSI, 0, 1, &[1])).with([Fd::Eventfd]),
        ),
    ];
    let row = |(name, bytes): (&str, Bytes)| {
        row(format!("SET_IRQS: {name}"), [bytes.fails(Errno::INVAL)])
    };
    cases.into_iter().map(row).collect()
}

/// Which has no interrupts at all.
fn of_ivshmem() -> Vec<Row> {
    [("INTx", INTX), ("MSI", MSI)]
        .into_iter()
        .flat_map(|(name, index)| {
            [
                row(
                    format!("SET_IRQS: {name} of a function without"),
                    [msg(SET_IRQS, set(NONE_TRIGGER, index, 0, 1)).fails(Errno::INVAL)],
                )
                .of_ivshmem(),
                row(
                    format!("SET_IRQS: an eventfd for {name} of a function without"),
                    [with(EVENTFD_TRIGGER, index, 1, [Fd::Eventfd]).fails(Errno::INVAL)],
                )
                .of_ivshmem(),
            ]
        })
        .collect()
}

fn accepted() -> Vec<Row> {
    let trigger = |index| msg(SET_IRQS, set(NONE_TRIGGER, index, 0, 1)).succeeds();
    vec![
        row("SET_IRQS: signals nobody", [trigger(INTX), trigger(MSI)]),
        row(
            "SET_IRQS: more bytes than bools",
            [msg(SET_IRQS, set_irqs(BOOL_TRIGGER, MSI, 0, 1, &[1; 4096])).fails(Errno::INVAL)],
        ),
        // The kernel shows no difference to an eventfd until it is to be signalled, and then does
        // nothing.
        row(
            "SET_IRQS: a nested epoll instance",
            [with(EVENTFD_TRIGGER, MSI, 1, [Fd::Epoll]).expects(Expect::Reply), trigger(MSI)],
        ),
        row(
            "SET_IRQS: signals a blocking eventfd",
            [with(EVENTFD_TRIGGER, MSI, 1, [Fd::Eventfd]).succeeds(), trigger(MSI), trigger(MSI)],
        ),
        row(
            "SET_IRQS: an eventfd after the other",
            vec![with(EVENTFD_TRIGGER, INTX, 1, [Fd::Eventfd]).succeeds(); 20],
        ),
        row(
            "SET_IRQS: takes away what is not there",
            [
                msg(SET_IRQS, set(EVENTFD_TRIGGER, MSI, 0, 1)).succeeds(),
                msg(SET_IRQS, set(NONE_TRIGGER, MSI, 0, 0)).succeeds(),
                msg(SET_IRQS, set(NONE_TRIGGER, INTX, 0, 0)).succeeds(),
            ],
        ),
    ]
}
