//! Memory faults and dead backends, seen from the VMM's side.

use std::sync::Arc;
use std::time::Duration;

use barkeep_shim::bar::{AddressSpace, SuspendOrder, TrackingError};
use barkeep_shim::client::Attended;
use barkeep_shim::fault::{FaultCounts, FaultPlace, GuestAccess, Unlocated, Verdict};
use barkeep_shim::hypervisor::model::Model;
use barkeep_shim::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, MemoryFault, SlotId, SlotMapping, VcpuEntry, VcpuExit,
    Vm,
};
use barkeep_shim::{FaultOutcome, Frontend};

use crate::sidecar::Sidecar;

const BAR2: u64 = 0x10_0000_0000;
const RAM: u64 = 0x100_0000;
const DEADLINE: Duration = Duration::from_secs(20);
const COMMAND: u16 = 0x04;
/// Region index of configuration space.
const CONFIG: u32 = 7;

/// An ivshmem function at [`BAR2`], decode off.
fn attached(order: SuspendOrder) -> (Sidecar, Arc<Model>, Frontend) {
    let sidecar = Sidecar::start(&["ivshmem,size=64K"]);
    let model = Arc::new(Model::new());
    let hypervisor: Arc<dyn Hypervisor> = model.clone();
    let mut frontend = Frontend::new(hypervisor, vec![(0, RAM)], SlotId(1));
    frontend.attach(&sidecar.socket(0), DEADLINE, order).unwrap();
    frontend.config_write(0, 0x18, &BAR2.to_le_bytes());
    (sidecar, model, frontend)
}

fn decode(frontend: &Frontend, on: bool) {
    frontend.config_write(0, COMMAND, &[if on { 2 } else { 0 }, 0]);
}

fn is_mapped(model: &Model) -> bool {
    // Whoever holds the slot can take it away; there is no other way to ask.
    model.unmap_slot(SlotId(1)).is_ok()
}

fn fault(address: u64) -> MemoryFault {
    MemoryFault::reported(GuestAddress(address), 4096, None)
}

fn read(frontend: &Frontend, address: u64) -> u32 {
    let mut data = [0; 4];
    frontend.read(AddressSpace::Memory, address, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_bar_is_mapped_exactly_while_it_decodes() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    assert!(!is_mapped(&model), "off");
    decode(&frontend, true);
    assert!(is_mapped(&model), "on");
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    decode(&frontend, false);
    assert!(!is_mapped(&model), "off again");
}

#[test]
fn a_backend_that_dies_while_nobody_uses_it_leaves_nothing_mapped() {
    let (sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    drop(sidecar);
    assert_eq!(frontend.attend(0), Attended::Ended);
    assert!(!is_mapped(&model), "without any access");
    assert_eq!(read(&frontend, BAR2), u32::MAX);
}

#[test]
fn a_fault_on_a_bar_that_does_not_decode_is_resolved_without_a_slot() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    assert_eq!(frontend.memory_fault(&fault(BAR2)), FaultOutcome::Reenter(Verdict::Retry));
    assert!(!is_mapped(&model));
    assert_eq!(read(&frontend, BAR2), u32::MAX, "the access that follows is UR");
    let state = frontend.functions()[0].client().region_state(2).unwrap();
    assert_eq!((state.memory_faults, state.reads_ur, state.claimed()), (1, 1, false));
}

#[test]
fn a_fault_on_a_mapped_bar_that_decodes_relaxes_it() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    let outcome = frontend.memory_fault(&fault(BAR2 + 0x1000));
    assert_eq!(outcome, FaultOutcome::Reenter(Verdict::Relax));
    assert!(is_mapped(&model));
}

#[test]
fn a_backend_that_stopped_decoding_by_itself_has_its_slot_suspended_on_the_fault() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    // Behind the shim's back, as a reset from elsewhere would be.
    frontend.functions()[0].client().reset().unwrap();
    let outcome = frontend.memory_fault(&fault(BAR2));
    assert_eq!(outcome, FaultOutcome::Reenter(Verdict::UnsupportedRequest));
    assert!(!is_mapped(&model));
}

/// Changes decode as another process would: the shim does not see it.
fn decode_behind_its_back(frontend: &Frontend, on: bool) {
    let command = [if on { 2 } else { 0 }, 0];
    frontend.functions()[0].client().region_write(CONFIG, COMMAND.into(), &command).unwrap();
}

