use thiserror::Error;

use super::State;
use crate::bar::mapping::{BarMapping, MappingError};

/// Why writes to a BAR can't be tracked.
#[derive(Debug, Error)]
pub enum TrackingError {
    /// The BAR does not exist, or has no memory that is mapped: its writes are all forwarded.
    #[error("BAR{0} is trapped")]
    Trapped(u8),
    /// Nobody began to track them.
    #[error("writes are not tracked")]
    NotTracked,
    /// The host refused to change protections.
    #[error("{0}")]
    Host(String),
}

impl From<MappingError> for TrackingError {
    fn from(error: MappingError) -> Self {
        Self::Host(error.to_string())
    }
}

impl State {
    pub(super) fn mapping(&mut self, bar: u8) -> Result<&mut BarMapping, TrackingError> {
        let mapping = self.mappings.get_mut(usize::from(bar)).and_then(Option::as_mut);
        mapping.ok_or(TrackingError::Trapped(bar))
    }
}
