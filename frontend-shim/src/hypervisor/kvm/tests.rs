use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_sregs};
use rustix::fs::MemfdFlags;

use super::stopped;
use super::*;
use crate::fault::{FaultAccess, FaultPlace, GuestAccess, Unlocated};
use crate::hypervisor::memory::Protection;
use crate::hypervisor::{GuestAddress, HostMapping, PAGE_SIZE, VcpuExit};

const RAM_SIZE: u64 = 0x20_0000;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
pub(super) const BAR: u64 = 0x4000_0000;
const OTHER_BAR: u64 = 0x8000_0000;
const BROKEN_RAM: u64 = 0xc000_0000;
/// Linear addresses: a 4 KiB page of [`BAR`], 2 MiB of [`OTHER_BAR`], and a page without a slot.
const BAR_PAGE: u64 = 0x10_0000;
const BROKEN_PAGE: u64 = 0x10_1000;
pub(super) const NO_SLOT_PAGE: u64 = 0x10_2000;
const UNMAPPED_PAGE: u64 = 0x10_3000;
const OTHER_BAR_LARGE: u64 = 0x20_0000;

pub(super) struct Guest {
    pub(super) kvm: Kvm,
    pub(super) vcpu: KvmVcpu,
    ram: Arc<HostMapping>,
    bar: Arc<HostMapping>,
}

/// A virtual CPU that stands in front of `code` in 64-bit mode; `None` without KVM. Whoever touches one
/// of its BARs takes a SIGBUS.
pub(super) fn guest(code: &[u8]) -> Option<Guest> {
    const TABLE: u64 = 0b11;
    const LARGE: u64 = 0b1000_0011;
    let kvm = match Kvm::probe().and_then(|()| Kvm::open()) {
        Ok(kvm) => kvm,
        Err(reason) => {
            println!("kvm skipped: {reason}");
            return None;
        }
    };
    let ram = Arc::new(HostMapping::anonymous(RAM_SIZE).unwrap());
    for (table, entry, value) in [(0, 0, 0x2000 | TABLE), (1, 0, 0x3000 | TABLE)] {
        ram.store_u64(TABLES + 0x1000 * table + 8 * entry, value).unwrap();
    }
    ram.store_u64(0x3000, 0x4000 | TABLE).unwrap();
    ram.store_u64(0x3008, OTHER_BAR | LARGE).unwrap();
    for page in 0..RAM_SIZE / PAGE_SIZE {
        let physical = match page * PAGE_SIZE {
            BAR_PAGE => BAR,
            BROKEN_PAGE => BROKEN_RAM,
            NO_SLOT_PAGE => BAR - PAGE_SIZE,
            UNMAPPED_PAGE => continue,
            address => address,
        };
        ram.store_u64(0x4000 + 8 * page, physical | TABLE).unwrap();
    }
    ram.write(CODE, code).unwrap();

    let fd = rustix::fs::memfd_create("bar", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 4 * PAGE_SIZE).unwrap();
    let bar = || Arc::new(HostMapping::from_fd(&fd, 0, 4 * PAGE_SIZE, true).unwrap().of_device());
    let (bar, other_bar) = (bar(), bar());
    rustix::fs::ftruncate(&fd, PAGE_SIZE).unwrap();
    let broken = Arc::new(HostMapping::from_fd(&fd, 0, PAGE_SIZE, true).unwrap());
    rustix::fs::ftruncate(&fd, 0).unwrap();
    for (id, address, memory) in
        [(0, 0, &ram), (1, BAR, &bar), (2, OTHER_BAR, &other_bar), (3, BROKEN_RAM, &broken)]
    {
        let mapping = SlotMapping::whole(GuestAddress(address), memory);
        kvm.map_slot(SlotId(id), mapping).unwrap();
    }
    let vcpu = kvm.reset_vcpu(0).unwrap();
    let page_table_root = GuestAddress(TABLES);
    vcpu.enter_long_mode(&VcpuEntry { rip: CODE, rsp: 0x7000, rdi: 0, page_table_root }).unwrap();
    Some(Guest { kvm, vcpu, ram, bar })
}

