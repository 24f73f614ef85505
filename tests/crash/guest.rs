//! A guest that clears and sets PCI_COMMAND.MEM while the workers behind its BARs are killed.

use std::time::Duration;

use barkeep_shim::client::DeadBackend;
use barkeep_shim::hypervisor::kvm::Kvm;
use barkeep_shim::vmm::{
    Arguments, Dma, HypervisorChoice, Loss, Machine, MemoryFaults, Order, Program,
};
use barkeep_tests::supervised::Supervised;
use barkeep_tests::{figure, skip};

use crate::kills::number_of_kills;
use crate::random::Random;

/// How often a guest toggles between two looks at whether there were kills enough.
const CYCLES: u64 = 500;

fn toggle(hypervisor: HypervisorChoice) {
    let mut random = Random::new();
    let run = Supervised::start(&["edu", "ivshmem,size=4M"]);
    let arguments = Arguments {
        devices: vec![run.socket(0).to_owned(), run.socket(1).to_owned()],
        program: Program::Toggle,
        vcpus: 3,
        cycles: CYCLES,
        hypervisor,
        suspend_order: Order::Alternate,
        memory_faults: MemoryFaults::Resolve,
        dma: Dma::Shared,
        loss: Loss::Protected,
        deadline: 20,
        dead_backend: DeadBackend::UnsupportedRequest,
        reconnect: false,
        json: false,
    };
    let (mut kills, wanted) = (0, number_of_kills() / 4);
    while kills < wanted {
        std::thread::scope(|scope| {
            let vm = scope.spawn(|| Machine::new(&arguments).unwrap().run(&arguments).unwrap());
            while !vm.is_finished() {
                // The life of one that is here: kills of all that appear would be the end of it.
                let worker = run.worker(usize::from(random.below(2) == 1));
                std::thread::sleep(Duration::from_micros(random.below(100_000)));
                worker.kill();
                kills += 1;
            }
            let report = vm.join().unwrap();
            let wrong: Vec<_> =
                report.failures.iter().filter(|what| !is_of_counters(what)).collect();
            assert!(wrong.is_empty(), "{wrong:?}");
            assert_eq!((report.wrong_values, report.cycles), (0, CYCLES));
            assert!(report.reads_ur > 0 && report.trapped_writes > 0);
        });
    }
    figure(&format_args!("{kills} kills on {hypervisor:?}"));
}

/// What backends count does not outlive their processes, so it does not add up.
fn is_of_counters(failure: &str) -> bool {
    [", the backends ", " dropped writes, not ", " applied writes, not "]
        .iter()
        .any(|part| failure.contains(part))
}

#[test]
fn a_guest_that_toggles_decoding_reads_no_wrong_value_on_the_model() {
    toggle(HypervisorChoice::Model);
}

#[test]
fn a_guest_that_toggles_decoding_reads_no_wrong_value_on_kvm() {
    match Kvm::probe() {
        Ok(()) => toggle(HypervisorChoice::Kvm),
        Err(reason) => skip(&reason),
    }
}
