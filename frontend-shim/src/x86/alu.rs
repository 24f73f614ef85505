//! Integer arithmetic and the flags it sets (AMD64 APM volume 3, general-purpose instructions).
//!
//! Operands and results are the low `width` bytes of a u64. Flags that the manual leaves undefined
//! after an instruction come out as some value that our guests may not depend on.

use iced_x86::ConditionCode;

pub(super) const CF: u64 = 1 << 0;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const OF: u64 = 1 << 11;
/// RFLAGS bit 1 is always one.
pub(super) const ALWAYS: u64 = 1 << 1;
/// Interrupt flag.
pub(super) const IF: u64 = 1 << 9;
/// Direction flag: string instructions go down.
pub(super) const DF: u64 = 1 << 10;
/// Resume flag: no instruction breakpoint on the instruction at RIP.
pub(super) const RF: u64 = 1 << 16;
/// What else POPF may change: TF, IF, IOPL, NT, AC and ID.
pub(super) const SYSTEM: u64 = 1 << 8 | IF | 3 << 12 | 1 << 14 | 1 << 18 | 1 << 21;
/// What arithmetic sets.
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// The low `width` bytes.
pub(super) fn truncate(value: u64, width: usize) -> u64 {
    value & mask(width)
}

/// Sign-extends from `width` bytes to 8.
pub(super) fn sign_extend(value: u64, width: usize) -> u64 {
    let shift = 64 - 8 * width;
    (value << shift).cast_signed().wrapping_shr(u32::try_from(shift).unwrap_or(0)).cast_unsigned()
}

/// `a + b + carry`; returns the result and all status flags.
pub(super) fn add(a: u64, b: u64, carry: bool, width: usize) -> (u64, u64) {
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let result = truncate(a.wrapping_add(b).wrapping_add(carry.into()), width);
    let mut flags = result_flags(result, width);
    flags |= when(wide > u128::from(mask(width)), CF);
    flags |= when((a ^ b ^ result) & 0x10 != 0, AF);
    flags |= when((a ^ result) & (b ^ result) & sign_bit(width) != 0, OF);
    (result, flags)
}

/// `a - b - borrow`; returns the result and all status flags.
pub(super) fn sub(a: u64, b: u64, borrow: bool, width: usize) -> (u64, u64) {
    let result = truncate(a.wrapping_sub(b).wrapping_sub(borrow.into()), width);
    let mut flags = result_flags(result, width);
    flags |= when(u128::from(a) < u128::from(b) + u128::from(borrow), CF);
    flags |= when((a ^ b ^ result) & 0x10 != 0, AF);
    flags |= when((a ^ b) & (a ^ result) & sign_bit(width) != 0, OF);
    (result, flags)
}

/// Flags of AND, OR, XOR, TEST.
pub(super) fn logic(result: u64, width: usize) -> u64 {
    result_flags(result, width)
}

/// SHL, SHR or SAR; `None` for a count of zero, which changes nothing, flags included.
pub(super) fn shift(kind: Shift, value: u64, count: u64, width: usize) -> Option<(u64, u64)> {
    let count = u32::try_from(count & if width == 8 { 0x3f } else { 0x1f }).unwrap_or(0);
    if count == 0 {
        return None;
    }
    // 128 bits hold every intermediate, also of counts beyond the width of a narrow operand.
    let wide = u128::from(value);
    let signed = i128::from(sign_extend(value, width).cast_signed());
    let (result, carry, overflow) = match kind {
        Shift::Left => {
            let shifted = wide << count;
            let result = low(shifted) & mask(width);
            let carry = shifted >> (8 * width) & 1 == 1;
            (result, carry, (result & sign_bit(width) != 0) != carry)
        }
        Shift::Right => {
            let carry = wide >> (count - 1) & 1 == 1;
            (low(wide >> count), carry, value & sign_bit(width) != 0)
        }
        Shift::ArithmeticRight => {
            let carry = signed >> (count - 1) & 1 == 1;
            (low((signed >> count).cast_unsigned()) & mask(width), carry, false)
        }
    };
    Some((result, result_flags(result, width) | when(carry, CF) | when(overflow, OF)))
}

/// Which way [`shift`] goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shift {
    Left,
    Right,
    ArithmeticRight,
}

/// Signed product; CF and OF tell that it did not fit.
pub(super) fn multiply(a: u64, b: u64, width: usize) -> (u64, u64) {
    let signed = |value| i128::from(sign_extend(value, width).cast_signed());
    let product = signed(a) * signed(b);
    let result = low(product.cast_unsigned()) & mask(width);
    let flags = result_flags(result, width) | when(signed(result) != product, CF | OF);
    (result, flags)
}

/// Whether a condition holds; `None` for one that the model does not know.
pub(super) fn condition(code: ConditionCode, flags: u64) -> Option<bool> {
    let set = |bits| flags & bits != 0;
    let less = set(SF) != set(OF);
    Some(match code {
        ConditionCode::o => set(OF),
        ConditionCode::no => !set(OF),
        ConditionCode::b => set(CF),
        ConditionCode::ae => !set(CF),
        ConditionCode::e => set(ZF),
        ConditionCode::ne => !set(ZF),
        ConditionCode::be => set(CF | ZF),
        ConditionCode::a => !set(CF | ZF),
        ConditionCode::s => set(SF),
        ConditionCode::ns => !set(SF),
        ConditionCode::p => set(PF),
        ConditionCode::np => !set(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(ZF),
        ConditionCode::g => !less && !set(ZF),
        _ => return None,
    })
}

fn result_flags(result: u64, width: usize) -> u64 {
    let parity_even = (result & 0xff).count_ones().is_multiple_of(2);
    when(result == 0, ZF) | when(result & sign_bit(width) != 0, SF) | when(parity_even, PF)
}

fn when(set: bool, flag: u64) -> u64 {
    if set { flag } else { 0 }
}

fn mask(width: usize) -> u64 {
    u64::MAX >> (64 - 8 * width)
}

fn sign_bit(width: usize) -> u64 {
    1 << (8 * width - 1)
}

/// The low half.
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
pub(super) fn low(value: u128) -> u64 {
    value as u64
}
