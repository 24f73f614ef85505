use super::Decode;

/// As much of the configuration space as tells about decoding (PCI 3.0, 6.1).
pub(crate) const HEADER: usize = 0x40;
/// PCI 3.0, 6.2.2.
pub(super) const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// PCI 3.0, 6.2.5.1.
pub(super) const BARS: u64 = 0x10;
pub(super) const BARS_END: u64 = 0x28;
const BAR_IO: u32 = 1 << 0;
const BAR_TYPE: u32 = 3 << 1;
const BAR_64_BITS: u32 = 2 << 1;
const BAR_FLAGS: u32 = 0xf;
/// PCI 3.0, 6.7.
const CAPABILITIES: usize = 0x34;
const CAPABILITY_POWER: u8 = 1;
/// Where PMCSR is in the capability (PCI Power Management 1.2, 3.2.4).
const PMCSR: u8 = 4;
const POWER_STATE: u16 = 3;
const D3_HOT: u16 = 3;

/// Whether memory BARs decode: the function's COMMAND, and its PMCSR if it has one. A function in D1
/// or D2 need not decode either (PCI Power Management 1.2, 5.4), but VFIO unmaps BARs in D3hot only.
pub(crate) fn decode(command: u16, pmcsr: Option<u16>) -> Decode {
    let asleep = pmcsr.is_some_and(|pmcsr| pmcsr & POWER_STATE == D3_HOT);
    if command & COMMAND_MEMORY != 0 && !asleep { Decode::On } else { Decode::Off }
}

/// The addresses in the registers of the memory BARs; `None` for other BARs, and for a register that
/// is the upper half of the one before.
pub(crate) fn addresses(header: &[u8; HEADER]) -> [Option<u64>; 6] {
    let register = |bar: usize| {
        let at = 0x10 + 4 * bar;
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let mut addresses = [None; 6];
    let mut bar = 0;
    while bar < 6 {
        let low = register(bar);
        let wide = low & BAR_IO == 0 && low & BAR_TYPE == BAR_64_BITS && bar < 5;
        if low & BAR_IO == 0 {
            let high = if wide { register(bar + 1) } else { 0 };
            addresses[bar] = Some(u64::from(high) << 32 | u64::from(low & !BAR_FLAGS));
        }
        bar += if wide { 2 } else { 1 };
    }
    addresses
}

/// Whether a BAR can be at an address at all. What a register holds while its size is asked for is
/// none, nor is 0: a window there would lie over the platform's own.
pub(crate) fn plausible(address: u64, size: u64) -> bool {
    let last = address.checked_add(size.saturating_sub(1));
    address != 0 && last.is_some_and(|last| last != u64::from(u32::MAX) && last != u64::MAX)
}

/// Where PMCSR is in the configuration space, if the function has it. `byte` reads one of it.
pub(crate) fn power_register(
    header: &[u8; HEADER],
    mut byte: impl FnMut(u8) -> Option<u8>,
) -> Option<u8> {
    let status = u16::from_le_bytes([header[STATUS], header[STATUS + 1]]);
    if status & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = header[CAPABILITIES] & !3;
    // There is room for so many, and a list that has more goes round in a circle.
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        if byte(at)? == CAPABILITY_POWER {
            return at.checked_add(PMCSR);
        }
        at = byte(at.checked_add(1)?)? & !3;
    }
    None
}
