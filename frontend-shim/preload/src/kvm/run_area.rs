#![expect(unsafe_code, reason = "reads and writes the structure that KVM shares with the VMM")]

use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_RUN_X86_SMM, kvm_run};

const EXIT_REASON: usize = offset_of!(kvm_run, exit_reason);
const IMMEDIATE_EXIT: usize = offset_of!(kvm_run, immediate_exit);
const FLAGS: usize = offset_of!(kvm_run, flags);
/// What an exit is about begins here. Of `mmio`: address, 8 bytes of data, length, direction; of
/// `memory_fault`: flags, address, size.
const EXIT: usize = offset_of!(kvm_run, __bindgen_anon_1);

/// In `immediate_exit`: not 0, and not what a VMM writes there.
const OURS: u8 = 0x80;

/// The VMM's mapping of a virtual CPU's `struct kvm_run`.
///
/// It is touched only right before and after `KVM_RUN`, by the thread that calls it: the VMM has to keep it
/// mapped then, since that is where it looks itself. If it unmaps it, that is seen first.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunArea {
    address: usize,
}

/// What an exit for MMIO is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MmioExit {
    /// Guest-physical.
    pub(super) address: u64,
    pub(super) data: [u8; 8],
    /// Bytes, 1 to 8.
    pub(super) len: usize,
    pub(super) write: bool,
}

/// What `KVM_EXIT_MEMORY_FAULT` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReportedFault {
    pub(super) flags: u64,
    /// Guest-physical.
    pub(super) address: u64,
    /// In bytes.
    pub(super) size: u64,
}

impl RunArea {
    /// The area that the kernel has just mapped for the VMM; `None` for what it never maps.
    pub(super) fn mapped(address: usize, len: usize) -> Option<RunArea> {
        (address != 0 && address.is_multiple_of(4096) && len >= size_of::<kvm_run>())
            .then_some(RunArea { address })
    }

    pub(super) fn exit_reason(self) -> u32 {
        self.u32(EXIT_REASON).load(Ordering::Relaxed)
    }

    pub(super) fn set_exit_reason(self, reason: u32) {
        self.u32(EXIT_REASON).store(reason, Ordering::Relaxed);
    }

    /// Has the next `KVM_RUN` return with `EINTR` once it has finished the last exit, before the guest
    /// executes anything else. Returns false if the VMM has asked for that itself.
    pub(super) fn ask_to_leave(self) -> bool {
        let place = self.u8(IMMEDIATE_EXIT);
        place.compare_exchange(0, OURS, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Takes that back. What the VMM has asked for meanwhile, in another thread, stays.
    pub(super) fn ask_no_more(self) {
        let place = self.u8(IMMEDIATE_EXIT);
        let _ = place.compare_exchange(OURS, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether somebody has asked for that.
    pub(super) fn is_asked_to_leave(self) -> bool {
        self.u8(IMMEDIATE_EXIT).load(Ordering::Relaxed) != 0
    }

    /// The number of the address space in which the virtual CPU is: 1 in System Management Mode.
    pub(super) fn address_space(self) -> u32 {
        // SAFETY: the area is mapped and shared with the kernel (see the type), and the field aligned.
        let flags = unsafe { AtomicU16::from_ptr(self.at(FLAGS).cast()) };
        u32::from(flags.load(Ordering::Relaxed)) & KVM_RUN_X86_SMM
    }

    pub(super) fn mmio(self) -> MmioExit {
        let write = self.u8(EXIT + 20);
        let len = usize::try_from(self.u32(EXIT + 16).load(Ordering::Relaxed)).unwrap_or(8);
        MmioExit {
            address: self.u64(EXIT).load(Ordering::Relaxed),
            data: self.u64(EXIT + 8).load(Ordering::Relaxed).to_le_bytes(),
            len: len.clamp(1, 8),
            write: write.load(Ordering::Relaxed) != 0,
        }
    }

    /// Guest-physical address of an exit for MMIO.
    pub(super) fn mmio_address(self) -> u64 {
        self.u64(EXIT).load(Ordering::Relaxed)
    }

    /// Gives a read the value with which the next `KVM_RUN` completes it.
    pub(super) fn set_mmio_data(self, data: [u8; 8]) {
        self.u64(EXIT + 8).store(u64::from_le_bytes(data), Ordering::Relaxed);
    }

    pub(super) fn memory_fault(self) -> ReportedFault {
        ReportedFault {
            flags: self.u64(EXIT).load(Ordering::Relaxed),
            address: self.u64(EXIT + 8).load(Ordering::Relaxed),
            size: self.u64(EXIT + 16).load(Ordering::Relaxed),
        }
    }

    fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: as in `address_space`.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `address_space`.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }

    fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `address_space`.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    fn at(self, offset: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One page, aligned.
    #[repr(C, align(4096))]
    struct Page([u64; 512]);

    #[test]
    fn fields_are_where_the_kernel_has_them() {
        let mut page = Box::new(Page([0; 512]));
        page.0[1] = 6 | 1 << 48;
        (page.0[4], page.0[5], page.0[6]) = (0xfebf_0010, 0x1122_3344_5566_7788, 4 | 1 << 32);
        let address = (&raw mut *page).expose_provenance();
        let run = RunArea::mapped(address, 12288).unwrap();
        assert_eq!((run.exit_reason(), run.address_space()), (6, 1));
        let data = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
        let exit = MmioExit { address: 0xfebf_0010, data, len: 4, write: true };
        assert_eq!((run.mmio(), run.mmio_address()), (exit, 0xfebf_0010));
        let fault = ReportedFault { flags: 0xfebf_0010, address: page.0[5], size: page.0[6] };
        assert_eq!(run.memory_fault(), fault);
        run.set_mmio_data([0xff; 8]);
        run.set_exit_reason(39);
        assert_eq!((page.0[5], page.0[1]), (u64::MAX, 39 | 1 << 48));
    }

    #[test]
    fn what_the_vmm_asks_for_itself_is_left_as_it_is() {
        let mut page = Box::new(Page([0; 512]));
        let place = (&raw mut *page).expose_provenance();
        let run = RunArea::mapped(place, 12288).unwrap();
        let asked = |run: RunArea| run.u8(IMMEDIATE_EXIT).load(Ordering::Relaxed);
        assert!(run.ask_to_leave());
        assert_ne!(asked(run), 0);
        run.ask_no_more();
        assert_eq!(asked(run), 0);
        // Before, and in between.
        run.u8(IMMEDIATE_EXIT).store(1, Ordering::Relaxed);
        assert!(!run.ask_to_leave());
        run.ask_no_more();
        assert_eq!(asked(run), 1);
    }

    #[test]
    fn what_the_kernel_never_maps_is_no_area() {
        assert!(RunArea::mapped(0, 12288).is_none());
        assert!(RunArea::mapped(0x1001, 12288).is_none());
        assert!(RunArea::mapped(0x1000, 64).is_none());
    }
}
