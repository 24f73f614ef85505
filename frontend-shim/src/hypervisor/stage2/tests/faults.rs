//! Which verdict an abort needs, what the table says to it, and what is mapped in the end.

use super::*;
use crate::fault::Verdict;

const MAP: Answer = Answer::Verdict(Verdict::Map);
const RELAX: Answer = Answer::Verdict(Verdict::Relax);
const UR: Answer = Answer::Verdict(Verdict::UnsupportedRequest);
const NOT_MINE: Answer = Answer::Verdict(Verdict::NotMine);

fn resolve(memory: &GuestMemory, abort: Abort, policy: Policy) -> Resolved {
    let mut resolution = Resolution::new(memory, abort, policy);
    loop {
        if let Some(resolved) = resolution.step() {
            return resolved;
        }
    }
}

/// What the page has when the fault is resolved, which need not be what it had when it was taken.
const ENTRIES: [Perms; 5] = [Perms::NONE, Perms::R, Perms::RW, Perms::RX, Perms::RWX];

/// Backing, access; then for each of `ENTRIES` what becomes of a translation fault, and of a permission
/// fault. M maps, R relaxes, N is not ours; + succeeds, ! is refused with "again"; then what is
/// mapped in the end. A dot is an entry that its backing would not permit.
#[rustfmt::skip]
const TABLE: [(&str, char, [&str; 5], [&str; 5]); 15] = [
    ("---", 'r', ["N ---", ".",     ".",     ".",     "."    ], ["N ---", ".",     ".",     ".",     "."    ]),
    ("---", 'w', ["N ---", ".",     ".",     ".",     "."    ], ["N ---", ".",     ".",     ".",     "."    ]),
    ("---", 'x', ["N ---", ".",     ".",     ".",     "."    ], ["N ---", ".",     ".",     ".",     "."    ]),
    ("r--", 'r', ["M+r--", "M!r--", ".",     ".",     "."    ], ["R!---", "R+r--", ".",     ".",     "."    ]),
    ("r--", 'w', ["N ---", "N r--", ".",     ".",     "."    ], ["N ---", "N r--", ".",     ".",     "."    ]),
    ("r--", 'x', ["N ---", "N r--", ".",     ".",     "."    ], ["N ---", "N r--", ".",     ".",     "."    ]),
    ("rw-", 'r', ["M+rw-", "M!r--", "M!rw-", ".",     "."    ], ["R!---", "R+rw-", "R+rw-", ".",     "."    ]),
    ("rw-", 'w', ["M+rw-", "M!r--", "M!rw-", ".",     "."    ], ["R!---", "R+rw-", "R+rw-", ".",     "."    ]),
    ("rw-", 'x', ["N ---", "N r--", "N rw-", ".",     "."    ], ["N ---", "N r--", "N rw-", ".",     "."    ]),
    ("r-x", 'r', ["M+r--", "M!r--", ".",     "M!r-x", "."    ], ["R!---", "R+r--", ".",     "R+r-x", "."    ]),
    ("r-x", 'w', ["N ---", "N r--", ".",     "N r-x", "."    ], ["N ---", "N r--", ".",     "N r-x", "."    ]),
    ("r-x", 'x', ["M+r-x", "M!r--", ".",     "M!r-x", "."    ], ["R!---", "R+r-x", ".",     "R+r-x", "."    ]),
    ("rwx", 'r', ["M+rw-", "M!r--", "M!rw-", "M!r-x", "M!rwx"], ["R!---", "R+rw-", "R+rw-", "R+rwx", "R+rwx"]),
    ("rwx", 'w', ["M+rw-", "M!r--", "M!rw-", "M!r-x", "M!rwx"], ["R!---", "R+rw-", "R+rw-", "R+rwx", "R+rwx"]),
    ("rwx", 'x', ["M+rwx", "M!r--", "M!rw-", "M!r-x", "M!rwx"], ["R!---", "R+rwx", "R+rwx", "R+rwx", "R+rwx"]),
];

