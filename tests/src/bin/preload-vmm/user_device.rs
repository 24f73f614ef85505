//! A vfio-user device, whose socket the scenario's arguments name.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::machine::Machine;
use crate::proxy::{CONFIG, Proxy, REGION_STATE, words};
use crate::raw;
use crate::vm::{CODE, DATA, EXITS, Exit, HAMMERS, KVM_GET_REGS, READS, REPEATS, WRITES};
use crate::{Outcome, say};

/// The socket, and a second argument.
fn socket() -> String {
    std::env::args().nth(2).unwrap_or_default()
}

fn number(index: usize, default: u32) -> u32 {
    std::env::args().nth(index).and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The session, as the VMM sees it: nothing of it may tell that somebody else speaks.
pub(crate) fn session() -> Outcome {
    let (proxy, capabilities) = Proxy::connect(&socket())?;
    say("capabilities", capabilities);
    for region in 0..10 {
        let info = words(&[4096, 0, region, 0, 0, 0, 0, 0]);
        let reply = proxy.call(crate::proxy::GET_REGION_INFO, &info, &[]);
        say("region", reply.map(|(body, fds)| (body, fds.len())));
    }
    say("a bad command", proxy.call(99, &[], &[]));
    say("an extension", proxy.call(0x8003, &[], &[]).is_err());
    say("config", proxy.read(CONFIG, 0, 64));
    say("too long", proxy.read(CONFIG, 0, 5000));
    say("a descriptor too many", proxy.call(9, &[0; 16], &[0]));
    say("trouble", proxy.trouble());
    Ok(())
}

/// Threads ask at once, while a guest reads a BAR that does not decode.
pub(crate) fn crowd() -> Outcome {
    let (machine, _) = Machine::new(&socket(), number(3, 2), READS)?;
    let vcpu = machine.vm.vcpu(0)?;
    let id = machine.proxy.read(CONFIG, 0, 4)?;
    machine.enable(true)?;
    machine.enable(false)?;
    let stop = AtomicBool::new(false);
    let (good, values) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut values = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let seen = machine.run(&vcpu).map(|(value, _)| value);
                if !values.contains(&seen) {
                    values.push(seen);
                }
            }
            values
        });
        let ask =
            || (0..500).filter(|_| machine.proxy.read(CONFIG, 0, 4).as_ref() == Ok(&id)).count();
        let others: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let good: Vec<_> = others.into_iter().map(|other| other.join().unwrap_or(0)).collect();
        stop.store(true, Ordering::SeqCst);
        (good, guest.join().unwrap_or_default())
    });
    say("good", good);
    say("values", values);
    say("trouble", machine.proxy.trouble());
    Ok(())
}

/// Decode is switched off and on, and the guest reads before, between and after.
pub(crate) fn switched() -> Outcome {
    let (machine, _) = Machine::new(&socket(), number(3, 2), READS)?;
    let vcpu = machine.vm.vcpu(0)?;
    // Before it has ever decoded, nobody knows where it is.
    machine.enable(true)?;
    if machine.bar.host != 0 {
        raw::store(machine.bar.host, 0x1234_5678);
    }
    say("on", machine.run(&vcpu));
    for _ in 0..3 {
        machine.enable(false)?;
        say("off", machine.run(&vcpu));
        say("off again", machine.run(&vcpu));
        machine.enable(true)?;
        say("on", machine.run(&vcpu));
    }
    machine.enable(false)?;
    say("a BAR's counters", counters(&machine));
    // While its size is asked for, its old addresses are not its own.
    machine.proxy.write(CONFIG, 0x10 + 4 * u64::from(machine.bar.index), &[0xff; 4])?;
    say("being sized", machine.run(&vcpu));
    let back = u32::try_from(DATA).unwrap_or(0).to_le_bytes();
    machine.proxy.write(CONFIG, 0x10 + 4 * u64::from(machine.bar.index), &back)?;
    say("back", machine.run(&vcpu));
    say("trouble", machine.proxy.trouble());
    Ok(())
}

/// The guest does nothing else than to read, by many instructions or (with a third argument) by one, and the
/// VMM looks at a flag between its `KVM_RUN`s.
pub(crate) fn hammered() -> Outcome {
    let repeats = std::env::args().nth(4).is_some();
    let program = if repeats { REPEATS } else { HAMMERS };
    let (machine, _) = Machine::new(&socket(), number(3, 2), program)?;
    let vcpu = machine.vm.vcpu(0)?;
    machine.enable(true)?;
    machine.enable(false)?;
    for _ in 0..3 {
        let Exit::Failed(libc::EINTR, _) = vcpu.run() else { continue };
        let mut regs = kvm_bindings::kvm_regs::default();
        raw::ioctl_with(vcpu.fd, KVM_GET_REGS, &mut regs)?;
        let stays = raw::load(vcpu.run) & 0xff00 != 0;
        say("looks up", (regs.rip.wrapping_sub(CODE), regs.rax, stays));
    }
    say("trouble", machine.proxy.trouble());
    Ok(())
}

