//! What a function tells its device, and the window to its BARs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use barkeep_protocol::wire::{
    DmaAccess, DmaMap, DmaUnmap, DmaUnmapFlags, IrqAction, IrqData, MigrationState, PciIrq,
    RegionAccess, SetIrqs,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::devices::{RestoreError, Saved};
use crate::pci::{
    BarKind, BarOffset, BarSpec, ClassCode, Ids, MsixSpec, MsixVectors, VendorSpec, spec,
};

const CONFIG: u32 = 7;
const WINDOW_TYPE: u8 = 5;
/// Where the window is: behind the header and MSI-X.
const WINDOW: u64 = 0x4c;
const DATA: u64 = WINDOW + 0x10;
const BAR_SIZE: u64 = 0x100;

/// What the device was told, and its registers.
#[derive(Debug, Default)]
struct Told {
    name: String,
    events: Vec<String>,
    registers: Vec<u8>,
    /// Answer to the next reload.
    reload: Option<String>,
}

struct Probe(Arc<Mutex<Told>>);

impl Device for Probe {
    fn spec(&self) -> FunctionSpec {
        let kind = BarKind::Memory32 { prefetchable: false };
        let bar = |index, size| BarSpec { index, kind, size };
        let at = |offset| BarOffset { bar: BarIndex::BAR2, offset };
        let vectors = MsixVectors::new(2).unwrap();
        FunctionSpec {
            bars: vec![bar(BarIndex::BAR0, BAR_SIZE), bar(BarIndex::BAR2, 0x1000)],
            msix: Some(MsixSpec { vectors, table: at(0), pending: at(0x800) }),
            vendor: vec![VendorSpec::bar_window(WINDOW_TYPE)],
            bar_window: Some(0),
            ..FunctionSpec::new(Ids {
                vendor: 1,
                device: 1,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.told().name);
    }

    fn bar_read(&mut self, _: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        let mut told = self.told();
        told.events.push(format!("read {} at {offset:#x}", data.len()));
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&told.registers[start..start + data.len()]);
    }

    fn bar_write(&mut self, _: BarIndex, offset: u64, data: &[u8], _: &mut Context<'_>) {
        let mut told = self.told();
        told.events.push(format!("write {} at {offset:#x}", data.len()));
        let start = usize::try_from(offset).unwrap();
        told.registers[start..start + data.len()].copy_from_slice(data);
    }

    fn rewired(&mut self, _: &mut Context<'_>) {
        self.told().events.push("rewired".into());
    }

    fn effects_applied(&mut self, effects: &Effects, context: &mut Context<'_>) {
        if effects.bus_master.is_some() {
            let event = format!("masters {}", context.bus_master());
            self.told().events.push(event);
        }
    }

    fn reload(&mut self, _: &mut Context<'_>) -> Result<(), String> {
        let mut told = self.told();
        told.events.push("reload".into());
        told.reload.take().map_or(Ok(()), Err)
    }

    fn quiesce(&mut self) {
        self.told().events.push("quiesce".into());
    }

    fn reset(&mut self) {
        self.told().events.push("reset".into());
    }

    fn saved(&mut self) -> Option<&mut dyn Saved> {
        Some(self)
    }
}

impl Saved for Probe {
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), RestoreError> {
        Ok(())
    }

    fn resume(&mut self, _: &mut Context<'_>) {
        self.told().events.push("resume".into());
    }
}

impl Probe {
    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.0.lock().unwrap()
    }
}

struct Bench {
    hosted: HostedFunction,
    told: Arc<Mutex<Told>>,
}

impl Bench {
    fn new() -> Self {
        let registers = (0..=255).collect();
        let told = Arc::new(Mutex::new(Told { registers, ..Told::default() }));
        let device = Box::new(Probe(Arc::clone(&told)));
        let mut bench = Self { hosted: HostedFunction::new("probe", device).unwrap(), told };
        bench.write(CONFIG, spec::header::COMMAND as u64, &[0b010]);
        bench.events();
        bench
    }

    fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.told.lock().unwrap().events)
    }

    fn read(&mut self, region: u32, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let count = u32::try_from(length).unwrap();
        let access = RegionAccess { offset, region, count };
        self.hosted.region_read(&access, &mut data).unwrap();
        data
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let count = u32::try_from(data.len()).unwrap();
        let access = RegionAccess { offset, region, count };
        self.hosted.region_write(&access, data).unwrap();
    }

    /// Points the window at a place in a BAR.
    fn point(&mut self, bar: u8, offset: u32, length: u32) {
        self.write(CONFIG, WINDOW + 4, &[bar]);
        self.write(CONFIG, WINDOW + 8, &offset.to_le_bytes());
        self.write(CONFIG, WINDOW + 12, &length.to_le_bytes());
    }

    fn go_to(&mut self, state: MigrationState) {
        self.hosted.go_to(state).unwrap();
    }
}

fn memory() -> OwnedFd {
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 0x1000).unwrap();
    File::from(memory).into()
}

#[test]
fn a_device_knows_what_logs_call_it() {
    assert_eq!(Bench::new().told.lock().unwrap().name, "probe");
}

#[test]
fn the_window_reads_and_writes_as_many_bytes_as_it_is_told() {
    for length in [1, 2, 4] {
        let mut bench = Bench::new();
        bench.point(0, 0x20, length);
        assert!(bench.events().is_empty());
        let read = bench.read(CONFIG, DATA, 4);
        let mut expected = [0; 4];
        let bytes = length as usize;
        expected[..bytes].copy_from_slice(&[0x20, 0x21, 0x22, 0x23][..bytes]);
        assert_eq!(read, expected);
        assert_eq!(bench.events(), [format!("read {length} at 0x20")]);

        bench.write(CONFIG, DATA, &[0xa, 0xb, 0xc, 0xd]);
        assert_eq!(bench.events(), [format!("write {length} at 0x20")]);
        let registers = bench.read(0, 0x20, 4);
        let mut expected = [0x20, 0x21, 0x22, 0x23];
        expected[..bytes].copy_from_slice(&[0xa, 0xb, 0xc, 0xd][..bytes]);
        assert_eq!(registers, expected);
    }
}

#[test]
fn the_window_is_used_by_whatever_touches_its_data() {
    let mut bench = Bench::new();
    bench.point(0, 4, 4);
    // A part of the register, and an access that covers more than it.
    assert_eq!(bench.read(CONFIG, DATA + 3, 1), [7]);
    let all = bench.read(CONFIG, WINDOW, 0x14);
    assert_eq!(all, [9, 0, 0x14, WINDOW_TYPE, 0, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4, 5, 6, 7]);
    assert_eq!(bench.events(), ["read 4 at 0x4", "read 4 at 0x4"]);
    // One that sets the place and writes there.
    bench.write(CONFIG, WINDOW + 4, &[0, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 1, 2, 3, 4]);
    assert_eq!(bench.events(), ["write 2 at 0x8"]);
    // Its neighbours do nothing.
    bench.read(CONFIG, WINDOW, 0x10);
    bench.read(CONFIG, DATA + 4, 4);
    assert!(bench.events().is_empty());
}

#[test]
fn a_window_that_points_to_nothing_does_nothing() {
    let past_the_end = u32::try_from(BAR_SIZE).unwrap();
    for (bar, offset, length, answer) in [
        (1, 0, 4, [0xff; 4]),
        (5, 0, 4, [0xff; 4]),
        (0, past_the_end - 2, 4, [0xff; 4]),
        (0, u32::MAX, 4, [0xff; 4]),
        // No access at all.
        (6, 0, 4, [0; 4]),
        (0xff, 0, 4, [0; 4]),
        (0, 0, 0, [0; 4]),
        (0, 0, 3, [0; 4]),
        (0, 0, 8, [0; 4]),
        (0, 0, u32::MAX, [0; 4]),
    ] {
        let mut bench = Bench::new();
        bench.point(bar, offset, length);
        assert_eq!(bench.read(CONFIG, DATA, 4), answer, "{bar} {offset:#x} {length}");
        bench.write(CONFIG, DATA, &[1; 4]);
        assert!(bench.events().is_empty());
    }
}

