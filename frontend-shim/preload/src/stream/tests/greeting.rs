//! VERSION with and without our object.

use barkeep_protocol::wire::{BarkeepExtensions, Command, MessageKind, Version};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::{ASK, YES, message, version};
use crate::stream::hello::{Hello, Welcome};

const VERSION: u16 = Command::Version as u16;
/// As QEMU writes it.
const QEMU: &str = r#"{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, "max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#;

fn data(minor: u16, json: &str) -> Vec<u8> {
    [&0_u16.to_ne_bytes(), &minor.to_ne_bytes(), json.as_bytes(), b"\0"].concat()
}

fn json_of(message: &[u8]) -> String {
    String::from_utf8(message[20..message.len() - 1].to_vec()).unwrap()
}

#[test]
fn what_qemu_proposes_gets_one_more_member_and_stays_as_it_is_otherwise() {
    let hello = Hello::with_ours(&message(7, VERSION, ASK, &data(0, QEMU))).unwrap();
    let ours = r#""barkeep":{"memory_fault":true,"region_state":true,"decode_page":true},"#;
    let expected =
        QEMU.replacen(r#""capabilities": {"#, &format!(r#""capabilities": {{{ours}"#), 1);
    assert_eq!(json_of(&hello.bytes), expected);
    assert_eq!(hello.bytes, message(7, VERSION, ASK, &data(0, &expected)));
}

#[test]
fn a_proposal_without_capabilities_gets_them() {
    for json in
        ["{}", " { } ", r#"{"capabilities":{}}"#, r#"{"x": "}\"{", "y": [1, {"capabilities": 2}]}"#]
    {
        let hello = Hello::with_ours(&message(7, VERSION, ASK, &data(1, json))).unwrap();
        let version = Version::parse(&hello.bytes[16..]).unwrap();
        assert_eq!(version.capabilities.barkeep, Some(BarkeepExtensions::all()), "{json}");
        let mut left: Value = serde_json::from_str(&json_of(&hello.bytes)).unwrap();
        left["capabilities"].as_object_mut().unwrap().remove("barkeep");
        let mut before: Value = serde_json::from_str(json).unwrap();
        before.as_object_mut().unwrap().entry("capabilities").or_insert(json!({}));
        assert_eq!(left, before);
    }
    let bare = message(7, VERSION, ASK, &[0, 0, 1, 0]);
    let version = Version::parse(&Hello::with_ours(&bare).unwrap().bytes[16..]).unwrap();
    assert_eq!(version.capabilities.barkeep, Some(BarkeepExtensions::all()));
}

#[test]
fn what_is_no_plain_version_is_left_alone() {
    let whole = version(3);
    let mut long = whole.clone();
    long.push(0);
    let speaks_barkeep = message(3, VERSION, ASK, &Version::proposal().to_bytes());
    let other_major = message(3, VERSION, ASK, &[1, 0, 0, 0]);
    let full = format!(r#"{{"capabilities":{{"x":"{}"}}}}"#, "x".repeat(4060));
    let cases = [
        &whole[..whole.len() - 1],
        &long,
        &speaks_barkeep,
        &other_major,
        &message(3, VERSION, YES, &whole[16..]),
        &message(3, VERSION, MessageKind::Command { no_reply: true }, &whole[16..]),
        &message(3, 4, ASK, &whole[16..]),
        &message(3, VERSION, ASK, &data(0, "[]")),
        &message(3, VERSION, ASK, &data(0, r#"{"capabilities":7}"#)),
        &message(3, VERSION, ASK, &data(0, r#"{"capabilities":{"barkeep":null}}"#)),
        // The escape is the same name to a parser.
        &message(3, VERSION, ASK, &data(0, r#"{"\u0063apabilities":{}}"#)),
        &message(3, VERSION, ASK, &data(0, &full)),
        &[],
    ];
    for case in cases {
        assert_eq!(Hello::with_ours(case), None, "{}", String::from_utf8_lossy(case));
    }
}

#[test]
fn our_object_is_cut_out_of_the_answer_wherever_it_stands() {
    let ours = r#""barkeep" : {"memory_fault":true, "decode_page":true}"#;
    let cases = [
        (
            format!(r#"{{"capabilities":{{{ours},"max_msg_fds":8}}}}"#),
            r#"{"capabilities":{"max_msg_fds":8}}"#,
        ),
        (
            format!(r#"{{"capabilities":{{"max_msg_fds":8 , {ours} }}}}"#),
            r#"{"capabilities":{"max_msg_fds":8 }}"#,
        ),
        (
            format!(r#"{{"a":[1,"}}"],"capabilities":{{"b":"\"",{ours},"c":1.50}},"z":2}}"#),
            r#"{"a":[1,"}"],"capabilities":{"b":"\"","c":1.50},"z":2}"#,
        ),
        (format!(r#"{{"capabilities":{{ {ours} }}}}"#), r#"{"capabilities":{  }}"#),
    ];
    let extensions =
        BarkeepExtensions { memory_fault: true, decode_page: true, ..BarkeepExtensions::default() };
    for (json, left) in cases {
        let welcome = Welcome::without_ours(&message(3, VERSION, YES, &data(2, &json)));
        assert_eq!(welcome.extensions, Some(extensions), "{json}");
        assert_eq!(welcome.shown, message(3, VERSION, YES, &data(2, left)), "{json}");
    }
}

#[test]
fn answers_without_our_object_stay_as_they_are() {
    let refused = MessageKind::Reply { error: Some(Errno::INVAL) };
    let cases = [
        message(3, VERSION, YES, &data(0, QEMU)),
        message(3, VERSION, refused, &[]),
        message(3, VERSION, YES, &data(0, r#"{"capabilities":{"barkeep":7}}"#)),
        message(3, VERSION, YES, &data(0, r#"{"barkeep":{}}"#)),
        message(3, VERSION, YES, &data(0, r#"{"capabilities":{"bark\u0065ep":{}}}"#)),
        message(3, VERSION, YES, b"junk"),
    ];
    for case in cases {
        let welcome = Welcome::without_ours(&case);
        assert_eq!(welcome, Welcome { shown: case, extensions: None });
    }
}
