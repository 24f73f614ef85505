//! CRCs, which tell what was stored whole from what was not, and from what somebody else has stored.

/// Of words, as they lie in memory.
pub(super) fn of_words<const N: usize>(words: [u64; N]) -> u64 {
    crc32fast::hash(words.map(u64::to_ne_bytes).as_flattened()).into()
}

/// Whether a checksum is that of what it belongs to. A fuzzer could never make it so, and would see
/// nothing of what is behind it.
pub(super) fn matches(stored: u64, computed: u64) -> bool {
    cfg!(feature = "fuzzing") || stored == computed
}
