//! A host bridge's two ways into configuration space: ports 0xCF8/0xCFC and ECAM.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::Frontend;
use crate::bar::AddressSpace;

/// ECAM of segment 0, buses 0 to 255 (PCI Firmware 3.0, 4.1.1).
pub(super) const ECAM_BASE: u64 = 0xb000_0000;
/// Length of ECAM in bytes.
pub(super) const ECAM_SIZE: u64 = 256 << 20;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;

/// Routes a guest's accesses: configuration space by one of the two ways, everything else to the
/// BARs.
#[derive(Debug)]
pub(super) struct PciHost {
    frontend: Frontend,
    config_address: AtomicU32,
}

/// A place in configuration space: which function, if there is one, and the register.
struct ConfigTarget {
    function: usize,
    register: u16,
}

impl PciHost {
    pub(super) fn new(frontend: Frontend) -> Self {
        Self { frontend, config_address: AtomicU32::new(0) }
    }

    pub(super) fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    pub(super) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match ecam_target(address) {
            Some(ConfigTarget { function, register }) => {
                self.frontend.config_read(function, register, data);
            }
            None => self.frontend.read(AddressSpace::Memory, address, data),
        }
    }

    pub(super) fn mmio_write(&self, address: u64, data: &[u8]) {
        match ecam_target(address) {
            Some(ConfigTarget { function, register }) => {
                self.frontend.config_write(function, register, data);
            }
            None => self.frontend.write(AddressSpace::Memory, address, data),
        }
    }

    pub(super) fn port_read(&self, port: u16, data: &mut [u8]) {
        if port == CONFIG_ADDRESS && data.len() == 4 {
            data.copy_from_slice(&self.config_address.load(Ordering::Relaxed).to_le_bytes());
        } else if is_config_data(port, data.len()) {
            match self.config_data_target(port) {
                Some(target) => self.frontend.config_read(target.function, target.register, data),
                None => data.fill(0xff),
            }
        } else {
            self.frontend.read(AddressSpace::Io, port.into(), data);
        }
    }

    pub(super) fn port_write(&self, port: u16, data: &[u8]) {
        if port == CONFIG_ADDRESS
            && let Ok(bytes) = data.try_into()
        {
            self.config_address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        } else if is_config_data(port, data.len()) {
            if let Some(target) = self.config_data_target(port) {
                self.frontend.config_write(target.function, target.register, data);
            }
        } else {
            self.frontend.write(AddressSpace::Io, port.into(), data);
        }
    }

    fn config_data_target(&self, port: u16) -> Option<ConfigTarget> {
        let address = self.config_address.load(Ordering::Relaxed);
        if address & CONFIG_ENABLE == 0 {
            return None;
        }
        let bdf = (address >> 8) & 0xffff;
        let [register, ..] = (address & 0xfc).to_le_bytes();
        let register = u16::from(register) + (port - CONFIG_DATA);
        Some(ConfigTarget { function: function_at(bdf)?, register })
    }
}

/// An access within the four ports; one that leaves them is none to configuration space.
fn is_config_data(port: u16, len: usize) -> bool {
    (CONFIG_DATA..CONFIG_DATA + 4).contains(&port) && usize::from(port - CONFIG_DATA) + len <= 4
}

fn ecam_target(address: u64) -> Option<ConfigTarget> {
    let offset = address.checked_sub(ECAM_BASE).filter(|offset| *offset < ECAM_SIZE)?;
    let bdf = u32::try_from(offset >> 12).ok()?;
    let register = u16::try_from(offset & 0xfff).ok()?;
    // A function that is not there answers as one: the index is beyond all that are attached.
    Some(ConfigTarget { function: function_at(bdf).unwrap_or(usize::MAX), register })
}

/// Function N is device N on bus 0.
fn function_at(bdf: u32) -> Option<usize> {
    let (bus, device, function) = (bdf >> 8, (bdf >> 3) & 0x1f, bdf & 7);
    (bus == 0 && function == 0).then_some(device as usize)
}
