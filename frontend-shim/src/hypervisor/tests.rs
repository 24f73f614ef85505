//! What all hypervisors have in common: slots, exits, and what instructions do.

use super::kvm::Kvm;
use super::model::Model;
use super::*;

const TABLES: u64 = 0x1000;
const CODE: u64 = 0x4000;
const BLOCK: u64 = 0x5000;
const STACK_TOP: u64 = 0x8000;
const RAM_SIZE: u64 = 0x1_0000;
const RAM_SLOT: SlotId = SlotId(0);
const BAR_SLOT: SlotId = SlotId(1);
const BAR: u64 = 0x10_0000;

/// Runs a test on every hypervisor that works here.
fn on_every_hypervisor(test: impl Fn(&dyn Vm)) {
    test(&Model::new());
    match Kvm::probe().and_then(|()| Kvm::open()) {
        Ok(kvm) => test(&kvm),
        Err(reason) => println!("kvm skipped: {reason}"),
    }
}

/// RAM at 0 with identity tables for the first 2 MiB and `code` at [`CODE`].
fn ram(vm: &dyn Vm, code: &[u8]) -> Arc<HostMapping> {
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 0b1000_0011;
    let ram = Arc::new(HostMapping::anonymous(RAM_SIZE).unwrap());
    ram.store_u64(TABLES, (TABLES + 0x1000) | TABLE).unwrap();
    ram.store_u64(TABLES + 0x1000, (TABLES + 0x2000) | TABLE).unwrap();
    ram.store_u64(TABLES + 0x2000, LARGE_PAGE).unwrap();
    ram.write(CODE, code).unwrap();
    vm.map_slot(RAM_SLOT, SlotMapping::whole(GuestAddress(0), &ram)).unwrap();
    ram
}

fn vcpu(vm: &dyn Vm, id: u32, rdi: u64) -> Box<dyn Vcpu> {
    let page_table_root = GuestAddress(TABLES);
    vm.create_vcpu(id, &VcpuEntry { rip: CODE, rsp: STACK_TOP, rdi, page_table_root }).unwrap()
}

