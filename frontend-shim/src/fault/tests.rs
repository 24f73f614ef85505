use barkeep_protocol::wire::FaultVerdict;

use super::*;
use crate::GuestAddress;

const UR: Option<FaultVerdict> = Some(FaultVerdict::UnsupportedRequest { epoch: 1 });
const MAP: Option<FaultVerdict> = Some(FaultVerdict::Map { epoch: 1 });
const TRAP: Option<FaultVerdict> = Some(FaultVerdict::Trap { epoch: 1 });
const DEAD: Option<FaultVerdict> = None;

#[test]
fn every_answer_meets_every_slot_state_with_a_defined_verdict() {
    use SlotState::{Mapped, Suspended, Trapped};
    let rows = [
        (UR, Mapped, Verdict::UnsupportedRequest),
        (UR, Suspended, Verdict::Retry),
        (UR, Trapped, Verdict::Retry),
        (MAP, Mapped, Verdict::Relax),
        (MAP, Suspended, Verdict::Map),
        (MAP, Trapped, Verdict::Retry),
        (TRAP, Mapped, Verdict::UnsupportedRequest),
        (TRAP, Suspended, Verdict::Retry),
        (TRAP, Trapped, Verdict::Retry),
        (DEAD, Mapped, Verdict::UnsupportedRequest),
        (DEAD, Suspended, Verdict::Retry),
        (DEAD, Trapped, Verdict::Retry),
    ];
    for (answer, slot, verdict) in rows {
        assert_eq!(decide(answer, slot), verdict, "{answer:?} {slot:?}");
    }
}

fn fault(address: u64) -> MemoryFault {
    MemoryFault::reported(GuestAddress(address), 4096, None)
}

#[test]
fn a_fault_that_repeats_without_progress_is_escalated() {
    let mut guard = ProgressGuard::default();
    for _ in 0..ProgressGuard::BOUND {
        guard.fault(&fault(0x1000), 7).unwrap();
    }
    assert_eq!(guard.fault(&fault(0x1000), 7), Err(NoProgress { fault: fault(0x1000) }));
}

#[test]
fn changes_by_others_do_not_hide_a_standstill_for_ever() {
    let mut guard = ProgressGuard::default();
    for changes in 0..ProgressGuard::BOUND_IN_ALL {
        guard.fault(&fault(0x1000), changes.into()).unwrap();
    }
    assert_eq!(guard.fault(&fault(0x1000), 0), Err(NoProgress { fault: fault(0x1000) }));
}

#[test]
fn progress_a_change_or_another_address_starts_the_count_anew() {
    let mut guard = ProgressGuard::default();
    for round in 0..4 * u64::from(ProgressGuard::BOUND) {
        guard.fault(&fault(round / 2), 0).unwrap();
    }
    let unknown = MemoryFault::unknown(Unlocated::NotTried);
    for changes in 0..4 * u64::from(ProgressGuard::BOUND) {
        guard.fault(&unknown, changes / 2).unwrap();
    }
    for _ in 0..2 * ProgressGuard::BOUND {
        guard.fault(&unknown, 0).unwrap();
        guard.progress();
    }
}

#[test]
fn a_fault_is_routed_by_whose_slot_or_window_is_there() {
    let window = |function, start| BarWindow {
        space: AddressSpace::Memory,
        start,
        len: 0x2000,
        function,
        bar: 2,
        offset: 0,
        decodes: true,
    };
    let table = WindowTable::new(vec![(0, 0x10_0000)]);
    table.publish(0, vec![window(0, 0x20_0000)]);
    table.publish(1, vec![window(1, 0x20_0000), window(1, 0x30_0000)]);
    // The second function's slot is still where the first one claims now; it is a part of its BAR.
    table.publish_slots(1, vec![BarWindow { offset: 0x1000, len: 0x1000, ..window(1, 0x20_0000) }]);

    let access = |address| GuestAccess { address: GuestAddress(address), size: 8, kind: None };
    let bar =
        |function, offset, address| BarTarget { function, bar: 2, offset, access: access(address) };
    let reported = |address| FaultPlace::Reported(access(address));
    let both = FaultPlace::OneOf(vec![access(0x30_0000), access(0x20_1000)]);
    let ram_too = FaultPlace::OneOf(vec![access(0x1000), access(0x30_0008)]);
    let rows = [
        ("RAM", reported(0x1000), Route::NotMine),
        (
            "the slot, not the window",
            reported(0x20_0010),
            Route::Bars(vec![bar(1, 0x1010, 0x20_0010)]),
        ),
        (
            "a window without a slot",
            reported(0x20_1000),
            Route::Bars(vec![bar(0, 0x1000, 0x20_1000)]),
        ),
        (
            "located",
            FaultPlace::Located(access(0x30_0004)),
            Route::Bars(vec![bar(1, 4, 0x30_0004)]),
        ),
        ("two", both, Route::Bars(vec![bar(1, 0, 0x30_0000), bar(0, 0x1000, 0x20_1000)])),
        ("RAM that works, and a BAR", ram_too, Route::Bars(vec![bar(1, 8, 0x30_0008)])),
        ("between", reported(0x40_0000), Route::Nowhere),
        ("unknown", FaultPlace::Unknown(Unlocated::Registers), Route::Anywhere),
    ];
    for (name, place, route) in rows {
        let fault = MemoryFault { place, private: false };
        assert_eq!(table.route(&fault), route, "{name}");
        let private = MemoryFault { private: true, ..fault };
        assert_eq!(table.route(&private), Route::NotMine, "{name}, private");
    }
}
