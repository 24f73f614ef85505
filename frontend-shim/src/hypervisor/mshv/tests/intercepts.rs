//! What becomes of an access, by what is at its address.

use iced_x86::code_asm::{al, dword_ptr, dx, eax, ecx, rbx};

use super::*;
use crate::hypervisor::FaultAccess;
use crate::hypervisor::mshv::message::{MESSAGE_SIZE, Message};
use crate::hypervisor::mshv::recorded::{self, MemoryMessage, bare_message};

const PAGE: u64 = PAGE_SIZE;

/// Loads from page 3 of the BAR, then from page 5.
fn load_two_pages(a: &mut CodeAssembler) {
    a.mov(eax, dword_ptr(rbx + 3 * PAGE)).unwrap();
    a.mov(ecx, dword_ptr(rbx + 5 * PAGE)).unwrap();
}

#[test]
fn the_first_access_to_a_bar_maps_all_of_it_by_default() {
    let machine = Machine::new(MapPolicy::default());
    machine.map_bar();
    assert!(machine.mapped_bar_pages().is_empty(), "nothing is mapped before it is accessed");
    machine.bar.store_u32(3 * PAGE, 0x1234).unwrap();
    machine.bar.store_u32(5 * PAGE, 0x5678).unwrap();

    let mut vcpu = machine.vcpu(load_two_pages);
    assert_eq!(run_to_halt(&mut vcpu), []);
    let registers = machine.partition.registers();
    assert_eq!((registers.general[0], registers.general[1]), (0x1234, 0x5678));
    assert_eq!(machine.mapped_bar_pages(), (0..BAR_PAGES).collect::<Vec<_>>());
    assert_eq!(machine.partition.maps().len(), 2, "RAM, and the BAR in one call");
}

#[test]
fn with_the_page_policy_each_access_maps_its_page() {
    let machine = Machine::new(MapPolicy::Page);
    machine.map_bar();
    machine.bar.store_u32(3 * PAGE, 0x1234).unwrap();

    let mut vcpu = machine.vcpu(load_two_pages);
    assert_eq!(run_to_halt(&mut vcpu), []);
    assert_eq!(machine.partition.registers().general[0], 0x1234);
    assert_eq!(machine.mapped_bar_pages(), [3, 5]);

    machine.adapter.unmap_slot(BAR_SLOT).unwrap();
    assert!(machine.mapped_bar_pages().is_empty());
    assert_eq!(machine.partition.ranges(), 1, "RAM");
}

#[test]
fn ram_is_mapped_before_it_is_accessed() {
    let machine = Machine::new(MapPolicy::Page);
    let pages: Vec<_> = machine.partition.mapped_pages().iter().map(|(page, _)| *page).collect();
    assert_eq!(pages, (0..RAM_PAGES).collect::<Vec<_>>());
}

#[test]
fn ram_that_can_not_be_mapped_is_no_slot() {
    let machine = Machine::new(MapPolicy::Whole);
    let memory = Arc::new(HostMapping::anonymous(PAGE).unwrap());
    machine.partition.add_host_memory(&memory);
    memory.set_accessible(false).unwrap();
    let mapping = SlotMapping::whole(GuestAddress(0x10_0000), &memory);
    let error = machine.adapter.map_slot(SlotId(7), mapping).expect_err("no backing");
    assert!(matches!(error, HypervisorError::Call { .. }), "{error}");
    let error = machine.adapter.unmap_slot(SlotId(7)).expect_err("never mapped");
    assert!(matches!(error, HypervisorError::NoSuchSlot { .. }), "{error}");
}

#[test]
fn slots_that_overlap_are_refused_and_change_nothing() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    run_to_halt(&mut machine.vcpu(load_two_pages));
    let before = machine.partition.mapped_pages();

    let other = device_memory(&machine.partition);
    let shifted = SlotMapping::whole(GuestAddress(BAR + PAGE), &other);
    let error = machine.adapter.map_slot(SlotId(2), shifted).expect_err("overlap");
    assert!(matches!(error, HypervisorError::SlotOverlap { .. }), "{error}");
    let again = machine.adapter.map_slot(BAR_SLOT, machine.bar_mapping()).expect_err("in use");
    assert!(matches!(again, HypervisorError::SlotInUse { .. }), "{again}");
    assert_eq!(machine.partition.mapped_pages(), before);
}

#[test]
fn pages_that_somebody_else_has_mapped_are_an_error_and_nothing_is_mapped() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    let other = device_memory(&machine.partition);
    let host = super::super::policy::HostFrame::of(other.host_address());
    let foreign = MapPlan { guest: GuestFrame::of(BAR + 6 * PAGE), host, pages: 1 };
    machine.partition.map_gpa(foreign, SlotAccess::ReadWrite).unwrap();
    let before = machine.partition.mapped_pages();

    let mut vcpu = machine.vcpu(load_two_pages);
    let error = vcpu.run().expect_err("pages 0 to 7 can't be mapped");
    assert!(matches!(error, HypervisorError::Call { .. }), "{error}");
    assert_eq!(machine.partition.mapped_pages(), before);
}