fn run_to_halt(vcpu: &mut dyn Vcpu) {
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Halted => return,
            VcpuExit::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_bar_is_memory_while_its_slot_is_mapped_and_mmio_otherwise() {
    // 1: mov rax, [rdi]; mov [rdi+8], rax; out 0x10, al; jmp 1b
    let code = [0x48, 0x8b, 0x07, 0x48, 0x89, 0x47, 8, 0xe6, 0x10, 0xeb, 0xf5];
    on_every_hypervisor(|vm| {
        let kind = vm.kind();
        let _ram = ram(vm, &code);
        let bar = Arc::new(HostMapping::anonymous(PAGE_SIZE).unwrap());
        let map = |access| {
            vm.map_slot(
                BAR_SLOT,
                SlotMapping { access, ..SlotMapping::whole(GuestAddress(BAR), &bar) },
            )
        };
        let mut vcpu = vcpu(vm, 0, BAR);
        for (round, access) in [
            (1, None),
            (2, Some(SlotAccess::ReadWrite)),
            (3, None),
            (4, Some(SlotAccess::ReadOnly)),
        ] {
            bar.store_u64(0, round).unwrap();
            bar.store_u64(8, 0).unwrap();
            if let Some(access) = access {
                map(access).unwrap();
            }
            let mut exits = Vec::new();
            loop {
                match vcpu.run().unwrap() {
                    VcpuExit::MmioRead { address, data } => {
                        exits.push(("read", address.0, data.len()));
                        data.fill(0xff);
                    }
                    VcpuExit::MmioWrite { address, data } => {
                        exits.push(("write", address.0, data.len()));
                    }
                    VcpuExit::PioWrite { port: 0x10, data, .. } => {
                        let expected = if access.is_some() { round } else { 0xff };
                        assert_eq!(u64::from(data[0]), expected, "{kind} round {round}");
                        break;
                    }
                    VcpuExit::Interrupted => {}
                    other => panic!("{kind} round {round}: {other:?}"),
                }
            }
            let (expected, stored): (&[_], _) = match access {
                None => (&[("read", BAR, 8), ("write", BAR + 8, 8)], 0),
                Some(SlotAccess::ReadWrite) => (&[], round),
                Some(SlotAccess::ReadOnly) => (&[("write", BAR + 8, 8)], 0),
            };
            assert_eq!(exits, expected, "{kind} round {round}");
            assert_eq!(bar.load_u64(8), Ok(stored), "{kind} round {round}");
            if access.is_some() {
                vm.unmap_slot(BAR_SLOT).unwrap();
            }
        }
        assert_eq!(Arc::strong_count(&bar), 1, "{kind}: unmapped slots keep no memory");
    });
}

#[test]
fn slots_that_can_not_be_are_refused_and_change_nothing() {
    on_every_hypervisor(|vm| {
        let ram = ram(vm, &[0xf4]);
        let map = |slot, guest, len| {
            let whole = SlotMapping::whole(GuestAddress(guest), &ram);
            vm.map_slot(SlotId(slot), SlotMapping { len, ..whole })
        };
        assert!(matches!(map(1, BAR + 1, PAGE_SIZE), Err(HypervisorError::Misaligned { .. })));
        assert!(matches!(map(1, BAR, 2 * RAM_SIZE), Err(HypervisorError::BadRange { .. })));
        assert!(matches!(map(0, BAR, PAGE_SIZE), Err(HypervisorError::SlotInUse { .. })));
        assert!(matches!(map(1, 0xf000, PAGE_SIZE), Err(HypervisorError::SlotOverlap { .. })));
        assert!(matches!(
            vm.unmap_slot(BAR_SLOT),
            Err(HypervisorError::NoSuchSlot { slot: BAR_SLOT })
        ));
        assert_eq!(Arc::strong_count(&ram), 2);
        run_to_halt(&mut *vcpu(vm, 0, 0));
    });
}

#[test]
fn memory_that_is_taken_away_faults_or_exits_and_works_again_when_it_is_back() {
    // mov rax, [rdi]; mov [rdi+8], rax; hlt
    let code = [0x48, 0x8b, 0x07, 0x48, 0x89, 0x47, 8, 0xf4];
    on_every_hypervisor(|vm| {
        let _ram = ram(vm, &code);
        let bar = Arc::new(HostMapping::anonymous(PAGE_SIZE).unwrap());
        bar.store_u64(0, 42).unwrap();
        vm.map_slot(BAR_SLOT, SlotMapping::whole(GuestAddress(BAR), &bar)).unwrap();
        bar.set_accessible(false).unwrap();
        let mut vcpu = vcpu(vm, 0, BAR);
        let expected = loop {
            match vcpu.run().unwrap() {
                VcpuExit::MemoryFault(fault) => {
                    println!("{}: {fault:?}", vm.kind());
                    assert!(
                        fault.candidates().iter().all(|access| access.address == GuestAddress(BAR))
                    );
                    break 42;
                }
                // A KVM that emulates every instruction can't tell refused memory from none at all.
                VcpuExit::MmioRead { address: GuestAddress(BAR), data }
                    if vm.kind() == HypervisorKind::Kvm =>
                {
                    println!("kvm: refused memory is reported as MMIO");
                    data.fill(0xff);
                    break u64::MAX;
                }
                VcpuExit::Interrupted => {}
                other => panic!("{other:?}"),
            }
        };
        bar.set_accessible(true).unwrap();
        run_to_halt(&mut *vcpu);
        assert_eq!(bar.load_u64(8), Ok(expected));
    });
}

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// What an instruction works on; `rsi` points to `memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    rax: u64,
    rbx: u64,
    rcx: u64,
    memory: u64,
    flags: u64,
}

const fn s(rax: u64, rbx: u64, rcx: u64, memory: u64, flags: u64) -> State {
    State { rax, rbx, rcx, memory, flags }
}

/// Loads the state at `rdi`, executes `bytes` and stores the state 64 bytes further.
fn wrap(bytes: &[u8]) -> Vec<u8> {
    use iced_x86::code_asm::{CodeAssembler, qword_ptr, rax, rbx, rcx, rdi, rdx, rsi};
    let mut a = CodeAssembler::new(64).unwrap();
    a.lea(rsi, qword_ptr(rdi + 24)).unwrap();
    a.mov(rax, qword_ptr(rdi)).unwrap();
    a.mov(rbx, qword_ptr(rdi + 8)).unwrap();
    a.mov(rcx, qword_ptr(rdi + 16)).unwrap();
    a.mov(rdx, qword_ptr(rdi + 32)).unwrap();
    a.push(rdx).unwrap();
    a.popfq().unwrap();
    a.db(bytes).unwrap();
    a.pushfq().unwrap();
    a.pop(rdx).unwrap();
    a.mov(qword_ptr(rdi + 96), rdx).unwrap();
    a.mov(qword_ptr(rdi + 64), rax).unwrap();
    a.mov(qword_ptr(rdi + 72), rbx).unwrap();
    a.mov(qword_ptr(rdi + 80), rcx).unwrap();
    a.mov(rdx, qword_ptr(rdi + 24)).unwrap();
    a.mov(qword_ptr(rdi + 88), rdx).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).unwrap()
}

