//! Does KVM on this machine execute guest code?

use std::sync::Arc;

use super::Kvm;
use crate::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, HypervisorError, PAGE_SIZE, SlotId, SlotMapping, Vcpu,
    VcpuExit,
};

const ANSWER: u8 = 42;
const PORT: u8 = 0x10;
/// `mov al, 42; out 0x10, al; hlt`, in real mode.
const GUEST: [u8; 5] = [0xb0, ANSWER, 0xe6, PORT, 0xf4];
const GUEST_ADDRESS: u64 = 0x1000;
/// A signal, or a host that makes the same access fail for ever, must not keep the probe busy.
const MAX_INTERRUPTIONS: u32 = 1000;

pub(super) fn run() -> Result<(), HypervisorError> {
    let kvm = Kvm::open()?;
    let memory = HostMapping::anonymous(PAGE_SIZE)
        .map_err(|source| HypervisorError::Call { call: "mmap", source })?;
    memory.write(0, &GUEST).expect("five bytes fit a page");
    let mapping = SlotMapping::whole(GuestAddress(GUEST_ADDRESS), &Arc::new(memory));
    kvm.map_slot(SlotId(0), mapping)?;
    let mut vcpu = kvm.reset_vcpu(0)?;
    vcpu.enter_real_mode(GUEST_ADDRESS)?;

    let mut answered = false;
    for _ in 0..MAX_INTERRUPTIONS {
        match vcpu.run()? {
            VcpuExit::PioWrite { port, data, .. }
                if port == u16::from(PORT) && data == [ANSWER] =>
            {
                answered = true;
            }
            VcpuExit::Halted if answered => return Ok(()),
            VcpuExit::Interrupted => {}
            other => {
                return Err(HypervisorError::Unavailable {
                    reason: format!(
                        "KVM does not execute guest code: a five byte guest ended in: {other}"
                    ),
                });
            }
        }
    }
    Err(HypervisorError::Unavailable {
        reason: "KVM does not execute guest code: a five byte guest never finished".to_owned(),
    })
}
