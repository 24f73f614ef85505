//! The interpreter and its slots.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::hypervisor::{FaultAccess, MemoryFault, PAGE_SIZE, VcpuExit};
use crate::hypervisor::{GuestAddress, HostMapping, SlotAccess};

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
const CODE_SLOT: SlotId = SlotId(0);
const DATA_SLOT: SlotId = SlotId(1);
const MMIO: u64 = 0x8000;

/// A machine with `code` at [`CODE`] and a page of memory at [`DATA`].
fn machine(code: &[u8]) -> (Model, Arc<HostMapping>) {
    let model = Model::new();
    for slot in [CODE_SLOT, DATA_SLOT] {
        let memory = Arc::new(HostMapping::anonymous(PAGE_SIZE).unwrap());
        if slot == CODE_SLOT {
            memory.write(0, code).unwrap();
            let at = GuestAddress(CODE);
            let access = SlotAccess::ReadOnly;
            model
                .map_slot(slot, SlotMapping { access, ..SlotMapping::whole(at, &memory) })
                .unwrap();
        } else {
            map_data(&model, &memory);
            return (model, memory);
        }
    }
    unreachable!("the second slot returns")
}

fn map_data(model: &Model, memory: &Arc<HostMapping>) {
    let at = GuestAddress(DATA);
    model.map_slot(DATA_SLOT, SlotMapping::whole(at, memory)).unwrap();
}

/// A virtual CPU at [`CODE`] with `rdi` as given.
fn vcpu(model: &Model, rdi: u64) -> Box<dyn Vcpu> {
    let entry =
        VcpuEntry { rip: CODE, rsp: DATA + PAGE_SIZE, rdi, page_table_root: GuestAddress(0) };
    model.create_vcpu(0, &entry).unwrap()
}

