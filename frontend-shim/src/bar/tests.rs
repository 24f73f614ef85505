//! One function and its memory slots, with a backend that says what a test wants and a hypervisor
//! whose calls fail on demand.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use barkeep_protocol::wire::{
    BarkeepExtensions, DeviceFlags, DeviceInfo, Errno, FaultReport, FaultVerdict, PciRegion,
    RegionFlags, RegionInfo, RegionState, SparseArea,
};
use rustix::fs::{MemfdFlags, SealFlags};

mod resume;

use super::*;
use crate::client::{ClientError, Doorbell};
use crate::fault::{
    FaultAccess, FaultPlace, GuestAccess, MemoryFault, ProgressGuard, Unlocated, Verdict,
};
use crate::hypervisor::{
    AccessError, DoorbellLen, DoorbellWrite, Hypervisor, HypervisorError, HypervisorKind, SlotId,
    SlotMapping,
};
use crate::{FaultOutcome, Frontend, GuestAddress};

const BAR: u64 = 0x8000_0000;
const SIZE: u64 = 0x8000;
const COMMAND: u16 = 4;
const BAR0: u16 = 0x10;

/// A function with one BAR, sparse: its page 4 is trapped.
#[derive(Debug)]
struct Peer {
    barkeep: bool,
    config: Mutex<[u8; 0x40]>,
    /// Its BAR's memory.
    file: OwnedFd,
    doorbells: Vec<Doorbell>,
    /// What it and its hypervisor were told.
    told: Arc<Mutex<Vec<Told>>>,
    /// It says that it decodes whatever is in its registers, and never lets itself be reset.
    insists: AtomicBool,
    life: Mutex<Life>,
}

/// How much of its life a backend has before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Life {
    #[default]
    Long,
    /// It does what is written to its BAR next, and dies.
    OneWrite,
    Over {
        /// Writes to its BAR that it did.
        writes: usize,
    },
}

type Answer<T> = Result<T, ClientError>;

impl Backend for Arc<Peer> {
    fn name(&self) -> String {
        "peer".into()
    }

    fn is_dead(&self) -> bool {
        matches!(*self.life.lock().unwrap(), Life::Over { .. })
    }

    fn extensions(&self) -> BarkeepExtensions {
        BarkeepExtensions { memory_fault: self.barkeep, ..BarkeepExtensions::default() }
    }

    fn device_info(&self) -> Answer<DeviceInfo> {
        let flags = DeviceFlags::PCI | DeviceFlags::RESET;
        Ok(DeviceInfo { flags, num_regions: PciRegion::COUNT, num_irqs: 5 })
    }

