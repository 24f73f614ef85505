use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;

use super::super::fake::{BAR_SIZE, Fake, Race, config};
use super::super::{Completion, IrqRequest, VfioFunction, VfioIrq, VfioRegion};
use crate::dma::{DmaAccess, DmaError, Iova};
use crate::irq::EventFd;

const BAR0: VfioRegion = VfioRegion::Bar(0);
const CONFIG: VfioRegion = VfioRegion::Config;

fn decoding() -> (Fake, VfioFunction) {
    let fake = Fake::new(config(&[]));
    let mut function = fake.function(true);
    assert_eq!(function.write(CONFIG, 4, &[6, 0]), Completion::Done);
    fake.log();
    (fake, function)
}

fn memory(size: u64) -> Option<(OwnedFd, u64)> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    Some((file, 0))
}

#[test]
fn a_device_that_was_left_decoding_is_silent_when_it_is_taken_over() {
    let fake = Fake::new(config(&[]));
    let mut function = fake.function(true);
    assert!(!function.claims(BAR0));
    let state = fake.state();
    assert_eq!((&state.config[4..6], &state.config[0x10..0x14]), (&[0; 2][..], &[0; 4][..]));
}

#[test]
fn the_device_itself_says_whether_it_decodes() {
    type Change = fn(&mut Vec<u8>);
    let rows: &[(&str, Change, bool)] = &[
        ("MEM", |config| config[4] = 2, true),
        ("bus mastering alone", |config| config[4] = 4, false),
        ("I/O alone", |config| config[4] = 1, false),
        ("D3hot", |config| config[0x64] = 3, false),
        ("D1", |config| config[0x64] = 1, false),
        ("unplugged", |config| config.fill(0xff), false),
        ("unplugged by now", |config| config[4..8].fill(0xff), false),
    ];
    for (what, change, claims) in rows {
        let (fake, mut function) = decoding();
        assert!(function.claims(BAR0));
        let epoch = function.epoch();
        // Behind our back: by the host, or by whoever shares the device file.
        change(&mut fake.state().config);
        assert_eq!(function.claims(BAR0), *claims, "{what}");
        assert_eq!(function.epoch() > epoch, !claims, "{what}: the epoch moves with decode");
        let mut data = [0; 4];
        let completion = function.read(BAR0, 0, &mut data);
        let expected = if *claims {
            (Completion::Done, [0x5a; 4])
        } else {
            (Completion::Unsupported, [0xff; 4])
        };
        assert_eq!((completion, data), expected, "{what}");
    }
}

#[test]
fn an_access_that_loses_a_race_against_decode_is_no_error() {
    let rows: &[(&str, &[Race], Completion)] = &[
        ("no race", &[], Completion::Done),
        ("off", &[Race::Off], Completion::Unsupported),
        ("off and on", &[Race::OffAndOn], Completion::Done),
        (
            "again and again, then off",
            &[Race::OffAndOn, Race::OffAndOn, Race::Off],
            Completion::Unsupported,
        ),
        ("for ever", &[Race::OffAndOn; 100], Completion::Failed(Errno::IO)),
    ];
    for (what, races, completion) in rows {
        let (fake, mut function) = decoding();
        fake.state().races = races.iter().copied().collect();
        let mut data = [0; 8];
        assert_eq!(function.read(BAR0, 8, &mut data), *completion, "{what}");
        let byte = if *completion == Completion::Done { 0x5a } else { 0xff };
        assert_eq!(data, [byte; 8], "{what}");

        let (fake, mut function) = decoding();
        fake.state().races = races.iter().copied().collect();
        assert_eq!(function.write(BAR0, 8, &[1; 8]), *completion, "{what}");
        let written = fake.state().bar[8] == 1;
        assert_eq!(written, *completion == Completion::Done, "{what}");
    }
}

