//! Headers: sizes, types, flags, commands, descriptors, and messages that are not due.

use barkeep_tests::peer::message::{COMMAND, ERROR, NO_REPLY, REPLY, command::*, header, message};
use barkeep_tests::peer::requests::{
    access, decode_page, dma_map, dma_unmap, info, irq, memory_fault, region_info, region_state,
    set_irqs, write,
};
use rustix::io::Errno;

use crate::table::{Expect, Fd, Row, flagged, msg, raw, row};

/// Longer than any message that is taken, by one byte.
const TOO_LONG: u32 = (1 << 20) + 4096 + 1;

/// Every command that is served after VERSION, as it succeeds. DMA_UNMAP finds nothing.
fn served() -> Vec<(&'static str, u16, Vec<u8>)> {
    vec![
        ("DMA_MAP", DMA_MAP, dma_map(0b11, 0, 0, 4096)),
        ("DMA_UNMAP", DMA_UNMAP, dma_unmap(0b10, 0, 0)),
        ("GET_INFO", GET_INFO, info(16, 0)),
        ("GET_REGION_INFO", GET_REGION_INFO, region_info(32, 0)),
        ("GET_IRQ_INFO", GET_IRQ_INFO, info(16, 0)),
        ("SET_IRQS", SET_IRQS, set_irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, irq::MSI, 0, 0, &[])),
        ("REGION_READ", REGION_READ, access(7, 0, 4)),
        ("REGION_WRITE", REGION_WRITE, write(7, 4, &[0, 0])),
        ("RESET", RESET, vec![]),
        ("MEMORY_FAULT", MEMORY_FAULT, memory_fault(1, 0, 0, 0)),
        ("REGION_STATE", REGION_STATE, region_state(56, 0, 0)),
        ("DECODE_PAGE", DECODE_PAGE, decode_page(16, 0)),
    ]
}

pub(crate) fn rows() -> Vec<Row> {
    [sizes(), types_and_flags(), no_reply(), unknown(), descriptors(), order(), unasked()].concat()
}

fn sizes() -> Vec<Row> {
    let mut rows = vec![
        row(
            "a header that claims 4 GiB less one byte",
            [raw(header(0, REGION_WRITE, u32::MAX, COMMAND)).expects(Expect::Waits)],
        ),
        row(
            "a header that claims 4 GiB of an unknown command",
            [raw(header(0, 0x4444, u32::MAX, COMMAND)).expects(Expect::Waits)],
        ),
        row(
            "a header that claims 4 GiB of a reply",
            [raw(header(0, GET_INFO, u32::MAX, REPLY)).expects(Expect::Waits)],
        ),
        row(
            "4 GiB before VERSION",
            [raw(header(0, VERSION, u32::MAX, COMMAND)).expects(Expect::Waits)],
        )
        .silent(),
        row(
            "4 GiB with descriptors",
            [raw(header(0, DMA_MAP, u32::MAX, COMMAND))
                .with([Fd::Memory(4096); 16])
                .expects(Expect::Waits)],
        ),
        row(
            "one byte less than a header",
            [raw(&header(0, RESET, 16, COMMAND)[..15]).expects(Expect::Waits)],
        ),
        row(
            "one byte less than a body",
            [raw(&message(0, REGION_READ, COMMAND, &access(7, 0, 4))[..31]).expects(Expect::Waits)],
        ),
        row("one byte too long", [oversized(REGION_WRITE).fails(Errno::INVAL)]),
        row("one byte too long, of an unknown command", [oversized(0x4444).fails(Errno::INVAL)]),
        row(
            "one byte too long, with a descriptor",
            [oversized(DMA_MAP).with([Fd::Memory(4096)]).fails(Errno::INVAL)],
        ),
        row(
            "the longest message, of zeros",
            [msg(GET_INFO, vec![0; TOO_LONG as usize - 17]).fails(Errno::INVAL)],
        ),
    ];
    for size in [0, 1, 4, 15] {
        let bytes = || raw(header(0, GET_INFO, size, COMMAND));
        let name = format!("a size of {size}");
        rows.push(row(format!("{name} before VERSION"), [bytes().fails_and_closes()]).silent());
        rows.push(row(name, [bytes().fails_and_closes()]));
    }
    for (name, code, _) in served().into_iter().filter(|(_, code, _)| *code != RESET) {
        rows.push(row(format!("{name} that is all header"), [msg(code, []).fails(Errno::INVAL)]));
    }
    rows
}

fn oversized(command: u16) -> crate::table::Bytes {
    let mut bytes = header(0, command, TOO_LONG, COMMAND);
    // Whole commands, which must not be taken for some.
    let inner = message(0xdead, GET_INFO, COMMAND, &info(16, 0));
    bytes.extend(inner.iter().cycle().take(TOO_LONG as usize - 16));
    raw(bytes)
}

fn types_and_flags() -> Vec<Row> {
    let get_info = |flags| flagged(GET_INFO, flags, info(16, 0));
    let mut rows: Vec<Row> = (2..16)
        .map(|kind| row(format!("type {kind}"), [get_info(kind).fails_and_closes()]))
        .collect();
    rows.extend([
        row("type 2 before VERSION", [get_info(2).fails_and_closes()]).silent(),
        row("type 2 with No_reply", [get_info(2 | NO_REPLY).fails_and_closes()]),
        row("a command with the error flag", [get_info(ERROR).expects(Expect::Payload(16))]),
        row("a command with bit 6", [get_info(1 << 6).expects(Expect::Payload(16))]),
        row("a command with bit 31", [get_info(1 << 31).expects(Expect::Payload(16))]),
        row(
            "a command with an errno",
            [raw(with_errno(message(0, RESET, COMMAND, &[]))).succeeds()],
        ),
    ]);
    rows
}

