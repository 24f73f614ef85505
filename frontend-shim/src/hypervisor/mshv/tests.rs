//! The adapter against the model of the hypervisor's rules.

mod completion;
mod intercepts;
mod races;

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;

use super::model::{ModelPartition, SecondMap};
use super::policy::{GuestFrame, MapPlan, MapPolicy};
use super::vcpu::MshvVcpu;
use super::{Adapter, hypercalls::Partition, hypercalls::Processor};
use crate::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, HypervisorError, PAGE_SIZE, SlotAccess, SlotId,
    SlotMapping, Vcpu, VcpuEntry, VcpuExit,
};
use crate::x86::Registers;

const RAM_SLOT: SlotId = SlotId(0);
const RAM_PAGES: u64 = 16;
const CODE: u64 = 0x1000;
const DATA: u64 = 0x8000;

const BAR_SLOT: SlotId = SlotId(1);
const BAR: u64 = 0xfebc_0000;
const BAR_PAGES: u64 = 8;

type ModelVcpu = MshvVcpu<ModelPartition>;

/// A machine with RAM, and a BAR that is in no slot yet.
struct Machine {
    partition: ModelPartition,
    adapter: Arc<Adapter<ModelPartition>>,
    ram: Arc<HostMapping>,
    bar: Arc<HostMapping>,
}

impl Machine {
    fn new(policy: MapPolicy) -> Machine {
        Machine::with(policy, SecondMap::Refused)
    }

    fn with(policy: MapPolicy, second_map: SecondMap) -> Machine {
        let partition = ModelPartition::new(second_map);
        let ram = Arc::new(HostMapping::anonymous(RAM_PAGES * PAGE_SIZE).unwrap());
        partition.add_host_memory(&ram);
        let bar = device_memory(&partition);
        let adapter = Arc::new(Adapter::new(partition.clone(), policy));
        let machine = Machine { partition, adapter, ram, bar };
        let mapping = SlotMapping::whole(GuestAddress(0), &machine.ram);
        machine.adapter.map_slot(RAM_SLOT, mapping).unwrap();
        machine
    }

    fn map_bar(&self) {
        self.adapter.map_slot(BAR_SLOT, self.bar_mapping()).unwrap();
    }

    fn bar_mapping(&self) -> SlotMapping {
        SlotMapping::whole(GuestAddress(BAR), &self.bar)
    }

    /// A virtual CPU that is about to execute `code`, with RBX at the BAR and RSI and RDI at the data.
    fn vcpu(&self, code: impl FnOnce(&mut CodeAssembler)) -> ModelVcpu {
        let mut assembler = CodeAssembler::new(64).unwrap();
        code(&mut assembler);
        assembler.hlt().unwrap();
        self.ram.write(CODE, &assembler.assemble(CODE).unwrap()).unwrap();
        let mut registers = Registers::new(CODE);
        for (number, value) in [(3, BAR), (6, DATA), (7, DATA + 0x100)] {
            registers.general[number] = value;
        }
        self.vcpu_with(registers)
    }

    fn vcpu_with(&self, registers: Registers) -> ModelVcpu {
        self.partition.set_registers(registers);
        let regions = &self.adapter.regions;
        let mut processor = regions.partition().create_processor(0).unwrap();
        let page_table_root = GuestAddress(0);
        let entry = VcpuEntry { rip: CODE, rsp: DATA + 0x800, rdi: 0, page_table_root };
        processor.enter_long_mode(&entry).unwrap();
        MshvVcpu::new(0, processor, Arc::clone(regions))
    }

    /// Pages of the BAR that the hypervisor maps, by their number in the BAR. Each must be mapped to its
    /// own host page.
    fn mapped_bar_pages(&self) -> Vec<u64> {
        let (guest, host) = (BAR / PAGE_SIZE, self.bar.host_address() / PAGE_SIZE);
        let pages = self.partition.mapped_pages().into_iter();
        pages
            .filter(|(page, _)| (guest..guest + BAR_PAGES).contains(page))
            .inspect(|(page, frame)| assert_eq!(frame - host, page - guest, "page {page:#x}"))
            .map(|(page, _)| page - guest)
            .collect()
    }
}

fn device_memory(partition: &ModelPartition) -> Arc<HostMapping> {
    let memory = Arc::new(HostMapping::anonymous(BAR_PAGES * PAGE_SIZE).unwrap().of_device());
    partition.add_host_memory(&memory);
    memory
}

/// One exit, as plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    PortRead(u16, usize),
    PortWrite(u16, Vec<u8>),
    Other(String),
}

/// Runs until the guest needs something; reads are answered as UR, with all ones.
fn run(vcpu: &mut ModelVcpu) -> Seen {
    match vcpu.run().unwrap() {
        VcpuExit::MmioRead { address, data } => {
            data.fill(0xff);
            Seen::Read(address.0, data.len())
        }
        VcpuExit::MmioWrite { address, data } => Seen::Write(address.0, data.to_vec()),
        VcpuExit::PioRead { port, width, data } => {
            data.fill(0xff);
            Seen::PortRead(port, width)
        }
        VcpuExit::PioWrite { port, data, .. } => Seen::PortWrite(port, data.to_vec()),
        other => Seen::Other(other.to_string()),
    }
}

/// Runs until the guest halts, and returns what came before.
fn run_to_halt(vcpu: &mut ModelVcpu) -> Vec<Seen> {
    let mut seen = Vec::new();
    loop {
        match run(vcpu) {
            Seen::Other(exit) if exit == "halted" => return seen,
            exit => seen.push(exit),
        }
        assert!(seen.len() < 100, "{seen:?}");
    }
}

fn fault(address: u64, access: &str) -> Seen {
    Seen::Other(format!("memory fault at {address:#x} ({access})"))
}
