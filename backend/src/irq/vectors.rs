use std::ops::Range;
use std::sync::Arc;

use super::{EventFd, IrqError};

/// The vectors of MSI or MSI-X: edges, each with an eventfd of its own.
#[derive(Debug, Default)]
pub struct Vectors {
    eventfds: Vec<Option<Arc<EventFd>>>,
}

impl Vectors {
    /// `count` vectors without eventfds.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self { eventfds: (0..count).map(|_| None).collect() }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.eventfds.len()
    }

    /// Checks a range of vectors.
    ///
    /// # Errors
    /// [`IrqError::Range`] when it leaves the vectors that exist.
    pub fn range(&self, start: u32, count: u32) -> Result<Range<usize>, IrqError> {
        let first = start as usize;
        match first.checked_add(count as usize) {
            Some(end) if end <= self.eventfds.len() => Ok(first..end),
            _ => Err(IrqError::Range { start, count }),
        }
    }

    /// Sets or takes away the eventfd of one vector.
    ///
    /// # Errors
    /// [`IrqError::Range`] when there is no such vector.
    pub fn set_eventfd(&mut self, vector: usize, fd: Option<EventFd>) -> Result<(), IrqError> {
        let start = u32::try_from(vector).unwrap_or(u32::MAX);
        let slot = self.eventfds.get_mut(vector).ok_or(IrqError::Range { start, count: 1 })?;
        *slot = fd.map(Arc::new);
        Ok(())
    }

    /// The eventfd of a vector, if it has one.
    #[must_use]
    pub fn eventfd(&self, vector: usize) -> Option<&Arc<EventFd>> {
        self.eventfds.get(vector)?.as_ref()
    }

    /// Signals a vector. One without an eventfd is lost, as a message to no address is.
    pub fn signal(&self, vector: usize) {
        if let Some(eventfd) = self.eventfd(vector) {
            eventfd.signal();
        }
    }

    /// Takes every eventfd away.
    pub fn clear(&mut self) {
        self.eventfds.fill_with(|| None);
    }
}