#[test]
fn a_bar_that_somebody_else_stopped_is_mapped_again_when_it_answers_a_read() {
    let (_sidecar, _model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    frontend.write(AddressSpace::Memory, BAR2, &7u32.to_le_bytes());
    decode_behind_its_back(&frontend, false);
    let outcome = frontend.memory_fault(&fault(BAR2));
    assert_eq!(outcome, FaultOutcome::Reenter(Verdict::UnsupportedRequest));
    assert_eq!(read(&frontend, BAR2), u32::MAX);
    assert_eq!(frontend.functions()[0].mapped_at(2), None, "still off");
    decode_behind_its_back(&frontend, true);
    assert_eq!(read(&frontend, BAR2), 7);
    assert_eq!(frontend.functions()[0].mapped_at(2), Some(GuestAddress(BAR2)));
}

#[test]
fn a_bar_that_somebody_else_stopped_is_mapped_again_when_it_takes_a_write() {
    let (_sidecar, _model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    decode_behind_its_back(&frontend, false);
    frontend.memory_fault(&fault(BAR2));
    frontend.write(AddressSpace::Memory, BAR2, &[1; 4]);
    assert_eq!(frontend.functions()[0].mapped_at(2), None, "the write was dropped");
    decode_behind_its_back(&frontend, true);
    frontend.write(AddressSpace::Memory, BAR2, &[2; 4]);
    assert_eq!(frontend.functions()[0].mapped_at(2), Some(GuestAddress(BAR2)));
    assert_eq!(read(&frontend, BAR2), 0x0202_0202);
}

#[test]
fn a_guest_that_switched_a_bar_off_itself_does_not_get_it_back_by_reading() {
    let (_sidecar, _model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    decode(&frontend, false);
    decode_behind_its_back(&frontend, true);
    assert_eq!(read(&frontend, BAR2), 0, "the function decodes, whoever wanted it");
    assert_eq!(frontend.functions()[0].mapped_at(2), None);
}

#[test]
fn faults_are_counted_by_what_was_known_of_them_and_by_verdict() {
    let (_sidecar, _model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    let access = |address| GuestAccess { address: GuestAddress(address), size: 4, kind: None };
    let placed = |place| MemoryFault { place, private: false };
    frontend.memory_fault(&fault(BAR2));
    frontend.memory_fault(&placed(FaultPlace::Located(access(BAR2))));
    frontend.memory_fault(&placed(FaultPlace::OneOf(vec![access(0x1000), access(BAR2 + 8)])));
    decode_behind_its_back(&frontend, false);
    frontend.memory_fault(&placed(FaultPlace::Located(access(BAR2))));
    frontend.memory_fault(&MemoryFault::unknown(Unlocated::NotTried));
    frontend.memory_fault(&fault(0x1000));
    let counts = FaultCounts {
        reported: 2,
        located: 2,
        one_of: 1,
        unknown: 1,
        unsupported_request: 1,
        relax: 3,
        retry: 1,
        not_mine: 1,
        ..FaultCounts::default()
    };
    assert_eq!(frontend.fault_counters().get(), counts);
}

/// Executes `mov [address], eax` until it retires; returns the verdicts of its faults.
fn store(model: &Model, frontend: &Frontend, address: u64) -> Vec<Verdict> {
    const STORE_AND_HALT: [u8; 3] = [0x89, 0x07, 0xf4];
    let ram = Arc::new(HostMapping::anonymous(4096).unwrap());
    ram.write(0, &STORE_AND_HALT).unwrap();
    model.map_slot(SlotId(0), SlotMapping::whole(GuestAddress(0), &ram)).unwrap();
    let entry = VcpuEntry { rip: 0, rsp: 0, rdi: address, page_table_root: GuestAddress(0) };
    let mut vcpu = model.create_vcpu(0, &entry).unwrap();
    let mut verdicts = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::MemoryFault(fault) => verdicts.push(frontend.memory_fault(&fault).verdict()),
            VcpuExit::MmioWrite { address, data } => {
                frontend.write(AddressSpace::Memory, address.0, data);
            }
            VcpuExit::Halted => break,
            other => panic!("{other}"),
        }
    }
    model.unmap_slot(SlotId(0)).unwrap();
    verdicts
}

#[test]
fn the_first_write_to_each_page_that_is_tracked_is_relaxed_and_noted() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    let function = &frontend.functions()[0];
    decode(&frontend, true);
    assert_eq!(store(&model, &frontend, BAR2 + 0x3004), [], "not tracked");
    function.track_writes(2).unwrap();
    assert_eq!(store(&model, &frontend, BAR2 + 0x3004), [Verdict::Relax]);
    assert_eq!(store(&model, &frontend, BAR2 + 0x3ffc), [], "the same page");
    assert_eq!(store(&model, &frontend, BAR2 + 0x4000), [Verdict::Relax]);
    assert_eq!(function.slot_changes(), 1, "the slot stayed as it was");
    assert_eq!(function.take_written(2).unwrap(), std::slice::from_ref(&(0x3000..0x5000)));
    assert_eq!(function.take_written(2).unwrap(), [], "once");
    assert_eq!(store(&model, &frontend, BAR2 + 0x3004), [Verdict::Relax], "tracked anew");
    function.stop_tracking_writes(2).unwrap();
    assert_eq!(store(&model, &frontend, BAR2 + 0x8000), []);
    assert!(matches!(function.take_written(2), Err(TrackingError::NotTracked)));
    assert!(matches!(function.track_writes(0), Err(TrackingError::Trapped(0))));
}

#[test]
fn writes_are_tracked_through_a_time_without_a_slot() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::BackingFirst);
    let function = &frontend.functions()[0];
    decode(&frontend, true);
    function.track_writes(2).unwrap();
    assert_eq!(store(&model, &frontend, BAR2 + 0x1000), [Verdict::Relax]);
    decode(&frontend, false);
    assert_eq!(store(&model, &frontend, BAR2 + 0x6000), [], "forwarded");
    decode(&frontend, true);
    assert_eq!(store(&model, &frontend, BAR2 + 0x1000), [], "written before");
    assert_eq!(store(&model, &frontend, BAR2 + 0x2000), [Verdict::Relax]);
    assert_eq!(function.take_written(2).unwrap(), [0x1000..0x3000, 0x6000..0x7000]);
}

