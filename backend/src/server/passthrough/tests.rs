use std::os::fd::OwnedFd;

use barkeep_protocol::page::decode::Space;
use barkeep_protocol::wire::{
    BarkeepExtensions, DmaAccess, DmaMap, FaultAccess, FaultReport, FaultVerdict, InfoQuery,
    IrqAction, IrqData, IrqInfo, RegionAccess, RegionFlags, RegionInfo, RegionState,
    RegionStateQuery, SetIrqs, SparseArea,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::{PassthroughFunction, RequestError};
use crate::devices::passthrough::MapBars;
use crate::devices::passthrough::fake::{BAR_SIZE, Fake, config};
use crate::server::served::{Reply, Served};

fn served() -> (Fake, PassthroughFunction) {
    let fake = Fake::new(config(&[]));
    let function = PassthroughFunction::new("test", fake.function(false), MapBars::Auto);
    (fake, function)
}

fn write(function: &mut PassthroughFunction, region: u32, offset: u64, data: &[u8]) {
    let count = u32::try_from(data.len()).unwrap();
    let access = RegionAccess { offset, region, count };
    function.region_write(&access, data).unwrap();
}

fn read(function: &mut PassthroughFunction, region: u32, offset: u64) -> Vec<u8> {
    let mut data = vec![0; 4];
    function.region_read(&RegionAccess { offset, region, count: 4 }, &mut data).unwrap();
    data
}

/// The payload and the descriptors of an answer.
fn answer(
    request: impl FnOnce(&mut Reply<'_>) -> Result<(), RequestError>,
) -> Result<(Vec<u8>, Vec<OwnedFd>), RequestError> {
    let (mut body, mut fds) = (Vec::new(), Vec::new());
    request(&mut Reply::new(&mut body, &mut fds))?;
    Ok((body, fds))
}

fn state(function: &mut PassthroughFunction) -> RegionState {
    let query = RegionStateQuery { region: 0 };
    let (body, _) = answer(|reply| function.region_state(query, reply)).unwrap();
    RegionState::parse(&body).unwrap()
}

fn fault(function: &mut PassthroughFunction, offset: u64) -> FaultVerdict {
    let report = FaultReport { region: 0, access: FaultAccess::READ, offset, size: 4096 };
    let (body, _) = answer(|reply| function.memory_fault(&report, reply)).unwrap();
    FaultVerdict::parse(&body).unwrap()
}

fn errno<T>(result: Result<T, RequestError>) -> Option<Errno> {
    result.err().map(|error| error.errno())
}

#[test]
fn accesses_are_counted_by_what_became_of_them() {
    let (fake, mut function) = served();
    assert_eq!(read(&mut function, 0, 0), [0xff; 4]);
    write(&mut function, 0, 0, &[1; 4]);
    write(&mut function, 7, 4, &[2, 0]);
    assert_eq!(read(&mut function, 0, 0), [0x5a; 4]);
    assert_eq!(read(&mut function, 0, 4), [0x5a; 4]);
    write(&mut function, 0, 0, &[1; 4]);
    let counted = state(&mut function);
    assert_eq!((counted.reads, counted.reads_ur), (2, 1));
    assert_eq!((counted.writes, counted.writes_dropped), (1, 1));
    assert!(counted.claimed());
    // Behind our back.
    fake.state().config[4] = 0;
    let later = state(&mut function);
    assert!(!later.claimed() && later.epoch > counted.epoch);
    function.client_left();
    let fresh = state(&mut function);
    assert_eq!((fresh.reads, fresh.reads_ur, fresh.claimed()), (0, 0, false));
}

#[test]
fn a_memory_fault_is_judged_by_what_the_device_decodes_and_what_can_be_mapped() {
    let (fake, mut function) = served();
    assert!(matches!(fault(&mut function, 0), FaultVerdict::UnsupportedRequest { .. }));
    write(&mut function, 7, 4, &[2, 0]);
    assert!(matches!(fault(&mut function, 0), FaultVerdict::Map { .. }));
    assert!(matches!(fault(&mut function, 0x1000), FaultVerdict::Trap { .. }), "the MSI-X table");
    fake.state().config[4] = 0;
    assert!(matches!(fault(&mut function, 0), FaultVerdict::UnsupportedRequest { .. }));
    assert_eq!(state(&mut function).memory_faults, 4);
    let config = FaultReport { region: 7, access: FaultAccess::READ, offset: 0, size: 4096 };
    let answer = answer(|reply| function.memory_fault(&config, reply));
    assert_eq!(errno(answer), Some(Errno::INVAL));
}

/// A client that forwards memory faults.
const FORWARDS: BarkeepExtensions =
    BarkeepExtensions { memory_fault: true, region_state: true, decode_page: true };

#[test]
fn memory_that_may_refuse_access_is_mapped_by_clients_that_forward_faults() {
    let plain = BarkeepExtensions::default();
    let rows = [
        (MapBars::Auto, FORWARDS, true),
        (MapBars::Auto, plain, false),
        (MapBars::Always, plain, true),
        (MapBars::Never, FORWARDS, false),
    ];
    for (map, extensions, mapped) in rows {
        let fake = Fake::new(config(&[]));
        let mut function = PassthroughFunction::new("test", fake.function(false), map);
        let query = InfoQuery { index: 0, argsz: 4096 };
        let (body, fds) = answer(|reply| function.region_info(query, extensions, reply)).unwrap();
        let (bar, _) = RegionInfo::parse(&body).unwrap();
        assert_eq!(bar.flags.contains(RegionFlags::MMAP), mapped, "{map:?}");
        assert_eq!((fds.len(), bar.sparse.len()), if mapped { (1, 2) } else { (0, 0) });
        write(&mut function, 7, 4, &[2, 0]);
        let trap = matches!(fault(&mut function, 0), FaultVerdict::Trap { .. });
        assert_eq!(trap, map == MapBars::Never, "{map:?}");
    }
}

#[test]
fn regions_are_described_with_the_device_file_and_what_of_it_may_be_mapped() {
    let (_fake, function) = served();
    let info = |index| {
        let query = InfoQuery { index, argsz: 4096 };
        let (body, fds) = answer(|reply| function.region_info(query, FORWARDS, reply)).unwrap();
        (RegionInfo::parse(&body).unwrap().0, fds.len())
    };
    let (bar, fds) = info(0);
    assert!(bar.flags.contains(RegionFlags::MMAP) && fds == 1);
    let areas = [(0, 0x1000), (0x2000, 0x2000)];
    assert_eq!(bar.sparse, areas.map(|(offset, size)| SparseArea { offset, size }));
    let (config, fds) = info(7);
    assert_eq!((config.size, config.flags, fds), (4096, RegionFlags::READ | RegionFlags::WRITE, 0));
    for absent in [1, 5, 8] {
        assert_eq!((info(absent).0.size, info(absent).1), (0, 0), "{absent}");
    }
    let query = InfoQuery { index: 9, argsz: 32 };
    let absent = answer(|reply| function.region_info(query, FORWARDS, reply));
    assert_eq!(errno(absent), Some(Errno::INVAL));
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let (_fake, mut function) = served();
    let set = |action, data, index, start, count| SetIrqs { action, data, index, start, count };
    let (trigger, mask) = (IrqAction::Trigger, IrqAction::Mask);
    let rows = [
        ("no such index", set(trigger, IrqData::None, 5, 0, 1), 0, Some(Errno::INVAL)),
        ("no such interrupt", set(trigger, IrqData::None, 4, 0, 1), 0, Some(Errno::INVAL)),
        ("too many", set(trigger, IrqData::None, 1, 0, u32::MAX), 0, Some(Errno::INVAL)),
        ("behind the last", set(trigger, IrqData::Eventfd, 1, 8, 1), 1, Some(Errno::INVAL)),
        ("fewer eventfds", set(trigger, IrqData::Eventfd, 1, 0, 2), 1, Some(Errno::INVAL)),
        ("mask by eventfd", set(mask, IrqData::Eventfd, 0, 0, 1), 1, Some(Errno::INVAL)),
        ("mask MSI", set(mask, IrqData::None, 1, 0, 1), 0, Some(Errno::INVAL)),
        ("mask behind the pin", set(mask, IrqData::None, 0, 1, 1), 0, Some(Errno::INVAL)),
        ("unmask behind", set(IrqAction::Unmask, IrqData::Eventfd, 0, 1, 1), 1, Some(Errno::INVAL)),
        ("end behind everything", set(mask, IrqData::None, 0, u32::MAX, 1), 0, Some(Errno::INVAL)),
        ("mask none of it", set(mask, IrqData::Bool(&[0]), 0, 0, 1), 0, None),
        ("nothing", set(trigger, IrqData::Eventfd, 1, 0, 0), 0, None),
        ("disable", set(trigger, IrqData::None, 2, 0, 0), 0, None),
        ("all of MSI", set(trigger, IrqData::Eventfd, 1, 0, 8), 8, None),
        ("take some away", set(trigger, IrqData::Eventfd, 1, 2, 3), 0, None),
    ];
    for (what, set, count, expected) in rows {
        let fds: Vec<OwnedFd> =
            (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
        assert_eq!(errno(function.set_irqs(&set, fds)), expected, "{what}");
    }
    let map = DmaMap { access: DmaAccess::READ, file_offset: 0, address: 0, size: 4096 };
    assert_eq!(errno(function.dma_map(&map, None)), Some(Errno::NOTSUP));
    let access = RegionAccess { offset: u64::MAX, region: 0, count: 4 };
    assert_eq!(errno(function.region_read(&access, &mut [0; 4])), Some(Errno::INVAL));
    let info = |index| answer(|reply| function.irq_info(InfoQuery { index, argsz: 16 }, reply));
    assert_eq!(errno(info(5)), Some(Errno::INVAL));
    assert_eq!(IrqInfo::parse(&info(1).unwrap().0).unwrap().count, 8);
}

#[test]
fn what_is_shown_of_the_device_is_what_its_registers_say() {
    let (fake, mut function) = served();
    let bar0 = |function: &PassthroughFunction| {
        let bar = function.decode_state().bars[0].expect("it has BAR 0");
        assert_eq!((bar.size, bar.space), (BAR_SIZE, Space::Memory));
        (bar.address, bar.decodes)
    };
    assert_eq!(bar0(&function), (0, false));
    write(&mut function, 7, 0x10, &0xfea0_0000u32.to_le_bytes());
    assert_eq!(bar0(&function), (0xfea0_0000, false));
    write(&mut function, 7, 4, &[2, 0]);
    assert_eq!(bar0(&function), (0xfea0_0000, true));
    // Behind our back: the next request tells.
    fake.state().config[4] = 0;
    let _ = read(&mut function, 0, 0);
    assert_eq!(bar0(&function), (0xfea0_0000, false));
    assert_eq!(function.completions().reads_ur, 1);
    let before = function.decode_state().epoch;
    write(&mut function, 7, 4, &[2, 0]);
    assert!(function.decode_state().epoch > before);
    fake.state().unplugged = true;
    let _ = read(&mut function, 0, 0);
    assert_eq!(bar0(&function), (0xfea0_0000, false), "gone from where it was");
    fake.state().unplugged = false;
    function.client_left();
    assert!(!bar0(&function).1);
    assert_eq!(function.decode_state().bars[1..], [None; 5]);
}
