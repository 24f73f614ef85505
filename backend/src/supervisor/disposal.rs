//! Closes what clients and workers have sent.
//!
//! Whoever has sent a descriptor decides what it is, and so how long it takes to close the last one: for a
//! TCP socket that lingers or a file of somebody's own file system, for ever. The supervisor has no time
//! for that.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use tracing::warn;

/// A thread of one function's, from when there is something to close on.
#[derive(Debug, Default)]
pub(super) struct Disposal {
    thread: Option<Sender<Box<dyn Send>>>,
    pending: Arc<AtomicUsize>,
}

/// It does little.
const STACK: usize = 128 << 10;

impl Disposal {
    /// Has something dropped at some time.
    pub(super) fn take(&mut self, what: impl Send + 'static) {
        if self.thread.is_none() {
            self.start();
        }
        let Some(thread) = &self.thread else { return };
        self.pending.fetch_add(1, Ordering::Relaxed);
        // It ends after this.
        let _ = thread.send(Box::new(what));
    }

    /// How much is not closed yet.
    pub(super) fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    fn start(&mut self) {
        let (sender, receiver) = channel::<Box<dyn Send>>();
        let pending = Arc::clone(&self.pending);
        let run = move || {
            for what in receiver {
                drop(what);
                pending.fetch_sub(1, Ordering::Relaxed);
            }
        };
        match thread::Builder::new().name("disposal".into()).stack_size(STACK).spawn(run) {
            Ok(_) => self.thread = Some(sender),
            Err(failure) => warn!("no thread to close descriptors: {failure}"),
        }
    }
}