#[test]
fn every_fault_meets_every_entry_and_every_backing_with_a_defined_result() {
    for (backing, kind, translation, permission) in TABLE {
        let backing = [Perms::NONE, Perms::R, Perms::RW, Perms::RX, Perms::RWX]
            .into_iter()
            .find(|perms| perms.to_string() == backing)
            .unwrap();
        let access = match kind {
            'r' => read(BASE),
            'w' => write(BASE),
            _ => fetch(BASE),
        };
        let columns =
            [(FaultStatus::Translation, translation), (FaultStatus::Permission, permission)];
        for (status, cells) in columns {
            for (entry, expected) in ENTRIES.into_iter().zip(cells) {
                assert_eq!(expected == ".", !backing.contains(entry), "{backing} {entry}");
                if expected != "." {
                    let got = one_fault(backing, entry, access, status);
                    assert_eq!(got, expected, "{backing} {entry} {access:?} {status:?}");
                }
            }
        }
    }
}

fn one_fault(backing: Perms, entry: Perms, access: Access, status: FaultStatus) -> String {
    let memory = memory_of(ram(PAGE_SIZE, backing));
    if entry != Perms::NONE {
        memory.table().map(GuestAddress(BASE), PAGE_SIZE, FRAME, entry).unwrap();
    }
    let abort = Abort { access, status, granule: PAGE_SIZE };
    let resolved = resolve(&memory, abort, Policy::RelaxOnPermission);
    let verdict = match resolved.answer {
        MAP => 'M',
        RELAX => 'R',
        NOT_MINE => 'N',
        other => panic!("{other:?}"),
    };
    let code = match resolved.code {
        None => ' ',
        Some(Ok(())) => '+',
        Some(Err(TableError::Again)) => '!',
        Some(Err(TableError::BadRange)) => panic!("a page is a page"),
    };
    format!("{verdict}{code}{}", perms_at(&memory, BASE))
}

#[test]
fn what_is_there_decides_before_permissions_do() {
    let bar = |decodes, suspended| Some(RegionKind::Bar { decodes, suspended });
    let ram = |private| Some(RegionKind::Ram { private });
    let private = |access| Access { private: true, ..access };
    let (r, w, x) = (read(BASE), write(BASE), fetch(BASE));
    let rows = [
        ("nothing", None, r, Answer::Mmio),
        ("nothing", None, w, Answer::Mmio),
        ("a fetch from nothing", None, x, NOT_MINE),
        ("a read-only slot", Some(RegionKind::Rom), r, MAP),
        ("a write to a read-only slot", Some(RegionKind::Rom), w, Answer::Mmio),
        ("a fetch from a read-only slot", Some(RegionKind::Rom), x, MAP),
        ("shared memory", ram(false), r, MAP),
        ("shared memory taken for private", ram(false), private(r), NOT_MINE),
        ("private memory", ram(true), private(w), MAP),
        ("private memory taken for shared", ram(true), w, NOT_MINE),
        ("a BAR", bar(true, false), r, MAP),
        ("a BAR", bar(true, false), w, MAP),
        ("a BAR taken for private memory", bar(true, false), private(r), NOT_MINE),
        ("a BAR that does not decode", bar(false, false), r, UR),
        ("a BAR that does not decode", bar(false, false), w, UR),
        ("a BAR without its slot", bar(false, true), r, Answer::Mmio),
        ("a decoding BAR without its slot", bar(true, true), w, Answer::Mmio),
        ("a fetch from a BAR without its slot", bar(true, true), x, NOT_MINE),
    ];
    for (what, kind, access, expected) in rows {
        let memory = GuestMemory::new(false);
        if let Some(kind) = kind {
            memory.add(region(PAGE_SIZE, Perms::RWX, kind)).unwrap();
        }
        let abort = memory.access(access).unwrap_err();
        let got = resolve(&memory, abort, Policy::RelaxOnPermission);
        assert_eq!(got.answer, expected, "{what}: {access:?}");
        assert_eq!(got.code, (expected == MAP).then_some(Ok(())), "{what}: {access:?}");
    }
}

