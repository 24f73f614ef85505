//! A PCI function as Linux shows it in sysfs.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::mmio::Mapping;
use crate::{Result, ensure};

/// A function, found by its ids.
#[derive(Debug)]
pub(crate) struct Function {
    directory: PathBuf,
    config: File,
}

/// One line of the `resource` attribute: where the kernel put a BAR, and of what kind it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bar {
    pub(crate) len: u64,
    pub(crate) is_memory: bool,
    pub(crate) is_64bit: bool,
    pub(crate) is_prefetchable: bool,
}

/// Bits of the Command register (PCI Express Base Specification, 7.5.1.1.3).
pub(crate) mod command {
    pub(crate) const MEMORY_SPACE: u16 = 1 << 1;
    pub(crate) const BUS_MASTER: u16 = 1 << 2;
    pub(crate) const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// Bits of the Status register (PCI Express Base Specification, 7.5.1.1.4).
pub(crate) mod status {
    pub(crate) const INTERRUPT: u16 = 1 << 3;
}

/// Capability ids (PCI Code and ID Assignment Specification, 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capability {
    PowerManagement = 0x01,
    Msi = 0x05,
    Vendor = 0x09,
    PciExpress = 0x10,
    MsiX = 0x11,
}

/// Offsets in configuration space (PCI Express Base Specification, 7.5.1.1).
pub(crate) const COMMAND: u64 = 0x04;
pub(crate) const STATUS: u64 = 0x06;
const CAPABILITIES_POINTER: u64 = 0x34;

