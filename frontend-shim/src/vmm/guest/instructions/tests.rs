//! The program against a BAR of two pages, on every hypervisor that this computer has.

use std::sync::{Arc, Mutex};

use super::*;
use crate::hypervisor::kvm::Kvm;
use crate::hypervisor::model::Model;
use crate::hypervisor::{GuestAddress, SlotId, SlotMapping, VcpuExit, Vm};
use crate::vmm::guest::{
    CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, ConfigAddress, Device, EXIT_PORT, MMIO_WINDOW,
    Parameters, Program, RAM_SIZE, RunState, StatBlock,
};

const BAR: u64 = MMIO_WINDOW.0 + 0x10_0000;
const BAR_SIZE: u64 = 0x2000;
const RAM_SLOT: SlotId = SlotId(0);
const BAR_SLOT: SlotId = SlotId(1);
const CYCLES: u64 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bug {
    None,
    /// Reads with decode off return zero.
    ZeroForUr,
    /// Reads of 2 bytes with decode off return one byte of ones.
    NarrowUr,
    /// Writes arrive with decode off.
    WritesArrive,
    /// Writes of 1 byte are lost with decode on.
    ByteLost,
}

/// A function whose BAR is memory.
struct Board {
    vm: Arc<dyn Vm>,
    bar: Arc<HostMapping>,
    /// Every access with decode on exits.
    trapped: bool,
    bug: Bug,
    decodes: Mutex<bool>,
}