#[test]
fn a_bar_without_backing_is_suspended_and_comes_back_with_it() {
    for policy in [MapPolicy::Whole, MapPolicy::Page] {
        let machine = Machine::new(policy);
        machine.map_bar();
        machine.bar.store_u32(3 * PAGE, 0x1234).unwrap();
        machine.partition.withdraw(&machine.bar);
        let mut vcpu = machine.vcpu(load_two_pages);
        for _ in 0..3 {
            assert_eq!(run(&mut vcpu), fault(BAR + 3 * PAGE, "read"), "{policy:?}");
            assert!(machine.mapped_bar_pages().is_empty());
        }
        machine.partition.restore(&machine.bar);
        assert_eq!(run_to_halt(&mut vcpu), []);
        assert_eq!(machine.partition.registers().general[0], 0x1234);
    }
}

#[test]
fn a_mapping_that_lost_its_backing_is_removed_and_reported() {
    for second in [SecondMap::Refused, SecondMap::Accepted] {
        for policy in [MapPolicy::Whole, MapPolicy::Page] {
            let machine = Machine::with(policy, second);
            machine.map_bar();
            let mut vcpu = machine.vcpu(|a| {
                load_two_pages(a);
                a.out(dx, al).unwrap();
                load_two_pages(a);
            });
            assert_eq!(run(&mut vcpu), Seen::PortWrite(0, vec![0]));
            machine.partition.withdraw(&machine.bar);
            for _ in 0..3 {
                assert_eq!(run(&mut vcpu), fault(BAR + 3 * PAGE, "read"), "{policy:?}");
            }
            machine.partition.restore(&machine.bar);
            // What is left of the old mapping is found when the guest touches it.
            let seen = run_to_halt(&mut vcpu);
            let stale = fault(BAR + 5 * PAGE, "read");
            let expected = if policy == MapPolicy::Page { vec![stale] } else { vec![] };
            assert_eq!(seen, expected, "{policy:?}");
            assert!(machine.mapped_bar_pages().contains(&5));

            machine.adapter.unmap_slot(BAR_SLOT).unwrap();
            assert_eq!(machine.partition.ranges(), 1, "RAM");
        }
    }
}

#[test]
fn a_suspended_bar_that_is_unmapped_completes_as_mmio() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    machine.partition.withdraw(&machine.bar);
    let mut vcpu = machine.vcpu(load_two_pages);
    assert_eq!(run(&mut vcpu), fault(BAR + 3 * PAGE, "read"));
    machine.adapter.unmap_slot(BAR_SLOT).unwrap();
    let expected = [Seen::Read(BAR + 3 * PAGE, 4), Seen::Read(BAR + 5 * PAGE, 4)];
    assert_eq!(run_to_halt(&mut vcpu), expected);
    assert_eq!(machine.partition.registers().general[0], 0xffff_ffff);
}

#[test]
fn a_slot_that_can_not_be_unmapped_is_still_there() {
    let machine = Machine::new(MapPolicy::Page);
    machine.map_bar();
    run_to_halt(&mut machine.vcpu(load_two_pages));
    machine.partition.fail_unmaps(true);
    let error = machine.adapter.unmap_slot(BAR_SLOT).expect_err("refused");
    assert!(matches!(error, HypervisorError::Call { .. }), "{error}");
    assert_eq!(machine.mapped_bar_pages(), [3, 5]);
    assert_eq!(run_to_halt(&mut machine.vcpu(load_two_pages)), []);

    machine.partition.fail_unmaps(false);
    machine.adapter.unmap_slot(BAR_SLOT).unwrap();
    assert!(machine.mapped_bar_pages().is_empty());
}

#[test]
fn a_write_to_a_read_only_slot_is_mmio_and_a_read_is_not() {
    let machine = Machine::new(MapPolicy::Whole);
    let mapping = SlotMapping { access: SlotAccess::ReadOnly, ..machine.bar_mapping() };
    machine.adapter.map_slot(BAR_SLOT, mapping).unwrap();
    machine.bar.store_u32(0, 0x1234).unwrap();
    for first in ["write", "read"] {
        let mut vcpu = machine.vcpu(|a| {
            if first == "read" {
                a.mov(eax, dword_ptr(rbx)).unwrap();
            }
            a.mov(dword_ptr(rbx), 7).unwrap();
            a.add(dword_ptr(rbx), 1).unwrap();
            a.mov(eax, dword_ptr(rbx)).unwrap();
        });
        let writes = [vec![7, 0, 0, 0], vec![0x35, 0x12, 0, 0]];
        let expected = writes.map(|data| Seen::Write(BAR, data));
        assert_eq!(run_to_halt(&mut vcpu), expected, "{first} first");
        assert_eq!(machine.partition.registers().general[0], 0x1234);
        assert_eq!(machine.bar.load_u32(0), Ok(0x1234));
    }
}