impl Guest {
    pub(super) fn registers(&self, change: impl FnOnce(&mut kvm_regs)) {
        let mut regs = self.vcpu.fd().get_regs().unwrap();
        change(&mut regs);
        self.vcpu.fd().set_regs(&regs).unwrap();
    }

    pub(super) fn vectors(&self, change: impl FnOnce(&mut [[u8; 32]; 16])) {
        let fd = self.vcpu.fd();
        let mut image = stopped::image(&fd.get_xsave().unwrap(), &self.kvm.machine.xsave);
        let mut vectors = image.vectors();
        change(&mut vectors.0);
        image.set_vectors(&vectors, None);
        self.vcpu.set_xsave(&stopped::xsave(&image)).unwrap();
    }

    pub(super) fn special(&self, change: impl FnOnce(&mut kvm_sregs)) {
        let mut sregs = self.vcpu.fd().get_sregs().unwrap();
        change(&mut sregs);
        self.vcpu.fd().set_sregs(&sregs).unwrap();
    }
}

fn words(words: [u32; 4]) -> [u8; 16] {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.try_into().unwrap()
}

fn access(address: u64, size: u64, kind: FaultAccess) -> GuestAccess {
    GuestAccess { address: GuestAddress(address), size, kind: Some(kind) }
}

use FaultAccess::{Execute, Read, Write};

#[test]
fn a_stopped_vcpu_tells_which_of_its_accesses_can_have_faulted() {
    const LOAD: &[u8] = &[0x8b, 0x07]; // mov eax, [rdi]
    const STORE: &[u8] = &[0x48, 0x89, 0x07]; // mov [rdi], rax
    const MOVE: &[u8] = &[0xf3, 0xa5]; // rep movsd
    const ADD: &[u8] = &[0xf0, 0x01, 0x07]; // lock add [rdi], eax
    const PUSH: &[u8] = &[0xff, 0x37]; // push qword [rdi]
    let located = FaultPlace::Located;
    let unknown = |why| FaultPlace::Unknown(why);
    let rows = [
        ("4 KiB page", LOAD, 0, BAR_PAGE + 8, located(access(BAR + 8, 4, Read))),
        (
            "2 MiB page",
            STORE,
            0,
            OTHER_BAR_LARGE + 0x1010,
            located(access(OTHER_BAR + 0x1010, 8, Write)),
        ),
        (
            "across pages",
            STORE,
            0,
            OTHER_BAR_LARGE + 0xffd,
            FaultPlace::OneOf(vec![
                access(OTHER_BAR + 0xffd, 3, Write),
                access(OTHER_BAR + 0x1000, 5, Write),
            ]),
        ),
        (
            "the half behind the slot would have exited",
            STORE,
            0,
            OTHER_BAR_LARGE + 0x3ffd,
            located(access(OTHER_BAR + 0x3ffd, 3, Write)),
        ),
        ("read-modify-write", ADD, 0, BAR_PAGE, located(access(BAR, 4, Write))),
        ("RAM to BAR", MOVE, 0x6000, BAR_PAGE + 4, located(access(BAR + 4, 4, Write))),
        ("BAR to RAM", MOVE, BAR_PAGE + 4, 0x6000, located(access(BAR + 4, 4, Read))),
        (
            "BAR to BAR",
            MOVE,
            BAR_PAGE,
            OTHER_BAR_LARGE,
            FaultPlace::OneOf(vec![access(BAR, 4, Read), access(OTHER_BAR, 4, Write)]),
        ),
        ("BAR to broken RAM", MOVE, BAR_PAGE, BROKEN_PAGE, located(access(BROKEN_RAM, 4, Write))),
        ("BAR to nothing", MOVE, BAR_PAGE, NO_SLOT_PAGE, located(access(BAR, 4, Read))),
        ("BAR to the stack", PUSH, 0, BAR_PAGE, located(access(BAR, 8, Read))),
        ("RAM", LOAD, 0, 0x6000, unknown(Unlocated::NoSlot(CODE))),
        ("slot gone since", LOAD, 0, NO_SLOT_PAGE + 8, located(access(BAR - 0xff8, 4, Read))),
        ("not mapped", LOAD, 0, UNMAPPED_PAGE, unknown(Unlocated::NotMapped(UNMAPPED_PAGE))),
        ("not canonical", LOAD, 0, 1 << 63, unknown(Unlocated::NotMapped(1 << 63))),
        (
            "no instruction",
            &[0x0f, 0x04],
            0,
            BAR_PAGE,
            unknown(Unlocated::UnknownInstruction(CODE)),
        ),
    ];
    for (name, code, rsi, rdi, expected) in rows {
        let Some(guest) = guest(code) else { return };
        guest.registers(|regs| (regs.rsi, regs.rdi, regs.rcx) = (rsi, rdi, 7));
        assert_eq!(guest.vcpu.find_fault(), expected, "{name}");
    }
}

