use std::num::{NonZeroU32, NonZeroU64};

use crate::config::{ConfigError, Parameters};
use crate::devices::virtio::rate_limit::Limit;

/// What an operator says of an entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `max-bytes=SIZE[,period=MILLISECONDS]`, as in QEMU.
    pub limit: Option<Limit>,
}

/// QEMU's, in milliseconds.
const PERIOD: u64 = 1 << 16;

impl Options {
    /// Takes them.
    ///
    /// # Errors
    /// [`ConfigError`] when a value is none, zero or too large, or there is a period of nothing.
    pub(super) fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let amount = parameters.take_size("max-bytes")?;
        let period = parameters.take_number("period")?;
        let Some(amount) = amount else {
            return match period {
                Some(_) => Err(ConfigError::invalid("period", "without max-bytes")),
                None => Ok(Self::default()),
            };
        };
        let amount = NonZeroU64::new(amount)
            .ok_or_else(|| ConfigError::invalid("max-bytes", "0 bytes are nothing at all"))?;
        let period = period.unwrap_or(PERIOD);
        let period = u32::try_from(period).ok().and_then(NonZeroU32::new).ok_or_else(|| {
            let reason = format!("{period} is not 1 to {} milliseconds", u32::MAX);
            ConfigError::invalid("period", reason)
        })?;
        Ok(Self { limit: Some(Limit { amount, period }) })
    }
}
