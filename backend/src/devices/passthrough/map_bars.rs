use std::str::FromStr;

use thiserror::Error;

/// Which clients get the memory of BARs to map.
///
/// The kernel takes that memory away while the device does not decode. A virtual CPU that accesses it
/// at that moment faults, and a VMM that does not resolve such faults loses its VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapBars {
    /// Those that say that they forward memory faults. For others all accesses are trapped: slower,
    /// and safe.
    #[default]
    Auto,
    /// All of them, for a client that copes in ways of its own.
    Always,
    /// None.
    Never,
}

/// No policy has this name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("'{0}' is none of auto, always, never")]
pub struct NoMapBars(String);

impl MapBars {
    /// Whether a client gets it that forwards memory faults, or does not.
    #[must_use]
    pub fn allows(self, forwards_faults: bool) -> bool {
        match self {
            Self::Auto => forwards_faults,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl FromStr for MapBars {
    type Err = NoMapBars;

    fn from_str(text: &str) -> Result<Self, NoMapBars> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            other => Err(NoMapBars(other.to_owned())),
        }
    }
}
