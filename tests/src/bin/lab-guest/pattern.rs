//! Bytes that nobody else writes by chance, and what is told of long ones.

/// A stream of pseudo-random bytes (Marsaglia, "Xorshift RNGs", 2003: xorshift64), the same for the
/// same seed wherever it is made.
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    state: u64,
}

impl Pattern {
    pub(crate) fn new(seed: u64) -> Self {
        // Zero would stay zero, and small seeds would start alike.
        let state = (seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1;
        Self { state }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    /// A number less than `bound`, which is not zero.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 8) % bound
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
    }
}

/// FNV-1a, 64 bits: enough to tell what was damaged on its way.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
