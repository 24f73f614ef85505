//! barkeep's own commands: 0x8001 memory_fault and 0x8002 region_state.

use barkeep_tests::backend::Backend;
use barkeep_tests::peer::message::{Payload, command, u64_at};
use barkeep_tests::peer::requests::{CONFIG, memory_fault, pci, region_state};
use barkeep_tests::peer::{Peer, version_body};
use rustix::io::Errno;

const UNSUPPORTED_REQUEST: u32 = 1;
const MAP: u32 = 2;
const TRAP: u32 = 3;
const READ: u32 = 1;

fn epoch(peer: &mut Peer) -> u64 {
    u64_at(&peer.call(command::REGION_STATE, &region_state(56, 0, 0)).success(), 8)
}

#[test]
fn an_extension_that_was_not_negotiated_is_not_served() {
    let backend = Backend::serve(&["edu"]);
    let fault = (command::MEMORY_FAULT, memory_fault(READ, 0, 0, 4096));
    let state = (command::REGION_STATE, region_state(56, 0, 0));
    let only = |name: &str| format!(r#"{{"capabilities":{{"barkeep":{{"{name}":true}}}}}}"#);
    for (json, refused, served) in [
        ("{}".into(), vec![&fault, &state], vec![]),
        (only("memory_fault"), vec![&state], vec![&fault]),
        (only("region_state"), vec![&fault], vec![&state]),
    ] {
        let mut peer = Peer::connect(backend.socket());
        let _ = peer.call(command::VERSION, &version_body(0, 2, &json)).success();
        for (command, body) in refused {
            peer.expect_errno(*command, body, Errno::NOTSUP);
        }
        for (command, body) in served {
            let _ = peer.call(*command, body).success();
        }
    }
}

#[test]
fn the_verdict_on_a_fault_follows_decode() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    let [off, on] = [0, pci::MEMORY_SPACE];
    for (command, region, verdict) in [
        (off, 0, UNSUPPORTED_REQUEST),
        (off, 2, UNSUPPORTED_REQUEST),
        (on, 0, TRAP),
        (on, 2, MAP),
        (off, 2, UNSUPPORTED_REQUEST),
    ] {
        peer.set_config_u16(pci::COMMAND, command);
        let epoch = epoch(&mut peer);
        for access in [0, 1, 2, 3, 4, 7] {
            let report = memory_fault(access, region, 0x80, 4096);
            let reply = peer.call(command::MEMORY_FAULT, &report).success();
            assert_eq!(reply, Payload::new().u32(verdict).u32(0).u64(epoch).done());
        }
    }
    // In D3hot, the enables don't matter.
    peer.set_config_u16(pci::COMMAND, on);
    let pmcsr = peer.capability(pci::POWER_MANAGEMENT) + 4;
    peer.set_config_u16(pmcsr, 0b11);
    let reply = peer.call(command::MEMORY_FAULT, &memory_fault(READ, 2, 0, 4096)).success();
    assert_eq!(reply[..4], UNSUPPORTED_REQUEST.to_ne_bytes());
}

#[test]
fn a_fault_that_is_on_no_bar_is_refused() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    for (name, body) in [
        ("configuration space", memory_fault(READ, CONFIG, 0, 4096)),
        ("no such BAR", memory_fault(READ, 1, 0, 4096)),
        ("the ROM", memory_fault(READ, 6, 0, 4096)),
        ("no such region", memory_fault(READ, u32::MAX, 0, 4096)),
        ("behind the BAR", memory_fault(READ, 2, 0x10000, 4096)),
        ("far behind it", memory_fault(READ, 2, u64::MAX, 4096)),
        ("an unknown access", memory_fault(8, 2, 0, 4096)),
        ("short", memory_fault(READ, 2, 0, 4096)[..31].to_vec()),
        ("long", [memory_fault(READ, 2, 0, 4096), vec![0]].concat()),
    ] {
        println!("{name}");
        peer.expect_errno(command::MEMORY_FAULT, &body, Errno::INVAL);
    }
}

#[test]
fn region_state_counts_what_happened() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    let state =
        |peer: &mut Peer| peer.call(command::REGION_STATE, &region_state(56, 0, 2)).success();
    let expected = |claimed, epoch, counters: [u64; 5]| {
        let fixed = Payload::new().u32(56).u32(claimed).u64(epoch);
        counters.into_iter().fold(fixed, Payload::u64).done()
    };
    assert_eq!(state(&mut peer), expected(0, 0, [0; 5]));
    let _ = peer.read(2, 0, 4);
    peer.write(2, 0, &[0; 4]);
    peer.write(2, 0, &[0; 4]);
    let _ = peer.call(command::MEMORY_FAULT, &memory_fault(READ, 2, 0, 4096)).success();
    assert_eq!(state(&mut peer), expected(0, 0, [0, 0, 1, 2, 1]));
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    for _ in 0..3 {
        let _ = peer.read(2, 0, 4);
    }
    peer.write(2, 0, &[0; 4]);
    assert_eq!(state(&mut peer), expected(1, 1, [3, 1, 1, 2, 1]));
}

#[test]
fn the_epoch_moves_with_decode_and_addresses_alone() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    let mut last = epoch(&mut peer);
    for (name, offset, value, moves) in [
        ("enable", pci::COMMAND, 0b010, true),
        ("enable again", pci::COMMAND, 0b010, false),
        ("bus mastering", pci::COMMAND, 0b110, false),
        ("a BAR", pci::BAR0 + 8, 0xc000_0000, true),
        ("the same BAR", pci::BAR0 + 8, 0xc000_0000, false),
        ("its upper half", pci::BAR0 + 12, 1, true),
        ("the interrupt line", 0x3c, 9, false),
        ("disable", pci::COMMAND, 0b100, true),
        ("a BAR that does not decode", pci::BAR0, 0xb000_0000, true),
    ] {
        peer.write_u32(CONFIG, offset, value);
        let now = epoch(&mut peer);
        assert_eq!(now != last, moves, "{name}");
        last = now;
    }
}

#[test]
fn configuration_space_has_a_state_and_other_queries_are_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let reply = peer.call(command::REGION_STATE, &region_state(56, 0, CONFIG)).success();
    assert_eq!(reply[..8], Payload::new().u32(56).u32(1).done(), "always claimed");
    for (name, body) in [
        ("no room", region_state(55, 0, 0)),
        ("a flag", region_state(56, 1, 0)),
        ("no such BAR", region_state(56, 0, 1)),
        ("the ROM", region_state(56, 0, 6)),
        ("no such region", region_state(56, 0, 9)),
        ("short", region_state(56, 0, 0)[..12].to_vec()),
    ] {
        println!("{name}");
        peer.expect_errno(command::REGION_STATE, &body, Errno::INVAL);
    }
}
