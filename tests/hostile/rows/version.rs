//! VERSION: its numbers and its JSON.

use barkeep_tests::peer::message::{NO_REPLY, Payload, command::*};
use barkeep_tests::peer::requests::access;
use barkeep_tests::peer::version_body;
use rustix::io::Errno;

use crate::table::{Expect, Fd, Row, flagged, msg, row};

/// The longest data that is looked at, with its NUL.
const LONGEST: usize = 4096;

pub(crate) fn rows() -> Vec<Row> {
    [numbers(), refused_data(), accepted_data(), order()].concat()
}

fn numbers() -> Vec<Row> {
    let numbers = |major, minor| Payload::new().u16(major).u16(minor).done();
    let mut rows = vec![
        row(
            "VERSION with a minor version of 65535",
            [msg(VERSION, numbers(0, u16::MAX)).succeeds()],
        )
        .silent(),
        row("VERSION 0.0", [msg(VERSION, numbers(0, 0)).succeeds()]).silent(),
    ];
    for major in [1, 2, 0x8000, u16::MAX] {
        let name = format!("VERSION {major}.0");
        rows.push(row(name, [msg(VERSION, numbers(major, 0)).fails_and_closes()]).silent());
    }
    rows.push(
        row("VERSION 1.0 with data", [msg(VERSION, version_body(1, 0, "{}")).fails_and_closes()])
            .silent(),
    );
    for length in 0..4 {
        let name = format!("VERSION of {length} bytes");
        rows.push(row(name, [msg(VERSION, vec![0; length]).fails_and_closes()]).silent());
    }
    rows
}

/// Data behind the numbers, as it is.
fn data(bytes: &[u8]) -> Vec<u8> {
    [&[0, 0, 2, 0], bytes].concat()
}