/// Runs to HLT and lists the exits; reads are answered with bytes 0x11, 0x22, ...
fn exits(vcpu: &mut dyn Vcpu) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Halted => return seen,
            VcpuExit::MmioRead { address, data } => {
                seen.push(format!("read {address} {}", data.len()));
                data.copy_from_slice(&0x8877_6655_4433_2211_u64.to_le_bytes()[..data.len()]);
            }
            VcpuExit::MmioWrite { address, data } => {
                seen.push(format!("write {address} {data:02x?}"))
            }
            VcpuExit::PioRead { port, data, .. } => {
                seen.push(format!("in {port:#x} {}", data.len()));
                data.copy_from_slice(&0x4433_2211_u32.to_le_bytes()[..data.len()]);
            }
            VcpuExit::PioWrite { port, data, .. } => {
                seen.push(format!("out {port:#x} {data:02x?}"))
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_access_outside_of_slots_is_one_exit_of_its_own_width() {
    let rows: [(&str, &[u8], &[&str]); 15] = [
        ("mov al, [rdi]", &[0x8a, 0x07], &["read 0x8000 1"]),
        ("movzx eax, word [rdi]", &[0x0f, 0xb7, 0x07], &["read 0x8000 2"]),
        ("mov eax, [rdi+4]", &[0x8b, 0x47, 0x04], &["read 0x8004 4"]),
        ("mov rax, [rdi]", &[0x48, 0x8b, 0x07], &["read 0x8000 8"]),
        ("mov rax, [rdi+1]", &[0x48, 0x8b, 0x47, 0x01], &["read 0x8001 8"]),
        (
            "mov rax, [rdi+0xffc]: two pages",
            &[0x48, 0x8b, 0x87, 0xfc, 0x0f, 0, 0],
            &["read 0x8ffc 4", "read 0x9000 4"],
        ),
        (
            "mov qword [rdi], -2",
            &[0x48, 0xc7, 0x07, 0xfe, 0xff, 0xff, 0xff],
            &["write 0x8000 [fe, ff, ff, ff, ff, ff, ff, ff]"],
        ),
        ("add byte [rdi], 1", &[0x80, 0x07, 0x01], &["read 0x8000 1", "write 0x8000 [12]"]),
        (
            "lock inc dword [rdi]",
            &[0xf0, 0xff, 0x07],
            &["read 0x8000 4", "write 0x8000 [12, 22, 33, 44]"],
        ),
        ("xchg [rdi], edi", &[0x87, 0x3f], &["read 0x8000 4", "write 0x8000 [00, 80, 00, 00]"]),
        (
            "push [rdi]; mov rax, [0x2ff8]; mov [rdi], rax",
            &[0xff, 0x37, 0x48, 0x8b, 0x04, 0x25, 0xf8, 0x2f, 0, 0, 0x48, 0x89, 0x07],
            &["read 0x8000 8", "write 0x8000 [11, 22, 33, 44, 55, 66, 77, 88]"],
        ),
        (
            "mov ecx, 2; mov rsi, rdi; mov edi, 0x9000; rep movsw",
            &[0xb9, 2, 0, 0, 0, 0x48, 0x89, 0xfe, 0xbf, 0, 0x90, 0, 0, 0xf3, 0x66, 0xa5],
            &["read 0x8000 2", "write 0x9000 [11, 22]", "read 0x8002 2", "write 0x9002 [11, 22]"],
        ),
        (
            "mov dx, 0xcfc; in ax, dx; out 0x10, eax",
            &[0x66, 0xba, 0xfc, 0x0c, 0x66, 0xed, 0xe7, 0x10],
            &["in 0xcfc 2", "out 0x10 [11, 22, 00, 00]"],
        ),
        ("in al, 0x80", &[0xe4, 0x80], &["in 0x80 1"]),
        ("a write to a read-only slot", &[0xa2, 0, 0x10, 0, 0, 0, 0, 0, 0], &["write 0x1000 [00]"]),
    ];
    for (name, bytes, expected) in rows {
        let (model, _memory) = machine(&[bytes, &[0xf4]].concat());
        assert_eq!(exits(&mut *vcpu(&model, MMIO)), expected, "{name}");
    }
}

#[test]
fn code_that_the_model_does_not_know_is_an_error_that_names_it() {
    let rows: [(&str, &[u8]); 6] = [
        ("addps xmm0, xmm1", &[0x0f, 0x58, 0xc1]),
        ("undefined opcode", &[0x0f, 0x0b]),
        ("no opcode at all", &[0x06]),
        ("REP INSB", &[0xf3, 0x6c]),
        ("LOOP", &[0xe2, 0xfe]),
        ("locked access that is not aligned", &[0xf0, 0xff, 0x04, 0x25, 1, 0x20, 0, 0]),
    ];
    for (name, bytes) in rows {
        let (model, _memory) = machine(&[&[0x90], bytes].concat());
        match vcpu(&model, 0).run().expect_err(name) {
            HypervisorError::UnsupportedInstruction { vcpu: 0, rip, bytes: found, .. } => {
                assert_eq!(rip, CODE + 1, "{name}");
                assert!(found.starts_with(bytes), "{name}: {found:02x?}");
            }
            other => panic!("{name}: {other}"),
        }
    }
    let (model, _memory) = machine(&[0xe9, 0, 0, 1, 0]);
    let error = vcpu(&model, 0).run().expect_err("jump out of memory");
    assert!(error.to_string().contains("outside of memory slots"), "{error}");
}

#[test]
fn an_inaccessible_slot_faults_and_the_instruction_is_executed_again() {
    let rows: [(&str, &[u8], FaultAccess, u64); 4] = [
        (
            "mov rax, [rdi]; add [rdi+8], rax",
            &[0x48, 0x8b, 0x07, 0x48, 0x01, 0x47, 8],
            FaultAccess::Read,
            14,
        ),
        ("mov qword [rdi+8], 5", &[0x48, 0xc7, 0x47, 8, 5, 0, 0, 0], FaultAccess::Write, 5),
        ("inc qword [rdi+8]", &[0x48, 0xff, 0x47, 8], FaultAccess::Write, 8),
        (
            "lock xadd [rdi+8], rdi",
            &[0xf0, 0x48, 0x0f, 0xc1, 0x7f, 8],
            FaultAccess::Write,
            DATA + 7,
        ),
    ];
    for (name, bytes, access, expected) in rows {
        let (model, memory) = machine(&[bytes, &[0xf4]].concat());
        memory.store_u64(0, 7).unwrap();
        memory.store_u64(8, 7).unwrap();
        memory.set_accessible(false).unwrap();
        let mut vcpu = vcpu(&model, DATA);
        for attempt in 0..3 {
            match vcpu.run().unwrap() {
                VcpuExit::MemoryFault(fault) => assert_eq!(
                    fault,
                    MemoryFault::reported(GuestAddress(DATA), PAGE_SIZE, Some(access)),
                    "{name}, attempt {attempt}"
                ),
                other => panic!("{name}: {other:?}"),
            }
        }
        memory.set_accessible(true).unwrap();
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Halted), "{name}");
        assert_eq!(memory.load_u64(8), Ok(expected), "{name}: exactly once");
    }
}

#[test]
fn deleting_the_slot_turns_a_fault_into_mmio() {
    let (model, memory) = machine(&[0x48, 0x8b, 0x07, 0xf4]); // mov rax, [rdi]
    memory.set_accessible(false).unwrap();
    let mut vcpu = vcpu(&model, DATA);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::MemoryFault(_)));
    model.unmap_slot(DATA_SLOT).unwrap();
    assert_eq!(exits(&mut *vcpu), ["read 0x2000 8"]);
}

