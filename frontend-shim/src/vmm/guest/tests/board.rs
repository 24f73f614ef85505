//! A tiny machine for the programs: two PCI functions that can be told to misbehave.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::super::*;
use crate::hypervisor::{SlotId, SlotMapping, VcpuExit, Vm};

pub(super) const ON: u16 = 0x0006;
pub(super) const OFF: u16 = 0x0004;
pub(super) const ECAM: u64 = 0xe000_0000;
pub(super) const EDU_BAR: u64 = 0xf000_0000;
pub(super) const EDU_BAR_SIZE: u64 = 0x10_0000;
pub(super) const CELL_BAR: u64 = MMIO_WINDOW.0 + 0x20_0000;
pub(super) const CELL_BAR_SIZE: u64 = 0x1000;
pub(super) const EDU_BDF: u16 = 1 << 3;
pub(super) const CELL_BDF: u16 = 2 << 3;
pub(super) const RAM_SLOT: SlotId = SlotId(0);
pub(super) const CELL_SLOT: SlotId = SlotId(1);

/// How the fake functions misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    None,
    /// The edu function goes on decoding.
    EduIgnoresDecode,
    /// Reads of a mapped BAR that does not decode return zero.
    ZeroForUr,
    /// Writes to the mapped BAR arrive although it does not decode.
    PoisonArrives,
    /// ECAM says something else than the ports.
    EcamLies,
    /// DMA loses a byte.
    DmaCorrupts,
    /// Never finishes a factorial.
    Hangs,
    /// The edu identification register holds something else.
    WrongIdentification,
    /// The edu liveness register returns what was written.
    NotInverted,
    /// The edu function loses the upper half of 8 byte writes.
    HalfWrites,
    /// The edu function answers accesses that are too narrow.
    AnswersNarrow,
}

/// A machine with one edu function, trapped, and one whose BAR is mapped memory.
pub(super) struct Board {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) ram: Arc<HostMapping>,
    cells: Arc<HostMapping>,
    bug: Bug,
    /// Sets the stop flag at this many MMIO reads.
    pub(super) stop_at: Option<u32>,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    config_address: u32,
    pub(super) decode: BTreeMap<u16, bool>,
    edu: BTreeMap<u64, u64>,
    edu_buffer: Vec<u8>,
    reads: u32,
    exit_code: Option<u8>,
}

impl Board {
    pub(super) fn new(vm: Arc<dyn Vm>, cycles: u64, bug: Bug) -> Board {
        Self::with_rows(vm, cycles, bug, 1)
    }

    /// With the same two functions in several rows of the device table.
    pub(super) fn with_rows(vm: Arc<dyn Vm>, cycles: u64, bug: Bug, rows: usize) -> Board {
        let ram = Arc::new(HostMapping::anonymous(RAM_SIZE).unwrap());
        vm.map_slot(RAM_SLOT, SlotMapping::whole(GuestAddress(0), &ram)).unwrap();
        let parameters = Parameters {
            cycles,
            command_on: ON,
            command_off: OFF,
            ecam: GuestAddress(ECAM),
            poll_limit: 100,
            resets: false,
            devices: vec![
                Device {
                    trapped: ConfigAddress::from_bdf(EDU_BDF),
                    trapped_bar: GuestAddress(EDU_BAR),
                    narrow: true,
                    mapped: ConfigAddress::from_bdf(CELL_BDF),
                    mapped_bar: GuestAddress(CELL_BAR),
                };
                rows
            ],
        };
        parameters.install(&ram).unwrap();
        let cells = Arc::new(HostMapping::anonymous(CELL_BAR_SIZE).unwrap());
        let board = Board {
            vm,
            ram,
            cells,
            bug,
            stop_at: None,
            state: Mutex::new(State {
                config_address: 0,
                decode: [(EDU_BDF, true), (CELL_BDF, true)].into(),
                edu: BTreeMap::new(),
                edu_buffer: vec![0; 4096],
                reads: 0,
                exit_code: None,
            }),
        };
        board.map_cells();
        board
    }

    fn map_cells(&self) {
        let at = GuestAddress(CELL_BAR);
        self.vm.map_slot(CELL_SLOT, SlotMapping::whole(at, &self.cells)).unwrap();
    }

    /// Runs programs, one per virtual CPU, until all have halted.
    pub(super) fn run(&self, programs: &[Program]) {
        std::thread::scope(|scope| {
            for (vcpu, program) in (0..).zip(programs) {
                program.load(&self.ram).unwrap();
                let mut cpu = self.vm.create_vcpu(vcpu, &program.entry(vcpu).unwrap()).unwrap();
                scope.spawn(move || {
                    loop {
                        match cpu.run().unwrap() {
                            VcpuExit::MmioRead { address, data } => {
                                let value = self.mmio_read(address.0, data.len());
                                data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
                            }
                            VcpuExit::MmioWrite { address, data } => {
                                self.mmio_write(address.0, data.len(), number(data));
                            }
                            VcpuExit::PioRead { port, data, .. } => {
                                let value = self.port_read(port);
                                data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
                            }
                            VcpuExit::PioWrite { port, data, .. } => {
                                self.port_write(port, number(data))
                            }
                            VcpuExit::Interrupted => {}
                            VcpuExit::Halted => break,
                            other => {
                                // The others would wait for a stop flag that nobody sets any more.
                                request_stop(&self.ram).unwrap();
                                panic!("vCPU {vcpu}: {other:?}");
                            }
                        }
                    }
                });
            }
        });
    }

