use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::hypervisor::kvm::tests::{BAR, Guest, NO_SLOT_PAGE, guest};
use crate::hypervisor::{
    DoorbellLen, DoorbellWrite, GuestAddress, Hypervisor, HypervisorError, MsiMessage, PAGE_SIZE,
    Vcpu, VcpuExit,
};

const DOORBELL: GuestAddress = GuestAddress(BAR - PAGE_SIZE);

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// How often it was signalled since the last time.
fn taken(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

/// A guest that writes `value` to the doorbell with one instruction and halts.
fn ringing(store: &[u8], value: u64) -> Option<Guest> {
    let mut code = store.to_vec();
    code.extend_from_slice(&[0x04, 0x25]);
    code.extend_from_slice(&u32::try_from(NO_SLOT_PAGE).unwrap().to_le_bytes());
    code.push(0xf4);
    let guest = guest(&code)?;
    guest.registers(|regs| regs.rax = value);
    Some(guest)
}

const STORE_2: &[u8] = &[0x66, 0x89];
const STORE_4: &[u8] = &[0x89];
const STORE_8: &[u8] = &[0x48, 0x89];

#[test]
fn a_doorbell_rings_for_the_writes_that_it_describes_and_for_no_others() {
    use DoorbellLen::{Eight, Four, Two};
    type Row<'a> = (&'a [u8], Option<DoorbellLen>, Option<u64>, bool);
    let rows: [Row<'_>; 9] = [
        (STORE_4, None, None, true),
        (STORE_2, None, None, true),
        (STORE_4, Some(Four), None, true),
        (STORE_2, Some(Four), None, false),
        (STORE_8, Some(Eight), None, true),
        (STORE_4, Some(Four), Some(7), true),
        (STORE_4, Some(Four), Some(8), false),
        (STORE_2, Some(Two), Some(7), true),
        (STORE_2, Some(Four), Some(7), false),
    ];
    for (store, len, value, rings) in rows {
        let Some(mut guest) = ringing(store, 7) else { return };
        let event = event();
        let write = DoorbellWrite { address: DOORBELL, len, value };
        guest.kvm.add_ioeventfd(&write, event.as_fd()).unwrap();
        let exit = guest.vcpu.run().unwrap();
        assert_eq!(matches!(exit, VcpuExit::Halted), rings, "{write:?}: {exit}");
        assert_eq!(matches!(exit, VcpuExit::MmioWrite { .. }), !rings, "{write:?}: {exit}");
        assert_eq!(taken(&event), u64::from(rings), "{write:?}");
    }
}

#[test]
fn a_doorbell_that_was_taken_back_does_not_ring() {
    let Some(mut guest) = ringing(STORE_4, 7) else { return };
    let event = event();
    let write = DoorbellWrite { address: DOORBELL, len: Some(DoorbellLen::Four), value: None };
    guest.kvm.add_ioeventfd(&write, event.as_fd()).unwrap();
    assert!(guest.kvm.add_ioeventfd(&write, event.as_fd()).is_err(), "one at a place");
    guest.kvm.remove_ioeventfd(&write, event.as_fd()).unwrap();
    let exit = guest.vcpu.run().unwrap();
    assert!(matches!(exit, VcpuExit::MmioWrite { address: DOORBELL, .. }), "{exit}");
    assert_eq!(taken(&event), 0);
    assert!(guest.kvm.remove_ioeventfd(&write, event.as_fd()).is_err(), "it is gone");
}

#[test]
fn a_value_without_a_length_is_refused() {
    let Some(guest) = ringing(STORE_4, 7) else { return };
    let write = DoorbellWrite { address: DOORBELL, len: None, value: Some(7) };
    let error = guest.kvm.add_ioeventfd(&write, event().as_fd()).unwrap_err();
    assert!(matches!(error, HypervisorError::Call { .. }), "{error}");
}

#[test]
fn an_eventfd_raises_the_message_that_its_number_stands_for() {
    let Some(_) = guest(&[0xf4]) else { return };
    let kvm = crate::hypervisor::kvm::Kvm::open().unwrap();
    if let Err(reason) = kvm.create_interrupt_controller() {
        println!("irqfd skipped: {reason}");
        return;
    }
    let vcpu = kvm.reset_vcpu(0).unwrap();
    let mut lapic = vcpu.fd().get_lapic().unwrap();
    // Spurious interrupt vector register: enabled.
    lapic.regs[0xf1] |= 1;
    vcpu.fd().set_lapic(&lapic).unwrap();
    let pending = |vector: usize| {
        let lapic = vcpu.fd().get_lapic().unwrap();
        // Interrupt request register: 32 vectors in each 16 bytes.
        let byte = 0x200 + vector / 32 * 16 + vector % 32 / 8;
        lapic.regs[byte].cast_unsigned() & 1 << (vector % 8) != 0
    };
    let message = |vector| Some(MsiMessage { address: 0xfee0_0000, data: vector });
    let (first, second) = (event(), event());
    kvm.route_msi(40, message(0x51)).unwrap();
    kvm.route_msi(41, message(0x62)).unwrap();
    kvm.add_irqfd(40, first.as_fd()).unwrap();
    kvm.add_irqfd(41, second.as_fd()).unwrap();
    rustix::io::write(&first, &1u64.to_ne_bytes()).unwrap();
    while !pending(0x51) {
        std::thread::yield_now();
    }
    assert!(!pending(0x62));

    // Routed anew, and taken back.
    kvm.route_msi(41, message(0x73)).unwrap();
    kvm.remove_irqfd(40, first.as_fd()).unwrap();
    rustix::io::write(&second, &1u64.to_ne_bytes()).unwrap();
    while !pending(0x73) {
        std::thread::yield_now();
    }
    assert!(!pending(0x62));
}

#[test]
fn a_hypervisor_without_doorbells_says_so() {
    let model = crate::hypervisor::model::Model::new();
    let write = DoorbellWrite { address: DOORBELL, len: None, value: None };
    let event = event();
    let refused = [
        model.add_ioeventfd(&write, event.as_fd()),
        model.remove_ioeventfd(&write, event.as_fd()),
        model.route_msi(1, None),
        model.add_irqfd(1, event.as_fd()),
        model.remove_irqfd(1, event.as_fd()),
    ];
    for result in refused {
        assert!(matches!(result, Err(HypervisorError::NotSupported { .. })), "{result:?}");
    }
}
