//! Whatever a guest does.

use proptest::prelude::*;

use super::bench::{Bench, MEMORY, ring};
use super::registers::FIELDS;
use crate::pci::BarIndex;

#[derive(Clone, Debug)]
enum Step {
    Read { offset: u64, length: usize },
    Write { offset: u64, data: Vec<u8> },
    Config { offset: usize, data: Vec<u8> },
    Memory { offset: u64, data: Vec<u8> },
    Field { index: usize, value: u64 },
    Wake(usize),
    Drive(u64),
    Kick(u16),
    Map,
    Unmap,
    Move,
}

/// Places that matter more often than others.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![0..0x40_u64, 0x1000..0x1004_u64, 0x2000..0x2010_u64, 0..0x8000_u64]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![Just(0_u8), Just(1), Just(15), Just(0xff), any::<u8>()];
    let length = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8), 0..20_usize];
    length.prop_flat_map(move |length| prop::collection::vec(value.clone(), length))
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![0..4_u64, Just(8), Just(15), MEMORY..MEMORY + 0x4000, any::<u64>()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (offset(), 0..20_usize).prop_map(|(offset, length)| Step::Read { offset, length }),
        4 => (offset(), bytes()).prop_map(|(offset, data)| Step::Write { offset, data }),
        1 => (0..0x110_usize, bytes()).prop_map(|(offset, data)| Step::Config { offset, data }),
        1 => (0..0x4000_u64, bytes()).prop_map(|(offset, data)| Step::Memory { offset, data }),
        4 => (0..FIELDS.len(), value()).prop_map(|(index, value)| Step::Field { index, value }),
        1 => (0..4_usize).prop_map(Step::Wake),
        1 => any::<u64>().prop_map(Step::Drive),
        1 => (0..2_u16).prop_map(Step::Kick),
        1 => Just(Step::Map),
        1 => Just(Step::Unmap),
        1 => Just(Step::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_guest_does_is_more_than_its_own_problem(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut bench = Bench::driven(2, 0);
        let mut mapped = true;
        for step in steps {
            match step {
                Step::Read { offset, length } => {
                    bench.read(BarIndex::BAR0, offset, &mut vec![0; length]);
                }
                Step::Write { offset, data } => bench.write(BarIndex::BAR0, offset, &data),
                Step::Config { offset, data } => bench.config_write(offset, &data),
                Step::Memory { offset, data } => bench.put(MEMORY + offset, &data),
                Step::Field { index, value } => {
                    let (offset, width, ..) = FIELDS[index];
                    bench.set(offset, width, value);
                    bench.field(offset, width);
                }
                Step::Wake(index) => bench.wake(index),
                Step::Drive(features) => bench.drive(features),
                Step::Kick(queue) => {
                    bench.send(queue, b"request");
                    bench.kick(queue);
                }
                Step::Map if !mapped => {
                    bench.map_memory();
                    mapped = true;
                }
                Step::Unmap => {
                    bench.unmap_memory();
                    mapped = false;
                }
                Step::Move => {
                    bench = bench.moved();
                    bench.resume();
                    mapped = true;
                }
                Step::Map => {}
            }
        }
        // After a reset it works as ever.
        bench.reset_function(crate::pci::ResetKind::Device);
        if !mapped {
            bench.map_memory();
        }
        bench.bus_master(true);
        bench.enable_msix(true);
        bench.put(ring(0), &[0; 0x100]);
        bench.put(ring(0) + 0x1000, &[0; 0x100]);
        bench.drive(0);
        let head = bench.send(0, b"fine");
        bench.kick(0);
        prop_assert_eq!(bench.used(0), [(head, b"fine".to_vec())]);
    }
}
