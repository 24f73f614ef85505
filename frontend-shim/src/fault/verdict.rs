use barkeep_protocol::wire::FaultVerdict;

/// What a memory fault is resolved with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The BAR does not decode, or its backend is dead: suspend its memory slot and re-enter. The
    /// access then exits as MMIO, with its width and data, and completes as an Unsupported Request.
    UnsupportedRequest,
    /// The BAR decodes and is not mapped: map it and re-enter.
    Map,
    /// The BAR decodes and is mapped, but its memory was not accessible: restore access and
    /// re-enter. Never a second map of the same range, which real stage-2 code answers with "again".
    Relax,
    /// What the fault was about has changed since: re-enter.
    Retry,
    /// Not about a BAR: the VMM's own business, untouched.
    NotMine,
}

/// What is mapped where the fault happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// The BAR's memory slot is there.
    Mapped,
    /// There is no slot, but the BAR has memory that could be mapped.
    Suspended,
    /// The BAR is trapped: there is nothing to map.
    Trapped,
}

/// Decides about a fault on a BAR from the backend's answer; `None` stands for a dead backend.
#[must_use]
pub fn decide(answer: Option<FaultVerdict>, slot: SlotState) -> Verdict {
    match (answer, slot) {
        (None | Some(FaultVerdict::UnsupportedRequest { .. }), SlotState::Mapped) => {
            Verdict::UnsupportedRequest
        }
        (Some(FaultVerdict::Map { .. }), SlotState::Mapped) => Verdict::Relax,
        (Some(FaultVerdict::Map { .. }), SlotState::Suspended) => Verdict::Map,
        // The backend says that it is trapped, so a slot there is a mistake; it goes as for UR.
        (Some(FaultVerdict::Trap { .. }), SlotState::Mapped) => Verdict::UnsupportedRequest,
        // Somebody else resolved it while we asked: without a slot, the access exits as MMIO.
        (_, SlotState::Suspended | SlotState::Trapped) => Verdict::Retry,
    }
}
