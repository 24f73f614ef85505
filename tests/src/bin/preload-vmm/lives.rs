//! Processes and threads that begin and end in other ways than most.

use libc::{SIG_DFL, SIGBUS};

use crate::machine::Machine;
use crate::proxy::{CONFIG, Proxy};
use crate::raw::{self, CODE, HANDLED};
use crate::vm::{READS, Vm};
use crate::{Outcome, say};

/// The file that the scenario is about.
fn socket() -> String {
    std::env::args().nth(2).unwrap_or_default()
}

/// A VMM that goes to the background before it looks at its devices, as `qemu -daemonize` does: the process
/// that was started ends, and a child of it does all the rest.
pub(crate) fn daemonized() -> Outcome {
    raw::go_to_background()?;
    let (machine, capabilities) = Machine::new(&socket(), 2, READS)?;
    say("hears of barkeep", capabilities.contains("barkeep"));
    let vcpu = machine.vm.vcpu(0)?;
    machine.enable(true)?;
    raw::store(machine.bar.host, 0x1234_5678);
    say("on", machine.run(&vcpu));
    machine.enable(false)?;
    say("off", machine.run(&vcpu));
    say("trouble", machine.proxy.trouble());
    Ok(())
}

/// The first file that a VMM without standard error opens, a disk for instance, has its number.
pub(crate) fn no_standard_error() -> Outcome {
    // Rust's runtime has put something there; C's does not.
    raw::close(2)?;
    say("the disk", raw::open(&socket()));
    Vm::bare().map(drop)
}

/// A helper that is started by way of `vfork` sets its own signals first, in the memory of the VMM.
pub(crate) fn helped() -> Outcome {
    let handler = raw::handler as *const () as usize;
    raw::sigaction(SIGBUS, Some(&raw::action(handler, libc::SA_SIGINFO, &[])))?;
    say("a helper", raw::helper(SIGBUS, "/bin/true"));
    let still = raw::sigaction(SIGBUS, None)?;
    say("still handled", still.sa_sigaction == handler && still.sa_sigaction != SIG_DFL);
    let file = raw::memfd(0x1000)?;
    let at = raw::shared(file, 0x1000)?;
    raw::truncate(file, 0)?;
    say("a lost page", raw::load(at));
    let seen = [&CODE].map(|code| code.load(std::sync::atomic::Ordering::SeqCst));
    say("handled", (HANDLED.load(std::sync::atomic::Ordering::SeqCst), seen));
    Ok(())
}

/// A thread that is to end at the next point at which it can runs a virtual CPU, talks to a device, and
/// leaves another.
pub(crate) fn cancelled() -> Outcome {
    let (machine, _) = Machine::new(&socket(), 2, READS)?;
    let vcpu = machine.vm.vcpu(0)?;
    machine.enable(true)?;
    machine.run(&vcpu)?;
    machine.enable(false)?;
    let id = machine.proxy.read(CONFIG, 0, 4)?;
    let (other, _) = Proxy::connect(&std::env::args().nth(3).unwrap_or_default())?;
    let seen = std::thread::scope(|scope| {
        let ends = scope.spawn(|| {
            raw::cancel_this_thread();
            let off = machine.run(&vcpu);
            let read = machine.proxy.read(CONFIG, 0, 4);
            let waiting = raw::recvmsg(machine.proxy.fd, &mut [0], libc::MSG_DONTWAIT);
            // The library has a copy of it, which goes as well.
            let closed = raw::close(other.fd);
            raw::stop_cancelling();
            (off, read == Ok(id), waiting, closed)
        });
        ends.join().map_err(drop)
    });
    say("seen", seen);
    say("trouble", machine.proxy.trouble());
    Ok(())
}
