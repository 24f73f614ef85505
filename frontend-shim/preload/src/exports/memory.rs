#![expect(unsafe_code, reason = "symbols that take the place of the C library's")]

//! Mappings that come and go, and writes to devices.

use std::ffi::{c_int, c_void};

use super::{address, guarded, keeping_errno, nothing, real, real_for_allocator, shim};
use crate::descriptors::Descriptor;
use crate::system::{Answer, Kernel, Mmap, Mremap, Real, System};

#[unsafe(no_mangle)]
extern "C" fn mmap64(
    start: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    let address = start.addr();
    let request = Mmap { address, len, protection, flags, fd, offset };
    place(match shim() {
        Some(shim) => keeping_errno(|| shim.mmap(request)),
        None => before(|system| system.mmap(request), |kernel| kernel.mmap(request)),
    })
}

#[unsafe(no_mangle)]
extern "C" fn mmap(
    start: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    mmap64(start, len, protection, flags, fd, offset)
}

#[unsafe(no_mangle)]
extern "C" fn munmap(start: *mut c_void, len: usize) -> c_int {
    nothing(match shim() {
        Some(shim) => keeping_errno(|| shim.munmap(start.addr(), len)),
        None => before(
            |system| system.munmap(start.addr(), len),
            |kernel| kernel.munmap(start.addr(), len),
        ),
    })
}

/// The last argument is there only with some flags; without them it's whatever the register has.
#[unsafe(no_mangle)]
extern "C" fn mremap(
    start: *mut c_void,
    len: usize,
    new_len: usize,
    flags: c_int,
    new_start: *mut c_void,
) -> *mut c_void {
    let (address, new_address) = (start.addr(), new_start.addr());
    let request = Mremap { address, len, new_len, flags, new_address };
    place(match shim() {
        Some(shim) => keeping_errno(|| shim.mremap(request)),
        None => before(|system| system.mremap(request), |kernel| kernel.mremap(request)),
    })
}

#[unsafe(no_mangle)]
extern "C-unwind" fn pwrite64(fd: c_int, data: *const c_void, len: usize, offset: i64) -> isize {
    let device = shim().and_then(|shim| shim.descriptors.get(fd));
    let ours = match (device, u64::try_from(offset)) {
        (Some(Descriptor::Device(device)), Ok(offset)) => Some((device, offset)),
        _ => None,
    };
    let before = ours.and_then(|(device, offset)| {
        let before = guarded(|shim| shim.device_to_be_written(device, offset, len)).flatten();
        before.map(|before| (device, before))
    });
    // SAFETY: the caller's own arguments, to the function that it meant.
    let answer = unsafe { (real().pwrite)(fd, data, len, offset) };
    if let Some((device, before)) = before {
        guarded(|shim| shim.device_written(device, before));
    }
    answer
}

#[unsafe(no_mangle)]
extern "C-unwind" fn pwrite(fd: c_int, data: *const c_void, len: usize, offset: i64) -> isize {
    pwrite64(fd, data, len, offset)
}

/// Does what is asked for before our constructor ran.
fn before<T>(
    next: impl FnOnce(&Real) -> Answer<T>,
    kernel: impl FnOnce(&Kernel) -> Answer<T>,
) -> Answer<T> {
    real_for_allocator().map_or_else(|| kernel(&Kernel), next)
}

fn place(answer: Answer<usize>) -> *mut c_void {
    // The kernel made it out of nothing that is known here.
    std::ptr::with_exposed_provenance_mut(address(answer))
}
