//! The functions that are tried.

use barkeep_backend::devices::Registry;
use barkeep_backend::pci::{
    BarIndex, BarKind, BarOffset, BarSpec, ClassCode, Decoding, ExpressSpec, Function,
    FunctionSpec, Ids, InterruptPin, MsiSpec, MsiVectors, MsixSpec, MsixVectors, PowerSpec,
    RomSpec, VendorByte, VendorSpec,
};

/// Bit 7: what D3hot leaves of it. Bit 6: whether it waits to be enabled.
pub(crate) fn function(kind: u8) -> Function {
    let device = |spec: &str| {
        let spec = spec.parse().expect("a device specification");
        let (device, _) = Registry::default().create(spec).expect("a device");
        device.spec()
    };
    let mut spec = match (kind & 0x3f) % 6 {
        0 => device("edu"),
        1 => device("ivshmem,size=4K,vectors=4"),
        2 => FunctionSpec {
            bars: vec![
                bar(BarIndex::BAR0, MEMORY64, 1 << 40),
                bar(BarIndex::BAR2, BarKind::Io, 16),
                bar(BarIndex::BAR3, MEMORY32, 1 << 12),
                bar(BarIndex::BAR4, MEMORY64, 1 << 12),
            ],
            interrupt_pin: Some(InterruptPin::D),
            msi: msi(MsiVectors::ThirtyTwo, true),
            express: Some(ExpressSpec { function_level_reset: true, aer: false }),
            ..FunctionSpec::new(IDS)
        },
        3 => FunctionSpec { msi: msi(MsiVectors::Four, false), ..FunctionSpec::new(IDS) },
        4 => everything(),
        // Its table and pending bits have neighbours in one page, and a BAR each.
        _ => FunctionSpec {
            bars: vec![bar(BarIndex::BAR1, MEMORY32, 1 << 12), bar(BarIndex::BAR4, MEMORY64, 64)],
            msix: Some(MsixSpec {
                vectors: vectors(3),
                table: BarOffset { bar: BarIndex::BAR1, offset: 0x7f8 },
                pending: BarOffset { bar: BarIndex::BAR4, offset: 8 },
            }),
            rom: Some(RomSpec { size: 1 << 11 }),
            ..FunctionSpec::new(IDS)
        },
    };
    if kind % 64 != 3 {
        spec.power = Some(PowerSpec { no_soft_reset: kind & 0x80 != 0 });
    }
    spec.decode = if kind & 0x40 != 0 { Decoding::Always } else { Decoding::Strict };
    Function::new(spec).expect("a function that can exist")
}

fn everything() -> FunctionSpec {
    let table = 0x1800;
    FunctionSpec {
        bars: vec![
            bar(BarIndex::BAR0, MEMORY32, 1 << 12),
            bar(BarIndex::BAR1, MEMORY32, 1 << 14),
            bar(BarIndex::BAR2, MEMORY64, 1 << 33),
            bar(BarIndex::BAR4, BarKind::Io, 32),
        ],
        interrupt_pin: Some(InterruptPin::A),
        msi: msi(MsiVectors::Eight, true),
        msix: Some(MsixSpec {
            vectors: vectors(70),
            table: BarOffset { bar: BarIndex::BAR1, offset: table },
            pending: BarOffset { bar: BarIndex::BAR1, offset: table + 70 * 16 },
        }),
        express: Some(ExpressSpec { function_level_reset: true, aer: true }),
        vendor: vec![
            VendorSpec::read_only(b"barkeep"),
            VendorSpec { bytes: vec![VendorByte { reset: 0x5a, read_write: 0x0f }; 6] },
        ],
        rom: Some(RomSpec { size: 1 << 16 }),
        ..FunctionSpec::new(IDS)
    }
}

const IDS: Ids = Ids {
    vendor: 0x1234,
    device: 1,
    subsystem_vendor: 0xaaaa,
    subsystem: 0x5555,
    revision: 7,
    class: ClassCode { base: 0xff, sub: 1, interface: 2 },
};
const MEMORY32: BarKind = BarKind::Memory32 { prefetchable: false };
const MEMORY64: BarKind = BarKind::Memory64 { prefetchable: true };

fn bar(index: BarIndex, kind: BarKind, size: u64) -> BarSpec {
    BarSpec { index, kind, size }
}

fn msi(vectors: MsiVectors, per_vector_masking: bool) -> Option<MsiSpec> {
    Some(MsiSpec { vectors, per_vector_masking })
}

fn vectors(count: u16) -> MsixVectors {
    MsixVectors::new(count).expect("a number of vectors")
}
