//! "VFIO_USER_VERSION"

use barkeep_tests::backend::Backend;
use barkeep_tests::peer::message::{Payload, command, u16_at};
use barkeep_tests::peer::{Peer, version_body};
use rustix::io::Errno;
use serde_json::{Value, json};

/// What QEMU's `hw/vfio-user/proxy.c` proposes, without the line breaks.
const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_data_xfer_size": 1048576,
    "write_multiple": true, "max_msg_fds": 8, "max_dma_maps": 65535}}"#;
/// What libvfio-user's own client samples propose.
const LIBVFIO_USER: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,
    "migration":{"pgsize":4096}}}"#;

/// Sends a proposal and takes the answer apart: minor version and JSON.
fn negotiate(peer: &mut Peer, body: &[u8]) -> (u16, Value) {
    let body = peer.call(command::VERSION, body).success();
    assert_eq!(u16_at(&body, 0), 0, "\"the major version in the reply must be the same\"");
    let (nul, json) = body[4..].split_last().expect("version data");
    assert_eq!(*nul, 0, "version data includes its terminating NUL");
    assert!(!json.contains(&0), "and no other");
    (u16_at(&body, 2), serde_json::from_slice(json).expect("JSON"))
}

#[test]
fn every_known_proposal_is_answered_with_our_limits() {
    let backend = Backend::serve(&["edu"]);
    let ours = json!({"capabilities": {
        "max_msg_fds": 16, "max_data_xfer_size": 1_048_576, "max_dma_maps": 65535, "pgsizes": 4096,
    }});
    for (name, minor, body) in [
        ("no data", 2, Payload::new().u16(0).u16(2).done()),
        ("an empty object", 2, version_body(0, 2, "{}")),
        ("no capabilities", 2, version_body(0, 2, r#"{"capabilities":{}}"#)),
        ("unknown names", 2, version_body(0, 2, r#"{"x":1,"capabilities":{"y":[2,{"z":3}]}}"#)),
        ("white space", 2, version_body(0, 2, " { \"capabilities\" :\t{ }\r\n} ")),
        ("QEMU", 0, version_body(0, 0, QEMU)),
        ("libvfio-user", 1, version_body(0, 1, LIBVFIO_USER)),
        (
            "a twin socket",
            2,
            version_body(0, 2, r#"{"capabilities":{"twin_socket":{"supported":true}}}"#),
        ),
    ] {
        let answer = negotiate(&mut Peer::connect(backend.socket()), &body);
        // What the client did not name, it is not told of: QEMU would complain.
        let mut expected = ours.clone();
        let capabilities = &mut expected["capabilities"];
        match name {
            "QEMU" => capabilities["write_multiple"] = json!(true),
            "libvfio-user" => capabilities["migration"] = json!({ "pgsize": 4096 }),
            "a twin socket" => {
                capabilities["twin_socket"] = json!({ "supported": true, "fd_index": 0 });
            }
            _ => {}
        }
        assert_eq!(answer, (minor, expected), "{name}");
    }
}

#[test]
fn the_lower_minor_version_is_spoken() {
    let backend = Backend::serve(&["edu"]);
    for (theirs, answered) in [(0, 0), (1, 1), (2, 2), (3, 2), (99, 2), (u16::MAX, 2)] {
        let mut peer = Peer::connect(backend.socket());
        assert_eq!(negotiate(&mut peer, &version_body(0, theirs, "{}")).0, answered);
    }
}

#[test]
fn extensions_are_answered_to_those_who_propose_them() {
    let backend = Backend::serve(&["edu"]);
    for (proposed, answered) in [
        (json!({"memory_fault": true, "region_state": true}), [true, true, false]),
        (json!({"memory_fault": true}), [true, false, false]),
        (json!({"region_state": true, "of_tomorrow": true}), [false, true, false]),
        (json!({"memory_fault": false, "region_state": false}), [false, false, false]),
        (json!({"decode_page": true}), [false, false, true]),
        (json!({"decode_page": false, "region_state": true}), [false, true, false]),
        (json!({}), [false, false, false]),
    ] {
        let proposal = json!({"capabilities": {"barkeep": proposed}}).to_string();
        let mut peer = Peer::connect(backend.socket());
        let (_, answer) = negotiate(&mut peer, &version_body(0, 2, &proposal));
        let [memory_fault, region_state, decode_page] = answered;
        let mut expected = json!({"memory_fault": memory_fault, "region_state": region_state});
        // Clients from before it find what they did.
        if decode_page {
            expected["decode_page"] = json!(true);
        }
        assert_eq!(answer["capabilities"]["barkeep"], expected, "{proposal}");
    }
}

#[test]
fn a_proposal_that_cant_be_understood_is_refused_and_ends_the_connection() {
    let backend = Backend::serve(&["edu"]);
    let data = |bytes: &[u8]| Payload::new().u16(0).u16(2).bytes(bytes).done();
    let long = format!("{{}}{}", " ".repeat(4096));
    for (name, body) in [
        ("empty", vec![]),
        ("short", vec![0, 0, 2]),
        ("major 1", version_body(1, 0, "{}")),
        ("major 65535", version_body(u16::MAX, 0, "{}")),
        // Of a foreign major version, not even the data's format is known.
        ("major 1 with other data", Payload::new().u16(1).u16(0).bytes(b"\xff\xfe").done()),
        ("no NUL", data(b"{}")),
        ("NUL alone", data(&[0])),
        ("NUL in the middle", data(b"{}\0{}\0")),
        ("not JSON", data(b"capabilities\0")),
        ("cut JSON", data(b"{\"capabilities\":{\0")),
        ("not UTF-8", data(b"{\"capabilities\":{\"\xff\":1}}\0")),
        ("a number", data(b"1\0")),
        ("a limit that is a string", data(b"{\"capabilities\":{\"max_msg_fds\":\"8\"}}\0")),
        ("a limit below zero", data(b"{\"capabilities\":{\"max_msg_fds\":-1}}\0")),
        ("capabilities that are a number", data(b"{\"capabilities\":1}\0")),
        ("longer than any proposal", version_body(0, 2, &long)),
    ] {
        let mut peer = Peer::connect(backend.socket());
        println!("{name}");
        peer.expect_errno(command::VERSION, &body, Errno::INVAL);
        peer.expect_closed();
    }
}

/// "The version data is an optional UTF-8 encoded JSON byte array with the following format":
/// objects, not the arrays that some JSON readers take for them.
#[test]
fn arrays_in_place_of_objects_are_refused() {
    let backend = Backend::serve(&["edu"]);
    for json in ["[]", "[{}]", r#"{"capabilities":[]}"#, r#"{"capabilities":[16]}"#] {
        let mut peer = Peer::connect(backend.socket());
        println!("{json}");
        peer.expect_errno(command::VERSION, &version_body(0, 2, json), Errno::INVAL);
        peer.expect_closed();
    }
}
