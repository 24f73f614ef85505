//! Real signals, on a BAR that is a mapping of a file with nothing in it: every access is refused, as
//! the kernel refuses those to a device that does not decode.
#![expect(unsafe_code, reason = "makes accesses that raise signals")]
#![expect(clippy::multiple_unsafe_ops_per_block, reason = "what a test does is done at once")]

mod allocations;
mod children;
mod genuine;
mod instructions;
mod machine;
mod stubborn;
mod vectors;
mod vforked;

use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;

use super::{Action, Change};
use crate::Shim;
use crate::device::{BarMapping, DeviceId};
use crate::status::Status;
use crate::system::{Answer, SignalFunctions, System};

const PAGE: usize = 4096;
/// Pages of the BAR; there is one of ordinary memory before them and one after.
const PAGES: usize = 2;
/// Where the device has its configuration space, in its file.
const CONFIG: u64 = 7 << 40;
const COMMAND: u64 = CONFIG + 4;
const MEMORY: u32 = 1 << 1;
const NOTHING: u32 = u32::MAX;

/// The C library's functions, and a device of VFIO's.
struct Host {
    functions: SignalFunctions,
    /// COMMAND, or `NOTHING` where it can't be read.
    command: AtomicU32,
    /// How often COMMAND was read.
    asked: AtomicUsize,
    /// The BAR has its memory from this reading of COMMAND on.
    present_from: AtomicUsize,
    file: OwnedFd,
}

impl System for Host {
    fn ask(&self, _fd: RawFd, request: u64, argument: &mut [u8]) -> Answer<i32> {
        match request & 0xff {
            // Of the device: PCI.
            0x6b => argument[4] = 2,
            // Of a region: the configuration space, or the one BAR.
            0x6c if argument[8] == 7 => {
                argument[16..24].copy_from_slice(&256_u64.to_le_bytes());
                argument[24..32].copy_from_slice(&CONFIG.to_le_bytes());
            }
            0x6c if argument[8] == 0 => {
                argument[16..24].copy_from_slice(&((PAGES * PAGE) as u64).to_le_bytes());
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(0)
    }

    fn pread(&self, _fd: RawFd, data: &mut [u8], offset: u64) -> Answer<usize> {
        data.fill(0);
        if offset != COMMAND {
            return Ok(data.len());
        }
        let command = self.command.load(Ordering::SeqCst);
        if command == NOTHING {
            return Err(Errno::IO);
        }
        let asked = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        if asked == self.present_from.load(Ordering::SeqCst) {
            ftruncate(&self.file, (PAGES * PAGE) as u64)?;
        }
        data[0] = u8::try_from(command).unwrap();
        Ok(data.len())
    }

    fn process(&self) -> u32 {
        std::process::id()
    }

    fn link(&self, _fd: RawFd) -> Answer<Vec<u8>> {
        Ok(b"anon_inode:[vfio-device]".to_vec())
    }

    fn read_memory(&self, address: usize, data: &mut [u8]) -> Answer<()> {
        let own = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        let other = libc::iovec { iov_base: address as *mut c_void, iov_len: data.len() };
        // SAFETY: the buffer is valid, and the kernel checks the other address.
        let read = unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const own, 1, &raw const other, 1, 0)
        };
        if read == data.len().cast_signed() { Ok(()) } else { Err(Errno::FAULT) }
    }

    fn write_memory(&self, address: usize, data: &[u8]) -> Answer<()> {
        let own = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let other = libc::iovec { iov_base: address as *mut c_void, iov_len: data.len() };
        // SAFETY: the buffer is valid, and the kernel checks the other address.
        let written = unsafe {
            libc::process_vm_writev(libc::getpid(), &raw const own, 1, &raw const other, 1, 0)
        };
        if written == data.len().cast_signed() { Ok(()) } else { Err(Errno::FAULT) }
    }

    fn signal_action(&self, signal: i32, new: Option<Action>) -> Answer<Action> {
        self.functions.action(signal, new)
    }

    fn signal_mask(&self, change: Option<Change>) -> Answer<u64> {
        self.functions.mask(change)
    }

    fn signals_pending(&self) -> Answer<u64> {
        SignalFunctions::pending()
    }
}

/// A process with a BAR, and the handler.
struct Bench {
    shim: &'static Shim<Host>,
    /// The first byte of the BAR.
    bar: usize,
}

/// A BAR that does not decode, and the handler installed.
fn bench() -> Bench {
    let bench = without_handler();
    assert!(!bench.shim.has_sigbus());
    bench.shim.sigbus_install().unwrap();
    assert!(bench.shim.has_sigbus());
    bench
}

/// A process with the same memory as the library would find it.
fn without_handler() -> Bench {
    let find = |name: &std::ffi::CStr| {
        // SAFETY: the name is a C string.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    let host = Host {
        functions: SignalFunctions::find(find).unwrap(),
        command: AtomicU32::new(0),
        asked: AtomicUsize::new(0),
        present_from: AtomicUsize::new(0),
        file: memfd_create("bar", MemfdFlags::CLOEXEC).unwrap(),
    };
    let fd = host.file.as_raw_fd();
    let bar = map_between_pages(fd);
    let shim = Box::leak(Box::new(Shim::new(host, Status::default())));
    shim.vfio_asked(fd, 0x3b6c);
    let len = PAGES * PAGE;
    shim.add_mapping(BarMapping { device: DeviceId(0), bar: 0, start: bar, len, offset: 0 });
    assert_eq!(shim.mapping_at(bar).map(|mapping| mapping.len), Some(len));
    Bench { shim, bar }
}

/// Maps the BAR with a page of ordinary memory before it, and one after.
fn map_between_pages(fd: RawFd) -> usize {
    let (protection, anonymous) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), (PAGES + 2) * PAGE, protection, anonymous, -1, 0)
    };
    assert_ne!(start, libc::MAP_FAILED);
    let bar = start as usize + PAGE;
    map_over(bar, fd);
    bar
}

fn map_over(bar: usize, fd: RawFd) {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: over a mapping of the test's own.
    let mapped = unsafe { libc::mmap(bar as *mut c_void, PAGES * PAGE, protection, flags, fd, 0) };
    assert_eq!(mapped as usize, bar);
}

impl Bench {
    fn host(&self) -> &Host {
        &self.shim.system
    }

    fn set_command(&self, command: u32) {
        self.host().command.store(command, Ordering::SeqCst);
    }

    /// The BAR gets its memory when COMMAND is read the next time but `readings`.
    fn present_after(&self, readings: usize) {
        let asked = self.host().asked.load(Ordering::SeqCst);
        self.host().present_from.store(asked + 1 + readings, Ordering::SeqCst);
    }

    fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: mapped memory, of which the handler makes all ones; every value of `T` here is a number.
        unsafe { ((self.bar + offset) as *const T).read_volatile() }
    }

    fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: mapped memory; the handler drops the write.
        unsafe { ((self.bar + offset) as *mut T).write_volatile(value) }
    }
}