#[test]
fn code_in_a_bar_is_executed() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    machine.bar.write(0, &[0xf4]).unwrap();
    let mut vcpu = machine.vcpu(|a| a.jmp(rbx).unwrap());
    assert_eq!(run_to_halt(&mut vcpu), []);
    assert_eq!(machine.partition.registers().rip, BAR + 1);
}

#[test]
fn code_in_no_slot_is_an_internal_error_at_its_address() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut vcpu = machine.vcpu(|a| a.jmp(rbx).unwrap());
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, VcpuExit::InternalError { suberror: 1, rip: Some(BAR) }), "{exit}");
}

/// A read of `[rbx]`, which is at `CODE`.
fn recorded_read(gva: Option<u64>, gpa: Option<u64>) -> Message {
    let (kind, access, rip) = (recorded::UNMAPPED, FaultAccess::Read, CODE);
    MemoryMessage { kind, gva, gpa, access, rip, code: &[0x8b, 0x03] }.build()
}

#[test]
fn an_access_without_an_address_is_located_by_its_linear_one_or_unknown() {
    let machine = Machine::new(MapPolicy::Whole);
    let load = |a: &mut CodeAssembler| a.mov(eax, dword_ptr(rbx)).unwrap();
    let mut vcpu = machine.vcpu(load);
    machine.partition.script(recorded_read(Some(BAR), None));
    assert_eq!(run(&mut vcpu), Seen::Read(BAR, 4));

    let mut vcpu = machine.vcpu(load);
    machine.partition.script(recorded_read(None, None));
    let unknown = "memory fault at an unknown address: nobody looked";
    assert_eq!(run(&mut vcpu), Seen::Other(unknown.to_owned()));

    machine.partition.translate_page(BAR, None);
    machine.partition.script(recorded_read(Some(BAR), None));
    let unknown =
        "memory fault at an unknown address: linear address 0xfebc0000 is not mapped by the guest";
    assert_eq!(run(&mut vcpu), Seen::Other(unknown.to_owned()));
}

#[test]
fn a_mapping_that_does_not_help_is_reported_instead_of_made_for_ever() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    for _ in 0..4 {
        machine.partition.script(recorded_read(Some(BAR), Some(BAR)));
    }
    let mut vcpu = machine.vcpu(|_| ());
    for _ in 0..2 {
        assert_eq!(run(&mut vcpu), fault(BAR, "read"));
    }
    assert_eq!(machine.partition.maps().len(), 3, "RAM, and the BAR before each report");
    assert_eq!(run_to_halt(&mut vcpu), []);
}

#[test]
fn messages_without_details_become_exits() {
    let machine = Machine::new(MapPolicy::Whole);
    for (kind, expected) in [
        (0, "interrupted"),
        (0x8000_0004, "memory fault at an unknown address: nobody looked, private memory"),
        (
            0x8000_0020,
            "the processor refused to enter the guest (reason 0x80000020 on physical CPU 0)",
        ),
        (0x8000_0021, "shutdown (triple fault)"),
        (0x8001_0004, "exit reason 2147549188 that no guest of ours causes"),
        (0x8001_0007, "halted"),
    ] {
        machine.partition.script(bare_message(kind));
        assert_eq!(run(&mut machine.vcpu(|_| ())), Seen::Other(expected.to_owned()));
    }
}

#[test]
fn a_request_to_accept_a_page_is_a_conversion() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut message = recorded_read(Some(BAR), Some(BAR));
    message.0[..4].copy_from_slice(&0x8000_0003_u32.to_le_bytes());
    machine.partition.script(message);
    let mut vcpu = machine.vcpu(|_| ());
    let VcpuExit::MemoryFault(fault) = vcpu.run().unwrap() else { panic!("a memory fault") };
    assert!(fault.private);
}

#[test]
fn a_malformed_message_is_an_error_that_says_so() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut message = recorded_read(Some(BAR), Some(BAR));
    message.0[16 + 44] = 17;
    machine.partition.script(message);
    let mut vcpu = machine.vcpu(|_| ());
    let error = vcpu.run().expect_err("17 bytes").to_string();
    assert!(error.contains("MSHV_RUN_VP") && error.contains("17 instruction bytes"), "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(64))]
    #[test]
    fn whatever_a_message_says_the_virtual_cpu_stops_with_an_exit_or_an_error(
        kind in proptest::sample::select(vec![0x8000_0000_u32, 0x8000_0001, 0x8000_0003, 0x8001_0000]),
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), MESSAGE_SIZE),
        count in 0..=16_u8,
    ) {
        let machine = Machine::new(MapPolicy::Page);
        machine.map_bar();
        let mut message = Message(bytes.try_into().expect("of that length"));
        message.0[..5].copy_from_slice(&[&kind.to_le_bytes()[..], &[128]].concat());
        message.0[16 + 5] %= 3;
        message.0[16 + 6] |= 0x10;
        message.0[16 + 23] |= 0x20;
        message.0[16 + if kind == 0x8001_0000 { 43 } else { 44 }] = count;
        machine.partition.script(message);
        let _ = machine.vcpu(|_| ()).run();
    }
}
