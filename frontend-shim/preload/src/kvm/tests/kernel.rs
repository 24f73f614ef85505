//! A kernel with KVM, as far as slots and `KVM_RUN` go.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_UNKNOWN, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
};
use rustix::io::Errno;

use crate::kvm::abi;
use crate::kvm::slots::Region;
use crate::system::{Answer, System};

/// Descriptors from here on are virtual CPUs; below, and not negative, VMs and `/dev/kvm`.
pub(super) const VCPU: RawFd = 100;
pub(super) const DEV_KVM: RawFd = 1;
const FIRST_VM: RawFd = 10;
const MAX_SLOT: u32 = 509;
const SPACES: u32 = 2;

/// This process's memory, where addresses that can't be used are errors.
static MEMORY: LazyLock<File> =
    LazyLock::new(|| OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap());

#[derive(Debug, Default)]
pub(super) struct Kernel {
    state: Mutex<State>,
    /// What another thread does during the next `KVM_RUN`.
    meanwhile: Mutex<Meanwhile>,
}

#[derive(Default)]
struct Meanwhile(Option<Box<dyn FnOnce() + Send>>);

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Meanwhile").field(&self.0.is_some()).finish()
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    vms: BTreeMap<RawFd, Vm>,
    pub(super) vcpus: BTreeMap<RawFd, Vcpu>,
    /// Host memory that refuses every access.
    pub(super) refusing: Vec<std::ops::Range<u64>>,
    /// Every request so far, with its descriptor.
    pub(super) calls: Vec<(RawFd, u32)>,
    /// The next request to change slots fails with this.
    pub(super) next_slot_error: Option<Errno>,
    /// A signal comes after so many faults; and faults since the last one.
    pub(super) signals: Option<(u32, u32)>,
    pub(super) registers_unreadable: bool,
    /// Descriptors are not KVM's, whatever they answer.
    pub(super) strange: bool,
    pub(super) no_proc: bool,
}

#[derive(Debug, Default)]
struct Vm {
    slots: BTreeMap<u32, Region>,
    /// Pages that were written, by slot. There is one exactly for each slot that logs.
    logs: BTreeMap<u32, Vec<u64>>,
}

/// A virtual CPU, and its guest.
#[derive(Debug)]
pub(super) struct Vcpu {
    vm: RawFd,
    /// Its `struct kvm_run`.
    run: &'static [AtomicU64],
    /// What the guest does next.
    pub(super) todo: VecDeque<Do>,
    /// What came of it.
    pub(super) done: Vec<Done>,
    exit: Option<Do>,
    pub(super) in_smm: bool,
    /// Reads are those of one instruction.
    pub(super) repeats: bool,
    /// How often `immediate_exit` had it return.
    pub(super) out: usize,
    pub(super) rbx: u64,
    pub(super) rip: u64,
}

/// What a guest does, or what happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Do {
    Read(u64),
    Write(u64, u32),
    /// An access to a port.
    Port,
    /// `KVM_RUN` fails.
    Fail(Errno),
    /// A fault with `KVM_EXIT_MEMORY_FAULT`, until the slot at the address is gone.
    Reported {
        flags: u64,
        address: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// In memory.
    Live,
    /// A read that was an exit, and its value.
    Read(u32),
    /// A write that was an exit.
    Written,
}

impl Kernel {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn meanwhile(&self, other: impl FnOnce() + Send + 'static) {
        self.meanwhile.lock().unwrap().0 = Some(Box::new(other));
    }

    /// The slots that the kernel has for a VM.
    pub(super) fn slots(&self, vm: RawFd) -> Vec<Region> {
        self.state().vms[&vm].slots.values().copied().collect()
    }

    /// Has the guest write a page of a slot.
    pub(super) fn dirty(&self, vm: RawFd, slot: u32, page: usize) {
        let mut state = self.state();
        if let Some(log) = state.vms.get_mut(&vm).and_then(|vm| vm.logs.get_mut(&slot)) {
            log[page / 64] |= 1 << (page % 64);
        }
    }

    /// Host address of a virtual CPU's `struct kvm_run`.
    pub(super) fn run_area(&self, vcpu: RawFd) -> usize {
        self.state().vcpus[&vcpu].run.as_ptr().addr()
    }

    pub(super) fn run_words(&self, vcpu: RawFd) -> Vec<u64> {
        let run = self.state().vcpus[&vcpu].run;
        run.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }
}