#[test]
fn memory_that_is_read_only_faults_on_writes_alone() {
    let fd = rustix::fs::memfd_create("read-only", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, PAGE_SIZE).unwrap();
    let memory = Arc::new(HostMapping::from_fd(&fd, 0, PAGE_SIZE, false).unwrap());
    // mov eax, [rdi]; mov [rdi], eax; hlt
    let (model, _memory) = machine(&[0x8b, 0x07, 0x89, 0x07, 0xf4]);
    model.unmap_slot(DATA_SLOT).unwrap();
    map_data(&model, &memory);
    match vcpu(&model, DATA).run().unwrap() {
        VcpuExit::MemoryFault(fault) => {
            assert_eq!(fault.candidates()[0].kind, Some(FaultAccess::Write))
        }
        other => panic!("{other:?}"),
    };
}

#[test]
fn a_completed_exit_is_not_repeated_when_a_slot_appears_meanwhile() {
    // mov rax, [rdi]; mov [rdi+8], rax; hlt
    let (model, memory) = machine(&[0x48, 0x8b, 0x07, 0x48, 0x89, 0x47, 8, 0xf4]);
    memory.store_u64(0, 1).unwrap();
    model.unmap_slot(DATA_SLOT).unwrap();
    let mut vcpu = vcpu(&model, DATA);
    match vcpu.run().unwrap() {
        VcpuExit::MmioRead { data, .. } => data.fill(0xff),
        other => panic!("{other:?}"),
    }
    map_data(&model, &memory);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Halted));
    assert_eq!(memory.load_u64(8), Ok(u64::MAX));
}

#[test]
fn locked_instructions_of_two_vcpus_lose_no_count() {
    // mov ecx, 20000; 1: lock inc qword [rdi]; dec ecx; jnz 1b; hlt
    let code = [0xb9, 0x20, 0x4e, 0, 0, 0xf0, 0x48, 0xff, 0x07, 0xff, 0xc9, 0x75, 0xf8, 0xf4];
    let (model, memory) = machine(&code);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut vcpu = vcpu(&model, DATA);
            scope.spawn(move || assert!(matches!(vcpu.run().unwrap(), VcpuExit::Halted)));
        }
    });
    assert_eq!(memory.load_u64(0), Ok(40_000));
}

#[test]
fn after_unmap_returns_no_vcpu_reaches_the_memory() {
    const SENTINEL: u64 = u64::MAX;
    // 1: inc rax; mov [rdi], rax; jmp 1b
    let (model, memory) = machine(&[0x48, 0xff, 0xc0, 0x48, 0x89, 0x07, 0xeb, 0xf8]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut vcpu = vcpu(&model, DATA);
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    match vcpu.run().unwrap() {
                        VcpuExit::MmioWrite { .. } | VcpuExit::Interrupted => {}
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        let mut reached = 0;
        for _ in 0..3000 {
            model.unmap_slot(DATA_SLOT).unwrap();
            memory.store_u64(0, SENTINEL).unwrap();
            for _ in 0..50 {
                if memory.load_u64(0) != Ok(SENTINEL) {
                    reached += 1;
                }
                std::hint::spin_loop();
            }
            map_data(&model, &memory);
        }
        done.store(true, Ordering::Relaxed);
        model.unmap_slot(DATA_SLOT).unwrap();
        assert_eq!(reached, 0, "accesses through a snapshot that was replaced");
    });
}

#[test]
fn unmap_waits_for_an_access_under_way_and_for_nothing_else() {
    let (model, memory) = machine(&[0xf4]);
    let mut reader = model.slots.reader();
    let mut idle = model.slots.reader();
    drop(idle.enter());
    let returned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let snapshot = reader.enter();
        scope.spawn(|| {
            model.unmap_slot(DATA_SLOT).unwrap();
            returned.store(true, Ordering::Release);
        });
        // Published already, and still waiting for this snapshot.
        while idle.enter().table().find(DATA).is_some() {
            std::thread::yield_now();
        }
        assert!(snapshot.table().find(DATA).is_some(), "the snapshot is what it was");
        assert!(!returned.load(Ordering::Acquire), "still waiting");
        drop(snapshot);
    });
    assert!(returned.load(Ordering::Acquire));
    assert!(reader.enter().table().find(DATA).is_none());
    assert_eq!(Arc::strong_count(&memory), 1, "nobody keeps memory that is not mapped");
}

#[test]
fn a_guest_that_never_exits_returns_to_its_caller() {
    let (model, _memory) = machine(&[0xeb, 0xfe]); // 1: jmp 1b
    assert!(matches!(vcpu(&model, 0).run().unwrap(), VcpuExit::Interrupted));
}
