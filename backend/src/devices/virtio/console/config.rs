//! Feature Bits (5.3.3) and Device configuration layout (5.3.4).

/// The configuration's field for emergency writes is there.
pub(super) const EMERG_WRITE: u64 = 1 << 2;

/// emerg_wr. The size and the number of ports before it are not there without features that this
/// device does not offer, and read as zeros.
const EMERG_WR: u64 = 8;

/// The character of a write to the configuration, if it is an emergency write: "the least
/// significant byte".
pub(super) fn emergency_character(offset: u64, data: &[u8]) -> Option<u8> {
    let position = usize::try_from(EMERG_WR.checked_sub(offset)?).ok()?;
    data.get(position).copied()
}
