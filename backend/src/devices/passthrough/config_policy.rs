//! What of configuration space is the VMM's business and not the device's.
//!
//! The kernel's vfio-pci virtualises BARs and ROM, the interrupt line, the addresses and data of MSI
//! and the power states, hides capabilities that it does not know, and drops writes that could harm
//! the host. On top of that this policy owns a few bits, as a table of bytes; nothing here does I/O.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::pci::spec::{CONFIG_SIZE, express, header, msi, power};

/// Extended capabilities that are taken out of the list, by ID (PCIe 7.9).
const HIDDEN_EXTENDED: [(u16, &str); 7] = [
    (0x0e, "ARI: names the next function of the host's device"),
    (0x0f, "ATS: its enable bit is the host IOMMU's, the kernel drops writes"),
    (0x10, "SR-IOV: virtual functions are the host's to create"),
    (0x13, "PRI: goes with ATS"),
    (0x15, "Resizable BAR: the host has placed the BARs, the kernel drops writes"),
    (0x1b, "PASID: goes with ATS"),
    (0x24, "VF Resizable BAR: goes with SR-IOV"),
];

/// Capability IDs and registers that the function model has no use for (PCI 6.8.2, PCIe 7.8.3).
mod ids {
    pub(super) const MSIX: u8 = 0x11;
    pub(super) const ADVANCED_FEATURES: u8 = 0x13;
}

const HEADER_MULTI_FUNCTION: u8 = 1 << 7;
const MSIX_CONTROL_HIGH: usize = 0x03;
const MSIX_TABLE: usize = 0x04;
const MSIX_ENABLE: u8 = 1 << 7;
const MSIX_FUNCTION_MASK: u8 = 1 << 6;
/// Enable and Multiple Message Enable, in the low byte of Message Control.
const MSI_OWNED: u8 = 0b0111_0001;
const INITIATE_FLR_HIGH: u8 = 1 << 7;
const EXTENDED_START: usize = 0x100;

/// The bits of configuration space that are answered here.
#[derive(Clone, Debug)]
pub struct ConfigPolicy {
    owned: BTreeMap<usize, Owned>,
    layout: Layout,
}

/// Bits of one byte.
#[derive(Clone, Copy, Debug)]
struct Owned {
    mask: u8,
    value: u8,
    /// Those that a guest may change.
    writable: u8,
}

/// Where the registers are that others look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Power Management Control/Status.
    pub power: Option<usize>,
    /// The MSI capability.
    msi: Option<Msi>,
    /// Where the MSI-X table is.
    pub msix: Option<MsixTablePlace>,
    /// The high byte of Message Control of MSI-X.
    msix_control: Option<usize>,
    /// Bytes whose top or bottom bit resets the function, with that bit.
    resets: Vec<(usize, u8)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Msi {
    at: usize,
    /// Log2 of the vectors that the device is capable of.
    capable: u8,
    addresses: Range<usize>,
}

/// Where the MSI-X table of a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixTablePlace {
    /// The BAR that holds it.
    pub bar: u8,
    /// Where it starts there, in bytes.
    pub offset: u64,
    /// Number of entries, 16 bytes each.
    pub entries: u16,
}

/// Which messages the guest has enabled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageEnables {
    /// MSI, with so many vectors.
    pub msi: Option<u32>,
    /// MSI-X.
    pub msix: bool,
}

impl ConfigPolicy {
    /// The policy for a function whose configuration space reads as `config`, as much as there is.
    #[must_use]
    pub fn new(config: &[u8]) -> Self {
        let mut policy = Self { owned: BTreeMap::new(), layout: Layout::default() };
        policy.own(header::HEADER_TYPE, HEADER_MULTI_FUNCTION, 0);
        for (id, at) in capabilities(config) {
            policy.learn(config, id, at);
        }
        policy.hide_extended(config);
        policy
    }