#[test]
fn faults_outside_of_bars_are_the_vmms_own() {
    let (_sidecar, _model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    let private = MemoryFault { private: true, ..fault(BAR2) };
    for (what, fault) in [("RAM", fault(0x1000)), ("a conversion to private memory", private)] {
        assert_eq!(frontend.memory_fault(&fault), FaultOutcome::NotMine, "{what}");
    }
}

#[test]
fn a_fault_that_comes_after_its_bar_has_moved_is_retried() {
    let (_sidecar, _model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    frontend.config_write(0, 0x18, &[0xff; 8]);
    let outcome = frontend.memory_fault(&fault(BAR2));
    assert_eq!(outcome, FaultOutcome::Reenter(Verdict::Retry), "the BAR is being sized");
}

#[test]
fn a_fault_goes_to_the_function_whose_slot_is_there() {
    let (_first, model, mut frontend) = attached(SuspendOrder::SlotsFirst);
    let second = Sidecar::start(&["ivshmem,size=64K"]);
    frontend.attach(&second.socket(0), DEADLINE, SuspendOrder::SlotsFirst).unwrap();
    // Both at one address: the second is mapped, then the first decodes as well and claims it.
    frontend.config_write(1, 0x18, &BAR2.to_le_bytes());
    frontend.config_write(1, COMMAND, &[2, 0]);
    decode(&frontend, true);
    frontend.functions()[1].client().reset().unwrap();
    let outcome = frontend.memory_fault(&fault(BAR2));
    assert_eq!(outcome, FaultOutcome::Reenter(Verdict::UnsupportedRequest));
    assert!(model.unmap_slot(SlotId(2)).is_err(), "the second one's slot is gone");
}

#[test]
fn a_bar_that_is_shadowed_is_not_mapped() {
    let (_first, model, mut frontend) = attached(SuspendOrder::SlotsFirst);
    let second = Sidecar::start(&["ivshmem,size=64K"]);
    frontend.attach(&second.socket(0), DEADLINE, SuspendOrder::SlotsFirst).unwrap();
    decode(&frontend, true);
    frontend.config_write(1, 0x18, &(BAR2 + 0x1000).to_le_bytes());
    frontend.config_write(1, 0x18, &BAR2.to_le_bytes());
    frontend.config_write(1, COMMAND, &[2, 0]);
    assert!(model.unmap_slot(SlotId(2)).is_err());
    assert!(is_mapped(&model), "the first one is");
}

#[test]
fn a_bar_over_ecam_is_not_mapped() {
    let sidecar = Sidecar::start(&["ivshmem,size=64K"]);
    let model = Arc::new(Model::new());
    let claimed = vec![(0, RAM), (0xb000_0000, 0x1000_0000)];
    let mut frontend = Frontend::new(model.clone(), claimed, SlotId(1));
    frontend.attach(&sidecar.socket(0), DEADLINE, SuspendOrder::SlotsFirst).unwrap();
    frontend.config_write(0, 0x18, &0xb001_0000u64.to_le_bytes());
    decode(&frontend, true);
    assert!(!is_mapped(&model));
}

#[test]
fn a_quarantined_bar_goes_on_trapped() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    frontend.write(AddressSpace::Memory, BAR2, &7u32.to_le_bytes());
    assert!(frontend.quarantine(&fault(BAR2)));
    assert!(!is_mapped(&model));
    decode(&frontend, false);
    assert_eq!(read(&frontend, BAR2), u32::MAX);
    decode(&frontend, true);
    assert!(!is_mapped(&model), "for the rest of the session");
    assert_eq!(read(&frontend, BAR2), 7);
    assert!(!frontend.quarantine(&fault(0x1000)), "RAM has no such way out");
}

#[test]
fn a_reset_of_the_machine_takes_the_slots_away() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    frontend.reset();
    assert!(!is_mapped(&model));
    let mut command = [0xff; 2];
    frontend.config_read(0, COMMAND, &mut command);
    assert_eq!(command, [0, 0]);
}

