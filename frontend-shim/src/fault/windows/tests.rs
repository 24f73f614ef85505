use proptest::prelude::*;

use super::*;

fn window(start: u64, len: u64, function: usize, decodes: bool) -> BarWindow {
    BarWindow { space: AddressSpace::Memory, start, len, function, bar: 0, offset: 0, decodes }
}

fn owner(table: &WindowTable, address: u64) -> Option<(usize, u64)> {
    table.find(AddressSpace::Memory, address).map(|(window, offset)| (window.function, offset))
}

#[test]
fn an_address_belongs_to_the_window_around_it() {
    let table = WindowTable::new(Vec::new());
    table.publish(0, vec![window(0x1000, 0x1000, 0, true)]);
    table.publish(1, vec![window(0x3000, 0x100, 1, false)]);
    let rows = [
        (0xfff, None),
        (0x1000, Some((0, 0))),
        (0x1fff, Some((0, 0xfff))),
        (0x2000, None),
        (0x3001, Some((1, 1))),
        (0x3100, None),
        (u64::MAX, None),
    ];
    for (address, expected) in rows {
        assert_eq!(owner(&table, address), expected, "{address:#x}");
    }
    assert_eq!(table.find(AddressSpace::Io, 0x1000), None, "ports are another space");
}

#[test]
fn a_window_up_to_the_top_of_the_address_space_is_found() {
    let table = WindowTable::new(Vec::new());
    table.publish(0, vec![window(u64::MAX - 0xfff, 0x1000, 0, true)]);
    assert_eq!(owner(&table, u64::MAX), Some((0, 0xfff)));
}

#[test]
fn overlaps_go_to_ram_then_to_what_decodes_then_to_the_first_attached() {
    let table = WindowTable::new(vec![(0, 0x10000)]);
    table.publish(0, vec![window(0xf000, 0x2000, 0, true)]);
    assert_eq!(owner(&table, 0x10000), None, "a BAR over RAM is nowhere");

    table.publish(0, vec![window(0x20000, 0x1000, 0, false)]);
    table.publish(1, vec![window(0x20000, 0x1000, 1, true)]);
    assert_eq!(owner(&table, 0x20000), Some((1, 0)), "being sized hides nobody");

    table.publish(0, vec![window(0x20000, 0x1000, 0, true)]);
    assert_eq!(owner(&table, 0x20000), Some((0, 0)));
}

#[test]
fn publishing_replaces_a_functions_windows() {
    let table = WindowTable::new(Vec::new());
    table.publish(3, vec![window(0x1000, 0x1000, 3, true)]);
    table.publish(3, vec![window(0x8000, 0x1000, 3, true)]);
    assert_eq!((owner(&table, 0x1000), owner(&table, 0x8000)), (None, Some((3, 0))));
    table.publish(3, Vec::new());
    assert_eq!(owner(&table, 0x8000), None);
}

#[test]
fn an_access_is_cut_where_its_target_changes() {
    let table = WindowTable::new(Vec::new());
    table.publish(0, vec![window(0x1000, 0x1000, 0, true)]);
    table.publish(1, vec![window(0x2004, 0x100, 1, true)]);
    let pieces: Vec<_> = table
        .pieces(AddressSpace::Memory, 0x1ffc, 12)
        .map(|piece| (piece.target.map(|(window, offset)| (window.function, offset)), piece.len))
        .collect();
    assert_eq!(pieces, [(Some((0, 0xffc)), 4), (None, 4), (Some((1, 0)), 4)]);
}

proptest! {
    /// The pieces of an access cover it exactly, and each byte goes where `find` says.
    #[test]
    fn pieces_cover_an_access_byte_by_byte(
        windows in prop::collection::vec((0u64..256, 1u64..64, any::<bool>()), 0..8),
        address in 0u64..300,
        len in 1usize..40,
    ) {
        let table = WindowTable::new(vec![(200, 10)]);
        for (function, (start, len, decodes)) in windows.iter().enumerate() {
            table.publish(function, vec![window(*start, *len, function, *decodes)]);
        }
        let mut at = address;
        for piece in table.pieces(AddressSpace::Memory, address, len) {
            for byte in 0..piece.len as u64 {
                let expected = piece.target.map(|(w, offset)| (w.function, offset + byte));
                prop_assert_eq!(owner(&table, at + byte), expected);
            }
            at += piece.len as u64;
        }
        prop_assert_eq!(at, address + len as u64);
    }
}

#[test]
fn an_empty_claim_claims_nothing() {
    let table = WindowTable::new(vec![(0x1000, 0), (0, 0)]);
    assert!(!table.is_claimed(0x1000) && !table.is_claimed(0));
}
