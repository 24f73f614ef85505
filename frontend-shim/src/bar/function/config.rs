//! What the shim has to understand of configuration space (PCI Local Bus 3.0, 6.1 and 6.7).

use barkeep_protocol::wire::PciRegion;

use super::BarInfo;
use crate::bar::{AddressSpace, Backend};
use crate::client::ClientError;

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const BAR0: u16 = 0x10;
const AFTER_BARS: u16 = 0x28;
const CAPABILITIES_POINTER: u16 = 0x34;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const STATUS_CAPABILITIES: u16 = 1 << 4;

const CAP_POWER: u8 = 0x01;
const CAP_EXPRESS: u8 = 0x10;
const CAP_ADVANCED_FEATURES: u8 = 0x13;
/// PMCSR in the power management capability (PCI PM 1.2, 3.2.4).
const PMCSR: u16 = 4;
const PMCSR_STATE: u8 = 0b11;
/// Device Control in the PCI Express capability (PCIe 7.5.3.4): Initiate FLR is in its high byte.
const DEVICE_CONTROL: u16 = 8;
/// AF Control in the Advanced Features capability: Initiate FLR of a conventional function.
const AF_CONTROL: u16 = 4;

/// Command and BARs, as the function says.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    command: u16,
    bars: [u32; 6],
}

impl Registers {
    /// Reads them from the function, in one request.
    pub(super) fn read(backend: &impl Backend) -> Result<Self, ClientError> {
        let mut bytes = [0; (AFTER_BARS - COMMAND) as usize];
        backend.region_read(PciRegion::Config.index(), COMMAND.into(), &mut bytes)?;
        let mut bars = [0; 6];
        let words = bytes[usize::from(BAR0 - COMMAND)..].chunks_exact(4);
        for (bar, word) in bars.iter_mut().zip(words) {
            *bar = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        }
        Ok(Self { command: u16::from_le_bytes([bytes[0], bytes[1]]), bars })
    }

    pub(super) fn enables(&self) -> Enables {
        Enables::in_command(self.command)
    }

    /// The kind of a BAR, from its read-only low bits (PCI 6.2.5.1).
    pub(super) fn describe(&self, bar: u8, size: u64) -> BarInfo {
        let register = self.bars[usize::from(bar)];
        let io = register & 1 != 0;
        BarInfo {
            bar,
            space: if io { AddressSpace::Io } else { AddressSpace::Memory },
            wide: !io && register & 0b110 == 0b100,
            prefetchable: !io && register & 0b1000 != 0,
            size,
            mapped: false,
        }
    }

    /// The address that the function says a BAR has.
    pub(super) fn address(&self, info: &BarInfo) -> u64 {
        address_in(&self.bars, info)
    }
}

/// Which of its spaces a function claims.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Enables {
    pub(super) memory: bool,
    pub(super) io: bool,
}

impl Enables {
    fn in_command(command: u16) -> Self {
        Self { memory: command & COMMAND_MEMORY != 0, io: command & COMMAND_IO != 0 }
    }

    pub(super) fn of(self, space: AddressSpace) -> bool {
        match space {
            AddressSpace::Memory => self.memory,
            AddressSpace::Io => self.io,
        }
    }
}

/// The enables that a write of `data` at `offset` sets, if it touches them.
pub(super) fn enables_written(offset: u16, data: &[u8]) -> Option<Enables> {
    let low_byte = data.get(usize::from(COMMAND.checked_sub(offset)?))?;
    Some(Enables::in_command(u16::from(*low_byte)))
}

/// BAR registers as the guest wrote them.
///
/// The guest alone decides where a BAR is. A backend that names another address is not believed: it
/// could place itself over its neighbours.
#[derive(Clone, Debug, Default)]
pub(super) struct GuestBars([u32; 6]);

impl GuestBars {
    /// Notes a configuration write of any width.
    pub(super) fn write(&mut self, bars: &[BarInfo], offset: u16, data: &[u8]) {
        for (at, byte) in (offset..).zip(data).filter(|(at, _)| (BAR0..AFTER_BARS).contains(at)) {
            let (register, lane) = (usize::from((at - BAR0) / 4), 8 * ((at - BAR0) % 4));
            let old = self.0[register] & !(0xff << lane);
            self.0[register] = old | u32::from(*byte) << lane;
        }
        for info in bars {
            let mask = !(info.size - 1);
            let [low, high] = [mask, mask >> 32].map(|half| (half & 0xffff_ffff) as u32);
            self.0[usize::from(info.bar)] &= low;
            if info.wide {
                self.0[usize::from(info.bar) + 1] &= high;
            }
        }
    }

    /// Forgets a BAR's address: the function was reset.
    pub(super) fn clear(&mut self, info: &BarInfo) {
        self.0[usize::from(info.bar)] = 0;
        if info.wide {
            self.0[usize::from(info.bar) + 1] = 0;
        }
    }

    pub(super) fn address(&self, info: &BarInfo) -> u64 {
        address_in(&self.0, info)
    }
}

fn address_in(bars: &[u32; 6], info: &BarInfo) -> u64 {
    let bar = usize::from(info.bar);
    let low = match info.space {
        AddressSpace::Io => bars[bar] & !0b11,
        AddressSpace::Memory => bars[bar] & !0b1111,
    };
    let high = if info.wide { bars[bar + 1] } else { 0 };
    u64::from(high) << 32 | u64::from(low)
}

