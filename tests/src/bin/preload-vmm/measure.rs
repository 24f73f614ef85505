//! What one `KVM_RUN` costs.

use std::io::Read;
use std::time::Instant;

use crate::machine::Machine;
use crate::proxy::CONFIG;
use crate::raw;
use crate::vm::{DATA, EXITS, KVM_RUN, READS, Vcpu, Vm};
use crate::{Outcome, say};

/// An argument after the scenario's name.
fn argument(index: usize, default: u32) -> u32 {
    std::env::args().nth(2 + index).and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Prints, for every round, nanoseconds of all calls of the function that the program is bound to, and of
/// the one that lies underneath: for exits to a port, for MMIO, and for MMIO beside the BARs of a
/// vfio-user device, whose socket is the third argument.
pub(crate) fn runs() -> Outcome {
    for (kind, program) in [("port", EXITS), ("mmio", READS)] {
        let vm = Vm::new(program)?;
        time(kind, &vm.vcpu(0)?)?;
    }
    let Some(socket) = std::env::args().nth(4) else { return Ok(()) };
    let (machine, _) = Machine::new(&socket, 2, READS)?;
    let elsewhere = u32::try_from(DATA + (1 << 28)).unwrap_or(0);
    machine.proxy.write(CONFIG, 0x10 + 4 * 2, &elsewhere.to_le_bytes())?;
    machine.enable(true)?;
    // The slot that the VMM puts there is not measured.
    machine.vm.set_slot(9, 0, DATA, 0, machine.bar.host)?;
    time("device", &machine.vm.vcpu(0)?)
}

fn time(kind: &str, vcpu: &Vcpu) -> Outcome {
    let (rounds, calls) = (argument(0, 20), argument(1, 1000));
    let (Some(bound), Some(beneath)) = (raw::bound_ioctl(), raw::ioctl_beneath()) else {
        return Err(0);
    };
    // The page says what this exit was, if what lies beneath does nothing.
    raw::hidden_ioctl(vcpu.fd, KVM_RUN)?;
    let time = |ioctl| {
        let start = Instant::now();
        let failures = raw::repeat_ioctl(ioctl, vcpu.fd, KVM_RUN, calls);
        (start.elapsed().as_nanos(), failures)
    };
    for round in 0..rounds {
        // Neither is always the first.
        let first = (round % 2 == 0).then(|| time(bound));
        let (there, failed_too) = time(beneath);
        let (here, failed) = first.unwrap_or_else(|| time(bound));
        println!("{kind} {here} {there} {}", failed + failed_too);
    }
    Ok(())
}

/// Says "ready", waits for a byte, runs so often, says "done".
pub(crate) fn counted_runs() -> Outcome {
    let calls = argument(0, 100);
    let vms = [Vm::new(EXITS)?, Vm::new(READS)?];
    let vcpus = [vms[0].vcpu(0)?, vms[1].vcpu(0)?];
    for vcpu in &vcpus {
        vcpu.run();
    }
    say("ready", std::process::id());
    let _ = std::io::stdin().read(&mut [0]);
    let mut good = 0;
    for _ in 0..calls {
        good += vcpus.iter().filter(|vcpu| raw::ioctl(vcpu.fd, KVM_RUN, 0).is_ok()).count();
    }
    say("good", good);
    Ok(())
}

/// A guest that does nothing but exit: prints nanoseconds per exit, for every round that standard
/// input asks for with a byte.
pub(crate) fn exit_loop() -> Outcome {
    let calls = argument(0, 1000);
    let vm = Vm::new(EXITS)?;
    let vcpu = vm.vcpu(0)?;
    vcpu.run();
    say("ready", ());
    while std::io::stdin().read(&mut [0]).is_ok_and(|count| count == 1) {
        let start = Instant::now();
        for _ in 0..calls {
            vcpu.run();
        }
        println!("{}", start.elapsed().as_nanos() / u128::from(calls));
    }
    Ok(())
}