    /// Where registers are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Puts the owned bits into what the device answered to a read at `offset`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, owned) in self.owned.range(offset..offset + data.len()) {
            let byte = &mut data[at - offset];
            *byte = *byte & !owned.mask | owned.value;
        }
    }

    /// Takes a guest's write in. Returns the pieces of it that go on to the device.
    pub fn write<'a>(&mut self, offset: usize, data: &'a [u8]) -> Vec<(usize, &'a [u8])> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for (at, owned) in self.owned.range_mut(offset..offset + data.len()) {
            if owned.writable == 0 {
                continue;
            }
            // The kernel sets such a register itself, when interrupts are configured.
            let here = at - offset;
            owned.value = owned.value & !owned.writable | data[here] & owned.writable;
            if start < here {
                pieces.push((offset + start, &data[start..here]));
            }
            start = here + 1;
        }
        if start < data.len() {
            pieces.push((offset + start, &data[start..]));
        }
        pieces
    }

    /// Whether a write resets the function (PCIe 6.6.2).
    #[must_use]
    pub fn resets(&self, offset: usize, data: &[u8]) -> bool {
        self.layout.resets.iter().any(|(at, bit)| {
            at.checked_sub(offset)
                .and_then(|here| data.get(here))
                .is_some_and(|byte| byte & bit != 0)
        })
    }

    /// Which messages the guest has enabled now.
    #[must_use]
    pub fn message_enables(&self) -> MessageEnables {
        let value = |at: usize| self.owned.get(&at).map_or(0, |owned| owned.value);
        let msi = self.layout.msi.as_ref().and_then(|msi| {
            let control = value(msi.at + msi::MESSAGE_CONTROL);
            (control & 1 != 0).then(|| 1 << (control >> 4 & 0b111).min(msi.capable))
        });
        let msix = self.layout.msix_control.is_some_and(|at| value(at) & MSIX_ENABLE != 0);
        MessageEnables { msi, msix }
    }

    /// Forgets what a guest wrote. Returns the registers that the kernel keeps across a reset of the
    /// device and that are zero after one, and the power state for devices without a reset.
    pub fn reset(&mut self) -> Vec<Range<usize>> {
        for owned in self.owned.values_mut() {
            owned.value &= !owned.writable;
        }
        // D0 first: a device may lose the others on its way there.
        let mut zero: Vec<_> = self.layout.power.iter().map(|at| *at..at + 1).collect();
        zero.extend([
            header::COMMAND..header::COMMAND + 2,
            header::BAR0..header::BAR0 + 24,
            header::EXPANSION_ROM..header::EXPANSION_ROM + 4,
            header::INTERRUPT_LINE..header::INTERRUPT_LINE + 1,
        ]);
        zero.extend(self.layout.msi.as_ref().map(|msi| msi.addresses.clone()));
        zero
    }

    fn own(&mut self, at: usize, mask: u8, writable: u8) {
        self.owned.insert(at, Owned { mask, value: 0, writable });
    }

    fn learn(&mut self, config: &[u8], id: u8, at: usize) {
        match id {
            power::CAPABILITY_ID => self.layout.power = Some(at + power::PMCSR),
            msi::CAPABILITY_ID => {
                let control = word(config, at + msi::MESSAGE_CONTROL);
                let wide = control & msi::CONTROL_64_BIT != 0;
                let start = at + msi::MESSAGE_ADDRESS;
                let capable = (control >> msi::CONTROL_MULTIPLE_CAPABLE_SHIFT & 0b111).min(5);
                self.own(at + msi::MESSAGE_CONTROL, MSI_OWNED, MSI_OWNED);
                self.layout.msi = Some(Msi {
                    at,
                    capable: u8::try_from(capable).expect("at most 5"),
                    addresses: start..start + if wide { 10 } else { 6 },
                });
            }
            ids::MSIX => {
                let table = word(config, at + MSIX_TABLE);
                let table_high = word(config, at + MSIX_TABLE + 2);
                let table = u32::from(table_high) << 16 | u32::from(table);
                let owned = MSIX_ENABLE | MSIX_FUNCTION_MASK;
                self.own(at + MSIX_CONTROL_HIGH, owned, owned);
                self.layout.msix_control = Some(at + MSIX_CONTROL_HIGH);
                self.layout.msix = Some(MsixTablePlace {
                    bar: u8::try_from(table & 0b111).expect("3 bits"),
                    offset: u64::from(table & !0b111),
                    entries: (word(config, at + 2) & 0x7ff) + 1,
                });
            }
            express::CAPABILITY_ID => {
                self.layout.resets.push((at + express::DEVICE_CONTROL + 1, INITIATE_FLR_HIGH));
            }
            ids::ADVANCED_FEATURES => self.layout.resets.push((at + 4, 1)),
            _ => {}
        }
    }

    /// Takes capabilities out of the extended list: the one before points to the one behind. The
    /// first has none before; it becomes a null capability, which PCIe 7.9.1 has for that.
    fn hide_extended(&mut self, config: &[u8]) {
        let list = extended_capabilities(config);
        let hidden = |id: u16| HIDDEN_EXTENDED.iter().any(|(hidden, _)| *hidden == id);
        let mut kept = None;
        for (position, (id, at)) in list.iter().enumerate() {
            if !hidden(*id) {
                kept = Some(*at);
                continue;
            }
            let next = list.get(position + 1).map_or(0, |(_, next)| *next);
            let before = kept.unwrap_or(EXTENDED_START);
            if kept.is_none() {
                self.own(EXTENDED_START, 0xff, 0);
                self.own(EXTENDED_START + 1, 0xff, 0);
            }
            self.set_next(config, before, next);
        }
    }

    /// Next Capability Offset: bits 31 to 20 of the header. The version, bits 19 to 16, stays.
    fn set_next(&mut self, config: &[u8], at: usize, next: usize) {
        let [low, high] = u16::try_from(next << 4).expect("12 bits").to_le_bytes();
        let version = config[at + 2] & 0x0f;
        self.owned.insert(at + 2, Owned { mask: 0xff, value: low | version, writable: 0 });
        self.owned.insert(at + 3, Owned { mask: 0xff, value: high, writable: 0 });
    }
}

