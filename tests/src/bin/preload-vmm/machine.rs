//! A VM with a vfio-user device, treated as QEMU treats it: the guest's writes to configuration space go to
//! the device first, and the VMM's memory slots follow them under one lock.

use std::sync::{Arc, Mutex, PoisonError};

use crate::proxy::{CONFIG, GET_INFO, GET_REGION_INFO, Proxy, words};
use crate::raw::{self, Answer, READ_WRITE};
use crate::vm::{DATA, Exit, Vcpu, Vm};

/// The slot that holds the BAR.
const SLOT: u32 = 9;
const COMMAND: u64 = 4;
const MEMORY_SPACE: u16 = 2;

/// The BAR that the machine has mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    pub(crate) index: u32,
    pub(crate) len: usize,
    /// Where it is in this process; 0 where it can't be mapped.
    pub(crate) host: usize,
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) vm: Vm,
    pub(crate) bar: Bar,
    /// Whether the VMM believes that the BAR is there.
    lock: Mutex<bool>,
}

impl Machine {
    /// Connects and maps the BAR with this index, which then is at [`DATA`] and off.
    pub(crate) fn new(path: &str, index: u32, program: &[u8]) -> Answer<(Self, String)> {
        let (proxy, capabilities) = Proxy::connect(path)?;
        proxy.call(GET_INFO, &words(&[16, 0, 0, 0]), &[])?;
        let mut bar = Bar { index, len: 0, host: 0 };
        for region in 0..9 {
            let info = words(&[4096, 0, region, 0, 0, 0, 0, 0]);
            let (body, fds) = proxy.call(GET_REGION_INFO, &info, &[])?;
            if region == index {
                bar = map(index, &body, &fds)?;
            }
        }
        let register = 0x10 + 4 * u64::from(index);
        let address = u32::try_from(DATA).unwrap_or(0);
        proxy.write(CONFIG, register, &address.to_le_bytes())?;
        let vm = Vm::new(program)?;
        let machine = Self { proxy, vm, bar, lock: Mutex::new(false) };
        machine.enable(false)?;
        Ok((machine, capabilities))
    }

    /// What the guest's write to the Command register does.
    pub(crate) fn enable(&self, enabled: bool) -> Answer<()> {
        let mut there = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let command = if enabled { MEMORY_SPACE } else { 0 };
        self.proxy.write(CONFIG, COMMAND, &command.to_le_bytes())?;
        if self.bar.host != 0 && *there != enabled {
            let len = if enabled { self.bar.len as u64 } else { 0 };
            self.vm.set_slot(SLOT, 0, DATA, len, self.bar.host)?;
        }
        *there = enabled;
        Ok(())
    }

    /// Runs until the guest says something on its port, completing MMIO as QEMU does: what is nowhere
    /// reads 0. Returns what it says and how often the VMM was asked.
    pub(crate) fn run(&self, vcpu: &Vcpu) -> Answer<(u32, u32)> {
        let mut asked = 0;
        loop {
            match vcpu.run() {
                Exit::Out { value, .. } => return Ok((value, asked)),
                Exit::MmioRead { address, .. } => vcpu.answer(self.load(address)?),
                Exit::MmioWrite { address, value, .. } => self.store(address, value)?,
                Exit::Failed(libc::EINTR, _) => continue,
                Exit::Failed(errno, _) => return Err(errno),
                _ => return Err(0),
            }
            asked += 1;
        }
    }

    fn load(&self, address: u64) -> Answer<u32> {
        let there = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = address.wrapping_sub(DATA);
        match usize::try_from(offset) {
            Ok(at) if *there && at < self.bar.len && self.bar.host != 0 => {
                Ok(raw::load(self.bar.host + at))
            }
            Ok(at) if *there && at < self.bar.len => self.proxy.read_u32(self.bar.index, offset),
            _ => Ok(0),
        }
    }

    fn store(&self, address: u64, value: u32) -> Answer<()> {
        let there = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = address.wrapping_sub(DATA);
        match usize::try_from(offset) {
            Ok(at) if *there && at < self.bar.len && self.bar.host != 0 => {
                raw::store(self.bar.host + at, value);
                Ok(())
            }
            Ok(at) if *there && at < self.bar.len => {
                self.proxy.write(self.bar.index, offset, &value.to_le_bytes())
            }
            _ => Ok(()),
        }
    }
}

/// Maps a region as QEMU 11 does: over memory that was reserved for it, with more around it.
fn map(index: u32, info: &[u8], fds: &[i32]) -> Answer<Bar> {
    let word = |at: usize| {
        let bytes = info.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or(libc::EPROTO)
    };
    let len = usize::try_from(word(16)?).map_err(|_| libc::EPROTO)?;
    let Some(&fd) = fds.first() else { return Ok(Bar { index, len, host: 0 }) };
    let offset = word(24)?.cast_signed();
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let reserved = raw::mmap(0, 3 * len, libc::PROT_NONE, private, -1, 0)?;
    let host = (reserved + len) & !(len - 1);
    raw::munmap(host + len, reserved + 3 * len - host - len)?;
    if host > reserved {
        raw::munmap(reserved, host - reserved)?;
    }
    raw::mmap(host, len, READ_WRITE, libc::MAP_SHARED | libc::MAP_FIXED, fd, offset)?;
    Ok(Bar { index, len, host })
}
