//! The built-in guest programs against real sidecars.

use barkeep_shim::client::DeadBackend;
use barkeep_shim::vmm::{
    Arguments, Dma, HypervisorChoice, Loss, Machine, MemoryFaults, Order, Program, Report,
};

use crate::on_both::on_both_hypervisors;
use crate::sidecar::Sidecar;

fn arguments(sidecar: &Sidecar, program: Program, hypervisor: HypervisorChoice) -> Arguments {
    Arguments {
        devices: sidecar.sockets(),
        program,
        vcpus: 3,
        cycles: 100,
        hypervisor,
        suspend_order: Order::SlotsFirst,
        memory_faults: MemoryFaults::Resolve,
        dma: Dma::Shared,
        loss: Loss::Protected,
        deadline: 20,
        dead_backend: DeadBackend::UnsupportedRequest,
        reconnect: false,
        json: false,
    }
}

fn run(arguments: &Arguments) -> Report {
    let report = Machine::new(arguments).unwrap().run(arguments).unwrap();
    println!("ran on {}: {report:?}", report.hypervisor);
    assert!(report.passed(), "{:?}", report.failures);
    report
}

on_both_hypervisors!(a_guest_finds_every_function_by_ports_and_by_ecam);
fn a_guest_finds_every_function_by_ports_and_by_ecam(hypervisor: HypervisorChoice) {
    let sidecar = Sidecar::start(&["edu", "ivshmem,size=64K", "edu"]);
    let report = run(&arguments(&sidecar, Program::Probe, hypervisor));
    assert_eq!(report.findings, ["00:00.0 1234:11e8", "00:01.0 1af4:1110", "00:02.0 1234:11e8"]);
}

on_both_hypervisors!(edu_computes_and_copies_guest_memory);
fn edu_computes_and_copies_guest_memory(hypervisor: HypervisorChoice) {
    let sidecar = Sidecar::start(&["edu", "edu"]);
    let report = run(&arguments(&sidecar, Program::Edu, hypervisor));
    let right = |edu| format!("edu {edu}: factorial and DMA are right");
    assert_eq!(report.findings, [right(0), right(1)]);
}

on_both_hypervisors!(edu_copies_guest_memory_that_it_reaches_by_messages);
fn edu_copies_guest_memory_that_it_reaches_by_messages(hypervisor: HypervisorChoice) {
    let sidecar = Sidecar::start(&["edu", "edu"]);
    let by_messages =
        Arguments { dma: Dma::Messages, ..arguments(&sidecar, Program::Edu, hypervisor) };
    let report = run(&by_messages);
    let right = |edu| format!("edu {edu}: factorial and DMA are right");
    assert_eq!(report.findings, [right(0), right(1)]);
}

on_both_hypervisors!(a_disabled_bar_answers_ur_when_slots_go_first);
fn a_disabled_bar_answers_ur_when_slots_go_first(hypervisor: HypervisorChoice) {
    let sidecar = Sidecar::start(&["edu", "ivshmem,size=4M"]);
    let report = run(&arguments(&sidecar, Program::Toggle, hypervisor));
    check_toggle(&report);
    assert_eq!(report.memory_faults, 0, "there is no window in which an access could fault");
}

on_both_hypervisors!(a_disabled_bar_answers_ur_when_the_backing_goes_first);
fn a_disabled_bar_answers_ur_when_the_backing_goes_first(hypervisor: HypervisorChoice) {
    let sidecar = Sidecar::start(&["edu", "ivshmem,size=4M"]);
    let arguments = Arguments {
        suspend_order: Order::BackingFirst,
        cycles: 400,
        ..arguments(&sidecar, Program::Toggle, hypervisor)
    };
    let report = run(&arguments);
    check_toggle(&report);
    if hypervisor == HypervisorChoice::Model {
        assert!(report.memory_faults > 0, "the window was hit");
    }
}

on_both_hypervisors!(several_sidecars_are_toggled_at_a_time);
fn several_sidecars_are_toggled_at_a_time(hypervisor: HypervisorChoice) {
    let sidecars = [(); 3].map(|()| Sidecar::start(&["edu", "ivshmem,size=1M"]));
    let devices = sidecars.iter().flat_map(Sidecar::sockets).collect();
    let arguments =
        Arguments { devices, cycles: 30, ..arguments(&sidecars[0], Program::Toggle, hypervisor) };
    check_toggle(&run(&arguments));
}

/// Every count of a toggle run that must not be trivial.
fn check_toggle(report: &Report) {
    assert!(report.reads_ur > 0 && report.reads > report.reads_ur);
    assert!(report.backends.writes_dropped > 0 && report.backends.writes_applied > 0);
    let arrived = report.backends.writes_applied + report.backends.writes_dropped;
    assert_eq!(arrived, report.trapped_writes);
    assert!(report.mapped_writes > 0);
}

#[test]
fn a_vmm_without_the_shims_answer_dies_of_a_disabled_bar() {
    let sidecar = Sidecar::start(&["edu", "ivshmem,size=4M"]);
    let arguments = Arguments {
        suspend_order: Order::BackingFirst,
        memory_faults: MemoryFaults::Fatal,
        // One virtual CPU dies within the first hundreds, and the others go on to the last.
        cycles: 5_000,
        ..arguments(&sidecar, Program::Toggle, HypervisorChoice::Model)
    };
    let report = Machine::new(&arguments).unwrap().run(&arguments).unwrap();
    let died = report.failures.iter().any(|failure| failure.contains("memory fault at 0x10"));
    assert!(died, "by a fault in the window of 64-bit BARs: {:?}", report.failures);
}

on_both_hypervisors!(ram_that_is_gone_stops_the_vm);
fn ram_that_is_gone_stops_the_vm(hypervisor: HypervisorChoice) {
    // A BAR that could be mapped is there: a fault of unknown place could be about it.
    let sidecar = Sidecar::start(&["ivshmem,size=64K"]);
    let losses: &[Loss] = match hypervisor {
        HypervisorChoice::Model => &[Loss::Protected],
        _ => &[Loss::Protected, Loss::Vanished],
    };
    for loss in losses {
        let arguments = Arguments {
            vcpus: 1,
            loss: *loss,
            ..arguments(&sidecar, Program::LostRam, hypervisor)
        };
        let report = Machine::new(&arguments).unwrap().run(&arguments).unwrap();
        let named = report.failures.iter().any(|failure| failure.contains("at 0x2000000"));
        assert!(named, "{loss:?}, {:?}", report.failures);
        assert_eq!(report.reads, 1, "{loss:?}: the second read never returns");
    }
}