impl Function {
    /// Finds the one function with these ids.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub(crate) fn find(vendor: u64, device: u64) -> Result<Self> {
        let mut found = Self::find_all(vendor, device)?;
        match (found.pop(), found.len()) {
            (Some(function), 0) => Ok(function),
            (Some(_), more) => {
                Err(format!("{} functions {vendor:04x}:{device:04x}", more + 1).into())
            }
            (None, _) => Err(format!("no function {vendor:04x}:{device:04x}").into()),
        }
    }

    /// Finds every function with these ids, in the order of their addresses.
    ///
    /// # Errors
    /// sysfs can't be read.
    pub(crate) fn find_all(vendor: u64, device: u64) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/bus/pci/devices")? {
            let directory = entry?.path();
            // One that is being unplugged loses its attributes before its directory.
            let ids = (hex_attribute(&directory, "vendor"), hex_attribute(&directory, "device"));
            if matches!(ids, (Ok(v), Ok(d)) if (v, d) == (vendor, device)) {
                found.push(directory);
            }
        }
        found.sort();
        found.into_iter().map(Self::at).collect()
    }

    /// The function at a directory of sysfs.
    pub(crate) fn at(directory: PathBuf) -> Result<Self> {
        let config = OpenOptions::new().read(true).write(true).open(directory.join("config"))?;
        Ok(Self { directory, config })
    }

    /// Its address, such as `0000:00:02.0`.
    pub(crate) fn address(&self) -> Result<&str> {
        let name = self.directory.file_name().and_then(|name| name.to_str());
        Ok(name.ok_or("a function has no name")?)
    }

    /// An attribute written in hexadecimal.
    pub(crate) fn hex_attribute(&self, name: &str) -> Result<u64> {
        hex_attribute(&self.directory, name)
    }

    /// Writes an attribute.
    pub(crate) fn set_attribute(&self, name: &str, value: &str) -> Result<()> {
        fs::write(self.directory.join(name), value)
            .map_err(|error| format!("writing {value} to {name}: {error}").into())
    }

    /// Makes a driver take the function.
    ///
    /// # Errors
    /// The driver is not there or does not want it.
    pub(crate) fn bind(&self, driver: &str) -> Result<()> {
        let address = self.address()?;
        self.set_attribute("driver_override", driver)?;
        fs::write("/sys/bus/pci/drivers_probe", address)?;
        let bound = self.link_target("driver")?;
        ensure!(bound == driver, "{address} is driven by {bound}");
        Ok(())
    }

    /// Takes the function away from its driver.
    ///
    /// # Errors
    /// It has none.
    pub(crate) fn unbind(&self) -> Result<()> {
        let address = self.address()?;
        self.set_attribute("driver/unbind", address)?;
        self.set_attribute("driver_override", "\n")
    }

    /// Whether it is still plugged in.
    pub(crate) fn is_present(&self) -> bool {
        self.directory.exists()
    }

    /// The names in a directory of the function, such as its `uio` devices.
    pub(crate) fn names_in(&self, name: &str) -> Result<Vec<String>> {
        fs::read_dir(self.directory.join(name))
            .map_err(|error| format!("{name}: {error}"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    /// The name a symbolic link of the function points to, such as its IOMMU group's number.
    pub(crate) fn link_target(&self, name: &str) -> Result<String> {
        let target =
            fs::read_link(self.directory.join(name)).map_err(|error| format!("{name}: {error}"))?;
        let last = target.file_name().and_then(|last| last.to_str());
        Ok(last.ok_or("a link of a function points nowhere")?.to_owned())
    }

    /// The BAR as the kernel sized and typed it; `None` if it is not implemented.
    pub(crate) fn bar(&self, index: usize) -> Result<Option<Bar>> {
        // Resource flags of the kernel's include/linux/ioport.h.
        const MEMORY: u64 = 0x200;
        const PREFETCH: u64 = 0x2000;
        const MEMORY_64: u64 = 0x0010_0000;
        let resources = fs::read_to_string(self.directory.join("resource"))?;
        let line = resources.lines().nth(index).ok_or("`resource` has too few lines")?;
        let numbers = line.split_whitespace().map(parse_hex).collect::<Result<Vec<u64>>>()?;
        let &[start, end, flags] = numbers.as_slice() else {
            return Err(format!("not a resource: {line}").into());
        };
        Ok((flags != 0).then_some(Bar {
            len: end - start + 1,
            is_memory: flags & MEMORY != 0,
            is_64bit: flags & MEMORY_64 != 0,
            is_prefetchable: flags & PREFETCH != 0,
        }))
    }

    /// Maps a BAR. The kernel refuses while a driver claims it.
    pub(crate) fn map_bar(&self, index: usize) -> Result<Mapping> {
        let bar = self.bar(index)?.ok_or_else(|| format!("no BAR{index}"))?;
        let path = self.directory.join(format!("resource{index}"));
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Mapping::of_file(file, 0, usize::try_from(bar.len)?)
    }

    /// Where a capability starts in configuration space.
    ///
    /// # Errors
    /// The function does not have it, or its list does not end.
    pub(crate) fn capability(&self, wanted: Capability) -> Result<u64> {
        let first = self.capabilities(wanted)?.into_iter().next();
        Ok(first.ok_or_else(|| format!("no {wanted:?} capability"))?)
    }

    /// Where each capability of a kind starts, in the order of the list.
    ///
    /// # Errors
    /// The list does not end.
    pub(crate) fn capabilities(&self, wanted: Capability) -> Result<Vec<u64>> {
        const HAS_CAPABILITIES: u16 = 1 << 4;
        // 192 bytes of capabilities, each of 4 bytes at least.
        const MOST: usize = 48;
        ensure!(self.read_u16(STATUS)? & HAS_CAPABILITIES != 0, "no capability list");
        let mut at = self.read_u8(CAPABILITIES_POINTER)? & !3;
        let mut found = Vec::new();
        for _ in 0..MOST {
            if at == 0 {
                return Ok(found);
            }
            if self.read_u8(u64::from(at))? == wanted as u8 {
                found.push(u64::from(at));
            }
            at = self.read_u8(u64::from(at) + 1)? & !3;
        }
        Err("the capability list does not end".into())
    }

    /// Sets or clears bits of the Command register.
    pub(crate) fn set_command(&self, bits: u16, on: bool) -> Result<()> {
        let before = self.read_u16(COMMAND)?;
        let after = if on { before | bits } else { before & !bits };
        self.config.write_all_at(&after.to_le_bytes(), COMMAND)?;
        let seen = self.read_u16(COMMAND)?;
        ensure!(seen & bits == after & bits, "Command reads {seen:#06x} after {after:#06x}");
        Ok(())
    }

    pub(crate) fn read_u8(&self, offset: u64) -> Result<u8> {
        let mut byte = [0];
        self.config.read_exact_at(&mut byte, offset)?;
        Ok(byte[0])
    }

    pub(crate) fn read_u16(&self, offset: u64) -> Result<u16> {
        let mut bytes = [0; 2];
        self.config.read_exact_at(&mut bytes, offset)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(crate) fn read_u32(&self, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.config.read_exact_at(&mut bytes, offset)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn write_u16(&self, offset: u64, value: u16) -> Result<()> {
        Ok(self.config.write_all_at(&value.to_le_bytes(), offset)?)
    }
}

fn hex_attribute(directory: &Path, name: &str) -> Result<u64> {
    parse_hex(fs::read_to_string(directory.join(name))?.trim())
}

fn parse_hex(text: &str) -> Result<u64> {
    let digits = text.strip_prefix("0x").ok_or_else(|| format!("not hexadecimal: {text}"))?;
    Ok(u64::from_str_radix(digits, 16)?)
}
