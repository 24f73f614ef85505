use barkeep_protocol::wire::{
    BarkeepExtensions, DeviceInfo, Errno, FaultReport, FaultVerdict, RegionInfo, RegionState,
};

use super::*;
use crate::hypervisor::{HypervisorError, HypervisorKind, SlotId, SlotMapping};

/// The 256 bytes of a conventional function.
#[derive(Debug)]
struct Conventional([u8; 0x100]);

type Answer<T> = Result<T, ClientError>;

fn refused<T>() -> Answer<T> {
    Err(ClientError::Refused(Errno::INVAL))
}

impl Backend for Conventional {
    fn name(&self) -> String {
        "conventional".into()
    }
    fn is_dead(&self) -> bool {
        false
    }
    fn extensions(&self) -> BarkeepExtensions {
        BarkeepExtensions::default()
    }
    fn device_info(&self) -> Answer<DeviceInfo> {
        refused()
    }
    fn region_info(&self, _: u32) -> Answer<(RegionInfo, Option<OwnedFd>)> {
        refused()
    }
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Answer<()> {
        let at = usize::try_from(offset).unwrap();
        let Some(bytes) = self.0.get(at..at + data.len()) else { return refused() };
        data.copy_from_slice(bytes);
        Ok(())
    }
    fn region_write(&self, _: u32, _: u64, _: &[u8]) -> Answer<()> {
        refused()
    }
    fn reset(&self) -> Answer<()> {
        refused()
    }
    fn memory_fault(&self, _: &FaultReport) -> Answer<FaultVerdict> {
        refused()
    }
    fn region_state(&self, _: u32) -> Answer<RegionState> {
        refused()
    }
}

#[test]
fn msi_is_read_up_to_the_end_of_configuration_space() {
    let rows: [(u16, &[u8], u64); 2] = [
        (0xf4, &[5, 0, 0x01, 0, 0, 0x10, 0xe0, 0xfe, 0x41, 0], 0xfee0_1000),
        (0xf0, &[5, 0, 0x81, 0, 0, 0x10, 0xe0, 0xfe, 1, 0, 0, 0, 0x41, 0], 0x1_fee0_1000),
    ];
    for (at, capability, address) in rows {
        let mut config = [0; 0x100];
        config[usize::from(at)..][..capability.len()].copy_from_slice(capability);
        let messages = MsiMessages::read(&Conventional(config), at).unwrap().unwrap();
        assert_eq!(messages.of(0), Some(MsiMessage { address, data: 0x41 }), "{at:#x}");
    }
}

/// Which interrupt numbers are in use.
#[derive(Debug, Default)]
struct InUse(Mutex<Vec<u32>>);

impl Hypervisor for InUse {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Model
    }
    fn map_slot(&self, _: SlotId, _: SlotMapping) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn unmap_slot(&self, _: SlotId) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn add_irqfd(&self, gsi: u32, _: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        let mut used = self.0.lock().unwrap();
        assert!(!used.contains(&gsi), "{gsi} is in use");
        used.push(gsi);
        Ok(())
    }
    fn remove_irqfd(&self, gsi: u32, _: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        self.0.lock().unwrap().retain(|other| *other != gsi);
        Ok(())
    }
}

#[test]
fn interrupt_numbers_are_given_out_again() {
    let numbers = Arc::new(InUse::default());
    let routes = HypervisorRoutes::new(numbers.clone() as _, 24);
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let vector = |vector| InterruptVector { function: 0, kind: MsiKind::MsiX, vector };
    for _ in 0..3 {
        (0..4).for_each(|number| routes.connect(vector(number), event.as_fd()).unwrap());
        let mut used = numbers.0.lock().unwrap().clone();
        used.sort_unstable();
        assert_eq!(used, [24, 25, 26, 27], "a kernel has few thousand");
        (0..4).for_each(|number| routes.disconnect(vector(number), event.as_fd()));
        assert!(numbers.0.lock().unwrap().is_empty());
    }
}