#[test]
fn what_no_decoding_function_claims_is_unsupported_through_the_window_too() {
    let mut bench = Bench::new();
    bench.point(0, 0, 4);
    bench.write(CONFIG, spec::header::COMMAND as u64, &[0]);
    assert_eq!(bench.read(CONFIG, DATA, 4), [0xff; 4]);
    bench.write(CONFIG, DATA, &[1; 4]);
    assert!(bench.events().is_empty());
    let counters = bench.hosted.counters(0);
    assert_eq!((counters.reads_ur, counters.writes_dropped), (1, 1));
}

#[test]
fn the_window_reaches_the_msix_table() {
    let mut bench = Bench::new();
    bench.point(2, 8, 4);
    bench.write(CONFIG, DATA, &[0x11, 0x22, 0, 0]);
    assert_eq!(bench.read(2, 8, 2), [0x11, 0x22]);
    assert_eq!(bench.events(), ["rewired"]);
}

#[test]
fn a_device_is_told_of_whatever_the_client_set_up() {
    let mut bench = Bench::new();
    let access = DmaAccess::READ | DmaAccess::WRITE;
    let map = DmaMap { access, file_offset: 0, address: 0x1000, size: 0x1000 };
    bench.hosted.dma_map(&map, Some(memory())).unwrap();
    assert_eq!(bench.events(), ["rewired"]);

    let (mut body, mut fds) = (Vec::new(), Vec::new());
    let unmap =
        DmaUnmap { flags: DmaUnmapFlags::empty(), address: 0x1000, size: 0x1000, bitmap: None };
    bench.hosted.dma_unmap(&unmap, &mut Reply::new(&mut body, &mut fds)).unwrap();
    assert_eq!(bench.events(), ["quiesce", "rewired"]);

    let set = SetIrqs {
        action: IrqAction::Trigger,
        index: PciIrq::Msix.index(),
        start: 0,
        count: 1,
        data: IrqData::Eventfd,
    };
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    bench.hosted.set_irqs(&set, vec![eventfd]).unwrap();
    assert_eq!(bench.events(), ["rewired"]);

    // Bus mastering and MSI-X's enable, mask and table decide whether messages go out.
    bench.write(CONFIG, spec::header::COMMAND as u64, &[0b110]);
    assert_eq!(bench.events(), ["masters true"]);
    bench.write(CONFIG, 0x42, &[0, 0x80]);
    assert_eq!(bench.events(), ["rewired"]);
    bench.write(CONFIG, 0x42, &[0, 0xc0]);
    assert_eq!(bench.events(), ["rewired"]);
    bench.write(2, 12, &[1, 0, 0, 0]);
    assert_eq!(bench.events(), ["rewired"]);
    bench.write(CONFIG, spec::header::INTERRUPT_LINE as u64, &[1]);
    assert!(bench.events().is_empty());

    bench.hosted.client_left();
    assert_eq!(bench.events(), ["quiesce", "quiesce", "reset", "rewired"]);
}

#[test]
fn a_stopped_device_hears_of_it_when_it_goes_on() {
    let mut bench = Bench::new();
    bench.go_to(MigrationState::Stop);
    assert_eq!(bench.events(), ["quiesce"]);
    let map = DmaMap { access: DmaAccess::READ, file_offset: 0, address: 0, size: 0x1000 };
    bench.hosted.dma_map(&map, Some(memory())).unwrap();
    bench.hosted.reload();
    // It may know, but it can't do anything.
    bench.write(CONFIG, spec::header::COMMAND as u64, &[0b110]);
    assert_eq!(bench.events(), ["masters false"]);
    bench.go_to(MigrationState::Running);
    assert_eq!(bench.events(), ["resume", "rewired", "reload"]);
}

#[test]
fn a_reload_that_came_while_the_function_was_stopped_outlasts_a_reset() {
    let mut bench = Bench::new();
    bench.go_to(MigrationState::Stop);
    bench.hosted.reload();
    bench.hosted.device_reset().unwrap();
    assert_eq!(bench.events(), ["quiesce", "quiesce", "reset", "reload"]);
}

#[test]
fn a_reload_that_fails_leaves_the_function_as_it_was() {
    let mut bench = Bench::new();
    bench.told.lock().unwrap().reload = Some("no such file".into());
    bench.hosted.reload();
    assert_eq!(bench.events(), ["reload"]);
    assert_eq!(bench.read(0, 1, 1), [1]);
}