/// The capability list: ID and place. However a device links them, the walk ends.
fn capabilities(config: &[u8]) -> Vec<(u8, usize)> {
    const MOST: usize = (CONFIG_SIZE - header::LENGTH as usize) / 4;
    let link = |at: usize| config.get(at).map_or(0, |byte| usize::from(byte & !0b11));
    let mut found = Vec::new();
    let mut at = link(header::CAPABILITIES_POINTER);
    for _ in 0..MOST {
        // What is looked into has 8 bytes at least.
        if at < usize::from(header::LENGTH) || at + 8 > CONFIG_SIZE.min(config.len()) {
            break;
        }
        found.push((config[at], at));
        at = link(at + 1);
    }
    found
}

/// The extended capability list: ID and place.
fn extended_capabilities(config: &[u8]) -> Vec<(u16, usize)> {
    let mut found: Vec<(u16, usize)> = Vec::new();
    let mut at = EXTENDED_START;
    while let Some(header) = config.get(at..at + 4) {
        let id = u16::from_le_bytes([header[0], header[1]]);
        let link = u16::from_le_bytes([header[2], header[3]]);
        // No list at all reads as zeros or as ones.
        if header == [0; 4] || id == 0xffff || found.iter().any(|(_, seen)| *seen == at) {
            break;
        }
        found.push((id, at));
        at = usize::from(link >> 4) & !0b11;
        if at < EXTENDED_START {
            break;
        }
    }
    found
}

fn word(config: &[u8], at: usize) -> u16 {
    let bytes = config.get(at..at + 2).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u16::from_le_bytes)
}
