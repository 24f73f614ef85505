//! A device without hardware: what the kernel would do, as far as the bridge can tell.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

use super::{
    Description, IrqCommand, IrqDescription, RegionDescription, VfioDevice, VfioFunction, VfioIrq,
    VfioRegion,
};
use crate::dma::{DmaAccess, DmaTable, HostMemory, Iommu, Iova};

pub(crate) const BAR_SIZE: u64 = 0x4000;

/// A handle of the test's to what the function owns.
#[derive(Clone, Debug)]
pub(crate) struct Fake(Arc<Mutex<State>>);

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: Vec<u8>,
    pub(crate) bar: Vec<u8>,
    /// What happens to the next accesses to BAR 0, one each.
    pub(crate) races: VecDeque<Race>,
    /// What was done, in order.
    pub(crate) log: Vec<String>,
    /// The kernel has only so many vectors.
    pub(crate) vectors: usize,
    pub(crate) irq_error: Option<Errno>,
    /// Nothing answers any more.
    pub(crate) unplugged: bool,
    pub(crate) mapped: Vec<(u64, u64, DmaAccess)>,
    pub(crate) iommu_error: Option<Errno>,
    /// A window that the IOMMU does not give back.
    pub(crate) stuck: Option<u64>,
}

/// What somebody else does between a look at decode and the access.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Race {
    /// Clears PCI_COMMAND.MEM.
    Off,
    /// Clears it and sets it again.
    OffAndOn,
}

#[derive(Debug)]
struct Device {
    fake: Fake,
    file: OwnedFd,
}

impl Fake {
    pub(crate) fn new(config: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State {
            config,
            bar: vec![0x5a; usize::try_from(BAR_SIZE).unwrap()],
            races: VecDeque::new(),
            log: Vec::new(),
            vectors: usize::MAX,
            irq_error: None,
            unplugged: false,
            mapped: Vec::new(),
            iommu_error: None,
            stuck: None,
        })))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// What was done since the last question.
    pub(crate) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.state().log)
    }

    /// The function on top, with one mappable BAR, 8 MSI and 4 MSI-X vectors.
    pub(crate) fn function(&self, resizable: bool) -> VfioFunction {
        let mut description = Description { resettable: true, ..Description::default() };
        let readable = RegionDescription { readable: true, writable: true, ..Default::default() };
        let bar = 0..BAR_SIZE;
        description.regions[0] =
            RegionDescription { size: BAR_SIZE, mappable: vec![bar], ..readable.clone() };
        let size = self.state().config.len() as u64;
        let rom = RegionDescription { size: 0x800, readable: true, ..Default::default() };
        description.regions[6] = rom;
        description.regions[7] = RegionDescription { size, ..readable };
        let irq = |count| IrqDescription { count, eventfd: true, resizable, ..Default::default() };
        let intx = IrqDescription { maskable: true, automasked: true, ..irq(1) };
        description.irqs = [intx, irq(8), irq(4), irq(1), irq(0)];
        let file = memfd_create("device", MemfdFlags::CLOEXEC).unwrap();
        let device = Device { fake: self.clone(), file };
        let dma = DmaTable::behind(Box::new(self.clone()), 16);
        let function = VfioFunction::new(Box::new(device), description, dma).unwrap();
        self.log();
        function
    }
}

