//! Bytes and registers that nobody meant as an instruction.

use proptest::prelude::*;

use super::*;

/// No instruction has more accesses: 32 bytes read and written, each in pieces of at least one byte.
const MOST_ACCESSES: usize = 64;

/// What decoders branch on, and then anything.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(vec![
        &[][..],
        &[0x66],
        &[0x67],
        &[0xf0],
        &[0xf2],
        &[0xf3],
        &[0x64],
        &[0x66, 0xf0],
        &[0x67, 0xf3],
        &[0x0f],
        &[0x66, 0x0f],
        &[0xf3, 0x0f],
        &[0x48, 0x0f],
        &[0xf0, 0x48, 0x0f],
        &[0xc5],
        &[0xc4],
        &[0x62],
        &[0x8f],
    ]);
    (prefix, prop::collection::vec(any::<u8>(), 0..=MAX_INSTRUCTION))
        .prop_map(|(prefix, rest)| [prefix, rest.as_slice()].concat())
}

/// Pages of every kind, their ends, and any value.
fn value() -> impl Strategy<Value = u64> {
    let place = prop::sample::select(vec![0, RAM, DEVICE, ALIAS, READ_ONLY, NOT_MAPPED, u64::MAX]);
    let offset = prop_oneof![0_u64..0x40, 0xff0_u64..0x1010];
    prop_oneof![any::<u64>(), (place, offset).prop_map(|(at, offset)| at.wrapping_add(offset))]
}

/// Attempts an instruction until it ends; how many accesses it asked for.
fn end(bytes: &[u8], registers: Registers) -> Option<usize> {
    let mut pending = PendingInstruction::new(registers, bytes).ok()?;
    let mut board = Board::new();
    for exits in 0..=MOST_ACCESSES {
        match pending.attempt(&mut board) {
            Ok(Outcome::Exit) => drop(complete(&mut pending)),
            Ok(Outcome::Retired | Outcome::Halted) => return Some(exits),
            Ok(Outcome::Fault { .. } | Outcome::NotMapped { .. }) | Err(_) => return None,
        }
    }
    panic!("{bytes:02x?} asks for more than {MOST_ACCESSES} accesses");
}

#[test]
fn no_bytes_panic_or_go_on_for_ever() {
    let retired = std::cell::Cell::new(0_u32);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let strategy = (bytes(), prop::array::uniform16(value()), any::<[u8; 32]>(), any::<u64>());
    runner
        .run(&strategy, |(bytes, general, vector, flags)| {
            let mut registers = Registers::new(CODE);
            (registers.general, registers.flags) = (general, flags);
            registers.vectors = Some(Arc::new(Vectors([vector; 16])));
            if end(&bytes, registers).is_some() {
                retired.set(retired.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    // The rest were no instructions, unknown ones, or faulted.
    assert!(retired.get() > 500, "{} instructions retired", retired.get());
}
