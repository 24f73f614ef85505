//! The registers of the type 0 configuration header (PCI 6.1, PCIe 7.5.1.2).

use super::bar::BarIndex;
use super::command::{Command, Status};
use super::config_space::Register;
use super::function_spec::FunctionSpec;
use super::rom::RomSpec;
use super::spec::header as at;

/// The header of a function, whose capability list starts at `first_capability`.
pub(super) fn registers(spec: &FunctionSpec, first_capability: Option<u8>) -> Vec<Register> {
    let ids = &spec.ids;
    let capabilities_list = first_capability.map_or(Status::empty(), |_| Status::CAPABILITIES_LIST);
    // PCI Express has no bus to be polite on, and hardwires the timer to 0 (PCIe 7.5.1.1.8).
    let latency_timer: u8 = if spec.express.is_some() { 0 } else { 0xff };

    let mut registers = vec![
        Register::word("Vendor ID", at::VENDOR_ID).reset(ids.vendor),
        Register::word("Device ID", at::DEVICE_ID).reset(ids.device),
        Register::word("Command", at::COMMAND).read_write(Command::writable(spec).bits()),
        Register::word("Status", at::STATUS)
            .reset(capabilities_list.bits())
            .write_one_to_clear(Status::WRITE_ONE_TO_CLEAR.bits())
            .volatile(Status::volatile(spec).bits()),
        Register::byte("Revision ID", at::REVISION_ID).reset(ids.revision),
        Register::byte("Programming Interface", at::CLASS_CODE).reset(ids.class.interface),
        Register::byte("Sub-Class Code", at::CLASS_CODE + 1).reset(ids.class.sub),
        Register::byte("Base Class Code", at::CLASS_CODE + 2).reset(ids.class.base),
        Register::byte("Cache Line Size", at::CACHE_LINE_SIZE).read_write(0xff_u8),
        Register::byte("Latency Timer", at::LATENCY_TIMER).read_write(latency_timer),
        Register::byte("Header Type", at::HEADER_TYPE),
        Register::byte("BIST", at::BIST),
    ];
    registers.extend(base_addresses(spec));
    registers.extend([
        Register::dword("CardBus CIS Pointer", at::CARDBUS_CIS),
        Register::word("Subsystem Vendor ID", at::SUBSYSTEM_VENDOR_ID).reset(ids.subsystem_vendor),
        Register::word("Subsystem ID", at::SUBSYSTEM_ID).reset(ids.subsystem),
        spec.rom.map_or(RomSpec::absent(), |rom| rom.register()),
        Register::byte("Capabilities Pointer", at::CAPABILITIES_POINTER)
            .reset(first_capability.unwrap_or(0)),
        Register::byte("Interrupt Line", at::INTERRUPT_LINE).read_write(0xff_u8),
        Register::byte("Interrupt Pin", at::INTERRUPT_PIN)
            .reset(spec.interrupt_pin.map_or(0, |pin| pin as u8)),
        Register::byte("Min_Gnt", at::MIN_GNT),
        Register::byte("Max_Lat", at::MAX_LAT),
    ]);
    registers
}

/// All six registers, in order; one that no BAR uses reads 0.
fn base_addresses(spec: &FunctionSpec) -> Vec<Register> {
    let mut registers = Vec::with_capacity(BarIndex::ALL.len());
    for bar in &spec.bars {
        bar.registers(&mut registers);
    }
    for unused in BarIndex::ALL.map(BarIndex::register) {
        if !registers.iter().any(|register| register.offset == unused.offset) {
            registers.push(unused);
        }
    }
    registers.sort_by_key(|register| register.offset);
    registers
}