impl VfioDevice for Device {
    fn read(&self, region: VfioRegion, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let mut state = self.fake.state();
        state.access(region)?;
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&state.memory(region)[start..start + data.len()]);
        Ok(())
    }

    fn write(&self, region: VfioRegion, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let mut state = self.fake.state();
        state.access(region)?;
        if region == VfioRegion::Config {
            state.log.push(format!("config {offset:#x} {data:x?}"));
        } else if region == VfioRegion::Rom {
            return Err(Errno::INVAL);
        }
        let start = usize::try_from(offset).unwrap();
        state.memory(region)[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        self.fake.state().log.push("reset".into());
        Ok(())
    }

    fn set_irqs(&self, irq: VfioIrq, command: IrqCommand<'_>) -> Result<u32, Errno> {
        let mut state = self.fake.state();
        let text = match command {
            IrqCommand::Connect { start, eventfds } => {
                let marks: String =
                    eventfds.iter().map(|fd| if fd.is_some() { '+' } else { '-' }).collect();
                format!("connect {start} {marks}")
            }
            IrqCommand::Trigger { start, which } => {
                let marks: String = which.iter().map(|it| if *it { '!' } else { '.' }).collect();
                format!("trigger {start} {marks}")
            }
            IrqCommand::UnmaskBy(eventfd) => format!("unmask by {}", eventfd.is_some()),
            simple => format!("{simple:?}").to_lowercase(),
        };
        state.log.push(format!("{irq:?} {text}"));
        if let (IrqCommand::Connect { eventfds, .. }, true) = (command, state.vectors < usize::MAX)
            && eventfds.len() > state.vectors
        {
            return Ok(u32::try_from(state.vectors).unwrap());
        }
        match command {
            IrqCommand::Disable => Ok(0),
            _ => state.irq_error.map_or(Ok(0), Err),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl State {
    fn memory(&mut self, region: VfioRegion) -> &mut Vec<u8> {
        match region {
            VfioRegion::Config => &mut self.config,
            _ => &mut self.bar,
        }
    }

    fn access(&mut self, region: VfioRegion) -> Result<(), Errno> {
        if self.unplugged {
            return Err(Errno::NODEV);
        }
        if region == VfioRegion::Config {
            return Ok(());
        }
        match self.races.pop_front() {
            Some(Race::Off) => self.config[4] &= !2,
            Some(Race::OffAndOn) => return Err(Errno::IO),
            None => {}
        }
        if self.config[4] & 2 == 0 { Err(Errno::IO) } else { Ok(()) }
    }
}

impl Iommu for Fake {
    fn map(&self, iova: Iova, memory: HostMemory, access: DmaAccess) -> Result<(), Errno> {
        let mut state = self.state();
        if let Some(errno) = state.iommu_error {
            return Err(errno);
        }
        state.mapped.push((iova.0, memory.size(), access));
        Ok(())
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), Errno> {
        let mut state = self.state();
        if let Some(errno) = state.iommu_error {
            return Err(errno);
        }
        if state.stuck == Some(iova.0) {
            return Err(Errno::BUSY);
        }
        state.log.push(format!("unmap {:#x}", iova.0));
        let before = state.mapped.len();
        state.mapped.retain(|(at, length, _)| (*at, *length) != (iova.0, size));
        if state.mapped.len() + 1 == before { Ok(()) } else { Err(Errno::INVAL) }
    }
}

/// Configuration space of a function with power management (0x60), MSI of 8 vectors (0x40), MSI-X of
/// 4 (0x50, table at BAR 0 + 0x1040) and FLR (0x70), and extended capabilities.
pub(crate) fn config(extended: &[(u16, usize)]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
    put(0, &[0x34, 0x12, 0xe8, 0x11, 0x07, 0, 0x10, 0]);
    put(0x0e, &[0x80]);
    put(0x10, &[0, 0, 0, 0xfe]);
    put(0x34, &[0x40]);
    put(0x40, &[0x05, 0x50, 0x86, 0]);
    put(0x50, &[0x11, 0x60, 3, 0, 0x40, 0x10, 0, 0]);
    put(0x60, &[0x01, 0x70, 3, 0, 0, 0]);
    put(0x70, &[0x10, 0, 2, 0]);
    for (position, (id, at)) in extended.iter().enumerate() {
        let next = extended.get(position + 1).map_or(0, |(_, next)| *next);
        let link = u16::try_from(next << 4 | 1).unwrap();
        put(*at, &[id.to_le_bytes(), link.to_le_bytes()].concat());
    }
    bytes
}