impl System for Kernel {
    fn ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        let request = u32::try_from(request & u64::from(u32::MAX)).unwrap();
        if request == abi::RUN {
            let other = self.meanwhile.lock().unwrap().0.take();
            other.into_iter().for_each(|other| other());
        }
        let mut state = self.state();
        state.calls.push((fd, request));
        match request {
            abi::CREATE_VM => {
                let fd = FIRST_VM + RawFd::try_from(state.vms.len()).unwrap();
                state.vms.insert(fd, Vm::default());
                Ok(fd)
            }
            abi::CREATE_VCPU if state.vms.contains_key(&fd) => {
                let vcpu = VCPU + RawFd::try_from(state.vcpus.len()).unwrap();
                state.vcpus.insert(vcpu, Vcpu::new(fd));
                Ok(vcpu)
            }
            abi::RUN if fd >= VCPU => state.run(fd),
            abi::SET_SIGNAL_MASK if fd >= VCPU => Ok(0),
            abi::GET_REGS | abi::GET_SREGS if state.registers_unreadable => Err(Errno::INVAL),
            abi::GET_REGS => {
                let vcpu = &state.vcpus[&fd];
                let regs =
                    kvm_bindings::kvm_regs { rbx: vcpu.rbx, rip: vcpu.rip, ..Default::default() };
                let words = [regs.rax, regs.rbx];
                write_words(argument, &words)?;
                write_words(argument + 16 * 8, &[regs.rip])?;
                Ok(0)
            }
            abi::GET_SREGS => {
                // EFER is the ninth word from the end, in front of the APIC's base and the interrupts.
                let efer = std::mem::offset_of!(kvm_bindings::kvm_sregs, efer);
                let long = std::mem::offset_of!(kvm_bindings::kvm_sregs, cs)
                    + std::mem::offset_of!(kvm_bindings::kvm_segment, l);
                write_words(argument + efer, &[1 << 10])?;
                write(argument + long, &[1])?;
                Ok(0)
            }
            abi::TRANSLATE => {
                let linear = read_words::<1>(argument)?[0];
                write_words(argument + 8, &[linear, 1])?;
                Ok(0)
            }
            abi::SET_USER_MEMORY_REGION | abi::SET_USER_MEMORY_REGION2 => {
                let mut bytes = [0; Region::SIZE];
                self.read_memory(argument, &mut bytes)?;
                if let Some(error) = state.next_slot_error.take() {
                    return Err(error);
                }
                state.vms.get_mut(&fd).ok_or(Errno::NOTTY)?.set(Region::from_bytes(&bytes))
            }
            abi::GET_DIRTY_LOG => {
                let [slot, bitmap] = read_words::<2>(argument)?;
                let slot = u32::try_from(slot & u64::from(u32::MAX)).unwrap();
                let vm = state.vms.get_mut(&fd).ok_or(Errno::NOTTY)?;
                let log = vm.logs.get_mut(&slot).ok_or(Errno::NOENT)?;
                let log = std::mem::replace(log, vec![0; log.len()]);
                write_words(usize::try_from(bitmap).unwrap(), &log)?;
                Ok(0)
            }
            abi::CLEAR_DIRTY_LOG => {
                let [head, first, _] = read_words::<3>(argument)?;
                let slot = u32::try_from(head & u64::from(u32::MAX)).unwrap();
                let vm = &state.vms[&fd];
                let count = head >> 32;
                if first % 64 != 0 {
                    return Err(Errno::INVAL);
                }
                vm.logs.get(&slot).ok_or(Errno::NOENT)?;
                let pages = vm.slots[&slot].size / 4096;
                let left = pages.checked_sub(first).ok_or(Errno::INVAL)?;
                if count > left || count < left && count % 64 != 0 {
                    return Err(Errno::INVAL);
                }
                Ok(0)
            }
            _ => Err(Errno::NOTTY),
        }
    }

    fn read_memory(&self, address: usize, data: &mut [u8]) -> Answer<()> {
        MEMORY.read_exact_at(data, address as u64).map_err(|_| Errno::FAULT)
    }

    fn write_memory(&self, address: usize, data: &[u8]) -> Answer<()> {
        write(address, data)
    }

    fn link(&self, fd: RawFd) -> Answer<Vec<u8>> {
        match fd {
            _ if self.state().strange => Ok(b"/dev/other".to_vec()),
            _ if self.state().no_proc => Err(Errno::NOENT),
            VCPU.. => Ok(b"anon_inode:kvm-vcpu:0".to_vec()),
            FIRST_VM.. => Ok(b"anon_inode:kvm-vm".to_vec()),
            _ => Ok(b"/dev/kvm".to_vec()),
        }
    }
}

impl Vm {
    /// In the order of the kernel's own checks.
    fn set(&mut self, asked: Region) -> Answer<i32> {
        let valid = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
        let aligned = [asked.size, asked.guest, asked.host].iter().all(|at| at % 4096 == 0);
        let (space, id) = (asked.slot >> 16, asked.slot & 0xffff);
        if asked.flags & !valid != 0
            || !aligned
            || asked.host >> 47 != 0
            || space >= SPACES
            || id >= MAX_SLOT
            || asked.guest.checked_add(asked.size).is_none()
        {
            return Err(Errno::INVAL);
        }
        let old = self.slots.get(&asked.slot).copied();
        if asked.size == 0 {
            self.slots.remove(&asked.slot).ok_or(Errno::INVAL)?;
            self.logs.remove(&asked.slot);
            return Ok(0);
        }
        let mut moves = true;
        if let Some(old) = old {
            let readonly = (old.flags ^ asked.flags) & KVM_MEM_READONLY;
            if (old.host, old.size) != (asked.host, asked.size) || readonly != 0 {
                return Err(Errno::INVAL);
            }
            moves = old.guest != asked.guest;
        }
        let others = self.slots.values().filter(|slot| slot.slot != asked.slot);
        if moves && others.into_iter().any(|slot| slot.overlaps(&asked)) {
            return Err(Errno::EXIST);
        }
        self.slots.insert(asked.slot, asked);
        if asked.flags & KVM_MEM_LOG_DIRTY_PAGES == 0 {
            self.logs.remove(&asked.slot);
        } else {
            let words = usize::try_from((asked.size / 4096).div_ceil(64)).unwrap();
            self.logs.entry(asked.slot).or_insert_with(|| vec![0; words]);
        }
        Ok(0)
    }
}

