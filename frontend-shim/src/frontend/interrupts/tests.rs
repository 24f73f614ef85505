use barkeep_protocol::wire::{
    BarkeepExtensions, DeviceInfo, Errno, FaultReport, FaultVerdict, RegionInfo, RegionState,
};

use super::*;

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