#[test]
fn memory_that_we_took_away_ourselves_is_the_culprit() {
    // rep movsd from one BAR to the other
    let Some(guest) = guest(&[0xf3, 0xa5]) else { return };
    guest.registers(|regs| (regs.rsi, regs.rdi, regs.rcx) = (OTHER_BAR_LARGE, BAR_PAGE, 1));
    guest.bar.protect(0, PAGE_SIZE, Protection::ReadOnly).unwrap();
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(access(BAR, 4, Write)));
    guest.registers(|regs| (regs.rsi, regs.rdi) = (BAR_PAGE, OTHER_BAR_LARGE));
    let both = vec![access(BAR, 4, Read), access(OTHER_BAR, 4, Write)];
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::OneOf(both));
    guest.bar.set_accessible(false).unwrap();
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(access(BAR, 4, Read)));
}

#[test]
fn a_write_to_a_read_only_slot_has_no_slot() {
    let Some(guest) = guest(&[0x01, 0x07]) else { return }; // add [rdi], eax
    guest.kvm.unmap_slot(SlotId(1)).unwrap();
    let mapping = SlotMapping::whole(GuestAddress(BAR), &guest.bar);
    guest.kvm.map_slot(SlotId(1), SlotMapping { access: SlotAccess::ReadOnly, ..mapping }).unwrap();
    guest.registers(|regs| regs.rdi = BAR_PAGE);
    // Had it faulted, then before the slot became read-only.
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(access(BAR, 4, Write)));
}

#[test]
fn a_locked_access_to_a_device_that_refuses_is_a_fault_and_has_changed_nothing() {
    let rows: [(&str, &[u8], u64); 3] = [
        ("lock xadd [rdi], eax", &[0xf0, 0x0f, 0xc1, 0x07], 4),
        ("lock cmpxchg8b [rdi]", &[0xf0, 0x0f, 0xc7, 0x0f], 8),
        ("lock inc word [rdi]", &[0x66, 0xf0, 0xff, 0x07], 2),
    ];
    for (name, code, size) in rows {
        let Some(mut guest) = guest(code) else { return };
        guest.registers(|regs| (regs.rax, regs.rdi) = (0x1234, BAR_PAGE));
        let before = guest.vcpu.fd().get_regs().unwrap();
        let fault = loop {
            match guest.vcpu.run().unwrap() {
                // Where KVM emulates everything, refused memory exits as MMIO.
                VcpuExit::MmioRead { data, .. } => data.fill(7),
                VcpuExit::Interrupted => {}
                VcpuExit::MemoryFault(fault) => break fault,
                other => panic!("{name}: {other:?}"),
            }
        };
        if !matches!(fault.place, FaultPlace::Reported(_)) {
            assert_eq!(fault.place, FaultPlace::Located(access(BAR, size, Write)), "{name}");
        }
        assert_eq!(guest.vcpu.fd().get_regs().unwrap(), before, "{name}");
    }
}

