//! The locator against the crate's own interpreter: what an instruction accesses is what was located.

use std::collections::BTreeMap;
use std::convert::Infallible;

use iced_x86::{Decoder, DecoderOptions, Register};
use proptest::prelude::*;

use super::*;
use crate::x86::{self, Registers, execute};

const RIP: u64 = 0x7f_1234_5000;

/// Flat memory that remembers what was accessed in it; what it reads is arbitrary, but not aligned to
/// anything.
#[derive(Default)]
struct Recorder {
    accesses: Vec<(u64, u64, bool)>,
}

type Step<T> = Result<T, x86::Stop<Infallible>>;

impl x86::Bus for Recorder {
    type Error = Infallible;

    fn read(&mut self, address: u64, len: usize) -> Step<u64> {
        self.accesses.push((address, len as u64, false));
        Ok(address.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn write(&mut self, address: u64, len: usize, _: u64) -> Step<()> {
        self.accesses.push((address, len as u64, true));
        Ok(())
    }

    fn modify(
        &mut self,
        address: u64,
        len: usize,
        _: bool,
        mut update: impl FnMut(u64) -> u64,
    ) -> Step<u64> {
        update(0);
        self.accesses.push((address, len as u64, true));
        Ok(0)
    }

    fn port_read(&mut self, _: u16, _: usize) -> Step<u64> {
        Ok(0)
    }

    fn port_write(&mut self, _: u16, _: usize, _: u64) -> Step<()> {
        Ok(())
    }
}

/// A guest whose linear addresses are guest-physical ones, and whose code goes round and round.
struct Flat {
    state: VcpuState,
    code: Vec<u8>,
    vector: Option<[u8; 64]>,
    mask: Option<u64>,
}

impl StoppedVcpu for Flat {
    fn state(&self) -> &VcpuState {
        &self.state
    }

    fn translate(&self, linear: u64) -> Option<GuestAddress> {
        Some(GuestAddress(linear))
    }

    fn read_ram(&self, address: GuestAddress, data: &mut [u8]) -> bool {
        let from = usize::try_from(address.0.wrapping_sub(self.state.code_address())).unwrap_or(0);
        let rest = self.code.iter().cycle().skip(from % self.code.len());
        data.iter_mut().zip(rest).for_each(|(byte, code)| *byte = *code);
        true
    }

    fn vector(&self, number: usize) -> Option<[u8; 64]> {
        assert!(number < 32, "vector register {number}");
        self.vector
    }

    fn mask(&self, number: usize) -> Option<u64> {
        assert!(number < 8, "mask register {number}");
        self.mask
    }
}

/// Every byte that is accessed, and whether it is written: accesses cut at pages compare with whole
/// ones, and a read followed by a write with a read-modify-write.
fn touched(accesses: impl Iterator<Item = (u64, u64, bool)>) -> BTreeMap<u64, bool> {
    let mut bytes = BTreeMap::new();
    for (address, size, write) in accesses {
        for at in 0..size {
            *bytes.entry(address.wrapping_add(at)).or_default() |= write;
        }
    }
    bytes
}

/// Executes the instruction that begins `bytes` and compares. `None` if it is not one that the
/// interpreter knows.
fn compare(bytes: &[u8], general: [u64; 16]) -> Option<()> {
    let instruction = Decoder::with_ip(64, bytes, RIP, DecoderOptions::NONE).decode();
    let mut registers = Registers::new(instruction.next_ip());
    for (number, value) in (0..).zip(general) {
        registers.set(Register::RAX + number, value)?;
    }
    let mut recorder = Recorder::default();
    execute(&mut registers, &instruction, &mut recorder).ok()?;

    let state = VcpuState { general, rip: RIP, ..VcpuState::default() };
    let located = locate(&Flat { state, code: bytes.to_vec(), vector: None, mask: None })
        .unwrap_or_else(|error| panic!("{instruction:?}: {error}"));
    let located = touched(
        located
            .iter()
            .filter(|access| access.kind != Some(FaultAccess::Execute))
            .map(|a| (a.address.0, a.size, a.kind == Some(FaultAccess::Write))),
    );
    let executed = touched(recorder.accesses.into_iter());
    // With REP the interpreter may do several iterations at once; the first one is located.
    if instruction.has_rep_prefix() && instruction.is_string_instruction() {
        assert!(located.iter().all(|(at, write)| executed.get(at) == Some(write)), "{bytes:02x?}");
        assert_eq!(located.is_empty(), executed.is_empty(), "{bytes:02x?}");
    } else {
        assert_eq!(located, executed, "{bytes:02x?}");
    }
    Some(())
}

/// First bytes of instructions: prefixes that matter, then opcodes of the subset and their neighbours.
fn encoding() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(vec![
        &[][..],
        &[0x66],
        &[0x67],
        &[0xf0],
        &[0xf3],
        &[0x67, 0xf3],
        &[0x66, 0xf3],
    ]);
    let rex = prop::option::of(0x40_u8..0x50);
    let opcode = prop_oneof![
        (0_u8..=0xff).prop_map(|byte| vec![byte]),
        (0_u8..=0xff).prop_map(|byte| vec![0x0f, byte]),
        prop::sample::select(vec![0xa4_u8, 0xa5, 0xaa, 0xab, 0x86, 0x87, 0xff, 0x8f, 0xf6, 0xf7])
            .prop_map(|byte| vec![byte]),
        prop::sample::select(vec![0xb0_u8, 0xb1, 0xc0, 0xc1, 0xb6, 0xb7, 0xbe, 0xbf, 0x44, 0x94])
            .prop_map(|byte| vec![0x0f, byte]),
    ];
    let rest = prop::collection::vec(any::<u8>(), MAX_INSTRUCTION);
    (prefix, rex, opcode, rest)
        .prop_map(|(prefix, rex, opcode, rest)| [prefix, rex.as_slice(), &opcode, &rest].concat())
}

/// Any values, small ones and page ends among them.
fn register() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0_u64..4, (0_u64..1 << 40).prop_map(|page| page << 12 | 0xffd)]
}