/// Reads that were answered, writes that were applied, both completed as Unsupported Requests.
fn counters(machine: &Machine) -> raw::Answer<Vec<u64>> {
    let request = words(&[56, 0, machine.bar.index, 0]);
    let (body, _) = machine.proxy.call(REGION_STATE, &request, &[])?;
    let counter = |chunk: &[u8]| chunk.try_into().map(u64::from_le_bytes).unwrap_or_default();
    Ok(body.chunks(8).skip(2).map(counter).collect())
}

pub(crate) fn written() -> Outcome {
    let (machine, _) = Machine::new(&socket(), number(3, 2), WRITES)?;
    let vcpu = machine.vm.vcpu(0)?;
    machine.enable(true)?;
    let shown = || if machine.bar.host == 0 { 0 } else { raw::load(machine.bar.host) };
    say("on", (machine.run(&vcpu), shown()));
    machine.enable(false)?;
    for _ in 0..3 {
        say("off", (machine.run(&vcpu), shown()));
    }
    machine.enable(true)?;
    say("on", (machine.run(&vcpu), shown()));
    say("a BAR's counters", counters(&machine));
    Ok(())
}

/// Another toggles while a guest reads. Prints how many values were the device's, all ones, 0, others.
pub(crate) fn toggled() -> Outcome {
    const LIVE: u32 = 0x1234_5678;
    let (machine, _) = Machine::new(&socket(), number(3, 2), READS)?;
    let vcpus = [machine.vm.vcpu(0)?, machine.vm.vcpu(1)?];
    // It only exits; what it toggles is what its thread does between two exits, as in QEMU.
    let toggler = machine.vm.vcpu(2)?;
    raw::put(machine.vm.memory + 0x2000, EXITS);
    toggler.start_at(0x2000)?;
    machine.enable(true)?;
    raw::store(machine.bar.host, LIVE);
    let stop = AtomicBool::new(false);
    let counts: [AtomicU32; 4] = Default::default();
    let failed = std::thread::scope(|scope| {
        let guests: Vec<_> = vcpus
            .iter()
            .map(|vcpu| {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        let kind = match machine.run(vcpu)?.0 {
                            LIVE => 0,
                            u32::MAX => 1,
                            0 => 2,
                            _ => 3,
                        };
                        counts[kind].fetch_add(1, Ordering::SeqCst);
                    }
                    raw::Answer::Ok(())
                })
            })
            .collect();
        for _ in 0..number(4, 300) {
            let before = counts[1].load(Ordering::SeqCst) + counts[2].load(Ordering::SeqCst);
            toggler.run();
            machine.enable(false)?;
            // Until somebody has read.
            while counts[1].load(Ordering::SeqCst) + counts[2].load(Ordering::SeqCst) == before {
                toggler.run();
            }
            machine.enable(true)?;
        }
        stop.store(true, Ordering::SeqCst);
        guests.into_iter().try_for_each(|guest| guest.join().unwrap_or(Err(0)))
    });
    say("guests", failed);
    let counts = counts.map(AtomicU32::into_inner);
    say("live and ones were seen", (counts[0] > 0, counts[1] > 0));
    say("zeros", counts[2]);
    say("others", counts[3]);
    say("trouble", machine.proxy.trouble());
    Ok(())
}

/// The VMM's own loads and stores of a BAR whose file was truncated: while it decodes they are as fatal as
/// ever, while it does not they are Unsupported Requests. The third argument names the file.
pub(crate) fn truncated() -> Outcome {
    let file = std::env::args().nth(4).unwrap_or_default();
    let (machine, _) = Machine::new(&socket(), number(3, 2), READS)?;
    let at = machine.bar.host;
    machine.enable(true)?;
    raw::store(at + 0x100, 77);
    say("there", raw::load(at + 0x100));
    let file = raw::open(&file)?;
    raw::truncate(file, 0)?;
    say("while it decodes", raw::in_child(|| raw::load(at).cast_signed() & 1));
    machine.enable(false)?;
    say("in a child", raw::in_child(|| i32::from(raw::load(at) == u32::MAX)));
    say("read", raw::load(at + 0x100));
    raw::store(at + 0x100, 5);
    say("16 bytes", raw::load_16_bytes(at + 0x40));
    let mut data = [1; 32];
    raw::copy_out(at + 0x1000, &mut data);
    say("copied", data);
    raw::truncate(file, machine.bar.len as u64)?;
    say("written", raw::load(at + 0x100));
    Ok(())
}

/// The server goes away, at a word on standard input, while the BAR does not decode.
pub(crate) fn deserted() -> Outcome {
    use std::io::Read;
    let (machine, _) = Machine::new(&socket(), number(3, 2), READS)?;
    let vcpu = machine.vm.vcpu(0)?;
    machine.enable(true)?;
    machine.run(&vcpu)?;
    machine.enable(false)?;
    say("off", machine.run(&vcpu).map(|(value, _)| value));
    say("ready", ());
    let _ = std::io::stdin().read(&mut [0]);
    say("alone", machine.run(&vcpu).map(|(value, _)| value));
    say("and again", machine.run(&vcpu).map(|(value, _)| value));
    say("refused", machine.proxy.read(CONFIG, 0, 4).is_err());
    Ok(())
}