/// Name, bytes, state before, state after, flags that the manual leaves undefined.
type Row = (&'static str, &'static [u8], State, State, u64);

const M: u64 = u64::MAX;
const X: u64 = 0x1122_3344_5566_7788;

const INSTRUCTIONS: &[Row] = &[
    // Widths of registers.
    ("mov eax, ebx", &[0x89, 0xd8], s(M, X, 0, 0, 0), s(0x5566_7788, X, 0, 0, 0), 0),
    ("mov ax, bx", &[0x66, 0x89, 0xd8], s(M, X, 0, 0, 0), s(0xffff_ffff_ffff_7788, X, 0, 0, 0), 0),
    ("mov ah, bl", &[0x88, 0xdc], s(M, X, 0, 0, 0), s(0xffff_ffff_ffff_88ff, X, 0, 0, 0), 0),
    ("mov al, bh", &[0x88, 0xf8], s(M, X, 0, 0, 0), s(0xffff_ffff_ffff_ff77, X, 0, 0, 0), 0),
    (
        "mov rax, imm64",
        &[0x48, 0xb8, 8, 7, 6, 5, 4, 3, 2, 1],
        s(0, 0, 0, 0, 0),
        s(0x0102_0304_0506_0708, 0, 0, 0, 0),
        0,
    ),
    (
        "mov rax, -1",
        &[0x48, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff],
        s(0, 0, 0, 0, CF),
        s(M, 0, 0, 0, CF),
        0,
    ),
    ("movzx eax, bl", &[0x0f, 0xb6, 0xc3], s(M, X, 0, 0, 0), s(0x88, X, 0, 0, 0), 0),
    (
        "movsx rax, bl",
        &[0x48, 0x0f, 0xbe, 0xc3],
        s(0, X, 0, 0, 0),
        s(0xffff_ffff_ffff_ff88, X, 0, 0, 0),
        0,
    ),
    (
        "movsxd rax, ebx",
        &[0x48, 0x63, 0xc3],
        s(0, 0x8000_0000, 0, 0, 0),
        s(0xffff_ffff_8000_0000, 0x8000_0000, 0, 0, 0),
        0,
    ),
    (
        "lea rax, [rbx+rcx*4-1]",
        &[0x48, 0x8d, 0x44, 0x8b, 0xff],
        s(0, 0x100, 3, 0, CF),
        s(0x10b, 0x100, 3, 0, CF),
        0,
    ),
    // Memory and its widths.
    (
        "mov [rsi], ax",
        &[0x66, 0x89, 0x06],
        s(X, 0, 0, M, 0),
        s(X, 0, 0, 0xffff_ffff_ffff_7788, 0),
        0,
    ),
    ("mov eax, [rsi+1]", &[0x8b, 0x46, 1], s(M, 0, 0, X, 0), s(0x4455_6677, 0, 0, X, 0), 0),
    (
        "mov byte [rsi+7], 5",
        &[0xc6, 0x46, 7, 5],
        s(0, 0, 0, X, 0),
        s(0, 0, 0, 0x0522_3344_5566_7788, 0),
        0,
    ),
    // Arithmetic.
    ("add eax, ebx", &[0x01, 0xd8], s(M, 1, 0, 0, 0), s(0, 1, 0, 0, CF | PF | AF | ZF), 0),
    ("add al, 0x7f", &[0x04, 0x7f], s(1, 0, 0, 0, 0), s(0x80, 0, 0, 0, SF | OF | AF), 0),
    ("add rax, -1", &[0x48, 0x83, 0xc0, 0xff], s(5, 0, 0, 0, 0), s(4, 0, 0, 0, CF | AF), 0),
    ("adc rax, rbx", &[0x48, 0x11, 0xd8], s(M, M, 0, 0, CF), s(M, M, 0, 0, CF | PF | AF | SF), 0),
    ("sub rax, rbx", &[0x48, 0x29, 0xd8], s(0, 1, 0, 0, 0), s(M, 1, 0, 0, CF | PF | AF | SF), 0),
    ("sub al, bl", &[0x28, 0xd8], s(0x80, 1, 0, 0, 0), s(0x7f, 1, 0, 0, AF | OF), 0),
    (
        "sbb ax, bx",
        &[0x66, 0x19, 0xd8],
        s(0x1_0000, 0xffff, 0, 0, CF),
        s(0x1_0000, 0xffff, 0, 0, CF | PF | AF | ZF),
        0,
    ),
    ("cmp rax, [rsi]", &[0x48, 0x3b, 0x06], s(7, 0, 0, 7, 0), s(7, 0, 0, 7, PF | ZF), 0),
    (
        "inc keeps CF",
        &[0xff, 0xc0],
        s(0xffff_ffff, 0, 0, 0, CF),
        s(0, 0, 0, 0, CF | PF | AF | ZF),
        0,
    ),
    (
        "dec byte [rsi]",
        &[0xfe, 0x0e],
        s(0, 0, 0, 0x100, CF),
        s(0, 0, 0, 0x1ff, CF | PF | AF | SF),
        0,
    ),
    ("neg rax", &[0x48, 0xf7, 0xd8], s(1, 0, 0, 0, 0), s(M, 0, 0, 0, CF | PF | AF | SF), 0),
    (
        "neg of the least value",
        &[0xf6, 0xd8],
        s(0x80, 0, 0, 0, 0),
        s(0x80, 0, 0, 0, CF | SF | OF),
        0,
    ),
    (
        "imul rax, rbx",
        &[0x48, 0x0f, 0xaf, 0xc3],
        s(3, M, 0, 0, 0),
        s(3_u64.wrapping_neg(), M, 0, 0, 0),
        PF | AF | ZF | SF,
    ),
    (
        "imul eax, ebx, 16 overflows",
        &[0x6b, 0xc3, 16],
        s(0, 0x2000_0001, 0, 0, 0),
        s(16, 0x2000_0001, 0, 0, CF | OF),
        PF | AF | ZF | SF,
    ),
    // Logic.
    ("xor eax, eax", &[0x31, 0xc0], s(M, 0, 0, 0, CF | OF), s(0, 0, 0, 0, PF | ZF), AF),
    ("and rax, -16", &[0x48, 0x83, 0xe0, 0xf0], s(X, 0, 0, 0, CF), s(X - 8, 0, 0, 0, 0), AF),
    ("or byte [rsi], 0x80", &[0x80, 0x0e, 0x80], s(0, 0, 0, 1, 0), s(0, 0, 0, 0x81, SF | PF), AF),
    ("test ax, bx", &[0x66, 0x85, 0xd8], s(0xf0, 0x0f, 0, 0, CF), s(0xf0, 0x0f, 0, 0, PF | ZF), AF),
    (
        "not leaves flags alone",
        &[0xf7, 0xd0],
        s(0xf0, 0, 0, 0, CF | ZF),
        s(0xffff_ff0f, 0, 0, 0, CF | ZF),
        0,
    ),
    // Shifts.
    (
        "shl eax, 1",
        &[0xd1, 0xe0],
        s(0xc000_0000, 0, 0, 0, 0),
        s(0x8000_0000, 0, 0, 0, CF | PF | SF),
        AF,
    ),
    (
        "shl al, 9 moves all out",
        &[0xc0, 0xe0, 9],
        s(M, 0, 0, 0, 0),
        s(M << 8, 0, 0, 0, PF | ZF),
        AF | OF | CF,
    ),
    (
        "shl rax, 64 does nothing",
        &[0x48, 0xc1, 0xe0, 64],
        s(X, 0, 0, 0, CF | OF | ZF),
        s(X, 0, 0, 0, CF | OF | ZF),
        0,
    ),
    ("shr rax, cl", &[0x48, 0xd3, 0xe8], s(X, 0, 4, 0, 0), s(X >> 4, 0, 4, 0, CF | PF), AF | OF),
    (
        "shr eax, 1",
        &[0xd1, 0xe8],
        s(0x8000_0001, 0, 0, 0, 0),
        s(0x4000_0000, 0, 0, 0, CF | PF | OF),
        AF,
    ),
    (
        "sar ax, 15",
        &[0x66, 0xc1, 0xf8, 15],
        s(0x8000, 0, 0, 0, 0),
        s(0xffff, 0, 0, 0, PF | SF),
        AF | OF,
    ),
    // Exchange.
    ("xchg [rsi], rax", &[0x48, 0x87, 0x06], s(1, 0, 0, 2, 0), s(2, 0, 0, 1, 0), 0),
    (
        "lock xadd [rsi], eax",
        &[0xf0, 0x0f, 0xc1, 0x06],
        s(M, 0, 0, M, 0),
        s(0xffff_ffff, 0, 0, 0xffff_ffff_ffff_fffe, CF | AF | SF),
        PF,
    ),
    ("xadd al, al", &[0x0f, 0xc0, 0xc0], s(3, 0, 0, 0, 0), s(6, 0, 0, 0, PF), 0),
    (
        "lock cmpxchg [rsi], rbx succeeds",
        &[0xf0, 0x48, 0x0f, 0xb1, 0x1e],
        s(5, 9, 0, 5, 0),
        s(5, 9, 0, 9, PF | ZF),
        0,
    ),
    (
        "lock cmpxchg [rsi], rbx fails",
        &[0xf0, 0x48, 0x0f, 0xb1, 0x1e],
        s(5, 9, 0, 4, 0),
        s(4, 9, 0, 4, 0),
        0,
    ),
    // Conditions and control flow.
    ("setb al", &[0x0f, 0x92, 0xc0], s(M, 0, 0, 0, CF), s(M - 0xfe, 0, 0, 0, CF), 0),
    (
        "cmovne clears the upper half either way",
        &[0x0f, 0x45, 0xc3],
        s(M, 1, 0, 0, ZF),
        s(0xffff_ffff, 1, 0, 0, ZF),
        0,
    ),
    ("jl over a mov", &[0x7c, 2, 0xb0, 9], s(0, 0, 0, 0, SF), s(0, 0, 0, 0, SF), 0),
    ("jl not taken", &[0x7c, 2, 0xb0, 9], s(0, 0, 0, 0, SF | OF), s(9, 0, 0, 0, SF | OF), 0),
    (
        "call, pop, push, ret",
        &[0xe8, 2, 0, 0, 0, 0xeb, 5, 0x58, 0x50, 0xb3, 3, 0xc3],
        s(0, 0, 0, 0, 0),
        s(0, 3, 0, 0, 0),
        0,
    ),
    ("push imm8; pop rax", &[0x6a, 0xfe, 0x58], s(0, 0, 0, 0, 0), s(M - 1, 0, 0, 0, 0), 0),
    ("rep stosb with rcx 0", &[0xf3, 0xaa], s(5, 0, 0, 0, 0), s(5, 0, 0, 0, 0), 0),
    ("pause; cld", &[0xf3, 0x90, 0xfc], s(1, 2, 3, 4, CF), s(1, 2, 3, 4, CF), 0),
];