#[test]
fn what_an_instruction_accesses_is_what_was_located() {
    let executed = std::cell::Cell::new(0_u32);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let strategy = (encoding(), prop::array::uniform16(register()));
    runner
        .run(&strategy, |(bytes, general)| {
            if compare(&bytes, general).is_some() {
                executed.set(executed.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    // The rest were not instructions, or not of the subset.
    assert!(executed.get() > 2_000, "{} cases were executed", executed.get());
}

/// Of one instruction: 64 lanes or 11008 bytes, in pieces within a page.
const MOST_ACCESSES: usize = 160;

fn any_state() -> impl Strategy<Value = VcpuState> {
    let code = prop::sample::select(vec![CodeWidth::Bits16, CodeWidth::Bits32, CodeWidth::Bits64]);
    let segments = prop::array::uniform6(prop_oneof![Just(0), register()]);
    (prop::array::uniform16(register()), register(), segments, code, any::<bool>()).prop_map(
        |(general, rip, [es, cs, ss, ds, fs, gs], code, stack32)| {
            let segments = SegmentBases { es, cs, ss, ds, fs, gs };
            VcpuState { general, rip, segments, code, stack32 }
        },
    )
}

#[test]
fn no_bytes_make_it_panic_or_list_without_end() {
    let located = std::cell::Cell::new(0_u32);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    // EVEX with P0 as it must be, VEX, and anything.
    let vex = (prop::sample::select(vec![0xc5_u8, 0xc4, 0x62, 0x8f]), 0_u8..8, any::<[u8; 14]>())
        .prop_map(|(first, map, rest)| [&[first, 0xf0 | map], &rest[..]].concat());
    let code = prop_oneof![encoding(), vex, prop::collection::vec(any::<u8>(), 1..32)];
    let vector = prop::option::of(prop::collection::vec(any::<u8>(), 64));
    let strategy = (any_state(), code, vector, any::<Option<u64>>());
    runner
        .run(&strategy, |(state, code, vector, mask)| {
            let vector = vector.map(|bytes| bytes.try_into().unwrap());
            let hostile = Flat { state, code, vector, mask };
            if let Ok(accesses) = locate(&hostile) {
                located.set(located.get() + 1);
                prop_assert!(accesses.len() < MOST_ACCESSES, "{} accesses", accesses.len());
                for GuestAccess { address, size, .. } in accesses {
                    let within = address.0 % PAGE_SIZE + size <= PAGE_SIZE;
                    prop_assert!(size > 0 && within, "{address} {size}");
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(located.get() > 2_500, "{} instructions were located", located.get());
}