#[test]
fn the_rom_decodes_with_its_own_enable_and_nobody_writes_to_it() {
    let (_fake, mut function) = decoding();
    let mut data = [0; 2];
    assert_eq!(function.read(VfioRegion::Rom, 0, &mut data), Completion::Unsupported);
    function.write(CONFIG, 0x30, &[1]);
    assert_eq!(function.read(VfioRegion::Rom, 0, &mut data), Completion::Done);
    assert_eq!(function.write(VfioRegion::Rom, 0, &[0]), Completion::Done);
    function.write(CONFIG, 4, &[4]);
    assert_eq!(function.read(VfioRegion::Rom, 0, &mut data), Completion::Unsupported);
    assert_eq!(function.write(VfioRegion::Rom, 0, &[0]), Completion::Unsupported);
}

#[test]
fn a_device_that_was_unplugged_reads_as_ones() {
    let (fake, mut function) = decoding();
    fake.state().unplugged = true;
    let mut data = [0; 4];
    assert_eq!(function.read(BAR0, 0, &mut data), Completion::Unsupported);
    assert_eq!(function.read(CONFIG, 0, &mut data), Completion::Failed(Errno::NODEV));
    assert_eq!(data, [0xff; 4]);
    assert_eq!(function.write(CONFIG, 4, &[6]), Completion::Failed(Errno::NODEV));
    assert_eq!(function.disconnect(), Err(Errno::NODEV));
}

#[test]
fn the_epoch_moves_with_bars_and_resets_and_rests_otherwise() {
    let (_fake, mut function) = decoding();
    let rows: &[(&str, u64, &[u8], bool)] = &[
        ("a BAR", 0x13, &[0xfd], true),
        ("the ROM", 0x30, &[1], true),
        ("MEM off", 4, &[4], true),
        ("still off", 4, &[4], false),
        ("BME", 4, &[0], false),
        ("the interrupt line", 0x3c, &[11], false),
        ("FLR", 0x78, &[0, 0x80], true),
    ];
    for (what, offset, data, moves) in rows {
        let epoch = function.epoch();
        assert_eq!(function.write(CONFIG, *offset, data), Completion::Done);
        assert_eq!(function.epoch() != epoch, *moves, "{what}");
    }
    let epoch = function.epoch();
    function.reset().unwrap();
    assert!(function.epoch() > epoch);
}