/// Where the capabilities are that can stop decode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    power: Option<u16>,
    express: Option<u16>,
    advanced_features: Option<u16>,
}

/// What a configuration write may do to the BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConfigChange {
    /// Nothing.
    Unrelated,
    /// It sets the enables in the Command register, and touches nothing else that matters.
    Command(Enables),
    /// It moves a BAR, changes the power state or resets the function: afterwards, look.
    Reconfigures,
}

impl Capabilities {
    /// Walks the capability list. A backend may send one that loops: 48 are all that fit.
    pub(super) fn find(backend: &impl Backend) -> Result<Self, ClientError> {
        let config = PciRegion::Config.index();
        let byte = |offset: u16| {
            let mut data = [0];
            backend.region_read(config, offset.into(), &mut data).map(|()| data[0])
        };
        let mut found = Self::default();
        if u16::from(byte(STATUS)?) & STATUS_CAPABILITIES == 0 {
            return Ok(found);
        }
        let mut at = u16::from(byte(CAPABILITIES_POINTER)? & !0b11);
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            match byte(at)? {
                CAP_POWER => found.power = Some(at),
                CAP_EXPRESS => found.express = Some(at),
                CAP_ADVANCED_FEATURES => found.advanced_features = Some(at),
                _ => {}
            }
            at = u16::from(byte(at + 1)? & !0b11);
        }
        Ok(found)
    }

    /// Classifies a write of `data` at `offset`.
    pub(super) fn change(&self, offset: u16, data: &[u8]) -> ConfigChange {
        let len = u16::try_from(data.len()).unwrap_or(u16::MAX);
        let end = offset.saturating_add(len);
        let touches = |start: u16, stop: u16| offset < stop && start < end;
        let byte = |capability: Option<u16>, register: u16| {
            capability.is_some_and(|at| touches(at + register, at + register + 1))
        };
        if touches(BAR0, AFTER_BARS)
            || byte(self.power, PMCSR)
            || byte(self.express, DEVICE_CONTROL + 1)
            || byte(self.advanced_features, AF_CONTROL)
        {
            return ConfigChange::Reconfigures;
        }
        match enables_written(offset, data) {
            Some(enables) => ConfigChange::Command(enables),
            None => ConfigChange::Unrelated,
        }
    }

    /// Whether the function is in D0; one without power management always is.
    pub(super) fn in_d0(&self, backend: &impl Backend) -> Result<bool, ClientError> {
        let Some(at) = self.power else { return Ok(true) };
        let mut data = [0];
        backend.region_read(PciRegion::Config.index(), (at + PMCSR).into(), &mut data)?;
        Ok(data[0] & PMCSR_STATE == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_classified_by_the_bytes_they_touch() {
        use ConfigChange::{Command, Reconfigures, Unrelated};
        let capabilities =
            Capabilities { power: Some(0x40), express: Some(0x60), advanced_features: Some(0xa0) };
        let on = Command(Enables { memory: true, io: false });
        let off = Command(Enables::default());
        let rows: &[(u16, &[u8], ConfigChange)] = &[
            (0x04, &[2], on),
            (0x04, &[4, 0], off),
            (0x04, &[7, 4, 0, 0], Command(Enables { memory: true, io: true })),
            (0x05, &[4], Unrelated),
            (0x06, &[0xff, 0xff], Unrelated),
            (0x02, &[0, 0, 2, 0], on),
            (0x0c, &[0; 4], Unrelated),
            (0x0c, &[0; 8], Reconfigures),
            (0x10, &[0xff; 4], Reconfigures),
            (0x27, &[0], Reconfigures),
            (0x28, &[0; 4], Unrelated),
            (0x3c, &[0], Unrelated),
            (0x44, &[3], Reconfigures),
            (0x45, &[0], Unrelated),
            (0x68, &[0; 2], Reconfigures),
            (0x68, &[0], Unrelated),
            (0xa4, &[1], Reconfigures),
            (0xa5, &[1], Unrelated),
            (0x00, &[0; 64], Reconfigures),
        ];
        for (offset, data, change) in rows {
            assert_eq!(capabilities.change(*offset, data), *change, "{offset:#x} {data:x?}");
        }
    }

    #[test]
    fn bars_are_what_the_guest_wrote_in_whatever_widths() {
        let bar = |bar, wide, size| BarInfo {
            bar,
            space: AddressSpace::Memory,
            wide,
            prefetchable: false,
            size,
            mapped: false,
        };
        let infos = [bar(0, false, 0x10_0000), bar(2, true, 0x2_0000_0000)];
        let mut bars = GuestBars::default();
        bars.write(&infos, 0x10, &0xfebf_ffffu32.to_le_bytes());
        assert_eq!(bars.address(&infos[0]), 0xfeb0_0000, "masked by its size");
        bars.write(&infos, 0x12, &[0x10]);
        bars.write(&infos, 0x13, &[0xc0]);
        assert_eq!(bars.address(&infos[0]), 0xc010_0000);
        bars.write(&infos, 0x18, &[0xff; 8]);
        assert_eq!(bars.address(&infos[1]), 0xffff_fffe_0000_0000, "being sized");
        bars.write(&infos, 0x0c, &[0x55; 8]);
        assert_eq!(bars.address(&infos[0]), 0x5550_0000, "a write that starts before the BARs");
        bars.clear(&infos[1]);
        assert_eq!(bars.address(&infos[1]), 0);
    }
}
