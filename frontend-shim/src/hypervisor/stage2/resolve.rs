use barkeep_protocol::wire::FaultVerdict;

use super::{Abort, Access, Backing, FaultStatus, GuestMemory, RegionKind, TableError, Walk};
use crate::GuestAddress;
use crate::fault::{FaultAccess, SlotState, Verdict, decide};
use crate::hypervisor::PAGE_SIZE;

/// What a fault handler does about a valid entry that permits too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Adds the permission to the entry.
    RelaxOnPermission,
    /// Maps the memory again. The table refuses that, and the guest faults for ever: what KVM's handler
    /// for guest_memfd did until May 2026.
    AlwaysMap,
}

/// What an abort calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No memory fault at all: there is no memory slot, or a read-only one, and the access exits as
    /// MMIO with its width and data (`io_mem_abort`).
    Mmio,
    /// A memory fault, with this verdict.
    Verdict(Verdict),
}

/// How an abort was resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// What it called for.
    pub answer: Answer,
    /// What the table said, where it was asked to map or relax.
    pub code: Option<Result<(), TableError>>,
}

/// Decides about an abort, from the region that it lies in.
///
/// [`decide`] speaks of a whole BAR and its slot: a BAR that decodes and has its slot is `Relax` there.
/// Of a single page, that can mean two things, which only the fault's status tells apart: not mapped
/// yet, or mapped with too little permission. This function makes the difference.
#[must_use]
pub fn answer(abort: &Abort, backing: Option<&Backing>, policy: Policy) -> Answer {
    let Access { kind, private: taken_for_private, ipa } = abort.access;
    let fetch = kind == FaultAccess::Execute;
    let no_slot = if fetch { Answer::Verdict(Verdict::NotMine) } else { Answer::Mmio };
    let Some(backing) = backing else { return no_slot };
    match backing.region.kind {
        RegionKind::Bar { suspended: true, .. } => return no_slot,
        RegionKind::Rom if kind == FaultAccess::Write => return Answer::Mmio,
        _ => {}
    }
    let is_private = backing.region.kind == RegionKind::Ram { private: true };
    let permitted = backing.region.perms.contains(abort.access.needs());
    if is_private != taken_for_private || !permitted {
        return Answer::Verdict(Verdict::NotMine);
    }
    if let RegionKind::Bar { decodes, .. } = backing.region.kind {
        let epoch = backing.sequence;
        let says = if decodes {
            FaultVerdict::Map { epoch }
        } else {
            FaultVerdict::UnsupportedRequest { epoch }
        };
        let verdict = decide(Some(says), SlotState::Mapped);
        if verdict != Verdict::Relax {
            return Answer::Verdict(verdict);
        }
    }
    // An entry of another size than the one wanted now is replaced, not relaxed: a block whose pages
    // are tracked from now on, or pages that can be a block again (`user_mem_abort`).
    let same_size = backing.extent(ipa).1 == abort.granule;
    Answer::Verdict(match (abort.status, policy) {
        (FaultStatus::Permission, Policy::RelaxOnPermission) if same_size => Verdict::Relax,
        _ => Verdict::Map,
    })
}

/// A fault handler at work on one abort. Each [`step`](Self::step) is something that other vCPUs can
/// see, or can get in the way of.
#[derive(Debug)]
pub struct Resolution<'m> {
    memory: &'m GuestMemory,
    abort: Abort,
    policy: Policy,
    state: State<'m>,
}

#[derive(Debug)]
enum State<'m> {
    /// About to look at the region.
    Look,
    /// About to take the BAR's slot away, for which no walk may be under way.
    Suspend(Backing),
    /// About to begin the walk.
    Begin(Backing, Verdict),
    Walk {
        walk: Walk<'m>,
        verdict: Verdict,
        dirty: bool,
    },
    Done(Resolved),
}

impl<'m> Resolution<'m> {
    /// Begins with an abort.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, abort: Abort, policy: Policy) -> Self {
        Self { memory, abort, policy, state: State::Look }
    }

    /// Whether the next step has to wait for other walks to end.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        matches!(self.state, State::Suspend(_)) && self.memory.table().try_exclusive().is_none()
    }

    /// Takes one step; the last one gives the result. Without effect while
    /// [`is_blocked`](Self::is_blocked).
    pub fn step(&mut self) -> Option<Resolved> {
        let state = std::mem::replace(&mut self.state, State::Look);
        self.state = match state {
            State::Look => self.look(),
            State::Suspend(backing) => self.suspend(backing),
            State::Begin(backing, verdict) => self.begin(&backing, verdict),
            State::Walk { walk, verdict, dirty } => self.walk(walk, verdict, dirty),
            State::Done(resolved) => State::Done(resolved),
        };
        match self.state {
            State::Done(resolved) => Some(resolved),
            _ => None,
        }
    }

    fn look(&self) -> State<'m> {
        let backing = self.memory.backing(self.abort.access.ipa);
        let answer = answer(&self.abort, backing.as_ref(), self.policy);
        match (answer, backing) {
            (Answer::Verdict(Verdict::UnsupportedRequest), Some(backing)) => {
                State::Suspend(backing)
            }
            (Answer::Verdict(verdict @ (Verdict::Map | Verdict::Relax)), Some(backing)) => {
                State::Begin(backing, verdict)
            }
            (answer, _) => State::Done(Resolved { answer, code: None }),
        }
    }

    fn suspend(&self, backing: Backing) -> State<'m> {
        let Some(mut table) = self.memory.table().try_exclusive() else {
            return State::Suspend(backing);
        };
        if self.memory.sequence() != backing.sequence {
            return outdated();
        }
        self.memory.set_suspended_in(&mut table, self.abort.access.ipa, true);
        let answer = Answer::Verdict(Verdict::UnsupportedRequest);
        State::Done(Resolved { answer, code: None })
    }

    fn begin(&self, backing: &Backing, verdict: Verdict) -> State<'m> {
        let shared = self.memory.table().shared();
        // Nothing is invalidated from here on; what happened before makes the look worthless.
        if self.memory.sequence() != backing.sequence {
            return outdated();
        }
        let access = &self.abort.access;
        let grant = backing.grant(access, self.memory.dic());
        let dirty = backing.tracked && access.kind == FaultAccess::Write;
        let walk = if verdict == Verdict::Relax {
            shared.relax(access.ipa, grant)
        } else {
            let (ipa, size) = backing.extent(access.ipa);
            match shared.map(ipa, size, backing.region.frame_of(ipa), grant) {
                Ok(walk) => walk,
                Err(error) => {
                    let answer = Answer::Verdict(verdict);
                    return State::Done(Resolved { answer, code: Some(Err(error)) });
                }
            }
        };
        self.walk(walk, verdict, dirty)
    }

    fn walk(&self, mut walk: Walk<'m>, verdict: Verdict, dirty: bool) -> State<'m> {
        let Some(code) = walk.step() else { return State::Walk { walk, verdict, dirty } };
        // The walk still keeps others from write-protecting the page again.
        if dirty && code.is_ok() {
            let ipa = self.abort.access.ipa.0;
            self.memory.mark_dirty(GuestAddress(ipa - ipa % PAGE_SIZE));
        }
        State::Done(Resolved { answer: Answer::Verdict(verdict), code: Some(code) })
    }
}

/// The region was invalidated since it was looked at: the guest executes the instruction again.
fn outdated<'m>() -> State<'m> {
    State::Done(Resolved { answer: Answer::Verdict(Verdict::Retry), code: None })
}
