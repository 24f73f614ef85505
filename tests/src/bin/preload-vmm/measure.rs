//! What one `KVM_RUN` costs.

use std::io::Read;
use std::time::Instant;

use crate::raw;
use crate::vm::{EXITS, KVM_RUN, READS, Vm};
use crate::{Outcome, say};

/// An argument after the scenario's name.
fn argument(index: usize, default: u32) -> u32 {
    std::env::args().nth(2 + index).and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Prints, for every round, nanoseconds per call of the function that the program is bound to, and of
/// the one that lies underneath, for exits to a port and for MMIO.
pub(crate) fn runs() -> Outcome {
    let (rounds, calls) = (argument(0, 20), argument(1, 1000));
    let (Some(bound), Some(beneath)) = (raw::bound_ioctl(), raw::ioctl_beneath()) else {
        return Err(0);
    };
    for (kind, program) in [("port", EXITS), ("mmio", READS)] {
        let vm = Vm::new(program)?;
        let vcpu = vm.vcpu(0)?;
        // Something that the page says.
        vcpu.run();
        let time = |ioctl| {
            let start = Instant::now();
            let failures = raw::repeat_ioctl(ioctl, vcpu.fd, KVM_RUN, calls);
            (start.elapsed().as_nanos(), failures)
        };
        for _ in 0..rounds {
            let (here, failed) = time(bound);
            let (there, failed_too) = time(beneath);
            println!("{kind} {here} {there} {}", failed + failed_too);
        }
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