fn refused_data() -> Vec<Row> {
    let nested = |depth: usize, open: &str, close: &str| {
        let value = [open.repeat(depth), close.repeat(depth)].concat();
        version_body(0, 2, &format!(r#"{{"x":{value}}}"#))
    };
    let mut cases = vec![
        ("unterminated", data(b"{}")),
        ("a NUL alone", data(b"\0")),
        ("two NULs", data(b"{}\0\0")),
        ("a NUL inside", data(b"{\"x\":\"\0\"}\0")),
        ("a NUL in front", data(b"\0{}\0")),
        ("a byte order mark", data(b"\xef\xbb\xbf{}\0")),
        ("no UTF-8", data(b"{\"x\":\"\xff\"}\0")),
        ("UTF-16", data(b"{\0}\0")),
        ("binary", data(&[0xff; 64])),
        ("one byte more than is looked at", padded(LONGEST + 1)),
        ("ten times as much", padded(10 * LONGEST)),
        ("a depth of 1000 arrays", nested(1000, "[", "]")),
        ("a depth of 500 objects", nested(500, r#"{"x":"#, "}").into_iter().collect()),
        ("arrays that are never closed", version_body(0, 2, &"[".repeat(4000))),
        ("objects that are never closed", version_body(0, 2, &r#"{"a":"#.repeat(800))),
    ];
    let texts = [
        ("empty text", ""),
        ("white space", "  \n\t "),
        ("a word", "hello"),
        ("half an object", r#"{"capabilities":{"#),
        ("something behind", "{} {}"),
        ("a comma too many", r#"{"capabilities":{},}"#),
        ("single quotes", "{'capabilities':{}}"),
        ("a comment", "{/* */}"),
        ("an array", "[]"),
        ("an array of members", r#"[{"max_msg_fds":1}]"#),
        ("a number", "3"),
        ("a string", r#""capabilities""#),
        ("null", "null"),
        ("true", "true"),
        ("half a surrogate pair", r#"{"x":"\ud800"}"#),
        ("a control character", "{\"x\":\"\u{1}\"}"),
        ("a number too large to be one", r#"{"capabilities":{"max_msg_fds":1e999}}"#),
        (
            "a member twice",
            r#"{"capabilities":{"max_msg_fds":1},"capabilities":{"max_msg_fds":2}}"#,
        ),
        ("capabilities: array", r#"{"capabilities":[]}"#),
        ("capabilities: members without names", r#"{"capabilities":[16,1048576]}"#),
        ("capabilities: number", r#"{"capabilities":1}"#),
        ("capabilities: string", r#"{"capabilities":"{}"}"#),
        ("max_msg_fds: string", r#"{"capabilities":{"max_msg_fds":"16"}}"#),
        ("max_msg_fds: negative", r#"{"capabilities":{"max_msg_fds":-1}}"#),
        ("max_msg_fds: fraction", r#"{"capabilities":{"max_msg_fds":1.5}}"#),
        ("max_msg_fds: 2^64", r#"{"capabilities":{"max_msg_fds":18446744073709551616}}"#),
        ("max_msg_fds: array", r#"{"capabilities":{"max_msg_fds":[1]}}"#),
        ("max_data_xfer_size: object", r#"{"capabilities":{"max_data_xfer_size":{}}}"#),
        ("max_dma_maps: true", r#"{"capabilities":{"max_dma_maps":true}}"#),
        ("pgsizes: string", r#"{"capabilities":{"pgsizes":"4096"}}"#),
        ("write_multiple: number", r#"{"capabilities":{"write_multiple":1}}"#),
        ("twin_socket: true", r#"{"capabilities":{"twin_socket":true}}"#),
        ("twin_socket: array", r#"{"capabilities":{"twin_socket":[true]}}"#),
        (
            "twin_socket.supported: string",
            r#"{"capabilities":{"twin_socket":{"supported":"yes"}}}"#,
        ),
        ("barkeep: true", r#"{"capabilities":{"barkeep":true}}"#),
        ("barkeep: array", r#"{"capabilities":{"barkeep":[true,true]}}"#),
        ("barkeep.memory_fault: number", r#"{"capabilities":{"barkeep":{"memory_fault":1}}}"#),
    ];
    cases.extend(texts.map(|(name, text)| (name, version_body(0, 2, text))));
    let row = |(name, body)| {
        row(format!("VERSION data: {name}"), [msg(VERSION, body).fails_and_closes()]).silent()
    };
    cases.into_iter().map(row).collect()
}

/// An empty object and spaces, `length` bytes with the NUL.
fn padded(length: usize) -> Vec<u8> {
    version_body(0, 2, &format!("{{}}{}", " ".repeat(length - 3)))
}

fn accepted_data() -> Vec<Row> {
    let texts = [
        ("empty", "{}"),
        ("empty capabilities", r#"{"capabilities":{}}"#),
        ("unknown members", r#"{"x":1,"capabilities":{"y":[null,{"z":1e3}]}}"#),
        ("limits of 0", r#"{"capabilities":{"max_msg_fds":0,"max_data_xfer_size":0}}"#),
        (
            "limits of 2^64 - 1",
            r#"{"capabilities":{"max_msg_fds":18446744073709551615,"max_dma_maps":18446744073709551615}}"#,
        ),
        ("white space around it", " \n{ }\t "),
    ];
    let mut cases = texts.map(|(name, text)| (name, version_body(0, 2, text))).to_vec();
    cases.push(("exactly as much as is looked at", padded(LONGEST)));
    let row = |(name, body)| {
        row(format!("VERSION data: {name}"), [msg(VERSION, body).succeeds()]).silent()
    };
    cases.into_iter().map(row).collect()
}

fn order() -> Vec<Row> {
    let version = || msg(VERSION, version_body(0, 2, "{}"));
    let read = || msg(REGION_READ, access(7, 0, 4));
    vec![
        row("VERSION twice", [version().succeeds(), version().fails(Errno::INVAL)]).silent(),
        row(
            "VERSION twice, the second refused as such",
            [
                version().succeeds(),
                msg(VERSION, version_body(1, 0, "{}")).fails(Errno::INVAL),
                msg(VERSION, b"junk").fails(Errno::INVAL),
                msg(VERSION, version_body(0, 2, "[")).fails(Errno::INVAL),
            ],
        )
        .silent(),
        row(
            "a second VERSION gives no extensions",
            [
                version().succeeds(),
                msg(
                    VERSION,
                    version_body(0, 2, r#"{"capabilities":{"barkeep":{"region_state":true}}}"#),
                )
                .fails(Errno::INVAL),
                msg(REGION_STATE, barkeep_tests::peer::requests::region_state(56, 0, 0))
                    .fails(Errno::NOTSUP),
            ],
        )
        .silent(),
        row("VERSION and a request", [version().succeeds(), read().expects(Expect::Payload(20))])
            .silent(),
        row(
            "VERSION with No_reply",
            [
                flagged(VERSION, NO_REPLY, version_body(0, 2, "{}")).gets_nothing(),
                read().expects(Expect::Payload(20)),
            ],
        )
        .silent(),
        row(
            "a refused VERSION with No_reply",
            [flagged(VERSION, NO_REPLY, version_body(1, 0, "{}")).expects(Expect::Closes)],
        )
        .silent(),
        row("VERSION with a descriptor", [version().with([Fd::Socket]).fails_and_closes()])
            .silent(),
        row("VERSION with 17 descriptors", [version().with([Fd::Socket; 17]).fails_and_closes()])
            .silent(),
    ]
}
