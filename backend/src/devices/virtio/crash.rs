//! Where a process may be killed: before each store that somebody else sees.

/// Nothing, but in tests: there, the process that is tested may end here.
#[cfg(not(test))]
pub(super) fn point() {}

#[cfg(test)]
pub(super) use self::tests::point;

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        /// Points that are passed before the one that kills.
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// What kills.
    struct Killed;

    pub(crate) fn point() {
        if let Some(left) = LEFT.get() {
            if left == 0 {
                LEFT.set(None);
                resume_unwind(Box::new(Killed));
            }
            LEFT.set(Some(left - 1));
        }
    }

    /// Kills at the nth point from now on, from 0 on.
    pub(crate) fn kill_at(point: u64) {
        LEFT.set(Some(point));
    }

    /// Does something, unless it is killed.
    pub(crate) fn survives<R>(work: impl FnOnce() -> R) -> Option<R> {
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(result) => Some(result),
            Err(payload) if payload.is::<Killed>() => None,
            Err(payload) => resume_unwind(payload),
        }
    }

    /// Nobody is killed any more.
    pub(crate) fn spare() {
        LEFT.set(None);
    }
}
