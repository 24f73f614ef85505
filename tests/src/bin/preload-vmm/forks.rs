//! Children.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::raw;
use crate::vm::{DATA, EXITS, READS, Vm};
use crate::{Outcome, say};

pub(crate) fn forks() -> Outcome {
    let vm = Vm::new(READS)?;
    let vcpu = vm.vcpu(0)?;
    say("runs", vcpu.run());
    let child = raw::in_child(|| {
        // KVM refuses the descriptors of another process.
        say("in a child", vcpu.run());
        say("slot", vm.set_slot(1, 0, DATA, 0, 0));
        say("its own", a_vm());
        0
    })?;
    say("ended", child);
    vcpu.answer(1);
    say("runs on", vcpu.run());
    say("a grandchild", {
        raw::in_child(|| {
            let _ = raw::in_child(|| {
                say("its own", a_vm());
                0
            });
            0
        })
    });
    Ok(())
}

fn a_vm() -> raw::Answer<crate::vm::Exit> {
    let vm = Vm::new(EXITS)?;
    let exit = vm.vcpu(0)?.run();
    Ok(exit)
}

/// Forks while other threads make VMs, map and unmap.
pub(crate) fn storm() -> Outcome {
    let stop = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        let busy = || {
            while !stop.load(Ordering::SeqCst) {
                let made = Vm::new(EXITS).and_then(|vm| {
                    let vcpu = vm.vcpu(0)?;
                    vcpu.run();
                    vm.set_slot(0, 0, 0, 0, 0)?;
                    raw::munmap(vcpu.run, vcpu.run_size)?;
                    raw::close(vcpu.fd)?;
                    raw::close(vm.fd)
                });
                if made.is_err() {
                    return;
                }
            }
        };
        scope.spawn(busy);
        scope.spawn(busy);
        let ended: Vec<_> = (0..100)
            .map(|_| {
                raw::in_child(|| {
                    // Every lock that could be held is taken.
                    let Ok(at) = raw::anonymous(0x1000) else { return 2 };
                    let vm = Vm::bare().and_then(|vm| vm.set_slot(0, 0, 0, 0x1000, at));
                    i32::from(vm.is_err() || raw::munmap(at, 0x1000).is_err())
                })
            })
            .collect();
        stop.store(true, Ordering::SeqCst);
        ended
    });
    let strange = ended.iter().filter(|ended| !matches!(ended, Ok(raw::Ended::Exit(0)))).count();
    say("children", (ended.len(), strange));
    Ok(())
}

/// Programs that a VMM starts see its environment as it was.
pub(crate) fn programs() -> Outcome {
    let output = Command::new("/bin/sh").args(["-c", "echo started; exit 3"]).output();
    say("a program", output.map(|output| (output.status.code(), output.stdout)).map_err(|_| ()));
    Ok(())
}