    fn region_info(&self, index: u32) -> Answer<(RegionInfo, Option<OwnedFd>)> {
        let flags = RegionFlags::READ | RegionFlags::WRITE | RegionFlags::MMAP;
        let mut info = RegionInfo { flags, index, size: 0, file_offset: 0, sparse: Vec::new() };
        if index != 0 {
            return Ok((info, None));
        }
        info.size = SIZE;
        let area = |offset, size| SparseArea { offset, size };
        info.sparse = vec![area(0, 0x4000), area(0x5000, 0x3000)];
        Ok((info, Some(self.file.try_clone().unwrap())))
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Answer<()> {
        if region == PciRegion::Config.index() {
            let at = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.config.lock().unwrap()[at..at + data.len()]);
            if self.insists.load(Ordering::Relaxed) && offset == u64::from(COMMAND) {
                data[0] |= 2;
            }
        } else {
            data.fill(0x11);
        }
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Answer<()> {
        let life = &mut *self.life.lock().unwrap();
        match life {
            Life::Over { .. } => return Err(ClientError::Gone),
            Life::OneWrite if region == 0 => {
                *life = Life::Over { writes: 1 };
                return Err(ClientError::Lost);
            }
            Life::OneWrite | Life::Long => {}
        }
        if region == PciRegion::Config.index() {
            let at = usize::try_from(offset).unwrap();
            self.config.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
            if at == usize::from(COMMAND) {
                self.told.lock().unwrap().push(Told::Command(data[0]));
            }
        }
        Ok(())
    }

    fn doorbells(&self, region: u32) -> Answer<Vec<Doorbell>> {
        Ok(if region == 0 { self.doorbells.clone() } else { Vec::new() })
    }

    fn reset(&self) -> Answer<()> {
        if self.insists.load(Ordering::Relaxed) {
            return Err(ClientError::Refused(Errno::NOTSUP));
        }
        self.config.lock().unwrap().fill(0);
        Ok(())
    }

    fn memory_fault(&self, _: &FaultReport) -> Answer<FaultVerdict> {
        if self.barkeep {
            Ok(FaultVerdict::Map { epoch: 0 })
        } else {
            Err(ClientError::NotOffered("memory_fault"))
        }
    }

    fn region_state(&self, _: u32) -> Answer<RegionState> {
        Err(ClientError::NotOffered("region_state"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Command(u8),
    Connect(DoorbellWrite),
    Disconnect(DoorbellWrite),
}

#[derive(Debug, Default)]
struct Slots {
    told: Arc<Mutex<Vec<Told>>>,
    mapped: Mutex<BTreeMap<SlotId, SlotMapping>>,
    /// This one can't be removed.
    stuck: Mutex<Option<SlotId>>,
}

impl Hypervisor for Slots {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Kvm
    }

    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        assert!(self.mapped.lock().unwrap().insert(slot, mapping).is_none(), "slot {slot} twice");
        Ok(())
    }

    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
        if *self.stuck.lock().unwrap() == Some(slot) {
            let source = io::ErrorKind::OutOfMemory.into();
            return Err(HypervisorError::Call { call: "unmap", source });
        }
        assert!(self.mapped.lock().unwrap().remove(&slot).is_some(), "slot {slot} is not there");
        Ok(())
    }

    fn add_ioeventfd(
        &self,
        write: &DoorbellWrite,
        _: BorrowedFd<'_>,
    ) -> Result<(), HypervisorError> {
        self.told.lock().unwrap().push(Told::Connect(*write));
        Ok(())
    }

    fn remove_ioeventfd(
        &self,
        write: &DoorbellWrite,
        _: BorrowedFd<'_>,
    ) -> Result<(), HypervisorError> {
        self.told.lock().unwrap().push(Told::Disconnect(*write));
        Ok(())
    }
}

struct Board {
    peer: Arc<Peer>,
    slots: Arc<Slots>,
    frontend: Frontend<Arc<Peer>>,
}

/// What a guest access meets.
#[derive(Debug, PartialEq, Eq)]
enum Met {
    Memory,
    Fault,
    Mmio,
}

impl Board {
    fn new(barkeep: bool) -> Board {
        Board::sharing(memory(MemfdFlags::ALLOW_SEALING), barkeep)
    }

    fn sharing(file: OwnedFd, barkeep: bool) -> Board {
        Board::with(file, Vec::new(), barkeep, SuspendOrder::SlotsFirst)
    }

    fn with(file: OwnedFd, doorbells: Vec<Doorbell>, barkeep: bool, order: SuspendOrder) -> Board {
        let (config, insists) = (Mutex::new([0; 0x40]), AtomicBool::new(false));
        let told = Arc::new(Mutex::new(Vec::new()));
        let slots = Arc::new(Slots { told: Arc::clone(&told), ..Slots::default() });
        let life = Mutex::default();
        let peer = Arc::new(Peer { barkeep, config, file, doorbells, told, insists, life });
        let mut frontend = Frontend::new(slots.clone() as _, vec![(0, 0x1000)], SlotId(0));
        frontend.attach_backend(Arc::clone(&peer), order).unwrap();
        frontend.config_write(0, BAR0, &0x8000_0000_u32.to_le_bytes());
        Board { peer, slots, frontend }
    }

    fn decoding(barkeep: bool) -> Board {
        let board = Board::new(barkeep);
        board.command(2);
        board
    }

    fn command(&self, value: u8) {
        self.frontend.config_write(0, COMMAND, &[value, 0]);
    }

    fn function(&self) -> &AttachedFunction<Arc<Peer>> {
        &self.frontend.functions()[0]
    }

    fn mapped(&self) -> usize {
        self.slots.mapped.lock().unwrap().len()
    }

    /// Reads or writes through a slot, if one is there.
    fn touch(&self, offset: u64, write: bool) -> Met {
        let slots = self.slots.mapped.lock().unwrap();
        let found = slots.values().find_map(|mapping| {
            let at = (BAR + offset).checked_sub(mapping.guest.0)?;
            (at < mapping.len).then_some((&mapping.memory, mapping.offset + at))
        });
        let Some((memory, at)) = found else { return Met::Mmio };
        let result = if write { memory.store_u32(at, 1) } else { memory.load_u32(at).map(|_| ()) };
        match result {
            Ok(()) => Met::Memory,
            Err(AccessError::Inaccessible | AccessError::ReadOnly) => Met::Fault,
            Err(error) => panic!("{error}"),
        }
    }