impl Board {
    fn run(&self, parameters: InstructionsParameters) -> (InstructionsReport, StatBlock) {
        let ram = Arc::new(HostMapping::anonymous(RAM_SIZE).unwrap());
        self.vm.map_slot(RAM_SLOT, SlotMapping::whole(GuestAddress(0), &ram)).unwrap();
        let device = Device {
            trapped: ConfigAddress::from_bdf(0),
            trapped_bar: GuestAddress(BAR),
            narrow: false,
            mapped: ConfigAddress::from_bdf(8),
            mapped_bar: GuestAddress(BAR),
        };
        Parameters {
            cycles: CYCLES,
            command_on: 6,
            command_off: 4,
            ecam: GuestAddress(0),
            poll_limit: 0,
            resets: false,
            devices: vec![device],
        }
        .install(&ram)
        .unwrap();
        parameters.install(&ram).unwrap();
        Program::Instructions.load(&ram).unwrap();
        let mut vcpu = self.vm.create_vcpu(0, &Program::Instructions.entry(0).unwrap()).unwrap();
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::MmioRead { address, data } => self.read(address.0 - BAR, data),
                VcpuExit::MmioWrite { address, data } => self.write(address.0 - BAR, data),
                VcpuExit::PioWrite { port: CONFIG_DATA_PORT, data, .. } => {
                    self.set_decode(data[0] & 2 != 0);
                }
                VcpuExit::PioWrite { port: CONFIG_ADDRESS_PORT | EXIT_PORT, .. }
                | VcpuExit::Interrupted => {}
                VcpuExit::Halted => break,
                other => panic!("{other}"),
            }
        }
        (InstructionsReport::read(&ram).unwrap(), StatBlock::read(&ram, 0).unwrap())
    }

    fn set_decode(&self, on: bool) {
        let was = std::mem::replace(&mut *self.decodes.lock().unwrap(), on);
        if self.trapped || was == on {
            return;
        }
        let mapping = SlotMapping::whole(GuestAddress(BAR), &self.bar);
        if on {
            self.vm.map_slot(BAR_SLOT, mapping).unwrap();
        } else {
            self.vm.unmap_slot(BAR_SLOT).unwrap();
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match (*self.decodes.lock().unwrap(), self.bug, data.len()) {
            (true, _, _) => self.bar.read(offset, data).unwrap(),
            (false, Bug::ZeroForUr, _) => data.fill(0),
            (false, Bug::NarrowUr, 2) => data.copy_from_slice(&[0xff, 0]),
            (false, _, _) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let lost = self.bug == Bug::ByteLost && data.len() == 1;
        let decodes = *self.decodes.lock().unwrap();
        if decodes && !lost || self.bug == Bug::WritesArrive {
            self.bar.write(offset, data).unwrap();
        }
    }
}

fn board(vm: Arc<dyn Vm>, trapped: bool, bug: Bug) -> Board {
    let bar = Arc::new(HostMapping::anonymous(BAR_SIZE).unwrap());
    Board { vm, bar, trapped, bug, decodes: Mutex::new(false) }
}

fn everything() -> InstructionsParameters {
    let selected = InstructionsParameters::select(|_| true);
    InstructionsParameters { selected, memory: true, each: false, enable: false }
}

fn on_every_hypervisor(test: impl Fn(Arc<dyn Vm>, InstructionsParameters)) {
    test(Arc::new(Model::new()), everything());
    match Kvm::probe().and_then(|()| Kvm::open()) {
        Ok(kvm) => {
            let selected = InstructionsParameters::select(InstructionKind::is_emulated_by_kvm);
            let parameters = InstructionsParameters { selected, enable: true, ..everything() };
            test(Arc::new(kvm), parameters);
        }
        Err(reason) => println!("kvm skipped: {reason}"),
    }
}

#[test]
fn every_kind_is_right_with_decode_on_and_off() {
    for trapped in [false, true] {
        on_every_hypervisor(|vm, parameters| {
            let kind = vm.kind();
            let (report, stats) = board(vm, trapped, Bug::None).run(parameters);
            for row in report.kinds.iter().filter(|row| row.wrong > 0) {
                println!("{kind}: {row:x?}");
            }
            assert!(report.passed(), "{kind}, trapped: {trapped}");
            assert_eq!((stats.state, stats.progress), (RunState::Finished, CYCLES));
            assert_eq!(stats.first_wrong, None);
            for (index, row) in report.kinds.iter().enumerate() {
                let expected = if row.selected { CYCLES * 2 } else { 0 };
                let expected = if index >= KINDS.len() { CYCLES } else { expected };
                assert_eq!(row.runs, expected, "{kind}: {}", row.name);
            }
        });
    }
}

#[test]
fn a_bar_that_is_no_memory_is_only_touched_while_it_does_not_decode() {
    on_every_hypervisor(|vm, parameters| {
        let board = board(vm, true, Bug::None);
        board.bar.write(0, &[0x77; 256]).unwrap();
        let (report, _) = board.run(InstructionsParameters { memory: false, ..parameters });
        assert!(report.passed());
        let mut content = [0; 256];
        board.bar.read(0, &mut content).unwrap();
        assert_eq!(content, [0x77; 256]);
        assert_eq!(report.kinds[0].runs, CYCLES);
    });
}

#[test]
fn functions_that_misbehave_are_caught_by_the_kind_that_can_see_it() {
    let rows: [(Bug, &[&str], &[&str]); 4] = [
        (
            Bug::ZeroForUr,
            &["load of 1 byte", "movdqu load", "vmovdqu load", "lock xadd"],
            &["movnti"],
        ),
        (
            Bug::NarrowUr,
            &["load of 2 bytes", "movsx of 2 bytes"],
            &["load of 4 bytes", "movdqu load"],
        ),
        (Bug::WritesArrive, &[CONTENT_NAMES[1]], &[CONTENT_NAMES[0]]),
        (Bug::ByteLost, &[CONTENT_NAMES[0]], &["load of 4 bytes"]),
    ];
    for (bug, caught, silent) in rows {
        let (report, stats) = board(Arc::new(Model::new()), true, bug).run(everything());
        assert!(!report.passed(), "{bug:?}");
        assert!(stats.wrong > 0 && stats.first_wrong.is_some(), "{bug:?}");
        let row = |name| report.kinds.iter().find(|row| row.name == name).unwrap();
        for name in caught {
            let row = row(*name);
            assert!(row.wrong > 0, "{bug:?}: {name}");
            let (value, right) = row.first_wrong.unwrap();
            assert_ne!(value, right, "{bug:?}: {name}");
        }
        for name in silent {
            assert_eq!(row(*name).wrong, 0, "{bug:?}: {name}");
        }
    }
}

#[test]
fn a_kind_that_is_not_selected_does_not_run() {
    let selected = InstructionsParameters::select(|kind| !kind.crossing && kind.name != "lodsd");
    let parameters = InstructionsParameters { selected, ..everything() };
    let (report, _) = board(Arc::new(Model::new()), false, Bug::None).run(parameters);
    assert!(report.passed());
    for (row, kind) in report.kinds.iter().zip(InstructionsParameters::kinds()) {
        assert_eq!(row.runs == 0, kind.crossing || kind.name == "lodsd", "{}", kind.name);
    }
}

#[test]
fn it_fits_its_place() {
    assert!(Program::Instructions.assemble().unwrap().len() < 0x1_0000);
}
