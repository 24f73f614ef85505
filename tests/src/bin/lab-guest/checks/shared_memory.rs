//! `ivshmem`'s BAR2 as a window onto a file of the host.
//!
//! Each side fills its part with a line of its own, again and again, so that both can make and
//! compare the pattern with what they have: `yes`, `head` and `cmp` on the host.

use crate::mmio::Mapping;
use crate::{Result, ensure};

/// The host's line. The nonce tells this run's pattern from a leftover.
pub(crate) fn host_line(nonce: &str) -> String {
    format!("host {nonce}\n")
}

/// The guest's line.
pub(crate) fn guest_line(nonce: &str) -> String {
    format!("guest {nonce}\n")
}

/// Where the guest's half starts.
pub(crate) fn guest_half(memory: &Mapping) -> usize {
    memory.len() / 2
}

/// Fills `memory` from `start` to its end with the line.
pub(crate) fn fill(memory: &Mapping, start: usize, line: &str) {
    let mut pattern = line.bytes().cycle();
    for offset in (start..memory.len()).step_by(8) {
        memory.write(offset, next_word(&mut pattern));
    }
}

/// Compares `len` bytes from `start` with the line, repeated.
pub(crate) fn compare(memory: &Mapping, start: usize, len: usize, line: &str) -> Result<String> {
    let mut pattern = line.bytes().cycle();
    for offset in (start..start + len).step_by(8) {
        let (read, expected): (u64, u64) = (memory.read(offset), next_word(&mut pattern));
        ensure!(read == expected, "offset {offset:#x} reads {read:#018x}, not {expected:#018x}");
    }
    Ok(format!("{len} bytes equal"))
}

/// The next eight bytes of a line that is repeated.
pub(crate) fn next_word(pattern: &mut impl Iterator<Item = u8>) -> u64 {
    let mut word = [0; 8];
    for byte in &mut word {
        *byte = pattern.next().expect("a cycle over a line does not end");
    }
    u64::from_le_bytes(word)
}