#[test]
fn slots_leave_the_vm_with_the_frontend() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    drop(frontend);
    assert!(!is_mapped(&model));
}

#[test]
fn a_bar_placed_over_ram_claims_nothing_there() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    frontend.config_write(0, 0x1c, &[0; 4]);
    decode(&frontend, true);
    assert_eq!(frontend.memory_fault(&fault(0x1000)), FaultOutcome::NotMine);
    drop(model);
}

#[test]
fn flr_and_d3hot_take_the_slot_away_and_d0_brings_it_back() {
    let (_sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    let (power, express) = (capability(&frontend, 0x01), capability(&frontend, 0x10));
    decode(&frontend, true);
    frontend.config_write(0, power + 4, &[3, 0]);
    assert!(!is_mapped(&model), "D3hot");
    assert_eq!(read(&frontend, BAR2), u32::MAX);
    frontend.config_write(0, power + 4, &[0, 0]);
    assert_eq!(frontend.memory_fault(&fault(BAR2)), FaultOutcome::Reenter(Verdict::Relax), "D0");
    frontend.config_write(0, express + 8, &0x8000u16.to_le_bytes());
    assert!(!is_mapped(&model), "FLR");
}

fn capability(frontend: &Frontend, id: u8) -> u16 {
    let mut at = [0x34];
    frontend.config_read(0, 0x34, &mut at);
    loop {
        let mut header = [0; 2];
        frontend.config_read(0, at[0].into(), &mut header);
        if header[0] == id {
            return at[0].into();
        }
        at[0] = header[1];
        assert_ne!(at[0], 0, "the capability is there");
    }
}

#[test]
fn a_dead_backend_reads_as_all_ones_everywhere_and_nothing_hangs() {
    let (mut sidecar, model, frontend) = attached(SuspendOrder::SlotsFirst);
    decode(&frontend, true);
    sidecar.kill();
    assert_eq!(read(&frontend, 0xdead_0000), u32::MAX, "not ours");
    let mut config = [0; 4];
    frontend.config_read(0, 0, &mut config);
    assert_eq!(config, [0xff; 4], "as if the function were not there");
    assert!(!is_mapped(&model), "noticed by the first request");
    let outcome = frontend.memory_fault(&fault(BAR2));
    assert_eq!(outcome, FaultOutcome::Reenter(Verdict::Retry), "nothing is left to fault on");
    assert_eq!(read(&frontend, BAR2), u32::MAX);
    decode(&frontend, true);
    assert!(!is_mapped(&model), "nobody claims it any more");
}
