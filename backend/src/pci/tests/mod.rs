//! Behaviour of the function model, by what a guest can see of it.

mod advanced_errors;
mod bars;
mod capabilities;
mod config_space;
mod decode;
mod decoding;
mod errors;
mod interrupts;
mod msix;
mod properties;
mod rom;
mod state;

use super::*;

pub(super) const IDS: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0042,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    revision: 3,
    class: ClassCode { base: 0x01, sub: 0x08, interface: 0x02 },
};

/// Where [`full_spec`]'s capabilities are.
pub(super) const PM: usize = 0x40;
pub(super) const MSI: usize = 0x48;
pub(super) const EXPRESS: usize = 0x60;

/// One of everything: a 32-bit, a 64-bit and an I/O BAR, a pin and all capabilities.
pub(super) fn full_spec() -> FunctionSpec {
    FunctionSpec {
        bars: vec![
            memory32(BarIndex::BAR0, 0x1000),
            memory64(BarIndex::BAR2, 0x2_0000_0000),
            io(BarIndex::BAR4, 0x20),
        ],
        interrupt_pin: Some(InterruptPin::A),
        msi: Some(MsiSpec { vectors: MsiVectors::Eight, per_vector_masking: true }),
        power: Some(PowerSpec { no_soft_reset: true }),
        express: Some(ExpressSpec { function_level_reset: true, aer: false }),
        ..FunctionSpec::new(IDS)
    }
}

/// Where [`everything_spec`]'s further capabilities are.
pub(super) const EVERYTHING_MSIX: usize = 0x60;
pub(super) const EVERYTHING_EXPRESS: usize = 0x6c;
pub(super) const EVERYTHING_VENDOR: usize = 0xa8;
pub(super) const AER: usize = 0x100;

/// Like [`full_spec`], with what most functions do not have. The MSI-X table and Pending Bit Array
/// follow each other in the middle of BAR 1.
pub(super) fn everything_spec() -> FunctionSpec {
    let mut spec = full_spec();
    spec.bars.push(memory32(BarIndex::BAR1, 0x4000));
    FunctionSpec {
        msix: Some(MsixSpec {
            vectors: MsixVectors::new(70).unwrap(),
            table: BarOffset { bar: BarIndex::BAR1, offset: 0x1800 },
            pending: BarOffset { bar: BarIndex::BAR1, offset: 0x1800 + 70 * 16 },
        }),
        express: Some(ExpressSpec { function_level_reset: true, aer: true }),
        vendor: vec![
            VendorSpec::read_only(b"barkeep"),
            VendorSpec { bytes: vec![VendorByte { reset: 0x5a, read_write: 0x0f }; 6] },
        ],
        rom: Some(RomSpec { size: 0x1_0000 }),
        ..spec
    }
}

pub(super) fn everything() -> Function {
    Function::new(everything_spec()).unwrap()
}

pub(super) fn full() -> Function {
    Function::new(full_spec()).unwrap()
}

pub(super) fn memory32(index: BarIndex, size: u64) -> BarSpec {
    BarSpec { index, kind: BarKind::Memory32 { prefetchable: false }, size }
}

pub(super) fn memory64(index: BarIndex, size: u64) -> BarSpec {
    BarSpec { index, kind: BarKind::Memory64 { prefetchable: true }, size }
}

pub(super) fn io(index: BarIndex, size: u64) -> BarSpec {
    BarSpec { index, kind: BarKind::Io, size }
}

pub(super) fn read8(function: &Function, offset: usize) -> u8 {
    let mut data = [0; 1];
    function.config_read(offset, &mut data);
    data[0]
}

pub(super) fn read16(function: &Function, offset: usize) -> u16 {
    let mut data = [0; 2];
    function.config_read(offset, &mut data);
    u16::from_le_bytes(data)
}

pub(super) fn read32(function: &Function, offset: usize) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn write8(function: &mut Function, offset: usize, value: u8) -> Effects {
    function.config_write(offset, &[value])
}

pub(super) fn write16(function: &mut Function, offset: usize, value: u16) -> Effects {
    function.config_write(offset, &value.to_le_bytes())
}

pub(super) fn write32(function: &mut Function, offset: usize, value: u32) -> Effects {
    function.config_write(offset, &value.to_le_bytes())
}

pub(super) fn command(function: &mut Function, bits: Command) -> Effects {
    write16(function, spec::header::COMMAND, bits.bits())
}

/// All of configuration space.
pub(super) fn image(function: &Function) -> Vec<u8> {
    let mut data = vec![0; function.config_size()];
    function.config_read(0, &mut data);
    data
}

pub(super) fn request(kind: RequestKind) -> UnsupportedRequest {
    UnsupportedRequest { kind, address: 0xe000_0010, length: 4 }
}
