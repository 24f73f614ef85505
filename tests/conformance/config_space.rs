//! Configuration space as software finds it, through region 7.

use barkeep_tests::backend::Backend;
use barkeep_tests::peer::requests::{CONFIG, pci};

#[test]
fn a_bar_tells_its_size_and_type_when_all_ones_are_written() {
    for (spec, sizes) in [
        ("edu", [0xfff0_0000, 0, 0, 0, 0, 0]),
        // BAR2: prefetchable, 64 bits.
        ("ivshmem,size=64K", [0xffff_ff00, 0, 0xffff_000c, 0xffff_ffff, 0, 0]),
        ("ivshmem,size=8G", [0xffff_ff00, 0, 0x0000_000c, 0xffff_fffe, 0, 0]),
    ] {
        let backend = Backend::serve(&[spec]);
        let mut peer = backend.client();
        for (bar, size) in (0..).zip(sizes) {
            peer.write_u32(CONFIG, pci::BAR0 + 4 * bar, u32::MAX);
            assert_eq!(peer.read_u32(CONFIG, pci::BAR0 + 4 * bar), size, "{spec}, BAR{bar}");
        }
    }
}

#[test]
fn the_capability_list_holds_what_the_function_has() {
    for (spec, present, absent) in [
        ("edu", &[pci::POWER_MANAGEMENT, pci::MSI, pci::EXPRESS][..], &[0x11][..]),
        ("ivshmem,size=4K", &[pci::POWER_MANAGEMENT, pci::EXPRESS], &[pci::MSI, 0x11]),
    ] {
        let backend = Backend::serve(&[spec]);
        let mut peer = backend.client();
        assert_ne!(peer.config_u16(pci::STATUS) & 1 << 4, 0, "Capabilities List");
        let mut list = Vec::new();
        let mut at = peer.read(CONFIG, pci::CAPABILITIES_POINTER, 1)[0];
        while at != 0 {
            assert!(at >= 0x40 && at.is_multiple_of(4) && list.len() < 48);
            let [id, next] = peer.config_u16(at.into()).to_le_bytes();
            list.push(id);
            at = next;
        }
        assert!(present.iter().all(|id| list.contains(id)), "{spec}: {list:x?}");
        assert!(!absent.iter().any(|id| list.contains(id)), "{spec}: {list:x?}");
    }
}
