use super::Perms;
use super::table::{BLOCK_SIZE, Inner, PageState, Shared, Slot, SlotState, TableError};
use crate::hypervisor::PAGE_SIZE;

/// A change of the table on its way. Each [`step`](Self::step) is what one atomic operation of a real
/// walk does, so that tests can put any two walks into any order.
///
/// Dropped before its end, a walk leaves the entry that it was about to make invalid.
#[derive(Debug)]
pub struct Walk<'t> {
    shared: Shared<'t>,
    change: Change,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    /// `at` advances up to `end`, and `frame` with it.
    Map {
        at: u64,
        end: u64,
        frame: u64,
        perms: Perms,
    },
    Relax {
        at: u64,
        perms: Perms,
    },
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// About to read the entry.
    Read,
    /// About to replace the entry by "locked", if it has not moved since it was read.
    BreakSlot {
        seen: Option<u64>,
        make: MakeSlot,
    },
    BreakPage {
        table: u64,
        seen: u64,
    },
    /// About to put the new entry where "locked" is.
    MakeSlot(MakeSlot),
    MakePage {
        table: u64,
        locked: u64,
    },
    /// About to add permissions, if the entry has not moved since it was read.
    RelaxSlot {
        seen: u64,
    },
    RelaxPage {
        table: u64,
        seen: u64,
    },
    Done,
}

#[derive(Clone, Copy, Debug)]
enum MakeSlot {
    Block,
    Table,
}

impl<'t> Walk<'t> {
    pub(super) fn map(shared: Shared<'t>, at: u64, end: u64, frame: u64, perms: Perms) -> Self {
        Self { shared, change: Change::Map { at, end, frame, perms }, state: State::Read }
    }

    pub(super) fn relax(shared: Shared<'t>, at: u64, perms: Perms) -> Self {
        Self { shared, change: Change::Relax { at, perms }, state: State::Read }
    }

    /// Takes one step; with the last one comes the result. Later steps do nothing and succeed.
    pub fn step(&mut self) -> Option<Result<(), TableError>> {
        let mut inner = self.shared.table.lock();
        let next = match self.change {
            Change::Map { at, end, frame, perms } => {
                map_step(&mut inner, self.state, at, end, frame, perms)
            }
            Change::Relax { at, perms } => relax_step(&mut inner, self.state, at, perms),
        };
        let (state, result) = match next {
            Next::Go(state) => (state, None),
            Next::Advance(by) => self.advance(by),
            Next::End(result) => (State::Done, Some(result)),
        };
        self.state = state;
        result
    }

    /// Takes all steps that are left.
    ///
    /// # Errors
    /// See [`Stage2::map`](super::Stage2::map) and [`Stage2::relax`](super::Stage2::relax).
    pub fn run(mut self) -> Result<(), TableError> {
        loop {
            if let Some(result) = self.step() {
                return result;
            }
        }
    }

    /// Goes on behind an entry that has been made.
    fn advance(&mut self, by: u64) -> (State, Option<Result<(), TableError>>) {
        if let Change::Map { at, end, frame, .. } = &mut self.change {
            (*at, *frame) = (*at + by, *frame + by);
            if at < end {
                return (State::Read, None);
            }
        }
        (State::Done, Some(Ok(())))
    }
}

impl Drop for Walk<'_> {
    fn drop(&mut self) {
        let Change::Map { at, .. } = self.change else { return };
        let mut inner = self.shared.table.lock();
        match self.state {
            State::MakeSlot(_) => {
                inner.set_slot(at, SlotState::Invalid);
            }
            State::MakePage { table, locked }
                if inner.page(at, table).is_some_and(|page| page.stamp == locked) =>
            {
                inner.set_page(at, PageState::Invalid);
            }
            _ => {}
        }
    }
}

enum Next {
    Go(State),
    /// The entry is as it should be; go on so many bytes further.
    Advance(u64),
    End(Result<(), TableError>),
}

const AGAIN: Next = Next::End(Err(TableError::Again));

