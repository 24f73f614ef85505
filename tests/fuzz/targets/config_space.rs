//! Software and the function itself at work on configuration space. No write of any width moves a
//! read-only bit, the epoch counts what changes decode and nothing else, and what the function says
//! of itself agrees with its registers.
#![no_main]

use barkeep_backend::devices;
use barkeep_backend::pci::{
    BarIndex, BarKind, BarSpec, ClassCode, Decode, ExpressSpec, Function, FunctionSpec, Ids,
    InterruptPin, MsiOutcome, MsiSpec, MsiVectors, PowerSpec, Register, RequestKind, ResetKind,
    spec,
};
use barkeep_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// Registers that software can't write and that the function changes as a write completes: what is
/// unmasked is delivered, and pending no more.
const FOLLOW_A_WRITE: [&str; 1] = ["Pending Bits"];

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut function = function(input.u8());
    let masks = Masks::of(&function);
    let power_on = image(&function);
    let mut before = Observed::of(&function);
    while !input.is_empty() {
        let op = input.u8();
        let mut written = None;
        match op {
            0..0xc0 => written = write(&mut function, usize::from(op & 0x3f) + 1, &mut input),
            0xc0..0xd0 => drop(function.set_intx(input.u8() & 1 != 0)),
            0xd0..0xe0 => raise(&mut function, input.u8()),
            0xe0..0xe8 => function.record_unsupported_request(RequestKind::Posted),
            0xe8..0xf0 => function.record_unsupported_request(RequestKind::NonPosted),
            _ => reset(&mut function, op, &before.image, &power_on, &masks),
        }
        let now = Observed::of(&function);
        if let Some(write) = written {
            check_write(&write, &before.image, &now.image, &masks);
        }
        check(&function, &before, &now);
        before = now;
    }
});

/// Per byte of configuration space, its bits of one kind.
struct Masks {
    writable: Vec<u8>,
    clearable: Vec<u8>,
    followers: Vec<u8>,
    retained: Vec<u8>,
}

impl Masks {
    fn of(function: &Function) -> Self {
        let follows = |register: &Register| FOLLOW_A_WRITE.contains(&register.name);
        Self {
            writable: bits(function, |register| register.read_write),
            clearable: bits(function, |register| register.write_one_to_clear),
            followers: bits(function, |register| if follows(register) { u32::MAX } else { 0 }),
            retained: bits(function, |register| register.reset_retains),
        }
    }
}

/// What an operation may change, as it was before or after one.
struct Observed {
    image: Vec<u8>,
    addresses: Vec<u64>,
    decode: Decode,
    epoch: u64,
}

impl Observed {
    fn of(function: &Function) -> Self {
        Self {
            image: image(function),
            addresses: function.bars().map(|bar| bar.address).collect(),
            decode: function.decode(),
            epoch: function.epoch(),
        }
    }
}

fn function(kind: u8) -> Function {
    let device = |spec: &str| {
        let spec = spec.parse().expect("a device specification");
        devices::create(spec).expect("a device").spec()
    };
    let ids = Ids {
        vendor: 0x1234,
        device: 1,
        subsystem_vendor: 0xaaaa,
        subsystem: 0x5555,
        revision: 7,
        class: ClassCode { base: 0xff, sub: 1, interface: 2 },
    };
    let bar = |index, kind, size| BarSpec { index, kind, size };
    let memory64 = BarKind::Memory64 { prefetchable: true };
    let power = |no_soft_reset| Some(PowerSpec { no_soft_reset });
    let msi = |vectors, per_vector_masking| Some(MsiSpec { vectors, per_vector_masking });
    let spec = match kind % 4 {
        0 => device("edu"),
        1 => device("ivshmem,size=4K"),
        2 => FunctionSpec {
            bars: vec![
                bar(BarIndex::BAR0, memory64, 1 << 40),
                bar(BarIndex::BAR2, BarKind::Io, 16),
                bar(BarIndex::BAR3, BarKind::Memory32 { prefetchable: false }, 1 << 12),
                bar(BarIndex::BAR4, memory64, 1 << 12),
            ],
            interrupt_pin: Some(InterruptPin::D),
            msi: msi(MsiVectors::ThirtyTwo, true),
            power: power(kind & 0x80 != 0),
            express: Some(ExpressSpec { function_level_reset: true }),
            ..FunctionSpec::new(ids)
        },
        _ => FunctionSpec { msi: msi(MsiVectors::Four, false), ..FunctionSpec::new(ids) },
    };
    Function::new(spec).expect("a function that can exist")
}