#[test]
fn instructions_do_what_the_manual_says() {
    on_every_hypervisor(|vm| {
        let ram = ram(vm, &[]);
        let mut wrong = Vec::new();
        for (id, (name, bytes, before, after, undefined)) in (0..).zip(INSTRUCTIONS) {
            let kind = vm.kind();
            // A new virtual CPU for each: one that has executed code does not expect it to change.
            ram.write(CODE, &wrap(bytes)).unwrap();
            for (offset, value) in (0..).step_by(8).zip([
                before.rax,
                before.rbx,
                before.rcx,
                before.memory,
                before.flags,
            ]) {
                ram.store_u64(BLOCK + offset, value).unwrap();
            }
            run_to_halt(&mut *vcpu(vm, id, BLOCK));
            let get = |offset| ram.load_u64(BLOCK + 64 + offset).unwrap();
            let defined = STATUS & !undefined;
            let found = s(get(0), get(8), get(16), get(24), get(32) & defined);
            let mut after = *after;
            after.flags &= defined;
            // The return address is that of the code, not of the row.
            if bytes.starts_with(&[0xe8]) {
                after.rax = found.rax;
            }
            if found != after {
                wrong.push(format!("{kind}: {name}: {found:x?}, not {after:x?}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

#[test]
fn a_vcpu_keeps_the_memory_of_its_machine() {
    let keeps = |vm: Box<dyn Vm>| {
        let memory = ram(&*vm, &[0xf4]);
        let mut vcpu = vcpu(&*vm, 0, 0);
        drop(vm);
        assert_eq!(Arc::strong_count(&memory), 2);
        run_to_halt(&mut *vcpu);
        drop(vcpu);
        assert_eq!(Arc::strong_count(&memory), 1);
    };
    keeps(Box::new(Model::new()));
    match Kvm::probe().and_then(|()| Kvm::open()) {
        Ok(kvm) => keeps(Box::new(kvm)),
        Err(reason) => println!("kvm skipped: {reason}"),
    }
}
