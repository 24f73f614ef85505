//! What a function is like when another session has taken the place of one that has ended.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use barkeep_protocol::wire::{DmaAccess, DmaMap, DmaUnmap};
use barkeep_shim::bar::{AddressSpace, ReconnectError, SuspendOrder};
use barkeep_shim::client::{Attended, ClientOptions};
use barkeep_shim::hypervisor::model::Model;
use barkeep_shim::hypervisor::{GuestAddress, MsiMessage, SlotId};
use barkeep_shim::{Frontend, InterruptRoutes, InterruptVector, SessionEvent};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};

use crate::sidecar::Sidecar;

const DEADLINE: Duration = Duration::from_secs(20);
const COMMAND: u16 = 0x04;
const BAR0: u64 = 0xe000_0000;
const BAR2: u64 = 0x10_0000_0000;
const WINDOW: u64 = 0x1_0000;

/// One function that may be connected again, by whoever asks for it.
fn attached(device: &str) -> (Sidecar, Frontend) {
    let sidecar = Sidecar::start(&[device]);
    let mut frontend = Frontend::new(Arc::new(Model::new()), Vec::new(), SlotId(0));
    let options = ClientOptions { deadline: DEADLINE, reconnect: true, ..ClientOptions::default() };
    frontend.attach_with(&sidecar.socket(0), options, SuspendOrder::SlotsFirst).unwrap();
    (sidecar, frontend)
}

fn config<const N: usize>(frontend: &Frontend, offset: u16) -> [u8; N] {
    let mut data = [0; N];
    frontend.config_read(0, offset, &mut data);
    data
}

fn read(frontend: &Frontend, address: u64) -> u32 {
    let mut data = [0; 4];
    frontend.read(AddressSpace::Memory, address, &mut data);
    u32::from_le_bytes(data)
}

/// What the VMM hears of interrupts.
#[derive(Default)]
struct Recorded {
    eventfds: Mutex<Vec<OwnedFd>>,
    routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl InterruptRoutes for Recorded {
    fn connect(&self, _: InterruptVector, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.eventfds.lock().unwrap().push(eventfd.try_clone_to_owned()?);
        Ok(())
    }

    fn disconnect(&self, _: InterruptVector, _: BorrowedFd<'_>) {}

    fn route(&self, _: InterruptVector, message: Option<MsiMessage>) {
        self.routes.lock().unwrap().push(message);
    }
}

/// An edu function in the hands of its driver.
struct Edu<'a>(&'a Frontend);

impl Edu<'_> {
    /// MSI, the BAR, memory and bus mastering.
    fn program(&self, message: MsiMessage) {
        let mut at = config::<1>(self.0, 0x34)[0].into();
        while config::<1>(self.0, at) != [5] {
            at = config::<1>(self.0, at + 1)[0].into();
            assert_ne!(at, 0, "no MSI");
        }
        let address = u32::try_from(message.address).unwrap();
        self.0.config_write(0, at + 4, &address.to_le_bytes());
        let wide = config::<1>(self.0, at + 2)[0] & 0x80 != 0;
        self.0.config_write(0, at + if wide { 12 } else { 8 }, &message.data.to_le_bytes()[..2]);
        self.0.config_write(0, at + 2, &[1, 0]);
        self.0.config_write(0, 0x10, &u32::try_from(BAR0).unwrap().to_le_bytes());
        self.0.config_write(0, COMMAND, &[6, 0]);
    }

    fn interrupt(&self) {
        self.0.write(AddressSpace::Memory, BAR0 + 0x60, &1u32.to_le_bytes());
    }

    /// Copies 8 bytes of guest memory by DMA.
    fn copy(&self, from: u64, to: u64) {
        for (source, destination, command) in [(from, 0x4_0000, 1u64), (0x4_0000, to, 3)] {
            for (register, value) in
                [(0x80, source), (0x88, destination), (0x90, 8), (0x98, command)]
            {
                self.0.write(AddressSpace::Memory, BAR0 + register, &value.to_le_bytes());
            }
            while read(self.0, BAR0 + 0x98) & 1 != 0 {
                std::thread::yield_now();
            }
        }
    }
}

/// Guest memory at `address`, shared with the backend.
fn share(frontend: &Frontend, address: u64) -> OwnedFd {
    let file = memfd_create("returns", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, WINDOW).unwrap();
    let access = DmaAccess::READ | DmaAccess::WRITE;
    let map = DmaMap { access, file_offset: 0, address, size: WINDOW };
    frontend.functions()[0].client().dma_map(&map, Some(file.try_clone().unwrap())).unwrap();
    file
}

fn word(file: &OwnedFd, at: u64) -> u64 {
    let mut data = [0; 8];
    assert_eq!(pread(file, &mut data, at).unwrap(), data.len());
    u64::from_le_bytes(data)
}

fn set_word(file: &OwnedFd, at: u64, value: u64) {
    assert_eq!(pwrite(file, &value.to_le_bytes(), at).unwrap(), 8);
}

fn come_back(sidecar: &mut Sidecar, frontend: &Frontend) {
    sidecar.kill();
    frontend.session_ended(0);
    sidecar.start_again();
    frontend.reconnect(0).unwrap();
}