#[test]
fn the_msix_table_is_the_vmms_and_its_pages_are_never_mapped() {
    let (fake, mut function) = decoding();
    assert_eq!(function.region(BAR0).mappable, [0..0x1000, 0x2000..BAR_SIZE]);
    assert!(
        function.maps(BAR0, 0xfff) && !function.maps(BAR0, 0x1000) && function.maps(BAR0, 0x2000)
    );
    assert!(!function.region(BAR0).wholly_mappable());
    let mut data = [0; 24];
    // 8 bytes in front of the table and its first entry, masked.
    function.read(BAR0, 0x1038, &mut data);
    assert_eq!(data[..8], [0x5a; 8]);
    assert_eq!(data[8..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    function.write(BAR0, 0x103c, &[7; 12]);
    function.read(BAR0, 0x1038, &mut data);
    assert_eq!(data[4..16], [7; 12]);
    assert_eq!(fake.state().bar[0x103c..0x1040], [7; 4]);
    // The last entry ends at 0x1080.
    function.write(BAR0, 0x107c, &[0; 8]);
    function.read(BAR0, 0x1078, &mut data);
    assert_eq!(data[4..8], [0; 4]);
    function.reset().unwrap();
    function.write(CONFIG, 4, &[2]);
    function.read(BAR0, 0x1040, &mut data);
    assert_eq!(data[..16], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn a_refused_window_leaves_no_trace() {
    let (fake, mut function) = decoding();
    let all = DmaAccess::all();
    fake.state().iommu_error = Some(Errno::NOMEM);
    let refused = function.dma_map(Iova(0x1000), 0x1000, all, memory(0x1000));
    assert_eq!(refused, Err(DmaError::Iommu(Errno::NOMEM)));
    assert_eq!(function.dma_unmap(Some((Iova(0x1000), 0x1000))), Err(DmaError::NoSuchWindow));
    fake.state().iommu_error = None;
    let unreachable = function.dma_map(Iova(0x1000), 0x1000, all, None);
    assert_eq!(unreachable.unwrap_err().errno(), Errno::NOTSUP);
    function.dma_map(Iova(0x1000), 0x1000, DmaAccess::READ, memory(0x1000)).unwrap();
    function.dma_map(Iova(0x2000), 0x2000, all, memory(0x2000)).unwrap();
    let mapped = [(0x1000, 0x1000, DmaAccess::READ), (0x2000, 0x2000, all)];
    assert_eq!(fake.state().mapped, mapped);
    let overlap = function.dma_map(Iova(0x3000), 0x1000, all, memory(0x1000));
    assert_eq!(overlap, Err(DmaError::Overlap));
    assert_eq!(fake.state().mapped.len(), 2, "the IOMMU was not asked");
    // What it does not give back stays a window, whose memory nobody else gets.
    fake.state().iommu_error = Some(Errno::BUSY);
    let kept = function.dma_unmap(None);
    assert_eq!(kept, Err(DmaError::Iommu(Errno::BUSY)));
    fake.state().iommu_error = None;
    let overlap = function.dma_map(Iova(0x1000), 0x1000, all, memory(0x1000));
    assert_eq!(overlap, Err(DmaError::Overlap));
    function.dma_unmap(None).unwrap();
    assert_eq!(fake.state().mapped, []);
}

#[test]
fn one_window_that_the_iommu_keeps_keeps_no_other() {
    let (fake, mut function) = decoding();
    for iova in [0x1000, 0x2000, 0x3000] {
        function.dma_map(Iova(iova), 0x1000, DmaAccess::all(), memory(0x1000)).unwrap();
    }
    fake.state().stuck = Some(0x2000);
    assert_eq!(function.disconnect(), Err(Errno::BUSY));
    assert_eq!(fake.state().mapped, [(0x2000, 0x1000, DmaAccess::all())]);
    fake.state().stuck = None;
    function.disconnect().unwrap();
    assert_eq!(fake.state().mapped, []);
}

#[test]
fn a_device_that_was_left_asleep_is_awake_for_the_next_client() {
    let (fake, mut function) = decoding();
    assert_eq!(function.write(CONFIG, 0x64, &[3]), Completion::Done);
    // The fake's reset changes nothing, as if there were none.
    function.disconnect().unwrap();
    assert_eq!(fake.state().config[0x64], 0);
}

#[test]
fn when_a_client_leaves_the_device_is_silenced_before_its_memory_goes() {
    let (fake, mut function) = decoding();
    let msi = EventFd::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).unwrap();
    let connect = IrqRequest::Connect { start: 0, eventfds: vec![Some(msi)] };
    function.set_irqs(VfioIrq::Msi, connect).unwrap();
    function.write(CONFIG, 0x42, &[1]);
    function.dma_map(Iova(0x1000), 0x1000, DmaAccess::all(), memory(0x1000)).unwrap();
    fake.log();
    function.disconnect().unwrap();
    let log = fake.log();
    let at = |what: &str| log.iter().position(|line| line == what).expect(what);
    assert!(at("Msi disable") < at("config 0x4 [0, 0]"), "{log:?}");
    assert!(at("config 0x4 [0, 0]") < at("reset"), "{log:?}");
    assert!(at("reset") < at("unmap 0x1000"), "{log:?}");
    assert_eq!(fake.state().config[4], 0, "what the kernel restored after the reset");
    assert_eq!(function.write(CONFIG, 0x42, &[1]), Completion::Done);
    assert_eq!(fake.log().iter().filter(|line| line.starts_with("Msi")).count(), 0, "unwired");
}
