use super::super::tests::{BAR, Guest, NO_SLOT_PAGE, guest};
use crate::hypervisor::{GuestAddress, Vcpu, VcpuExit};

const NOWHERE: u64 = BAR - 0x1000;

/// Runs to HLT or to an exit that is not about memory. Reads are answered with the low byte of each
/// address; what happened is told as (write, address, data).
fn run(guest: &mut Guest) -> (Vec<(bool, u64, Vec<u8>)>, String) {
    let mut accesses = Vec::new();
    loop {
        match guest.vcpu.run().unwrap() {
            VcpuExit::MmioRead { address: GuestAddress(address), data } => {
                for (byte, at) in data.iter_mut().zip(address..) {
                    *byte = at.to_le_bytes()[0];
                }
                accesses.push((false, address, data.to_vec()));
            }
            VcpuExit::MmioWrite { address: GuestAddress(address), data } => {
                accesses.push((true, address, data.to_vec()));
            }
            VcpuExit::Interrupted => {}
            other => return (accesses, other.to_string()),
        }
    }
}

fn with_avx(code: &[u8]) -> Option<Guest> {
    let guest = guest(code)?;
    guest.registers(|regs| regs.rdi = NO_SLOT_PAGE);
    let mut xcrs = guest.vcpu.fd().get_xcrs().unwrap();
    xcrs.xcrs[0].value = 0b111;
    guest.special(|sregs| sregs.cr4 |= 1 << 18 | 1 << 9);
    guest.vcpu.fd().set_xcrs(&xcrs).unwrap();
    Some(guest)
}

fn bytes(from: u64, len: u64) -> Vec<u8> {
    (from..from + len).map(|at| at.to_le_bytes()[0]).collect()
}

#[test]
fn a_wide_load_and_store_of_a_device_are_exits_in_their_order() {
    // vmovdqu ymm1, [rdi + 0x10]; vmovdqu [rdi + 0x40], ymm1; hlt
    let code = [0xc5, 0xfe, 0x6f, 0x4f, 0x10, 0xc5, 0xfe, 0x7f, 0x4f, 0x40, 0xf4];
    let Some(mut guest) = with_avx(&code) else { return };
    let (accesses, end) = run(&mut guest);
    assert_eq!(end, "halted");
    let (reads, writes): (Vec<_>, Vec<_>) = accesses.iter().partition(|(write, ..)| !write);
    assert!(accesses.iter().is_sorted_by_key(|(write, address, _)| (*write, *address)));
    let data = |parts: &[&(bool, u64, Vec<u8>)]| {
        parts.iter().flat_map(|(_, _, data)| data.clone()).collect::<Vec<_>>()
    };
    assert_eq!(data(&reads), bytes(NOWHERE + 0x10, 32));
    assert_eq!(data(&writes), bytes(NOWHERE + 0x10, 32));
    assert_eq!((reads[0].1, writes[0].1), (NOWHERE + 0x10, NOWHERE + 0x40));
    guest.vectors(|vectors| assert_eq!(vectors[1], bytes(NOWHERE + 0x10, 32)[..]));
}

#[test]
fn what_is_not_known_here_either_is_an_internal_error() {
    // vaddps ymm1, ymm1, [rdi]; hlt
    let Some(mut guest) = with_avx(&[0xc5, 0xf4, 0x58, 0x0f, 0xf4]) else { return };
    let rip = guest.vcpu.fd().get_regs().unwrap().rip;
    let (accesses, end) = run(&mut guest);
    assert!(accesses.is_empty(), "{accesses:x?}");
    assert_eq!(end, format!("the hypervisor gave up (internal error 1 at guest rip {rip:#x})"));
}

#[test]
fn an_instruction_that_accesses_no_device_is_left_to_kvm() {
    // vmovdqu ymm1, [rdi]; hlt
    let Some(mut guest) = with_avx(&[0xc5, 0xfe, 0x6f, 0x0f, 0xf4]) else { return };
    guest.registers(|regs| regs.rdi = 0x6000);
    assert!(super::Completion::new(guest.vcpu.fd(), &guest.kvm.machine).is_none());
    guest.registers(|regs| regs.rdi = NO_SLOT_PAGE);
    assert!(super::Completion::new(guest.vcpu.fd(), &guest.kvm.machine).is_some());
    // The processor executes it; a KVM that emulates everything can't.
    guest.registers(|regs| regs.rdi = 0x6000);
    let (accesses, end) = run(&mut guest);
    assert!(accesses.is_empty(), "{accesses:x?}");
    assert!(end == "halted" || end.starts_with("the hypervisor gave up"), "{end}");
}

#[test]
fn user_space_gets_an_exception_where_the_kernel_stops_the_machine() {
    let Some(guest) = guest(&[0xf4]) else { return };
    let injected = || {
        let exception = guest.vcpu.fd().get_vcpu_events().unwrap().exception;
        (exception.injected, exception.nr)
    };
    assert!(matches!(guest.vcpu.give_up(), Ok(VcpuExit::InternalError { suberror: 1, .. })));
    assert_eq!(injected().0, 0);
    guest.special(|sregs| {
        (sregs.cs.dpl, sregs.ss.dpl) = (3, 3);
        (sregs.cs.selector, sregs.ss.selector) = (0x0b, 0x13);
    });
    assert!(matches!(guest.vcpu.give_up(), Ok(VcpuExit::Interrupted)));
    assert_eq!(injected(), (1, 6));
}