/// A write by software that reset nothing.
struct Write<'a> {
    offset: usize,
    data: &'a [u8],
}

fn write<'a>(function: &mut Function, length: usize, input: &mut Input<'a>) -> Option<Write<'a>> {
    let offset = usize::from(input.u16());
    // Most of what there is lies in the first 256 bytes.
    let offset = if offset & 0x8000 == 0 { offset & 0xff } else { offset & 0x1fff };
    let data = input.bytes(length);
    let effects = function.config_write(offset, data);
    effects.reset.is_none().then_some(Write { offset, data })
}

/// Only bits that were written have moved, and of those only the ones that software can move.
fn check_write(write: &Write<'_>, before: &[u8], after: &[u8], masks: &Masks) {
    for (at, was, is) in differences(before, after) {
        let value = at.checked_sub(write.offset).and_then(|at| write.data.get(at)).copied();
        let may = value.map_or(0, |value| masks.writable[at] | masks.clearable[at] & value);
        assert_eq!((was ^ is) & !may & !masks.followers[at], 0, "at {at:#x}");
        assert_eq!(is & masks.clearable[at] & !was, 0, "set by a write at {at:#x}");
    }
}

/// The bytes in which two images differ, by their place.
fn differences(one: &[u8], other: &[u8]) -> impl Iterator<Item = (usize, u8, u8)> {
    const CHUNK: usize = 64;
    let chunks = one.chunks(CHUNK).zip(other.chunks(CHUNK)).enumerate();
    chunks.filter(|(_, (one, other))| one != other).flat_map(|(chunk, (one, other))| {
        let bytes = one.iter().zip(other).enumerate();
        bytes.map(move |(at, (one, other))| (chunk * CHUNK + at, *one, *other))
    })
}

fn raise(function: &mut Function, vector: u8) {
    let may = function.msi_enabled() && function.bus_master() && vector < function.msi_vectors();
    let outcome = function.raise_msi(vector);
    assert_eq!(outcome != MsiOutcome::Dropped, may, "{outcome:?}");
}

fn reset(function: &mut Function, op: u8, before: &[u8], power_on: &[u8], masks: &Masks) {
    let kind = match op % 3 {
        0 => ResetKind::Soft,
        1 => ResetKind::FunctionLevel,
        _ => ResetKind::Device,
    };
    let effects = function.reset(kind);
    assert_eq!(effects.reset, Some(kind));
    for (at, is, was) in differences(&image(function), power_on) {
        let retained = masks.retained[at];
        assert_eq!((is ^ was) & !retained, 0, "at {at:#x}");
        assert_eq!((is ^ before[at]) & retained, 0, "not as before at {at:#x}");
    }
    assert!(!function.decode().memory && !function.decode().io && !function.bus_master());
    assert!(!function.intx_line());
}

/// What holds between any two operations.
fn check(function: &Function, before: &Observed, now: &Observed) {
    let changed = before.decode != now.decode || before.addresses != now.addresses;
    assert_eq!(now.epoch, before.epoch + u64::from(changed));
    for bar in function.bars() {
        assert_eq!(bar.address % bar.size, 0, "{}", bar.index);
        let io = bar.kind == BarKind::Io;
        assert_eq!(function.claims(bar.index), if io { now.decode.io } else { now.decode.memory });
    }
    for index in BarIndex::ALL {
        assert!(function.bar(index).is_some() || !function.claims(index));
    }
    let command = now.image[spec::header::COMMAND];
    assert!(command & 0b10 != 0 || !now.decode.memory);
    assert!(command & 0b01 != 0 || !now.decode.io);
    assert!(!(function.intx_line() && function.msi_enabled()));
    // What lies past the end is all ones.
    let mut end = [0; 8];
    function.config_read(now.image.len() - 4, &mut end);
    assert_eq!(end[4..], [0xff; 4]);
    assert_eq!(end[..4], now.image[now.image.len() - 4..]);
}

fn image(function: &Function) -> Vec<u8> {
    let mut bytes = vec![0; function.config_size()];
    function.config_read(0, &mut bytes);
    bytes
}

/// Per byte of configuration space, the bits that `mask` picks from its register.
fn bits(function: &Function, mask: impl Fn(&Register) -> u32) -> Vec<u8> {
    let mut bits = vec![0; function.config_size()];
    for register in function.registers() {
        let width = register.width.bytes();
        bits[register.offset..][..width].copy_from_slice(&mask(register).to_le_bytes()[..width]);
    }
    bits
}
