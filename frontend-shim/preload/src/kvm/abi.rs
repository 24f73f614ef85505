//! Requests of KVM and what they point to (Linux `include/uapi/linux/kvm.h`, x86-64).

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_regs, kvm_signal_mask, kvm_sregs,
    kvm_translation, kvm_userspace_memory_region, kvm_userspace_memory_region2, kvm_xsave,
};

pub(crate) const CREATE_VM: u32 = plain(0x01);
pub(crate) const CREATE_VCPU: u32 = plain(0x41);
pub(crate) const GET_DIRTY_LOG: u32 = request::<kvm_dirty_log>(WRITE, 0x42);
pub(crate) const SET_USER_MEMORY_REGION: u32 = request::<kvm_userspace_memory_region>(WRITE, 0x46);
pub(crate) const SET_USER_MEMORY_REGION2: u32 =
    request::<kvm_userspace_memory_region2>(WRITE, 0x49);
pub(crate) const RUN: u32 = plain(0x80);
pub(crate) const GET_REGS: u32 = request::<kvm_regs>(READ, 0x81);
pub(crate) const GET_SREGS: u32 = request::<kvm_sregs>(READ, 0x83);
pub(crate) const TRANSLATE: u32 = request::<kvm_translation>(READ | WRITE, 0x85);
/// The structure is followed by a mask of no fixed length, which its size does not count.
pub(crate) const SET_SIGNAL_MASK: u32 = request::<kvm_signal_mask>(WRITE, 0x8b);
pub(crate) const GET_XSAVE: u32 = request::<kvm_xsave>(READ, 0xa4);
pub(crate) const CLEAR_DIRTY_LOG: u32 = request::<kvm_clear_dirty_log>(READ | WRITE, 0xc0);

/// Directions of `include/uapi/asm-generic/ioctl.h`, as the caller sees them.
const WRITE: u32 = 1;
const READ: u32 = 2;

const fn plain(number: u32) -> u32 {
    KVMIO << 8 | number
}

const fn request<T>(direction: u32, number: u32) -> u32 {
    let size = size_of::<T>();
    assert!(size < 1 << 14, "the size has 14 bits");
    #[expect(clippy::cast_possible_truncation, reason = "checked in the line above")]
    let size = size as u32;
    direction << 30 | size << 16 | KVMIO << 8 | number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel() {
        assert_eq!((CREATE_VM, CREATE_VCPU, RUN), (0xae01, 0xae41, 0xae80));
        assert_eq!((SET_USER_MEMORY_REGION, SET_USER_MEMORY_REGION2), (0x4020_ae46, 0x40a0_ae49));
        assert_eq!((GET_DIRTY_LOG, CLEAR_DIRTY_LOG), (0x4010_ae42, 0xc018_aec0));
        assert_eq!((GET_REGS, GET_SREGS), (0x8090_ae81, 0x8138_ae83));
        assert_eq!((TRANSLATE, GET_XSAVE), (0xc018_ae85, 0x9000_aea4));
        assert_eq!(SET_SIGNAL_MASK, 0x4004_ae8b);
    }
}
