//! The view of guest memory that devices get: `vm-memory`'s traits, and the pieces of a range.

use vm_memory::guest_memory::{GuestMemory, Permissions};
use vm_memory::{Bytes, GuestAddress};

use super::*;

const LAST_PAGE: u64 = 0xffff_ffff_ffff_f000;

/// Windows of every kind, side by side: read and write, read only, write only, without a file,
/// neither; then a hole, and the last page that there is.
fn every_kind() -> DmaTable {
    let mut table = DmaTable::new(10);
    table.map(Iova(0x1000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    table.map(Iova(0x2000), 0x1000, DmaAccess::READ, shared(0x1000)).unwrap();
    table.map(Iova(0x3000), 0x1000, DmaAccess::WRITE, shared(0x1000)).unwrap();
    table.map(Iova(0x4000), 0x1000, READ_WRITE, None).unwrap();
    table.map(Iova(0x5000), 0x1000, DmaAccess::empty(), None).unwrap();
    table.map(Iova(LAST_PAGE), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    table
}

#[test]
fn a_view_grants_whole_ranges_and_only_what_their_windows_allow() {
    use Permissions::{No, Read, ReadWrite, Write};
    let rows: &[(&str, u64, usize, Permissions, bool)] = &[
        ("read and write", 0x1000, 0x1000, ReadWrite, true),
        ("reads span what is readable", 0x1800, 0x1800, Read, true),
        ("nothing is written where it may only be read", 0x2000, 1, Write, false),
        ("not even together", 0x2000, 1, ReadWrite, false),
        ("nor at the end of a range", 0x1fff, 2, Write, false),
        ("nothing is read where it may only be written", 0x3000, 1, Read, false),
        ("nor at the end of a range", 0x2fff, 2, Read, false),
        ("it is written there", 0x3000, 0x1000, Write, true),
        ("no message is sent", 0x4000, 1, Read, false),
        ("nor at the end of a range", 0x3fff, 2, Write, false),
        ("neither", 0x5000, 1, No, false),
        ("a hole", 0x6000, 1, Read, false),
        ("below the first window", 0xfff, 2, Read, false),
        ("the last byte of all", u64::MAX, 1, ReadWrite, true),
        ("the end of all", LAST_PAGE, 0x1000, ReadWrite, true),
        ("past the end of all", u64::MAX, 2, Read, false),
        ("around the whole address space", u64::MAX, usize::MAX, Read, false),
        ("as long as can be", 0x1000, usize::MAX, Read, false),
        ("nothing, in a hole", 0x6000, 0, ReadWrite, true),
    ];
    let table = every_kind();
    for (what, address, count, access, granted) in rows {
        let address = GuestAddress(*address);
        let view = table.view();
        assert_eq!(view.check_range(address, *count, *access), *granted, "{what}");
        let slices = view.get_slices(address, *count, *access);
        assert_eq!(slices.is_ok(), *granted, "{what}");
        if let Ok(slices) = slices {
            assert_eq!(slices.map(|slice| slice.unwrap().len()).sum::<usize>(), *count, "{what}");
        }
    }
}

#[test]
fn a_device_of_vm_memory_reads_and_writes_what_the_client_sees() {
    let (ours, theirs) = named(0x2000);
    let mut table = DmaTable::new(10);
    table.map(Iova(0x1000), 0x1000, READ_WRITE, Some((ours.try_clone().unwrap(), 0))).unwrap();
    table.map(Iova(0x2000), 0x1000, READ_WRITE, Some((ours, 0x1000))).unwrap();
    table.start_logging(&[], 4096).unwrap();
    let view = table.view();
    view.write_slice(b"span", GuestAddress(0x1ffe)).unwrap();
    assert_eq!(bytes_at(&theirs, 0xffe, 4), b"span");
    view.write_obj(0x1122_3344_u32, GuestAddress(0x1010)).unwrap();
    assert_eq!(bytes_at(&theirs, 0x10, 4), 0x1122_3344_u32.to_ne_bytes());
    assert_eq!(view.read_obj::<u32>(GuestAddress(0x1010)).unwrap(), 0x1122_3344);
    // What would be cut is not written at all.
    view.write_slice(b"cut", GuestAddress(0x2ffe)).unwrap_err();
    assert_eq!(bytes_at(&theirs, 0x1ffe, 2), [0; 2]);
    let mut bitmap = [0; 8];
    table.report(Iova(0), 0x4000, 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap[0], 0b110);
}

/// A name, address, length and access of a range, and its pieces.
type PiecesRow = (&'static str, u64, u64, DmaAccess, Result<Vec<Piece>, DmaError>);

#[test]
fn pieces_end_at_the_borders_of_windows_and_say_how_they_are_reached() {
    let piece = |iova: u64, len: u64, reach| Piece { iova: Iova(iova), len, reach };
    let mut table = DmaTable::new(10);
    table.map(Iova(0x1000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    table.map(Iova(0x2000), 0x2000, DmaAccess::READ, None).unwrap();
    table.map(Iova(0x4000), 0x1000, DmaAccess::READ, None).unwrap();
    table.map(Iova(0x5000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    table.map(Iova(LAST_PAGE), 0x1000, READ_WRITE, None).unwrap();
    let rows: &[PiecesRow] = &[
        ("one", 0x1004, 8, READ_WRITE, Ok(vec![piece(0x1004, 8, Reach::Mapped)])),
        ("a message", 0x2004, 8, DmaAccess::READ, Ok(vec![piece(0x2004, 8, Reach::Message)])),
        (
            "all",
            0x1ffe,
            0x3004,
            DmaAccess::READ,
            Ok(vec![
                piece(0x1ffe, 2, Reach::Mapped),
                piece(0x2000, 0x2000, Reach::Message),
                piece(0x4000, 0x1000, Reach::Message),
                piece(0x5000, 2, Reach::Mapped),
            ]),
        ),
        (
            "the end",
            LAST_PAGE,
            0x1000,
            READ_WRITE,
            Ok(vec![piece(LAST_PAGE, 0x1000, Reach::Message)]),
        ),
        ("nothing", 0x9000, 0, READ_WRITE, Ok(vec![])),
        ("read only further on", 0x1ffe, 4, DmaAccess::WRITE, Err(DmaError::Denied(0x2000))),
        ("a hole further on", 0x5ffe, 4, DmaAccess::READ, Err(DmaError::Unmapped(0x6000))),
        ("a hole", 0x8123, 4, DmaAccess::READ, Err(DmaError::Unmapped(0x8123))),
        ("past the end", u64::MAX, 2, DmaAccess::READ, Err(DmaError::Overflow)),
    ];
    for (what, address, len, access, expected) in rows {
        let pieces = table.pieces(Iova(*address), *len, *access);
        assert_eq!(&pieces.map(Iterator::collect), expected, "{what}");
    }
}
