use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Something that one thread has at a time, possibly while it waits in a system call. Others wait for
/// it with a deadline, and the mutex underneath is never held for longer than a look: a fork never
/// waits for a peer.
#[derive(Debug)]
pub(super) struct Turn<T> {
    /// `None` while somebody has it.
    value: Mutex<Option<Box<T>>>,
    given_back: Condvar,
}

/// The value, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken<'a, T> {
    turn: &'a Turn<T>,
    value: Option<Box<T>>,
}

impl<T> Turn<T> {
    pub(super) fn new(value: T) -> Self {
        Self { value: Mutex::new(Some(Box::new(value))), given_back: Condvar::new() }
    }

    /// Waits for as long as it takes.
    pub(super) fn take(&self) -> Taken<'_, T> {
        let mut place = self.lock();
        loop {
            if let Some(value) = place.take() {
                return Taken { turn: self, value: Some(value) };
            }
            place = self.given_back.wait(place).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the value is there and fits.
    pub(super) fn take_when(
        &self,
        deadline: Instant,
        fits: impl Fn(&T) -> bool,
    ) -> Option<Taken<'_, T>> {
        let mut place = self.lock();
        loop {
            if let Some(value) = place.take_if(|value| fits(value)) {
                return Some(Taken { turn: self, value: Some(value) });
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.given_back.wait_timeout(place, left);
            place = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes it if nobody has it.
    pub(super) fn try_take(&self) -> Option<Taken<'_, T>> {
        let value = self.lock().take()?;
        Some(Taken { turn: self, value: Some(value) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<T>>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for Taken<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("the value is here until the drop")
    }
}

impl<T> DerefMut for Taken<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("the value is here until the drop")
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        *self.turn.lock() = self.value.take();
        self.turn.given_back.notify_all();
    }
}
