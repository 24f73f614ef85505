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