#[test]
fn code_is_never_run_from_a_bar_whose_memory_is_not_executable() {
    for decodes in [true, false] {
        let kind = RegionKind::Bar { decodes, suspended: false };
        let memory = memory_of(region(PAGE_SIZE, Perms::RW, kind));
        let abort = memory.access(fetch(BASE)).unwrap_err();
        assert_eq!(resolve(&memory, abort, Policy::RelaxOnPermission).answer, NOT_MINE);
    }
}

#[test]
fn a_bar_that_ceases_to_decode_completes_as_mmio_and_works_again_with_its_slot() {
    let kind = RegionKind::Bar { decodes: true, suspended: false };
    let memory = memory_of(region(4 * PAGE_SIZE, Perms::RW, kind));
    let bar = GuestAddress(BASE);
    let run = || {
        let mut vcpu = Vcpu::new(&memory, Policy::RelaxOnPermission, vec![read(page(1))]);
        let done = vcpu.run().unwrap()[0].clone();
        (done.completion, done.faults.iter().map(|fault| fault.answer).collect::<Vec<_>>())
    };
    assert_eq!(run(), (Completion::Retired, vec![MAP]));
    assert_eq!(run(), (Completion::Retired, vec![]));
    memory.set_decode(bar, false);
    assert_eq!(run(), (Completion::Mmio, vec![UR, Answer::Mmio]));
    assert_eq!(run(), (Completion::Mmio, vec![Answer::Mmio]), "the slot is gone");
    memory.set_decode(bar, true);
    assert_eq!(run(), (Completion::Mmio, vec![Answer::Mmio]), "and stays so by itself");
    memory.set_suspended(bar, false);
    assert_eq!(run(), (Completion::Retired, vec![MAP]));
}

#[test]
fn a_permission_fault_on_an_entry_of_the_wrong_size_maps() {
    // A block that must become pages.
    let memory = memory_of(ram(BLOCK_SIZE, Perms::RWX));
    memory.table().map(GuestAddress(BASE), BLOCK_SIZE, FRAME, Perms::RW).unwrap();
    memory.track_writes(GuestAddress(BASE), false);
    let abort = memory.access(write(page(7))).unwrap_err();
    assert_eq!((abort.status, abort.granule), (FaultStatus::Permission, BLOCK_SIZE));
    let resolved = resolve(&memory, abort, Policy::RelaxOnPermission);
    assert_eq!(resolved, Resolved { answer: MAP, code: Some(Ok(())) });
    assert_eq!(memory.table().leaves().len(), 1);
    assert_eq!(memory.access(write(page(7))), Ok(()));

    // Pages that can be a block.
    let memory = memory_of(ram(BLOCK_SIZE, Perms::RWX));
    memory.table().map(GuestAddress(BASE), PAGE_SIZE, FRAME, Perms::RW).unwrap();
    let abort = memory.access(fetch(BASE)).unwrap_err();
    assert_eq!((abort.status, abort.granule), (FaultStatus::Permission, PAGE_SIZE));
    let resolved = resolve(&memory, abort, Policy::RelaxOnPermission);
    assert_eq!(resolved, Resolved { answer: MAP, code: Some(Ok(())) });
    let (ipa, size, frame, perms) = (GuestAddress(BASE), BLOCK_SIZE, FRAME, Perms::RWX);
    assert_eq!(memory.table().leaves(), [Leaf { ipa, size, frame, perms }]);

    // And a block that stays one.
    let abort = Abort { access: write(BASE), status: FaultStatus::Permission, granule: BLOCK_SIZE };
    let resolved = resolve(&memory, abort, Policy::RelaxOnPermission);
    assert_eq!(resolved, Resolved { answer: RELAX, code: Some(Ok(())) });
}