#[test]
fn code_in_a_bar_is_not_read() {
    let Some(guest) = guest(&[]) else { return };
    guest.registers(|regs| regs.rip = OTHER_BAR_LARGE + 0xffa);
    let fetch = access(OTHER_BAR + 0xffa, 6, Execute);
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(fetch));
    guest.registers(|regs| regs.rip = BROKEN_PAGE);
    let fetch = access(BROKEN_RAM, 15, Execute);
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(fetch));
}

#[test]
fn narrow_modes_are_located_through_their_segments() {
    let Some(guest) = guest(&[0x8b, 0x43, 0x10]) else { return };
    // mov eax, [ebx + 0x10] without paging
    guest.special(|sregs| {
        (sregs.cr0, sregs.cr4, sregs.efer) = (0x11, 0, 0);
        (sregs.cs.l, sregs.cs.db) = (0, 1);
        sregs.ds.base = BAR - 0x1000;
    });
    guest.registers(|regs| regs.rbx = 0x1000);
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(access(BAR + 0x10, 4, Read)));
    // mov ax, [bp + di + 0x10], the same bytes in real mode
    guest.special(|sregs| {
        sregs.cr0 = 0x10;
        (sregs.cs.db, sregs.ss.db) = (0, 0);
        sregs.ss.base = BAR;
    });
    guest.registers(|regs| (regs.rbp, regs.rdi) = (0xf000, 0x1_1020));
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::Located(access(BAR + 0x30, 2, Read)));
}

#[test]
fn the_lanes_of_a_gather_come_from_the_vector_registers() {
    // vpgatherdd xmm0, [rdi + xmm4 * 8], xmm3
    let Some(guest) = guest(&[0xc4, 0xe2, 0x61, 0x90, 0x04, 0xe7]) else { return };
    guest.vectors(|vectors| {
        vectors[3][..16].copy_from_slice(&words([1 << 31, 0, 1 << 31, 0]));
        vectors[4][..16].copy_from_slice(&words([2, 3, u32::MAX, 4]));
    });
    guest.registers(|regs| regs.rdi = BAR_PAGE + 0x100);
    let lanes = vec![access(BAR + 0x110, 4, Read), access(BAR + 0xf8, 4, Read)];
    assert_eq!(guest.vcpu.find_fault(), FaultPlace::OneOf(lanes));
}

#[test]
fn looking_for_a_fault_changes_no_more_than_accessed_bits() {
    let code = [0x8b, 0x07];
    let Some(guest) = guest(&code) else { return };
    guest.registers(|regs| regs.rdi = BAR_PAGE);
    let state = || (guest.vcpu.fd().get_regs().unwrap(), guest.vcpu.fd().get_sregs().unwrap());
    let ram = || {
        let words = (0..RAM_SIZE).step_by(8).map(|at| (at, guest.ram.load_u64(at).unwrap()));
        let tables = TABLES..CODE;
        words
            .map(|(at, word)| if tables.contains(&at) { word & !0x20 } else { word })
            .collect::<Vec<_>>()
    };
    let before = (state(), ram());
    guest.vcpu.find_fault();
    assert!(before == (state(), ram()));
}

#[test]
fn every_reason_for_a_missing_kvm_is_one_line_that_says_what_to_do() {
    use rustix::io::Errno;
    for (errno, expected) in [
        (Errno::NOENT, "not loaded"),
        (Errno::ACCESS, "kvm group"),
        (Errno::NODEV, "VMX or SVM"),
        (Errno::NOTTY, "can't be opened"),
    ] {
        let line = unavailable(errno.raw_os_error()).to_string();
        assert!(line.contains("/dev/kvm") && line.contains(expected), "{line}");
        assert!(!line.contains('\n'), "{line}");
    }
}