fn map_step(inner: &mut Inner, state: State, at: u64, end: u64, frame: u64, perms: Perms) -> Next {
    match state {
        State::Read => map_read(inner, at, end, frame),
        State::BreakSlot { seen, make } => {
            if inner.slot(at).map(|slot| slot.stamp) != seen {
                return AGAIN;
            }
            inner.set_slot(at, SlotState::Locked);
            Next::Go(State::MakeSlot(make))
        }
        // Nobody else touches a locked entry, and nobody takes it away while a walk is under way.
        State::MakeSlot(MakeSlot::Block) => {
            inner.set_slot(at, SlotState::Block { frame, perms });
            Next::Advance(BLOCK_SIZE)
        }
        State::MakeSlot(MakeSlot::Table) => {
            let table = inner.empty_table();
            inner.set_slot(at, table);
            Next::Go(State::Read)
        }
        State::BreakPage { table, seen } => match inner.page(at, table) {
            Some(page) if page.stamp == seen => {
                let locked = inner.set_page(at, PageState::Locked);
                Next::Go(State::MakePage { table, locked })
            }
            _ => AGAIN,
        },
        State::MakePage { table, locked } => match inner.page(at, table) {
            Some(page) if page.stamp == locked => {
                inner.set_page(at, PageState::Valid { frame, perms });
                Next::Advance(PAGE_SIZE)
            }
            // A block took the place of the whole table. A real walk writes into the table that was
            // taken out and reports success; the instruction is executed again either way.
            _ => AGAIN,
        },
        State::RelaxSlot { .. } | State::RelaxPage { .. } | State::Done => Next::End(Ok(())),
    }
}

fn map_read(inner: &Inner, at: u64, end: u64, frame: u64) -> Next {
    let fits_block = (at | frame).is_multiple_of(BLOCK_SIZE) && end - at >= BLOCK_SIZE;
    let slot = inner.slot(at);
    let seen = slot.map(|slot| slot.stamp);
    let make = if fits_block { MakeSlot::Block } else { MakeSlot::Table };
    match slot.map(|slot| &slot.state) {
        Some(SlotState::Locked) => AGAIN,
        // The same memory: the permissions are not looked at.
        Some(SlotState::Block { frame: old, .. }) if fits_block && *old == frame => AGAIN,
        Some(SlotState::Table(_)) if !fits_block => map_read_page(inner, at, frame),
        _ => Next::Go(State::BreakSlot { seen, make }),
    }
}

fn map_read_page(inner: &Inner, at: u64, frame: u64) -> Next {
    let Some((table, page)) =
        inner.slot(at).and_then(|slot| Some((slot.stamp, inner.page(at, slot.stamp)?)))
    else {
        return AGAIN;
    };
    match page.state {
        PageState::Locked => AGAIN,
        PageState::Valid { frame: old, .. } if old == frame => AGAIN,
        PageState::Invalid | PageState::Valid { .. } => {
            Next::Go(State::BreakPage { table, seen: page.stamp })
        }
    }
}

fn relax_step(inner: &mut Inner, state: State, at: u64, perms: Perms) -> Next {
    match state {
        State::Read => relax_read(inner, at, perms),
        State::RelaxSlot { seen } => match inner.slot(at) {
            Some(Slot { state: SlotState::Block { frame, perms: old }, stamp })
                if *stamp == seen =>
            {
                let (frame, perms) = (*frame, old.with(perms));
                inner.set_slot(at, SlotState::Block { frame, perms });
                Next::End(Ok(()))
            }
            _ => AGAIN,
        },
        State::RelaxPage { table, seen } => {
            match inner.page(at, table).map(|page| (page.state, page.stamp)) {
                Some((PageState::Valid { frame, perms: old }, stamp)) if stamp == seen => {
                    inner.set_page(at, PageState::Valid { frame, perms: old.with(perms) });
                    Next::End(Ok(()))
                }
                _ => AGAIN,
            }
        }
        _ => Next::End(Ok(())),
    }
}

fn relax_read(inner: &Inner, at: u64, perms: Perms) -> Next {
    let Some(slot) = inner.slot(at) else { return AGAIN };
    let (old, next) = match &slot.state {
        SlotState::Block { perms, .. } => (*perms, State::RelaxSlot { seen: slot.stamp }),
        SlotState::Table(_) => {
            match inner.page(at, slot.stamp).map(|page| (page.state, page.stamp)) {
                Some((PageState::Valid { perms, .. }, seen)) => {
                    (perms, State::RelaxPage { table: slot.stamp, seen })
                }
                _ => return AGAIN,
            }
        }
        SlotState::Invalid | SlotState::Locked => return AGAIN,
    };
    if old.contains(perms) { Next::End(Ok(())) } else { Next::Go(next) }
}
