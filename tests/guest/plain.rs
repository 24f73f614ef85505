//! Backends that know nothing of barkeep's extensions, and one that lies about its BAR.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use barkeep_protocol::transport::{Frame, Received, Receiver, Sender};
use barkeep_protocol::wire::{
    Capabilities, DeviceFlags, DeviceInfo, RegionAccess, RegionFlags, RegionInfo, Request, Version,
};
use barkeep_shim::Frontend;
use barkeep_shim::bar::{AddressSpace, SuspendOrder};
use barkeep_shim::hypervisor::SlotId;
use barkeep_shim::hypervisor::model::Model;

/// What the device says wherever it is read, whether or not it should.
const DEVICE: u8 = 0x5e;
const DEADLINE: Duration = Duration::from_secs(20);

/// A server with one BAR of 4 KiB that never looks at its Command register.
struct Plain {
    config: [u8; 256],
    /// Says that BAR0 is there, whatever was written to it.
    claims: Option<u32>,
}

fn serve(claims: Option<u32>) -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("plain.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        Plain { config: [0; 256], claims }.run(&socket);
    });
    (directory, path)
}

impl Plain {
    fn run(&mut self, socket: &UnixStream) {
        let (mut receiver, mut sender) = (Receiver::default(), Sender::default());
        loop {
            let frame = match receiver.receive(socket) {
                Ok(Received::Message(message)) => message.into_frame(),
                Ok(Received::Pending) => continue,
                _ => return,
            };
            let request = Request::parse(frame.header.command, &frame.body).unwrap();
            let body = self.answer(&request);
            sender.queue(Frame::reply(&frame.header, body));
            if sender.flush(socket).is_err() {
                return;
            }
        }
    }

    fn answer(&mut self, request: &Request<'_>) -> Vec<u8> {
        match request {
            Request::Version(_) => {
                Version { major: 0, minor: 1, capabilities: Capabilities::default() }.to_bytes()
            }
            Request::GetInfo => {
                DeviceInfo { flags: DeviceFlags::PCI, num_regions: 9, num_irqs: 5 }.to_bytes()
            }
            Request::GetRegionInfo(query) => RegionInfo {
                flags: RegionFlags::READ | RegionFlags::WRITE,
                index: query.index,
                size: if query.index == 0 { 4096 } else { 0 },
                file_offset: 0,
                sparse: Vec::new(),
            }
            .to_bytes(query.argsz),
            Request::RegionRead(access) => {
                let mut body = access.reply_buffer();
                let data = &mut body[RegionAccess::SIZE..];
                let from = usize::try_from(access.offset).unwrap();
                if access.region == 7 {
                    data.copy_from_slice(&self.config()[from..from + data.len()]);
                } else {
                    data.fill(DEVICE);
                }
                body
            }
            Request::RegionWrite(write) => {
                let from = usize::try_from(write.access.offset).unwrap();
                if write.access.region == 7 {
                    self.config[from..from + write.data.len()].copy_from_slice(write.data);
                }
                write.access.to_bytes()
            }
            other => panic!("not asked of this server: {other:?}"),
        }
    }

    fn config(&self) -> [u8; 256] {
        let mut config = self.config;
        if let Some(address) = self.claims {
            config[0x10..0x14].copy_from_slice(&address.to_le_bytes());
        }
        config
    }
}

fn read(frontend: &Frontend, address: u64) -> u8 {
    let mut data = [0];
    frontend.read(AddressSpace::Memory, address, &mut data);
    data[0]
}

fn place(frontend: &Frontend, function: usize, address: u32) {
    frontend.config_write(function, 0x10, &address.to_le_bytes());
    frontend.config_write(function, 0x04, &[2, 0]);
}

#[test]
fn a_server_that_ignores_its_command_register_is_gated_by_the_shim() {
    let (_directory, path) = serve(None);
    let mut frontend = Frontend::new(Arc::new(Model::new()), Vec::new(), SlotId(1));
    frontend.attach(&path, DEADLINE, SuspendOrder::SlotsFirst).unwrap();
    place(&frontend, 0, 0xc000_0000);
    assert_eq!(read(&frontend, 0xc000_0010), DEVICE);
    frontend.config_write(0, 0x04, &[0, 0]);
    assert_eq!(read(&frontend, 0xc000_0010), 0xff, "decode is off");
    frontend.config_write(0, 0x04, &[2, 0]);
    assert_eq!(read(&frontend, 0xc000_0010), DEVICE);
}

#[test]
fn a_backend_can_not_place_itself_over_its_neighbour() {
    let neighbour = 0xc000_0000;
    let (_first, liar) = serve(Some(neighbour));
    let (_second, honest) = serve(None);
    let mut frontend = Frontend::new(Arc::new(Model::new()), Vec::new(), SlotId(1));
    for path in [&liar, &honest] {
        frontend.attach(path, DEADLINE, SuspendOrder::SlotsFirst).unwrap();
    }
    place(&frontend, 0, 0xd000_0000);
    place(&frontend, 1, neighbour);
    frontend.config_write(1, 0x04, &[0, 0]);
    assert_eq!(read(&frontend, neighbour.into()), 0xff, "only the neighbour answers there");
    // Whoever says that it is elsewhere than the guest put it decodes nowhere.
    frontend.config_write(0, 0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(read(&frontend, 0xd000_0000), 0xff);
}