#[test]
fn blocks_stay_within_their_region_and_alike_aligned() {
    let at = |ipa: u64, size, frame| {
        let region = Region { ipa: GuestAddress(ipa), size, frame, ..ram(0, Perms::RW) };
        Backing { region, tracked: false, sequence: 0 }
    };
    let block = (GuestAddress(BASE), BLOCK_SIZE);
    let one_page = (GuestAddress(page(9)), PAGE_SIZE);
    let rows = [
        ("exactly a block", at(BASE, BLOCK_SIZE, FRAME), block),
        ("one page short", at(BASE, BLOCK_SIZE - PAGE_SIZE, FRAME), one_page),
        ("begins one page late", at(page(1), 2 * BLOCK_SIZE, FRAME + PAGE_SIZE), one_page),
        ("host not aligned", at(BASE, 2 * BLOCK_SIZE, FRAME + PAGE_SIZE), one_page),
        ("begins earlier", at(BASE - PAGE_SIZE, 2 * BLOCK_SIZE, FRAME - PAGE_SIZE), block),
        ("tracked", Backing { tracked: true, ..at(BASE, BLOCK_SIZE, FRAME) }, one_page),
    ];
    for (what, backing, expected) in rows {
        assert_eq!(backing.extent(GuestAddress(page(9) + 0x123)), expected, "{what}");
    }
}

#[test]
fn a_fault_that_outlives_its_region_s_state_is_taken_again() {
    let kind = RegionKind::Bar { decodes: true, suspended: false };
    let memory = memory_of(region(PAGE_SIZE, Perms::RW, kind));
    let abort = memory.access(read(BASE)).unwrap_err();
    let mut resolution = Resolution::new(&memory, abort, Policy::RelaxOnPermission);
    assert_eq!(resolution.step(), None, "it has looked, and is about to map");
    memory.set_decode(GuestAddress(BASE), false);
    let retry = Resolved { answer: Answer::Verdict(Verdict::Retry), code: None };
    assert_eq!(resolution.step(), Some(retry));
    assert_eq!(memory.table().leaves(), []);
}

#[test]
fn regions_that_overlap_or_are_no_pages_are_refused() {
    let memory = memory_of(ram(2 * PAGE_SIZE, Perms::RW));
    let at =
        |ipa: u64, size, frame| Region { ipa: GuestAddress(ipa), size, frame, ..ram(0, Perms::RW) };
    for (region, overlaps) in [
        (at(page(1), PAGE_SIZE, 0), true),
        (at(BASE - PAGE_SIZE, 2 * PAGE_SIZE, 0), true),
        (at(BASE - PAGE_SIZE, 8 * PAGE_SIZE, 0), true),
        (at(page(4), 0, 0), false),
        (at(page(4) + 1, PAGE_SIZE, 0), false),
        (at(page(4), 1, 0), false),
        (at(page(4), PAGE_SIZE, 1), false),
        (at(IPA_LIMIT, PAGE_SIZE, 0), false),
        (at(page(4), 2 * PAGE_SIZE, u64::MAX - PAGE_SIZE + 1), false),
    ] {
        let error = memory.add(region).unwrap_err();
        assert_eq!(matches!(error, RegionError::Overlap { .. }), overlaps, "{region:?}");
    }
    memory.add(at(page(2), PAGE_SIZE, 0)).unwrap();
}

#[test]
fn a_syndrome_tells_all_of_an_abort_but_where_it_was() {
    let rows = [
        (read(page(3)), FaultStatus::Translation, PAGE_SIZE, 0x9200_0007),
        (write(page(3)), FaultStatus::Translation, BLOCK_SIZE, 0x9200_0046),
        (fetch(page(3)), FaultStatus::Permission, PAGE_SIZE, 0x8200_000f),
        (write(page(3)), FaultStatus::Permission, BLOCK_SIZE, 0x9200_004e),
    ];
    for (access, status, granule, syndrome) in rows {
        let abort = Abort { access, status, granule };
        assert_eq!(abort.syndrome(), syndrome, "{abort:?}");
        assert_eq!(Abort::from_syndrome(syndrome, access.ipa), Some(abort));
    }
    // Access flag, level 1, alignment, and a trapped system register.
    for syndrome in [0x9200_000b, 0x9200_0005, 0x9200_0021, 0x6200_0007] {
        assert_eq!(Abort::from_syndrome(syndrome, GuestAddress(0)), None, "{syndrome:#x}");
    }
}
