//! A function that has all that a function can have.

use barkeep_backend::pci::{
    BarIndex, BarKind, BarOffset, BarSpec, ClassCode, Decoding, ExpressSpec, FunctionSpec, Ids,
    InterruptPin, MsiSpec, MsiVectors, MsixSpec, MsixVectors, PowerSpec, RomSpec, VendorByte,
    VendorSpec,
};

/// 64 MSI-X vectors, whose table takes a page of BAR 0 and whose Pending Bit Array the next.
const VECTORS: MsixVectors = MsixVectors::new(64).expect("64 vectors are possible");

/// BARs of all three kinds, every way to interrupt, error reporting, a ROM and a vendor's own
/// capability with a byte to write.
pub(crate) fn spec() -> FunctionSpec {
    let bar = |index, kind, size| BarSpec { index, kind, size };
    FunctionSpec {
        bars: vec![
            bar(BarIndex::BAR0, BarKind::Memory32 { prefetchable: false }, 0x4000),
            bar(BarIndex::BAR2, BarKind::Memory64 { prefetchable: true }, 1 << 33),
            bar(BarIndex::BAR4, BarKind::Io, 32),
        ],
        interrupt_pin: Some(InterruptPin::A),
        msi: Some(MsiSpec { vectors: MsiVectors::Eight, per_vector_masking: true }),
        msix: Some(MsixSpec {
            vectors: VECTORS,
            table: BarOffset { bar: BarIndex::BAR0, offset: 0x2000 },
            pending: BarOffset { bar: BarIndex::BAR0, offset: 0x3000 },
        }),
        power: Some(PowerSpec { no_soft_reset: false }),
        express: Some(ExpressSpec { function_level_reset: true, aer: true }),
        vendor: vec![VendorSpec {
            bytes: vec![
                VendorByte { reset: 1, read_write: 0 },
                VendorByte { reset: 0, read_write: 0xff },
            ],
        }],
        rom: Some(RomSpec { size: 0x1_0000 }),
        decode: Decoding::Strict,
        ..FunctionSpec::new(Ids {
            vendor: 0x1234,
            device: 0xeeee,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            revision: 1,
            class: ClassCode { base: 0xff, sub: 0, interface: 0 },
        })
    }
}
