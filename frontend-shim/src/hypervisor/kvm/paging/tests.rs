use std::sync::Arc;

use super::*;
use crate::hypervisor::slots::Slot;
use crate::hypervisor::{HostMapping, SlotId, SlotMapping};

const P: u64 = PRESENT;
const W: u64 = WRITABLE;
const U: u64 = USER;
const LINEAR: u64 = 0x1234;

/// Tables at 0x1000 to 0x4000 for the first 4 KiB pages; page 1 has `leaf` at `0x4008`.
fn tables(upper: u64, leaf: u64) -> (SlotTable, Arc<HostMapping>) {
    let ram = Arc::new(HostMapping::anonymous(0x8000).unwrap());
    for table in [0x1000, 0x2000, 0x3000] {
        ram.store_u64(table, (table + 0x1000) | upper).unwrap();
    }
    ram.store_u64(0x4008, leaf).unwrap();
    let mut slots = SlotTable::default();
    let mapping = SlotMapping::whole(GuestAddress(0), &ram);
    slots.insert(Slot::new(SlotId(0), mapping).unwrap()).unwrap();
    (slots, ram)
}

fn paging(user: bool, write_protect: bool) -> Paging {
    let (smap, protection_keys) = (false, false);
    Paging { root: 0x1000, levels: 4, user, write_protect, smap, protection_keys }
}

#[test]
fn permissions_of_all_levels_count() {
    // Upper entries, leaf, user, write protection, write, allowed.
    let rows = [
        (P | W | U, P | W | U, true, true, true, true),
        (P | W | U, P | U, true, true, false, true),
        (P | W | U, P | U, true, true, true, false),
        (P | U, P | W | U, true, true, true, false),
        (P | W, P | W | U, true, true, false, false),
        (P | W | U, P | W, true, true, false, false),
        (P | W, P | W, false, true, true, true),
        (P | W, P, false, true, true, false),
        (P | W, P, false, false, true, true),
        (P | W | U, P | U, true, false, true, false),
        (P | W, W, false, true, false, false),
        (W, P | W, false, true, false, false),
    ];
    for (upper, leaf, user, write_protect, write, allowed) in rows {
        let (slots, _) = tables(upper, 0x9000 | leaf);
        let found = paging(user, write_protect).walk(&slots, LINEAR, write);
        let expected = allowed.then_some(GuestAddress(0x9234));
        assert_eq!(found, expected, "{upper:#x} {leaf:#x} {user} {write_protect} {write}");
    }
}

#[test]
fn kernels_that_may_not_touch_user_pages_do_not() {
    let (slots, _) = tables(P | W | U, 0x9000 | P | W | U);
    let smap = Paging { smap: true, ..paging(false, true) };
    assert_eq!(smap.walk(&slots, LINEAR, false), None);
    let user = Paging { user: true, ..smap };
    assert_eq!(user.walk(&slots, LINEAR, false), Some(GuestAddress(0x9234)));
    let (slots, _) = tables(P | W | U, 0x9000 | P | W | U | 1 << 59);
    assert!(user.walk(&slots, LINEAR, false).is_some());
    let keyed = Paging { protection_keys: true, ..user };
    assert_eq!(keyed.walk(&slots, LINEAR, false), None);
}

#[test]
fn accessed_and_dirty_bits_are_set_as_the_processor_does() {
    let (slots, ram) = tables(P | W, 0x9000 | P | W);
    let marks = |table| ram.load_u64(table).unwrap() & (ACCESSED | DIRTY);
    paging(false, true).walk(&slots, LINEAR, false).unwrap();
    assert_eq!([0x1000, 0x2000, 0x3000, 0x4008].map(marks), [ACCESSED; 4]);
    paging(false, true).walk(&slots, LINEAR, true).unwrap();
    let both = ACCESSED | DIRTY;
    assert_eq!([0x1000, 0x2000, 0x3000, 0x4008].map(marks), [ACCESSED, ACCESSED, ACCESSED, both]);

    let (slots, ram) = tables(P | W, 0x9000 | P);
    assert_eq!(paging(false, true).walk(&slots, LINEAR, true), None);
    assert_eq!(ram.load_u64(0x4008).unwrap(), 0x9000 | P, "a refused access leaves no mark");
}

#[test]
fn large_pages_end_the_walk_early() {
    let (slots, ram) = tables(P | W, 0);
    ram.store_u64(0x3000, 0x4060_0000 | P | W | LARGE).unwrap();
    let walk = |linear| paging(false, true).walk(&slots, linear, true);
    assert_eq!(walk(0x1f_f234), Some(GuestAddress(0x407f_f234)));
    ram.store_u64(0x2000, 0x1_4000_0000 | P | W | LARGE).unwrap();
    assert_eq!(walk(0x3fff_f234), Some(GuestAddress(0x1_7fff_f234)));
    // Bit 7 is no size at the top.
    ram.store_u64(0x1000, 0x2000 | P | W | LARGE).unwrap();
    assert_eq!(walk(0x234), Some(GuestAddress(0x1_4000_0234)));
}

#[test]
fn addresses_that_do_not_exist_are_not_translated() {
    let (slots, ram) = tables(P | W, 0x9000 | P | W);
    let walk = |linear| paging(false, true).walk(&slots, linear, false);
    assert_eq!(walk(1 << 48 | LINEAR), None);
    assert_eq!(walk(1 << 63 | LINEAR), None);
    // 57 bits: one more level.
    ram.store_u64(0x5000, 0x1000 | P | W).unwrap();
    let five = Paging { root: 0x5000, levels: 5, ..paging(false, true) };
    assert_eq!(five.walk(&slots, LINEAR, false), Some(GuestAddress(0x9234)));
    assert_eq!(five.walk(&slots, 1 << 57 | LINEAR, false), None);
    // Tables outside of RAM.
    ram.store_u64(0x2000, 0x10_0000 | P | W).unwrap();
    assert_eq!(walk(LINEAR), None);
}
