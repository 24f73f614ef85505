//! What the driver finds and sets up.

use super::super::layout::common as at;
use super::bench::{ALL_SET, Bench, DEVICE, NO_VECTOR, ring};
use super::core::{FEATURE, QUEUE_SIZE, Told};
use crate::devices::Device;
use crate::devices::virtio::spec::{feature, status};
use crate::pci::{BarIndex, ResetKind, spec};

fn offered(bench: &mut Bench) -> Vec<u64> {
    let word = |select| {
        bench.set(at::DEVICE_FEATURE_SELECT, 4, select);
        bench.field(at::DEVICE_FEATURE, 4)
    };
    [0, 1, 2, 3, 4, u64::from(u32::MAX)].map(word).to_vec()
}

#[test]
fn a_modern_block_device_is_seen() {
    let bench = Bench::new(2);
    assert_eq!(bench.config(0, 4), [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(bench.config(spec::header::REVISION_ID, 4), [1, 0, 0, 1]);
    assert_eq!(bench.config(spec::header::SUBSYSTEM_VENDOR_ID, 4), [0xf4, 0x1a, 0x00, 0x11]);
    assert_eq!(bench.config(spec::header::INTERRUPT_PIN, 1), [1]);
}

#[test]
fn the_capabilities_name_the_structures() {
    let bench = Bench::new(2);
    let found: Vec<_> = bench
        .capabilities()
        .map(|at| (at, bench.config(at, 20)))
        .filter(|(_, bytes)| bytes[0] == spec::vendor::CAPABILITY_ID)
        .map(|(at, bytes)| {
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            assert!(at + usize::from(bytes[2]) <= 0x100);
            (bytes[2], bytes[3], bytes[4], word(8), word(12), word(16))
        })
        .collect();
    let [common, notify, isr, device, window] = found[..] else { panic!("{found:x?}") };
    // Length, type, BAR, offset, length of the structure; the multiplier of notify offsets.
    assert_eq!((common.0, common.1, common.2, common.3, common.4), (16, 1, 0, 0, 0x3c));
    assert_eq!(notify, (20, 2, 0, 0x4000, 0x2000, 0x1000));
    assert_eq!((isr.0, isr.1, isr.2, isr.3, isr.4), (16, 3, 0, 0x1000, 1));
    assert_eq!((device.0, device.1, device.2, device.3), (16, 4, 0, 0x2000));
    assert_eq!(window, (20, 5, 0, 0, 0, 0));
}

#[test]
fn the_most_queues_fit_and_one_more_is_refused() {
    let bench = Bench::new(512);
    assert_eq!(bench.function.spec().msix.unwrap().vectors.count(), 513);
    let last = bench.device.doorbells(BarIndex::BAR0).pop().unwrap();
    let size = bench.function.bar(BarIndex::BAR0).unwrap().size;
    assert_eq!((last.offset, size), (0x20_3000, 0x40_0000));
    assert!(bench.device.doorbells(BarIndex::BAR2).is_empty());

    let core = super::core::Echo::new(513);
    let backing = super::super::CoreBacking::new(Box::new(core)).unwrap();
    let refused = super::super::VirtioFunction::new(Box::new(backing)).unwrap_err();
    assert_eq!(refused.to_string(), "parameter 'queues': 513 queues, more than 512");
}

#[test]
fn features_are_offered_by_words_and_nothing_beyond() {
    let mut bench = Bench::new(1);
    let all = FEATURE | feature::TRANSPORT;
    assert_eq!(offered(&mut bench), [all & 0xffff_ffff, all >> 32, 0, 0, 0, 0]);
    // They are the device's to say.
    bench.set(at::DEVICE_FEATURE_SELECT, 4, 0);
    bench.set(at::DEVICE_FEATURE, 4, 0);
    assert_eq!(bench.field(at::DEVICE_FEATURE, 4), all & 0xffff_ffff);
}

#[test]
fn features_are_agreed_on_when_they_were_offered_and_are_modern() {
    let rows = [
        (feature::VERSION_1, true),
        (feature::VERSION_1 | FEATURE, true),
        (feature::TRANSPORT | FEATURE, true),
        (0, false),
        (FEATURE, false),
        (feature::TRANSPORT & !feature::VERSION_1, false),
        (feature::VERSION_1 | 1 << 4, false),
        (feature::VERSION_1 | 1 << 38, false),
        (u64::MAX, false),
    ];
    for (features, agreed) in rows {
        let mut bench = Bench::new(1);
        let set = bench.negotiate(features) & status::FEATURES_OK != 0;
        assert_eq!(set, agreed, "{features:#x}");
        // DRIVER_OK without it is none.
        bench.set(at::DEVICE_STATUS, 1, ALL_SET.into());
        assert_eq!(bench.status() & status::DRIVER_OK != 0, agreed, "{features:#x}");
        let told = if agreed { vec![Told::Started(features)] } else { Vec::new() };
        assert_eq!(bench.core.take_told(), told);
    }
}

#[test]
fn a_feature_behind_the_first_64_was_not_offered() {
    for (select, agreed) in [(2, false), (3, false), (4, true), (u64::from(u32::MAX), true)] {
        let mut bench = Bench::new(1);
        bench.set(at::DRIVER_FEATURE_SELECT, 4, select);
        bench.set(at::DRIVER_FEATURE, 4, 1);
        let set = bench.negotiate(feature::VERSION_1) & status::FEATURES_OK != 0;
        assert_eq!(set, agreed, "word {select}");
    }
}

#[test]
fn features_stay_what_was_agreed_on() {
    let mut bench = Bench::driven(1, 0);
    bench.set(at::DRIVER_FEATURE_SELECT, 4, 0);
    bench.set(at::DRIVER_FEATURE, 4, FEATURE);
    assert_eq!(bench.field(at::DRIVER_FEATURE, 4), 0);
}

#[test]
fn the_status_only_grows_until_it_is_written_0() {
    let mut bench = Bench::driven(1, 0);
    bench.set(at::DEVICE_STATUS, 1, 1);
    assert_eq!(bench.status(), ALL_SET);
    // The driver can't say that the device needs a reset, nor set what nothing defines.
    bench.set(at::DEVICE_STATUS, 1, 0x70);
    assert_eq!(bench.status(), ALL_SET);
    bench.set(at::DEVICE_STATUS, 1, status::FAILED.into());
    assert_eq!(bench.status(), ALL_SET | status::FAILED);
    bench.core.take_told();
    bench.set(at::DEVICE_STATUS, 1, 0);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.core.take_told(), [Told::Quiesced, Told::Reset]);
}

/// Offset, width, value at power-on, what is written, what is read then.
pub(super) const FIELDS: [(u64, usize, u64, u64, u64); 24] = [
    (at::DEVICE_FEATURE_SELECT, 4, 0, 0xdead_beef, 0xdead_beef),
    (at::DRIVER_FEATURE_SELECT, 4, 0, 1, 1),
    (at::DRIVER_FEATURE, 4, 0, 0xdead_beef, 0xdead_beef),
    (at::CONFIG_MSIX_VECTOR, 2, NO_VECTOR, 2, 2),
    (at::CONFIG_MSIX_VECTOR, 2, 2, 3, NO_VECTOR),
    (at::NUM_QUEUES, 2, 2, 7, 2),
    (at::DEVICE_STATUS, 1, 0, 3, 3),
    (at::CONFIG_GENERATION, 1, 0, 9, 0),
    (at::QUEUE_SELECT, 2, 0, 1, 1),
    (at::QUEUE_SIZE, 2, QUEUE_SIZE as u64, 4, 4),
    (at::QUEUE_SIZE, 2, 4, 3, 4),
    (at::QUEUE_SIZE, 2, 4, 0, 4),
    (at::QUEUE_SIZE, 2, 4, 16, 4),
    (at::QUEUE_MSIX_VECTOR, 2, NO_VECTOR, 0, 0),
    (at::QUEUE_MSIX_VECTOR, 2, 0, 0x1234, NO_VECTOR),
    (at::QUEUE_NOTIFY_OFF, 2, 1, 5, 1),
    (at::QUEUE_DESC, 8, 0, 0x1122_3344_5566_7788, 0x1122_3344_5566_7788),
    (at::QUEUE_DESC + 4, 4, 0x1122_3344, 0xa, 0xa),
    (at::QUEUE_DESC, 8, 0xa_5566_7788, 0, 0),
    (at::QUEUE_DRIVER, 8, 0, 0xffff_fff1, 0xffff_fff1),
    (at::QUEUE_DEVICE, 8, 0, 0x1000, 0x1000),
    (at::QUEUE_RESET, 2, 0, 1, 0),
    (at::QUEUE_ENABLE, 2, 0, 2, 0),
    (at::QUEUE_ENABLE, 2, 0, 1, 0),
];

#[test]
fn every_register_is_what_it_was_and_takes_what_it_can() {
    let mut bench = Bench::new(2);
    for (offset, width, before, written, after) in FIELDS {
        assert_eq!(bench.field(offset, width), before, "{offset:#x} before");
        bench.set(offset, width, written);
        assert_eq!(bench.field(offset, width), after, "{offset:#x} after {written:#x}");
    }
    // The last row was refused: the rings are nowhere that a ring can be.
    assert_eq!(bench.status(), 3 | status::DEVICE_NEEDS_RESET);
}

#[test]
fn a_register_is_not_there_for_accesses_of_another_width() {
    let mut bench = Bench::new(2);
    let widths = |offset| FIELDS.iter().filter(move |row| row.0 == offset).map(|row| row.1);
    for offset in 0..0x40_u64 {
        for width in [1, 2, 3, 4, 5, 8, 16] {
            let half = (0x20..0x38).contains(&offset) && offset.is_multiple_of(4) && width == 4;
            let read_only = (offset, width) == (at::DEVICE_FEATURE, 4);
            if half || read_only || widths(offset).any(|natural| natural == width) {
                continue;
            }
            bench.write(BarIndex::BAR0, offset, &vec![0x5a; width]);
            let mut data = vec![0; width];
            bench.read(BarIndex::BAR0, offset, &mut data);
            assert_eq!(data, vec![0xff; width], "{width} bytes at {offset:#x}");
        }
    }
    for (offset, width, _, _, _) in FIELDS.iter().filter(|row| row.0 != at::QUEUE_NOTIFY_OFF) {
        let fresh = Bench::new(2).field(*offset, *width);
        assert_eq!(bench.field(*offset, *width), fresh, "{offset:#x} was left alone");
    }
}

#[test]
fn a_queue_that_is_not_there_has_size_0_and_can_not_be_set_up() {
    let mut bench = Bench::new(2);
    bench.set(at::QUEUE_SELECT, 2, 2);
    for (offset, width, ..) in FIELDS.iter().filter(|row| row.0 >= at::QUEUE_SIZE) {
        bench.set(*offset, *width, 1);
        let nothing = if *offset == at::QUEUE_MSIX_VECTOR { NO_VECTOR } else { 0 };
        assert_eq!(bench.field(*offset, *width), nothing, "{offset:#x}");
    }
    assert_eq!(bench.status(), 0);
}

#[test]
fn an_enabled_queue_can_not_be_moved() {
    let mut bench = Bench::driven(1, 0);
    for (offset, width) in [(at::QUEUE_SIZE, 2), (at::QUEUE_DESC, 8), (at::QUEUE_ENABLE, 2)] {
        let before = bench.field(offset, width);
        bench.set(offset, width, 2);
        assert_eq!(bench.field(offset, width), before, "{offset:#x}");
    }
    assert_eq!(bench.field(at::QUEUE_DESC, 8), ring(0));
    // Only a reset stops it.
    bench.set(at::QUEUE_ENABLE, 2, 0);
    assert_eq!(bench.field(at::QUEUE_ENABLE, 2), 1);
}

#[test]
fn the_configuration_is_the_devices_at_any_width() {
    let mut bench = Bench::new(1);
    bench.write(BarIndex::BAR0, DEVICE + 1, &[1, 2, 3]);
    let mut data = [9; 12];
    bench.read(BarIndex::BAR0, DEVICE, &mut data);
    assert_eq!(data, [0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]);
    // Its structure ends somewhere, and nothing is between structures.
    for offset in [DEVICE - 2, DEVICE + 0xfff, 0x1001, 0x3c, 0x4001] {
        let mut data = [0; 2];
        bench.write(BarIndex::BAR0, offset, &[1, 1]);
        bench.read(BarIndex::BAR0, offset, &mut data);
        assert_eq!(data, [0xff; 2], "{offset:#x}");
    }
}

#[test]
fn a_reset_of_the_function_leaves_nothing() {
    for kind in [ResetKind::FunctionLevel, ResetKind::Device] {
        let mut bench = Bench::driven(2, FEATURE);
        bench.core.take_told();
        if kind == ResetKind::FunctionLevel {
            let at = bench.capability(spec::express::CAPABILITY_ID);
            bench.config_write(at + spec::express::DEVICE_CONTROL, &0x8000_u16.to_le_bytes());
        } else {
            bench.reset_function(kind);
        }
        assert_eq!(bench.core.take_told(), [Told::Quiesced, Told::Reset]);
        for (offset, width, ..) in FIELDS {
            let fresh = Bench::new(2).field(offset, width);
            assert_eq!(bench.field(offset, width), fresh, "{offset:#x}");
        }
    }
}