    fn forward_write(&self, offset: u64) {
        self.frontend.write(AddressSpace::Memory, BAR + offset, &[1; 4]);
    }

    fn write_fault(&self, offset: u64) -> FaultOutcome {
        self.frontend.memory_fault(&write_fault(offset))
    }
}

fn memory(flags: MemfdFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("bar", MemfdFlags::CLOEXEC | flags).unwrap();
    rustix::fs::ftruncate(&file, SIZE).unwrap();
    file
}

fn write_fault(offset: u64) -> MemoryFault {
    let page = GuestAddress((BAR + offset) & !0xfff);
    MemoryFault::reported(page, 4096, Some(FaultAccess::Write))
}

#[test]
fn tracking_gives_no_access_to_a_slot_that_could_not_be_removed() {
    type Action = fn(&Board);
    let rows: [(&str, Action); 5] = [
        ("track", |board| board.function().track_writes(0).unwrap()),
        ("take", |board| assert!(board.function().take_written(0).is_ok())),
        ("stop", |board| board.function().stop_tracking_writes(0).unwrap()),
        ("a forwarded write", |board| board.forward_write(0)),
        ("an unlocated fault", |board| {
            board.frontend.memory_fault(&MemoryFault::unknown(Unlocated::NotTried));
        }),
    ];
    for (what, action) in rows {
        let board = Board::decoding(true);
        board.function().track_writes(0).unwrap();
        board.write_fault(0);
        *board.slots.stuck.lock().unwrap() = Some(SlotId(0));
        board.command(0);
        assert_eq!(board.touch(0, false), Met::Fault);
        action(&board);
        assert_eq!(board.touch(0, false), Met::Fault, "{what}: reads");
        assert_eq!(board.touch(0, true), Met::Fault, "{what}: writes");
        *board.slots.stuck.lock().unwrap() = None;
        board.command(2);
        assert_eq!(board.touch(0, false), Met::Memory, "{what}: and back");
    }
}

#[test]
fn slots_that_went_while_another_one_stuck_come_back_with_it() {
    let board = Board::decoding(true);
    assert_eq!(board.mapped(), 2);
    *board.slots.stuck.lock().unwrap() = Some(SlotId(1));
    board.command(0);
    assert_eq!(board.mapped(), 1);
    board.command(2);
    assert_eq!(board.mapped(), 2);
    assert_eq!(board.touch(0, true), Met::Memory);
    *board.slots.stuck.lock().unwrap() = None;
}

#[test]
fn writes_that_were_noted_while_forwarded_do_not_fault_for_ever() {
    let board = Board::decoding(true);
    board.function().track_writes(0).unwrap();
    board.forward_write(0x6000);
    if board.touch(0x6000, true) == Met::Fault {
        assert_eq!(board.write_fault(0x6000), FaultOutcome::Reenter(Verdict::Relax));
    }
    assert_eq!(board.touch(0x6000, true), Met::Memory);
    board.forward_write(0x4000);
    let written = board.function().take_written(0).unwrap();
    assert_eq!(written, [0x4000..0x5000, 0x6000..0x7000], "the trapped page as well");
}

#[test]
fn a_write_fault_of_unknown_address_is_let_through_and_noted_everywhere() {
    let board = Board::decoding(true);
    board.function().track_writes(0).unwrap();
    assert_eq!(board.touch(0x1000, true), Met::Fault);
    board.frontend.memory_fault(&MemoryFault::unknown(Unlocated::UnknownInstruction(0)));
    assert_eq!(board.touch(0x1000, true), Met::Memory);
    let written = board.function().take_written(0).unwrap();
    assert_eq!(written, std::slice::from_ref(&(0..SIZE)));
    assert_eq!(board.touch(0x1000, true), Met::Fault, "tracked anew");
}

#[test]
fn quarantine_and_reset_lose_no_tracked_write() {
    let board = Board::decoding(true);
    let function = board.function();
    function.track_writes(0).unwrap();
    board.write_fault(0x1000);
    assert!(board.frontend.quarantine(&write_fault(0x1000)));
    assert_eq!(board.mapped(), 0);
    board.forward_write(0x2000);
    board.command(2);
    assert_eq!(board.mapped(), 0, "for the rest of the session");
    let written = std::slice::from_ref(&(0x1000..0x3000)).to_vec();
    assert_eq!(function.take_written(0).unwrap(), written);

    let board = Board::decoding(true);
    board.function().track_writes(0).unwrap();
    board.write_fault(0x1000);
    board.frontend.reset();
    let written = std::slice::from_ref(&(0x1000..0x2000)).to_vec();
    assert_eq!(board.function().take_written(0).unwrap(), written);
}

#[test]
fn tracking_anew_is_progress() {
    let board = Board::decoding(true);
    board.function().track_writes(0).unwrap();
    let mut guard = ProgressGuard::default();
    // A guest that does nothing but write to one page, and has no other exit.
    for round in 0..3 * ProgressGuard::BOUND {
        assert_eq!(board.touch(0, true), Met::Fault);
        let fault = write_fault(0);
        let noted = guard.fault(&fault, board.frontend.progress(&fault));
        assert_eq!(noted, Ok(()), "round {round}");
        board.frontend.memory_fault(&fault);
        assert_eq!(board.touch(0, true), Met::Memory);
        board.function().take_written(0).unwrap();
    }
}

#[test]
fn a_backend_that_insists_on_decode_is_not_mapped_against_the_guests_will() {
    let size_it = |board: &Board| board.frontend.config_write(0, BAR0, &[0xff; 4]);
    let recheck = |board: &Board| board.function().recheck(board.slots.as_ref());
    let fault = |board: &Board| assert!(board.write_fault(0).verdict() != Verdict::NotMine);
    let reset = |board: &Board| {
        board.command(2);
        board.frontend.reset();
    };
    type Action<'a> = &'a dyn Fn(&Board);
    let rows: [(&str, Action<'_>); 4] =
        [("sized", &size_it), ("asked", &recheck), ("fault", &fault), ("reset", &reset)];
    for (what, action) in rows {
        for barkeep in [true, false] {
            let board = Board::new(barkeep);
            board.peer.insists.store(true, Ordering::Relaxed);
            action(&board);
            assert_eq!(board.mapped(), 0, "{what}, barkeep: {barkeep}");
            let mut data = [0; 4];
            board.frontend.read(AddressSpace::Memory, BAR, &mut data);
            assert_eq!(data, [0xff; 4], "{what}, barkeep: {barkeep}");
        }
    }
}

#[test]
fn a_plain_server_that_names_another_address_loses_its_slot_on_a_fault() {
    let board = Board::decoding(false);
    board.peer.config.lock().unwrap()[usize::from(BAR0) + 3] = 0x90;
    assert_eq!(board.write_fault(0), FaultOutcome::Reenter(Verdict::UnsupportedRequest));
    assert_eq!(board.mapped(), 0);
    // And back, noticed by the first access.
    board.peer.config.lock().unwrap()[usize::from(BAR0) + 3] = 0x80;
    board.forward_write(0);
    assert_eq!(board.mapped(), 2);
}

#[test]
fn a_gather_with_all_lanes_in_one_bar_asks_for_one_quarantine() {
    let board = Board::decoding(true);
    let lane = |lane| GuestAccess { address: GuestAddress(BAR + lane), size: 1, kind: None };
    let place = FaultPlace::OneOf((0..100).map(lane).collect());
    assert!(board.frontend.quarantine(&MemoryFault { place, private: false }));
    assert!(board.frontend.quarantine(&write_fault(0)), "another vCPU may have been second");
}

/// Doorbells in the trapped page: one for any write, and one for one value.
fn doorbells() -> Vec<Doorbell> {
    let bell = |offset, size, value| {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        let eventfd = Arc::new(rustix::event::eventfd(0, flags).unwrap());
        Doorbell { offset, size, value, eventfd }
    };
    vec![
        bell(0x4000, 0, None),
        bell(0x4010, 4, Some(7)),
        // None of these can be.
        bell(SIZE, 1, None),
        bell(0x4000, 3, None),
        bell(0x4000, 0, Some(1)),
        bell(u64::MAX, 4, None),
    ]
}

#[test]
fn doorbells_ring_exactly_where_and_while_the_bar_decodes() {
    let orders = [
        SuspendOrder::SlotsFirst,
        SuspendOrder::BackingFirst,
        SuspendOrder::Alternate,
        SuspendOrder::FaultsOnly,
    ];
    for (order, mappable) in orders.into_iter().flat_map(|order| [(order, true), (order, false)]) {
        let flags = if mappable { MemfdFlags::ALLOW_SEALING } else { MemfdFlags::empty() };
        let board = Board::with(memory(flags), doorbells(), true, order);
        let told = || std::mem::take(&mut *board.peer.told.lock().unwrap());
        let rings = |base: u64| {
            let write = |at, len, value| DoorbellWrite { address: GuestAddress(at), len, value };
            [
                write(base + 0x4000, None, None),
                write(base + 0x4010, Some(DoorbellLen::Four), Some(7)),
            ]
        };
        assert_eq!(told(), [], "{order:?}: not before it decodes");
        board.command(2);
        let [first, second] = rings(BAR);
        let on = [Told::Command(2), Told::Connect(first), Told::Connect(second)];
        assert_eq!(told(), on, "{order:?}: after the backend decodes");
        board.command(6);
        assert_eq!(told(), [Told::Command(6)], "{order:?}: once");
        board.command(0);
        let off = [Told::Disconnect(first), Told::Disconnect(second), Told::Command(0)];
        assert_eq!(told(), off, "{order:?}: before the backend stops to decode");

        board.command(2);
        told();
        board.frontend.config_write(0, BAR0, &0x9000_0000_u32.to_le_bytes());
        let [third, fourth] = rings(0x9000_0000);
        let moved = [
            Told::Disconnect(first),
            Told::Disconnect(second),
            Told::Connect(third),
            Told::Connect(fourth),
        ];
        assert_eq!(told(), moved, "{order:?}: it moves");
        board.frontend.session_ended(0);
        assert_eq!(told(), [Told::Disconnect(third), Told::Disconnect(fourth)], "{order:?}");
    }
}

#[test]
fn a_backend_may_offer_doorbells_to_a_hypervisor_that_has_none() {
    struct Plain(Slots);
    impl Hypervisor for Plain {
        fn kind(&self) -> HypervisorKind {
            HypervisorKind::Model
        }
        fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
            self.0.map_slot(slot, mapping)
        }
        fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
            self.0.unmap_slot(slot)
        }
    }
    let file = memory(MemfdFlags::ALLOW_SEALING);
    let board = Board::with(file, doorbells(), true, SuspendOrder::SlotsFirst);
    let hypervisor = Arc::new(Plain(Slots::default()));
    let mut frontend = Frontend::new(hypervisor, Vec::new(), SlotId(0));
    frontend.attach_backend(Arc::clone(&board.peer), SuspendOrder::SlotsFirst).unwrap();
    frontend.config_write(0, BAR0, &0x8000_0000_u32.to_le_bytes());
    frontend.config_write(0, COMMAND, &[2, 0]);
    frontend.config_write(0, COMMAND, &[0, 0]);
    assert!(!frontend.functions()[0].backend().is_dead());
}

#[test]
fn a_backend_can_not_take_mapped_memory_away_by_truncating_its_file() {
    let board = Board::decoding(true);
    let file = &board.peer.file;
    assert_eq!(rustix::fs::ftruncate(file, 0), Err(rustix::io::Errno::PERM));
    assert_eq!(board.touch(0x7ffc, true), Met::Memory);
}

#[test]
fn memory_that_can_not_be_sealed_is_trapped_and_works() {
    let sealed_against_seals = memory(MemfdFlags::ALLOW_SEALING);
    rustix::fs::fcntl_add_seals(&sealed_against_seals, SealFlags::SEAL).unwrap();
    let regular = tempfile();
    rustix::fs::ftruncate(&regular, SIZE).unwrap();
    let mut rows = vec![
        ("sealed against seals", sealed_against_seals),
        ("not for sealing", memory(MemfdFlags::empty())),
        ("regular file", regular),
    ];
    // Its pages can be punched out, and the pool may have no others then, whatever the seals say. A
    // kernel without hugetlbfs has none.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    if let Ok(huge) = rustix::fs::memfd_create("bar", flags) {
        rustix::fs::ftruncate(&huge, 4 << 20).unwrap();
        rows.push(("huge pages", huge));
    }
    for (what, file) in rows {
        let board = Board::sharing(file, true);
        board.command(2);
        assert_eq!(board.mapped(), 0, "{what}");
        assert!(!board.function().has_mapped_bars(), "{what}");
        let mut data = [0; 4];
        board.frontend.read(AddressSpace::Memory, BAR, &mut data);
        assert_eq!(data, [0x11; 4], "{what}");
    }
}

#[test]
fn memory_that_its_owner_has_sealed_for_good_is_mapped() {
    let file = memory(MemfdFlags::ALLOW_SEALING);
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL).unwrap();
    let board = Board::sharing(file, true);
    board.command(2);
    assert_eq!(board.touch(0, true), Met::Memory);
}

/// A file with a name no more.
fn tempfile() -> OwnedFd {
    let path = std::env::temp_dir().join(format!("barkeep-bar-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path);
    std::fs::remove_file(path).unwrap();
    file.unwrap().into()
}
