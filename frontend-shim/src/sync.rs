//! The locks and counters of this crate. With the feature `model-check` they are shuttle's, whose
//! schedulers decide which thread goes on at each of them (`bar/model_check`).

#[cfg(feature = "model-check")]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(feature = "model-check")]
pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(feature = "model-check"))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(not(feature = "model-check"))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Locks a mutex whose data every holder leaves valid, whatever became of the holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits to be notified, at most for `limit`. Under a model checker time stands still: whoever is not
/// notified waits for ever, which it finds.
pub(crate) fn wait<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    limit: Duration,
) -> MutexGuard<'a, T> {
    #[cfg(not(feature = "model-check"))]
    return condvar.wait_timeout(guard, limit).unwrap_or_else(PoisonError::into_inner).0;
    #[cfg(feature = "model-check")]
    {
        let _ = limit;
        condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}

/// A value that is replaced as a whole: readers never wait, and keep what they have seen.
#[derive(Debug, Default)]
pub(crate) struct Snapshot<T> {
    #[cfg(not(feature = "model-check"))]
    value: arc_swap::ArcSwap<T>,
    /// Never held while another thread may run, so that a look or a change is one step: that of `turn`.
    #[cfg(feature = "model-check")]
    value: std::sync::Mutex<Arc<T>>,
    #[cfg(feature = "model-check")]
    turn: AtomicU64,
}

#[cfg(not(feature = "model-check"))]
impl<T> Snapshot<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: arc_swap::ArcSwap::from_pointee(value) }
    }

    /// What is there now, for a short look.
    pub(crate) fn load(&self) -> arc_swap::Guard<Arc<T>> {
        self.value.load()
    }

    /// What is there now, to be kept.
    pub(crate) fn load_full(&self) -> Arc<T> {
        self.value.load_full()
    }

    pub(crate) fn store(&self, value: T) {
        self.value.store(Arc::new(value));
    }
}

#[cfg(feature = "model-check")]
impl<T> Snapshot<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: std::sync::Mutex::new(Arc::new(value)), turn: AtomicU64::new(0) }
    }

    pub(crate) fn load(&self) -> Arc<T> {
        self.load_full()
    }

    pub(crate) fn load_full(&self) -> Arc<T> {
        Arc::clone(&self.reach())
    }

    pub(crate) fn store(&self, value: T) {
        *self.reach() = Arc::new(value);
    }

    /// After any other thread may have run.
    fn reach(&self) -> std::sync::MutexGuard<'_, Arc<T>> {
        self.turn.fetch_add(1, Ordering::Relaxed);
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