fn with_errno(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[12..16].fill(0xff);
    bytes
}

fn no_reply() -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, code, body) in served() {
        rows.push(row(
            format!("{name} with No_reply"),
            [flagged(code, NO_REPLY, &body).gets_nothing()],
        ));
        rows.push(row(
            format!("{name} with No_reply, too short"),
            [flagged(code, NO_REPLY, if code == RESET { &[0] } else { &body[1..] }).gets_nothing()],
        ));
    }
    rows.extend([
        row("an unknown command with No_reply", [flagged(0x4444, NO_REPLY, []).gets_nothing()]),
        row("a second VERSION with No_reply", [flagged(VERSION, NO_REPLY, [0; 4]).gets_nothing()]),
        row(
            "No_reply and too many descriptors",
            [flagged(DMA_MAP, NO_REPLY, served()[0].2.clone())
                .with([Fd::Memory(4096); 17])
                .gets_nothing()],
        ),
        row(
            "No_reply twenty times",
            vec![flagged(REGION_READ, NO_REPLY, access(9, 0, 4)).gets_nothing(); 20],
        ),
    ]);
    rows
}

fn unknown() -> Vec<Row> {
    let unknown = [0, 14, 19, 20, 0xff, 0x7fff, 0x8000, 0x8003, 0xffff];
    let mut rows: Vec<Row> = unknown
        .into_iter()
        .map(|code| row(format!("command {code:#x}"), [msg(code, []).fails(Errno::INVAL)]))
        .collect();
    rows.extend([
        row("an unknown command with a body", [msg(0x4444, [0xff; 100]).fails(Errno::INVAL)]),
        row(
            "an unknown command with a descriptor",
            [msg(19, []).with([Fd::Eventfd]).fails(Errno::INVAL)],
        ),
    ]);
    rows
}

fn descriptors() -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, code, body) in served() {
        let counts = match code {
            DMA_MAP | DMA_UNMAP => &[2, 16, 17, 253][..],
            // Its own limit is that of the message.
            SET_IRQS => &[1, 17, 253],
            _ => &[1, 16, 17, 253],
        };
        for count in counts {
            rows.push(row(
                format!("{name} with {count} descriptors"),
                [msg(code, &body).with(vec![Fd::Memory(4096); *count]).fails(Errno::INVAL)],
            ));
        }
    }
    rows
}

fn order() -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, code, body) in served() {
        rows.push(
            row(format!("{name} before VERSION"), [msg(code, &body).fails_and_closes()]).silent(),
        );
        rows.push(
            row(
                format!("{name} before VERSION with No_reply"),
                [flagged(code, NO_REPLY, &body).expects(Expect::Closes)],
            )
            .silent(),
        );
    }
    rows.extend([
        row("command 0 before VERSION", [msg(0, []).fails_and_closes()]).silent(),
        row("command 0xffff before VERSION", [msg(0xffff, [0; 100]).fails_and_closes()]).silent(),
        row("one byte too long before VERSION", [oversized(VERSION).fails_and_closes()]).silent(),
        row(
            "a descriptor before VERSION",
            [msg(DMA_MAP, served()[0].2.clone()).with([Fd::Memory(4096)]).fails_and_closes()],
        )
        .silent(),
    ]);
    rows
}

fn unasked() -> Vec<Row> {
    let reply = |command, flags, body: Vec<u8>| flagged(command, flags, body).fails_and_closes();
    let reply_to_taken_id = |flags| {
        row(
            format!("a reply {flags:#x} after a command"),
            [
                msg(GET_INFO, info(16, 0)).expects(Expect::Payload(16)),
                reply(GET_INFO, flags, info(16, 0)),
            ],
        )
    };
    vec![
        row("a reply", [reply(GET_INFO, REPLY, info(16, 0))]),
        row("a reply without a body", [reply(RESET, REPLY, vec![])]),
        row("an error reply", [reply(GET_INFO, REPLY | ERROR, vec![])]),
        row(
            "an error reply with an errno",
            [raw(with_errno(message(0, GET_INFO, REPLY | ERROR, &[]))).fails_and_closes()],
        ),
        row("an error reply with a body", [reply(GET_INFO, REPLY | ERROR, vec![0; 64])]),
        row("a reply with No_reply", [reply(GET_INFO, REPLY | NO_REPLY, info(16, 0))]),
        row("a reply to DMA_READ", [reply(DMA_READ, REPLY, vec![0; 20])]),
        row("a reply to DMA_WRITE", [reply(DMA_WRITE, REPLY, vec![0; 16])]),
        row("a reply to command 0", [reply(0, REPLY, vec![])]),
        row("a reply to VERSION", [reply(VERSION, REPLY, vec![0; 4])]),
        row(
            "a reply with a descriptor",
            [flagged(GET_INFO, REPLY, []).with([Fd::Memory(4096)]).fails_and_closes()],
        ),
        row(
            "a reply with 17 descriptors",
            [flagged(GET_INFO, REPLY, []).with([Fd::Memory(4096); 17]).fails_and_closes()],
        ),
        row(
            "a reply that is too long",
            [raw([header(0, GET_INFO, TOO_LONG, REPLY), vec![0; TOO_LONG as usize - 16]].concat())
                .fails_and_closes()],
        ),
        row("a reply before VERSION", [reply(VERSION, REPLY, vec![0; 4])]).silent(),
        row("an error reply before VERSION", [reply(GET_INFO, REPLY | ERROR, vec![])]).silent(),
        reply_to_taken_id(REPLY),
        reply_to_taken_id(REPLY | ERROR),
    ]
}