    fn mmio_read(&self, address: u64, len: usize) -> u64 {
        let mut state = self.state.lock().unwrap();
        state.reads += 1;
        if Some(state.reads) == self.stop_at {
            request_stop(&self.ram).unwrap();
        }
        let edu_decodes = state.decode[&EDU_BDF] || self.bug == Bug::EduIgnoresDecode;
        if let Some(offset) = inside(address, EDU_BAR, EDU_BAR_SIZE) {
            let wide = len == 4 || len == 8 && offset >= 0x80;
            let wide = wide || self.bug == Bug::AnswersNarrow;
            return if edu_decodes && wide { self.edu_read(&state, offset) } else { u64::MAX };
        }
        if let Some(offset) = inside(address, CELL_BAR, CELL_BAR_SIZE) {
            // Decode may have come back between the exit and here.
            return match (state.decode[&CELL_BDF], self.bug) {
                (true, _) => {
                    let mut data = [0; 8];
                    self.cells.read(offset, &mut data[..len]).unwrap();
                    number(&data)
                }
                (false, Bug::ZeroForUr) => 0,
                (false, _) => u64::MAX,
            };
        }
        let ecam = inside(address, ECAM, 256 << 12).filter(|offset| offset % 0x1000 == 0);
        match ecam.map(|offset| u16::try_from(offset >> 12).unwrap()) {
            Some(CELL_BDF) if self.bug == Bug::EcamLies => 0x1110_1af5,
            Some(bdf) => id(bdf).into(),
            None => u64::MAX,
        }
    }

    fn edu_read(&self, state: &State, offset: u64) -> u64 {
        match offset {
            0 if self.bug == Bug::WrongIdentification => 0x0200_00ed,
            0 => 0x0100_00ed,
            0x20 if self.bug == Bug::Hangs => 1,
            _ => state.edu.get(&offset).copied().unwrap_or(0),
        }
    }

    fn mmio_write(&self, address: u64, len: usize, value: u64) {
        let mut state = self.state.lock().unwrap();
        if let Some(offset) = inside(address, EDU_BAR, EDU_BAR_SIZE) {
            if state.decode[&EDU_BDF] || self.bug == Bug::EduIgnoresDecode {
                self.edu_write(&mut state, offset, value);
            }
        } else if let Some(offset) = inside(address, CELL_BAR, CELL_BAR_SIZE)
            && (state.decode[&CELL_BDF] || self.bug == Bug::PoisonArrives)
        {
            self.cells.write(offset, &value.to_le_bytes()[..len]).unwrap();
        }
    }

    fn edu_write(&self, state: &mut State, offset: u64, value: u64) {
        match offset {
            0x04 if self.bug == Bug::NotInverted => drop(state.edu.insert(offset, value)),
            0x80.. if self.bug == Bug::HalfWrites => {
                state.edu.insert(offset, value & 0xffff_ffff);
            }
            0x04 => drop(state.edu.insert(offset, !value & 0xffff_ffff)),
            0x08 => drop(state.edu.insert(offset, (1..=value).product())),
            0x98 if value & 1 == 1 => {
                let (source, destination) = (state.edu[&0x80], state.edu[&0x88]);
                let len = usize::try_from(state.edu[&0x90]).unwrap();
                if value & 2 == 0 {
                    assert_eq!(destination, 0x4_0000);
                    self.ram.read(source, &mut state.edu_buffer[..len]).unwrap();
                } else {
                    assert_eq!(source, 0x4_0000);
                    if self.bug == Bug::DmaCorrupts {
                        state.edu_buffer[len - 1] ^= 1;
                    }
                    self.ram.write(destination, &state.edu_buffer[..len]).unwrap();
                }
            }
            _ => drop(state.edu.insert(offset, value)),
        }
    }

    fn port_read(&self, port: u16) -> u32 {
        let address = self.state.lock().unwrap().config_address;
        let register_0 = port == CONFIG_DATA_PORT && address & 0xff == 0;
        if register_0 { id(bdf(address)) } else { u32::MAX }
    }

    fn port_write(&self, port: u16, value: u64) {
        let value = u32::try_from(value).unwrap();
        let mut state = self.state.lock().unwrap();
        match port {
            CONFIG_ADDRESS_PORT => state.config_address = value,
            CONFIG_DATA_PORT => {
                assert_eq!(state.config_address & 0xff, 4, "PCI_COMMAND");
                let (bdf, on) = (bdf(state.config_address), value & 2 != 0);
                let was_on = state.decode.insert(bdf, on).expect("a function that exists");
                // Not under the lock: a hypervisor may wait for a virtual CPU to leave the slot.
                drop(state);
                match (bdf, was_on, on) {
                    (CELL_BDF, true, false) => self.vm.unmap_slot(CELL_SLOT).unwrap(),
                    (CELL_BDF, false, true) => self.map_cells(),
                    _ => {}
                }
            }
            EXIT_PORT => state.exit_code = Some(u8::try_from(value).unwrap()),
            _ => panic!("port {port:#x}"),
        }
    }

    pub(super) fn exit_code(&self) -> Option<u8> {
        self.state.lock().unwrap().exit_code
    }

    pub(super) fn stats(&self, vcpu: u32) -> StatBlock {
        StatBlock::read(&self.ram, vcpu).unwrap()
    }
}

pub(super) fn number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn inside(address: u64, base: u64, len: u64) -> Option<u64> {
    address.checked_sub(base).filter(|offset| *offset < len)
}

fn bdf(config_address: u32) -> u16 {
    u16::try_from(config_address >> 8 & 0xffff).unwrap()
}

fn id(bdf: u16) -> u32 {
    match bdf {
        0 => 0x0d57_1b36,
        EDU_BDF => 0x11e8_1234,
        CELL_BDF => 0x1110_1af4,
        _ => u32::MAX,
    }
}
