//! Message-signalled interrupts, from the device to whoever takes them into the guest.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use barkeep_shim::bar::{AddressSpace, SuspendOrder};
use barkeep_shim::hypervisor::model::Model;
use barkeep_shim::hypervisor::{MsiMessage, SlotId};
use barkeep_shim::{
    Frontend, HypervisorRoutes, InterruptError, InterruptRoutes, InterruptVector, MsiKind,
};

use crate::sidecar::Sidecar;

const BAR0: u64 = 0xe000_0000;
const INTERRUPT_RAISE: u64 = 0x60;

#[derive(Default)]
struct Recorded {
    eventfds: Mutex<Vec<(InterruptVector, OwnedFd)>>,
    routes: Mutex<Vec<(InterruptVector, Option<MsiMessage>)>>,
    gone: Mutex<Vec<InterruptVector>>,
}

impl InterruptRoutes for Recorded {
    fn connect(&self, vector: InterruptVector, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.eventfds.lock().unwrap().push((vector, eventfd.try_clone_to_owned()?));
        Ok(())
    }

    fn disconnect(&self, vector: InterruptVector, _: BorrowedFd<'_>) {
        self.gone.lock().unwrap().push(vector);
    }

    fn route(&self, vector: InterruptVector, message: Option<MsiMessage>) {
        self.routes.lock().unwrap().push((vector, message));
    }
}

fn config(frontend: &Frontend, offset: u16) -> u8 {
    let mut data = [0];
    frontend.config_read(0, offset, &mut data);
    data[0]
}

/// The MSI capability of function 0.
fn msi(frontend: &Frontend) -> u16 {
    let mut at = u16::from(config(frontend, 0x34));
    while config(frontend, at) != 5 {
        at = u16::from(config(frontend, at + 1));
        assert_ne!(at, 0, "no MSI");
    }
    at
}

#[test]
fn what_the_guest_programs_is_routed_and_what_the_device_raises_is_signalled() {
    let sidecar = Sidecar::start(&["edu"]);
    let recorded = Arc::new(Recorded::default());
    let mut frontend = Frontend::new(Arc::new(Model::new()), Vec::new(), SlotId(0));
    let deadline = Duration::from_secs(20);
    frontend.attach(&sidecar.socket(0), deadline, SuspendOrder::SlotsFirst).unwrap();
    frontend.connect_interrupts(0, recorded.clone() as _).unwrap();
    let vector = InterruptVector { function: 0, kind: MsiKind::Msi, vector: 0 };
    let routes = || std::mem::take(&mut *recorded.routes.lock().unwrap());

    let at = msi(&frontend);
    frontend.config_write(0, at + 4, &0xfee0_1000_u32.to_le_bytes());
    let wide = config(&frontend, at + 2) & 0x80 != 0;
    frontend.config_write(0, at + if wide { 12 } else { 8 }, &[0x41, 0]);
    assert!(routes().iter().all(|(_, message)| message.is_none()), "not enabled yet");
    frontend.config_write(0, at + 2, &[1, 0]);
    let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    assert!(routes().contains(&(vector, Some(message))));

    // Memory and bus mastering.
    frontend.config_write(0, 0x10, &0xe000_0000_u32.to_le_bytes());
    frontend.config_write(0, 4, &[6, 0]);
    frontend.write(AddressSpace::Memory, BAR0 + INTERRUPT_RAISE, &1u32.to_le_bytes());
    let (_, eventfd) = recorded.eventfds.lock().unwrap().remove(0);
    let mut count = [0; 8];
    rustix::io::read(&eventfd, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);

    frontend.config_write(0, at + 2, &[0, 0]);
    assert!(routes().contains(&(vector, None)));
    drop(frontend);
    assert!(recorded.gone.lock().unwrap().contains(&vector));
}

#[test]
fn a_hypervisor_without_irqfds_refuses_and_the_function_works_on() {
    let sidecar = Sidecar::start(&["edu"]);
    let model = Arc::new(Model::new());
    let mut frontend = Frontend::new(model.clone(), Vec::new(), SlotId(0));
    let deadline = Duration::from_secs(20);
    frontend.attach(&sidecar.socket(0), deadline, SuspendOrder::SlotsFirst).unwrap();
    let routes = Arc::new(HypervisorRoutes::new(model, 32));
    let error = frontend.connect_interrupts(0, routes).unwrap_err();
    assert!(matches!(error, InterruptError::Host(_)), "{error}");
    assert_ne!(config(&frontend, 0), 0xff);
}

/// Which vectors somebody listens to.
#[derive(Default)]
struct Listening(Mutex<Vec<InterruptVector>>);

impl InterruptRoutes for Listening {
    fn connect(&self, vector: InterruptVector, _: BorrowedFd<'_>) -> io::Result<()> {
        let mut vectors = self.0.lock().unwrap();
        assert!(!vectors.contains(&vector), "{vector:?} is connected already");
        vectors.push(vector);
        Ok(())
    }

    fn disconnect(&self, vector: InterruptVector, _: BorrowedFd<'_>) {
        self.0.lock().unwrap().retain(|other| *other != vector);
    }

    fn route(&self, _: InterruptVector, _: Option<MsiMessage>) {}
}

#[test]
fn interrupts_that_are_connected_again_are_connected_once_and_stay_so() {
    let sidecar = Sidecar::start(&["edu"]);
    let listening = Arc::new(Listening::default());
    let mut frontend = Frontend::new(Arc::new(Model::new()), Vec::new(), SlotId(0));
    let deadline = Duration::from_secs(20);
    frontend.attach(&sidecar.socket(0), deadline, SuspendOrder::SlotsFirst).unwrap();
    frontend.connect_interrupts(0, listening.clone() as _).unwrap();
    let before = listening.0.lock().unwrap().clone();
    assert!(!before.is_empty());
    frontend.connect_interrupts(0, listening.clone() as _).unwrap();
    assert_eq!(*listening.0.lock().unwrap(), before);
    drop(frontend);
    assert!(listening.0.lock().unwrap().is_empty());
}
