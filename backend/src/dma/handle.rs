use std::mem;
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddressSpace;

use super::logging::DirtyLog;
use super::view::GuestView;
use super::window::Window;
use super::windows::Windows;

/// The guest memory of a function, for the threads of its device.
#[derive(Clone, Debug)]
pub struct DmaHandle {
    shared: Arc<Shared>,
    log: Arc<DirtyLog>,
}

impl DmaHandle {
    pub(super) fn new(shared: Arc<Shared>, log: Arc<DirtyLog>) -> Self {
        Self { shared, log }
    }

    /// Guest memory as it is now. The windows that it holds stay mapped until the guard is dropped,
    /// and the client's DMA_UNMAP of one of them waits for that: hold it for one transfer, never
    /// while waiting for the thread that serves the client.
    #[must_use]
    pub fn memory(&self) -> DmaGuard {
        let windows = Arc::clone(&self.shared.lock().windows);
        let view = GuestView { windows, log: Arc::clone(&self.log) };
        DmaGuard { view, shared: Arc::clone(&self.shared) }
    }
}

impl GuestAddressSpace for DmaHandle {
    type M = GuestView;
    type T = DmaGuard;

    fn memory(&self) -> DmaGuard {
        Self::memory(self)
    }
}

/// Keeps the windows of guest memory mapped. See [`DmaHandle::memory`].
#[derive(Debug)]
pub struct DmaGuard {
    view: GuestView,
    shared: Arc<Shared>,
}

impl Deref for DmaGuard {
    type Target = GuestView;

    fn deref(&self) -> &GuestView {
        &self.view
    }
}

impl Clone for DmaGuard {
    fn clone(&self) -> Self {
        let GuestView { windows, log } = &self.view;
        let view = GuestView { windows: Arc::clone(windows), log: Arc::clone(log) };
        Self { view, shared: Arc::clone(&self.shared) }
    }
}

impl Drop for DmaGuard {
    fn drop(&mut self) {
        // Under the lock: whoever waits for these windows either sees them gone or is told.
        let current = self.shared.lock();
        self.view.windows = Arc::default();
        let awaited = current.awaited;
        drop(current);
        // It is a system call, and transfers are many.
        if awaited {
            self.shared.given_back.notify_all();
        }
    }
}

/// What the table of windows and the handles have in common.
#[derive(Debug, Default)]
pub(super) struct Shared {
    current: Mutex<Current>,
    /// A guard was dropped, while that was awaited.
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct Current {
    /// The windows that there are now.
    windows: Arc<Windows>,
    /// Whether the table waits for guards.
    awaited: bool,
}

impl Shared {
    /// Changes the windows for everybody who asks from now on. Guards keep what they have.
    pub(super) fn change<R>(
        &self,
        windows: &mut Arc<Windows>,
        change: impl FnOnce(&mut Windows) -> R,
    ) -> R {
        let mut current = self.lock();
        // Without guards, the table's own reference is the last one now and nothing is copied.
        drop(mem::take(&mut current.windows));
        let result = change(Arc::make_mut(windows));
        current.windows = Arc::clone(windows);
        result
    }

    /// Waits until no guard holds any of the windows, and unmaps them.
    pub(super) fn retire(&self, mut removed: Vec<Arc<Window>>) {
        let mut current = self.lock();
        while let Some(window) = removed.last() {
            if Arc::strong_count(window) == 1 {
                removed.pop();
            } else {
                current.awaited = true;
                current = self.given_back.wait(current).unwrap_or_else(PoisonError::into_inner);
            }
        }
        current.awaited = false;
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