#[test]
fn it_is_as_after_a_reset_and_what_the_vmm_has_set_up_is_there_again() {
    let (mut sidecar, mut frontend) = attached("edu");
    let recorded = Arc::new(Recorded::default());
    frontend.connect_interrupts(0, recorded.clone() as _).unwrap();
    let eventfd = recorded.eventfds.lock().unwrap().remove(0);
    let memory = share(&frontend, WINDOW);
    let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    let edu = Edu(&frontend);
    for round in 1..=3 {
        edu.program(message);
        assert_eq!(recorded.routes.lock().unwrap().last(), Some(&Some(message)));
        edu.interrupt();
        let mut count = [0; 8];
        rustix::io::read(&eventfd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1, "session {round}");
        set_word(&memory, 0, round);
        edu.copy(WINDOW, WINDOW + 0x1000);
        assert_eq!(word(&memory, 0x1000), round);

        come_back(&mut sidecar, &frontend);
        assert_eq!(config(&frontend, COMMAND), [0, 0]);
        assert_eq!(config(&frontend, 0x10), [0; 4]);
        assert_eq!(read(&frontend, BAR0), u32::MAX);
        assert_eq!(recorded.routes.lock().unwrap().last(), Some(&None), "session {round}");
    }
    let outages = frontend.functions()[0].outages();
    assert_eq!((outages.gone, outages.back), (3, 3));
}

#[test]
fn memory_that_was_withdrawn_meanwhile_is_not_there_again() {
    let (mut sidecar, frontend) = attached("edu");
    let (kept, withdrawn) = (share(&frontend, WINDOW), share(&frontend, 2 * WINDOW));
    sidecar.kill();
    frontend.session_ended(0);
    let client = frontend.functions()[0].client();
    // Nobody uses it any more, whatever the answer is.
    let _ = client.dma_unmap(&DmaUnmap::range(2 * WINDOW, WINDOW));
    sidecar.start_again();
    frontend.reconnect(0).unwrap();
    let edu = Edu(&frontend);
    edu.program(MsiMessage { address: 0xfee0_1000, data: 0x41 });
    set_word(&kept, 0, 7);
    edu.copy(WINDOW, WINDOW + 0x1000);
    edu.copy(WINDOW, 2 * WINDOW);
    assert_eq!((word(&kept, 0x1000), word(&withdrawn, 0)), (7, 0));
}

#[test]
fn an_attendant_takes_its_memory_away_at_once_and_connects_it_again() {
    let (mut sidecar, frontend) = attached("ivshmem,size=64K");
    let function = &frontend.functions()[0];
    let enable = || {
        frontend.config_write(0, 0x18, &BAR2.to_le_bytes());
        frontend.config_write(0, COMMAND, &[2, 0]);
    };
    let (told, events) = mpsc::channel();
    std::thread::scope(|scope| {
        let attend = || frontend.attend_with(0, &mut |event| told.send(event).unwrap());
        let attendant = scope.spawn(attend);
        for _ in 0..3 {
            enable();
            assert_eq!(function.mapped_at(2), Some(GuestAddress(BAR2)));
            frontend.write(AddressSpace::Memory, BAR2, &7u32.to_le_bytes());
            sidecar.kill();
            assert_eq!(events.recv_timeout(DEADLINE), Ok(SessionEvent::Gone));
            assert_eq!(function.mapped_at(2), None);
            assert_eq!(read(&frontend, BAR2), u32::MAX);
            sidecar.start_again();
            let event = events.recv_timeout(DEADLINE);
            assert!(matches!(event, Ok(SessionEvent::Back { .. })), "{event:?}");
            assert_eq!(function.mapped_at(2), None, "the guest has not programmed it yet");
            assert_eq!(read(&frontend, BAR2), u32::MAX);
            enable();
            assert_eq!(read(&frontend, BAR2), 0, "memory of its own");
        }
        frontend.stop_attending(0);
        assert_eq!(attendant.join().unwrap(), Attended::Stopped);
    });
}

#[test]
fn another_function_does_not_take_its_place() {
    let (mut sidecar, frontend) = attached("ivshmem,size=64K");
    assert!(matches!(frontend.reconnect(0), Err(ReconnectError::Alive)));
    let others = [("edu", "PCI ids"), ("ivshmem,size=128K", "regions"), ("virtio-rng", "PCI ids")];
    for (other, difference) in others {
        sidecar.kill();
        frontend.session_ended(0);
        sidecar.start_as(&[other]);
        let result = frontend.reconnect(0);
        let Err(ReconnectError::Different(what)) = result else { panic!("{other}: {result:?}") };
        assert_eq!(what, difference, "{other}");
        assert_eq!(config(&frontend, 0), [0xff; 4], "{other}");
    }
    come_back(&mut sidecar, &frontend);
    assert_eq!(config(&frontend, 0), [0xf4, 0x1a, 0x10, 0x11]);
}

#[test]
fn nobody_is_connected_again_who_was_not_attached_for_it() {
    let mut sidecar = Sidecar::start(&["edu"]);
    let mut frontend = Frontend::new(Arc::new(Model::new()), Vec::new(), SlotId(0));
    frontend.attach(&sidecar.socket(0), DEADLINE, SuspendOrder::SlotsFirst).unwrap();
    sidecar.kill();
    sidecar.start_again();
    assert_eq!(frontend.attend(0), Attended::Ended);
    assert!(matches!(frontend.reconnect(0), Err(ReconnectError::NotWanted)));
    assert_eq!(config(&frontend, 0), [0xff; 4]);
}
