use super::*;

#[test]
fn version_data_is_checked_like_any_other_payload() {
    let version = |json: &[u8]| {
        let mut body = words(&[0x0002_0000]);
        body.extend_from_slice(json);
        Version::parse(&body)
    };
    assert_eq!(version(b"").unwrap().capabilities, Capabilities::default());
    assert_eq!(version(b"{}\0").unwrap().capabilities, Capabilities::default());
    let qemu =
        version(b"{\"capabilities\":{\"max_msg_fds\":16,\"migration\":{\"pgsize\":4096}}}\0");
    assert_eq!(qemu.unwrap().capabilities.max_msg_fds, Some(16));
    let deep = [b"[".repeat(3000), b"\0".to_vec()].concat();
    let bad: &[&[u8]] = &[
        b"{}",
        b"{\0",
        b"\"\0",
        b"\0",
        b"{\"capabilities\":\"23\"}\0",
        b"{\"capabilities\":{\"max_msg_fds\":\"foo\"}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"{\"capabilities\":{\"barkeep\":7}}\0",
        b"{\"capabilities\":[16]}\0",
        b"{\"capabilities\":{\"migration\":[4096]}}\0",
        b"{\"capabilities\":{\"migration\":{\"pgsize\":\"4096\"}}}\0",
        b"{\"capabilities\":{\"twin_socket\":true}}\0",
        b"{\"capabilities\":{\"twin_socket\":{\"supported\":1}}}\0",
        b"{\"capabilities\":{\"write_multiple\":1}}\0",
        b"\xff\xfe\0",
        &deep,
        &[b' '; 5000],
    ];
    for json in bad {
        let result = version(json);
        assert!(matches!(result, Err(WireError::VersionData(_))), "{json:?}: {result:?}");
    }
}

#[test]
fn extensions_are_answered_only_to_a_peer_that_proposed_them() {
    let plain = Version { major: 0, minor: 1, capabilities: Capabilities::default() };
    let answer = plain.answer().unwrap();
    assert_eq!((answer.minor, answer.capabilities.barkeep), (1, None));
    assert!(!String::from_utf8_lossy(&answer.to_bytes()).contains("barkeep"));

    let half = BarkeepExtensions { memory_fault: true, region_state: false, decode_page: true };
    let proposal = Version {
        capabilities: Capabilities { barkeep: Some(half), ..Capabilities::default() },
        ..Version::proposal()
    };
    assert_eq!(proposal.answer().unwrap().capabilities.barkeep, Some(half));

    let newer = Version { minor: 9, ..Version::proposal() };
    assert_eq!(newer.answer().unwrap().minor, Version::MINOR);
    let foreign = Version { major: 1, ..Version::proposal() };
    assert_eq!(foreign.answer(), Err(WireError::MajorVersion(1)));
}

fn capabilities(json: &str) -> Result<Capabilities, WireError> {
    let data = format!("{{\"capabilities\":{json}}}\0");
    let body = [words(&[0]), data.into_bytes()].concat();
    Version::parse(&body).map(|version| version.capabilities)
}

#[test]
fn json_bombs_have_a_defined_answer() {
    let nested = |open: &str, close: &str, depth| open.repeat(depth) + "0" + &close.repeat(depth);
    let bombs = [
        // Within 4096 bytes, deeper than any stack should follow.
        format!("{{\"x\":{}}}", nested("[", "]", 1990)),
        format!("{{\"x\":{}}}", nested("{\"\":", "}", 800)),
        nested("[", "]", 1990),
        "[".repeat(4000),
        "{\"max_msg_fds\":1e400}".into(),
        "{\"max_msg_fds\":1.0}".into(),
        "{\"max_msg_fds\":18446744073709551616}".into(),
        format!("{{\"max_dma_maps\":{}}}", "9".repeat(4000)),
        "{\"max_msg_fds\":1,\"max_msg_fds\":2}".into(),
        "{\"migration\":{},\"migration\":{}}".into(),
        "{\"migration\":{\"pgsize\":1,\"pgsize\":1}}".into(),
        // Of the two, a map would keep the harmless one.
        "{\"twin_socket\":[true],\"twin_socket\":{}}".into(),
        "{},\"capabilities\":{}".into(),
        "{\"a\":\"\u{0}\"}".into(),
        "{\"a\":\"\\ud800\"}".into(),
    ];
    for bomb in &bombs {
        let result = capabilities(bomb);
        let shown = &bomb[..bomb.len().min(60)];
        assert!(matches!(result, Err(WireError::VersionData(_))), "{shown}: {result:?}");
    }
    let tame = [
        "{\"max_msg_fds\":18446744073709551615}",
        "{\"unknown\":1,\"unknown\":[[[2]]],\"max_msg_fds\":null}",
    ];
    for json in tame {
        assert!(capabilities(json).is_ok(), "{json}");
    }
}

#[test]
fn what_is_offered_is_answered_only_to_a_peer_that_knows_its_name() {
    let everything = Offer::all();
    let names = ["write_multiple", "migration", "twin_socket"];
    let answered = |theirs: &Version, offer| {
        let answer = theirs.answer_with(offer).unwrap();
        let text = String::from_utf8(answer.to_bytes()).unwrap();
        let named = names.map(|name| text.contains(name));
        assert_eq!(Version::parse(&answer.to_bytes()).unwrap(), answer);
        assert_eq!(answer.capabilities.max_msg_fds, Some(16));
        named
    };
    let silent = Version { major: 0, minor: 1, capabilities: Capabilities::default() };
    assert_eq!(answered(&silent, everything), [false; 3]);
    let refusing = Capabilities {
        write_multiple: Some(false),
        twin_socket: Some(TwinSocket::default()),
        ..Capabilities::default()
    };
    let refusing = Version { capabilities: refusing, ..silent };
    assert_eq!(answered(&refusing, everything), [false; 3]);
    assert_eq!(answered(&Version::proposal(), everything), [false; 3]);

    let wanting = Version::proposal_with(everything);
    assert_eq!(wanting.capabilities.offer(), everything);
    assert_eq!(Version::parse(&wanting.to_bytes()).unwrap(), wanting);
    assert_eq!(answered(&wanting, everything), [true; 3]);
    assert_eq!(answered(&wanting, Offer::MIGRATION), [false, true, false]);
    assert_eq!(wanting.answer().unwrap().capabilities.offer(), Offer::empty());
}

#[test]
fn the_answer_names_of_migration_what_the_client_named() {
    let answer = |json| {
        let version = Version { major: 0, minor: 0, capabilities: capabilities(json).unwrap() };
        version.answer_with(Offer::MIGRATION).unwrap().capabilities.migration
    };
    let expected = |pgsize, max_bitmap_size| Some(MigrationCapability { pgsize, max_bitmap_size });
    assert_eq!(
        answer("{\"migration\":{\"pgsize\":65536,\"max_bitmap_size\":268435456}}"),
        expected(Some(4096), Some(1 << 20))
    );
    assert_eq!(answer("{\"migration\":{\"max_bitmap_size\":512}}"), expected(None, Some(512)));
    assert_eq!(answer("{\"migration\":{}}"), expected(None, None));
    assert_eq!(answer("{}"), None);
}

#[test]
fn a_twin_socket_that_did_not_come_ends_the_negotiation() {
    let twin = |json: &str| {
        let answer = capabilities(&format!("{{\"twin_socket\":{json}}}")).unwrap();
        answer.twin_socket_fd(2)
    };
    assert_eq!(Capabilities::default().twin_socket_fd(0), Ok(None));
    assert_eq!(twin("null"), Ok(None));
    assert_eq!(twin("{\"fd_index\":0}"), Ok(None));
    assert_eq!(twin("{\"supported\":false,\"fd_index\":0}"), Ok(None));
    assert_eq!(twin("{\"supported\":true,\"fd_index\":1}"), Ok(Some(1)));
    assert_eq!(twin("{\"supported\":true,\"fd_index\":2}"), Err(WireError::FdIndex(2)));
    assert_eq!(twin("{\"supported\":true}"), Err(WireError::FdIndex(u64::MAX)));
    let ours = Version::proposal_with(Offer::TWIN_SOCKET).answer_with(Offer::TWIN_SOCKET).unwrap();
    assert_eq!(ours.capabilities.twin_socket_fd(1), Ok(Some(0)));
}

#[test]
fn the_layout_of_dma_messages_is_expected_of_qemu_alone() {
    let expected = |minor, json| {
        let version = Version { major: 0, minor, capabilities: capabilities(json).unwrap() };
        DmaLayout::expected_of(&version)
    };
    let qemu = "{\"migration\":{\"max_bitmap_size\":268435456,\"pgsize\":4096},\
        \"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":4096,\
        \"max_dma_maps\":65535,\"write_multiple\":true}";
    assert_eq!(expected(0, qemu), DmaLayout::Qemu);
    assert_eq!(expected(2, qemu), DmaLayout::Spec);
    assert_eq!(expected(0, "{\"migration\":{\"pgsize\":4096}}"), DmaLayout::Spec);
    assert_eq!(DmaLayout::expected_of(&Version::proposal_with(Offer::all())), DmaLayout::Spec);
}