impl Vcpu {
    fn new(vm: RawFd) -> Self {
        // Three pages, and one more to find a beginning in.
        let words: &'static [AtomicU64] =
            (0..4 * 512).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak();
        let skipped = (4096 - words.as_ptr().addr() % 4096) / 8 % 512;
        let run = &words[skipped..skipped + 3 * 512];
        let (todo, done) = (VecDeque::new(), Vec::new());
        Self {
            vm,
            run,
            todo,
            done,
            exit: None,
            in_smm: false,
            repeats: false,
            out: 0,
            rbx: 0,
            rip: 0,
        }
    }

    fn set_exit(&self, reason: u32, words: [u64; 3]) {
        let flags = u64::from(self.in_smm) << 48;
        self.run[1].store(u64::from(reason) | flags, Ordering::Relaxed);
        for (word, value) in self.run[4..].iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

impl State {
    fn run(&mut self, fd: RawFd) -> Answer<i32> {
        let refusing = self.refusing.clone();
        let vcpu = self.vcpus.get_mut(&fd).ok_or(Errno::NOTTY)?;
        let slots = &self.vms.get(&vcpu.vm).ok_or(Errno::IO)?.slots;
        match vcpu.exit.take() {
            Some(Do::Read(_)) => {
                let value = vcpu.run[5].load(Ordering::Relaxed) & u64::from(u32::MAX);
                vcpu.done.push(Done::Read(u32::try_from(value).unwrap()));
            }
            Some(Do::Write(..)) => vcpu.done.push(Done::Written),
            _ => {}
        }
        let space = u32::from(vcpu.in_smm);
        let repeats = vcpu.repeats && matches!(vcpu.todo.front(), Some(Do::Read(_)));
        if vcpu.run[0].load(Ordering::Relaxed) & 0xff00 != 0 && !repeats {
            vcpu.out += 1;
            return Err(Errno::INTR);
        }
        loop {
            let Some(next) = vcpu.todo.front().copied() else { return Err(Errno::INTR) };
            let (address, exit) = match next {
                Do::Read(address) => (address, [address, 0, 4]),
                Do::Write(address, value) => (address, [address, value.into(), 4 | 1 << 32]),
                Do::Port => {
                    vcpu.todo.pop_front();
                    vcpu.set_exit(KVM_EXIT_IO, [0; 3]);
                    return Ok(0);
                }
                Do::Fail(error) => {
                    vcpu.todo.pop_front();
                    return Err(error);
                }
                Do::Reported { flags, address } => {
                    if flags == 0 && !slots.values().any(|slot| slot.contains(address)) {
                        vcpu.todo.pop_front();
                        continue;
                    }
                    vcpu.set_exit(KVM_EXIT_MEMORY_FAULT, [flags, address, 4096]);
                    return Err(Errno::FAULT);
                }
            };
            let mut here = slots.values().filter(|slot| slot.space() == space);
            let Some(slot) = here.find(|slot| slot.contains(address)) else {
                vcpu.todo.pop_front();
                vcpu.exit = Some(next);
                vcpu.set_exit(KVM_EXIT_MMIO, exit);
                return Ok(0);
            };
            let host = slot.host + (address - slot.guest);
            if refusing.iter().any(|range| range.contains(&host)) {
                if let Some((after, faults)) = &mut self.signals {
                    *faults += 1;
                    if *faults > *after {
                        *faults = 0;
                        return Err(Errno::INTR);
                    }
                }
                vcpu.rbx = address;
                vcpu.set_exit(KVM_EXIT_UNKNOWN, [0; 3]);
                return Err(Errno::FAULT);
            }
            vcpu.todo.pop_front();
            vcpu.done.push(Done::Live);
        }
    }
}

fn write(address: usize, data: &[u8]) -> Answer<()> {
    MEMORY.write_all_at(data, address as u64).map_err(|_| Errno::FAULT)
}

fn write_words(address: usize, words: &[u64]) -> Answer<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write(address, &bytes)
}

fn read_words<const N: usize>(address: usize) -> Answer<[u64; N]> {
    let mut words = [0; N];
    for (word, at) in words.iter_mut().zip((address..).step_by(8)) {
        let mut bytes = [0; 8];
        MEMORY.read_exact_at(&mut bytes, at as u64).map_err(|_| Errno::FAULT)?;
        *word = u64::from_le_bytes(bytes);
    }
    Ok(words)
}
