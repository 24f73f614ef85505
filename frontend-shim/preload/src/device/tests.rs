mod memory;
mod vfio;
mod windows;

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard};

use rustix::io::Errno;

use super::{DeviceId, Source};
use crate::Shim;
use crate::status::Status;
use crate::system::{Answer, Duplicate, Mmap, Mremap, System};

const GET_INFO: u64 = 0x3b6b;
const GET_REGION_INFO: u64 = 0x3b6c;
const RESET: u64 = 0x3b6f;
/// A VFIO device, and its regions, where the kernel has them: each at its index times 2^40.
pub(crate) const DEVICE: RawFd = 20;
pub(crate) const CONFIG: u64 = 7 << 40;
pub(crate) const VM: u32 = 3;
const COMMAND: usize = 0x04;
const MEMORY: u8 = 2;

/// A kernel with VFIO devices, each a configuration space and the sizes of six BARs.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    world: Mutex<World>,
}

#[derive(Debug, Default)]
pub(crate) struct World {
    devices: HashMap<RawFd, FakeDevice>,
    links: HashMap<RawFd, &'static [u8]>,
    no_proc: bool,
    /// The next answer of a call that gives an address or a descriptor, or nothing.
    answer: Option<Answer<usize>>,
    process: u32,
    pub(crate) reads: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct FakeDevice {
    pci: bool,
    config: Vec<u8>,
    sizes: [u64; 6],
}

impl Default for FakeDevice {
    /// BAR 0 has 32 bits and a page, BAR 1 is of ports, BAR 2 has 64 bits, BAR 4 has less than a page.
    fn default() -> Self {
        let mut config = vec![0; 256];
        config[0x06] = 0x10;
        config[0x34] = 0x50;
        config[0x50..0x52].copy_from_slice(&[0x05, 0x60]);
        config[0x60..0x62].copy_from_slice(&[0x01, 0x00]);
        let mut device = Self { pci: true, config, sizes: [0x1000, 0x20, 0x10_0000, 0, 0x80, 0] };
        device.set(0x10, 0xfe00_0000);
        device.set(0x14, 0xc001);
        device.set(0x18, 0xc);
        device.set(0x1c, 0x38);
        device.set(0x20, 0xfe00_1000);
        device
    }
}

impl FakeDevice {
    fn set(&mut self, at: usize, value: u32) {
        self.config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

impl Fake {
    fn with_device() -> Self {
        let fake = Self::default();
        fake.world().plug(DEVICE);
        fake
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("a test has failed already")
    }
}

impl World {
    pub(crate) fn plug(&mut self, fd: RawFd) {
        self.devices.insert(fd, FakeDevice::default());
        self.links.insert(fd, b"anon_inode:[vfio-device]");
    }

    pub(crate) fn config(&mut self, fd: RawFd) -> &mut FakeDevice {
        self.devices.get_mut(&fd).expect("the test has plugged it")
    }

    fn answer(&mut self) -> Answer<usize> {
        self.answer.take().unwrap_or(Err(Errno::INVAL))
    }
}

impl System for Fake {
    fn ask(&self, fd: RawFd, request: u64, argument: &mut [u8]) -> Answer<i32> {
        let world = self.world();
        let device = world.devices.get(&fd).ok_or(Errno::NOTTY)?;
        match request {
            GET_INFO => {
                assert_eq!(argument[..4], [16, 0, 0, 0]);
                argument[4] = if device.pci { 2 } else { 4 };
            }
            GET_REGION_INFO => {
                assert_eq!(argument[..4], [32, 0, 0, 0]);
                let index = argument[8];
                let size = match index {
                    0..=5 => device.sizes[usize::from(index)],
                    7 => device.config.len() as u64,
                    _ => return Err(Errno::INVAL),
                };
                argument[16..24].copy_from_slice(&size.to_le_bytes());
                argument[24..32].copy_from_slice(&(u64::from(index) << 40).to_le_bytes());
            }
            _ => return Err(Errno::NOTTY),
        }
        Ok(0)
    }

    fn pread(&self, fd: RawFd, data: &mut [u8], offset: u64) -> Answer<usize> {
        let mut world = self.world();
        world.reads += 1;
        let device = world.devices.get(&fd).ok_or(Errno::BADF)?;
        let at = usize::try_from(offset.checked_sub(CONFIG).ok_or(Errno::INVAL)?)
            .map_err(|_| Errno::INVAL)?;
        let from = device.config.get(at..at + data.len()).ok_or(Errno::INVAL)?;
        data.copy_from_slice(from);
        Ok(data.len())
    }

    fn link(&self, fd: RawFd) -> Answer<Vec<u8>> {
        let world = self.world();
        if world.no_proc {
            return Err(Errno::NOENT);
        }
        world.links.get(&fd).map(|link| link.to_vec()).ok_or(Errno::NOENT)
    }

    fn mmap(&self, _: Mmap) -> Answer<usize> {
        self.world().answer()
    }

    fn munmap(&self, _: usize, _: usize) -> Answer<()> {
        self.world().answer().map(drop)
    }

    fn mremap(&self, _: Mremap) -> Answer<usize> {
        self.world().answer()
    }

    fn close(&self, fd: RawFd) -> Answer<()> {
        self.world().devices.remove(&fd).map(drop).ok_or(Errno::BADF)
    }

    fn close_range(&self, first: u32, last: u32, flags: i32) -> Answer<()> {
        let closed = |fd: RawFd| (first..=last).contains(&fd.unsigned_abs());
        if flags == 0 {
            self.world().devices.retain(|fd, _| !closed(*fd));
        }
        Ok(())
    }

    fn duplicate(&self, fd: RawFd, _: Duplicate) -> Answer<RawFd> {
        let mut world = self.world();
        let new = world.answer()?;
        let new = RawFd::try_from(new).map_err(|_| Errno::BADF)?;
        if let Some(device) = world.devices.get(&fd).cloned() {
            world.devices.insert(new, device);
        }
        Ok(new)
    }

    fn process(&self) -> u32 {
        self.world().process
    }
}

/// What the VMM does to the process.
impl Shim<Fake> {
    pub(crate) fn faked() -> Self {
        let shim = Self::new(Fake::with_device(), Status::private(true));
        shim.vfio_asked(DEVICE, GET_REGION_INFO);
        shim
    }

    pub(crate) fn device(&self) -> DeviceId {
        let mut all = self.devices.table.all();
        all.next().expect("a device shows when its regions are asked for").0
    }

    /// Writes to the configuration space as the VMM does.
    fn write_config(&self, at: usize, data: &[u8]) {
        let device = self.device().0;
        let before = self.device_to_be_written(device, CONFIG + at as u64, data.len());
        self.system.world().config(DEVICE).config[at..at + data.len()].copy_from_slice(data);
        if let Some(before) = before {
            self.device_written(device, before);
        }
    }

    fn answering(&self, answer: Answer<usize>) -> &Self {
        self.system.world().answer = Some(answer);
        self
    }

    pub(crate) fn map(&self, fd: RawFd, start: usize, len: usize, flags: i32, offset: u64) {
        let request = Mmap {
            address: start,
            len,
            protection: 3,
            flags,
            fd,
            offset: i64::try_from(offset).expect("offsets of tests are small"),
        };
        assert_eq!(self.answering(Ok(start)).mmap(request), Ok(start));
    }

    fn source_of(&self) -> Option<Source> {
        self.source(self.device())
    }
}
