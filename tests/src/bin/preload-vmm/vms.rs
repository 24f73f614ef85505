//! VMs, slots and virtual CPUs, none of which has to do with a device.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::raw::{self, ANONYMOUS, READ_WRITE};
use crate::vm::{DATA, EXITS, HALTS, KVM_GET_REGS, KVM_RUN, READS, Vm, WRITES, kvm};
use crate::{Outcome, say};

/// Every answer that KVM has to a slot: added, added again, moved, resized, deleted twice, over another one.
pub(crate) fn slots() -> Outcome {
    let vm = Vm::new(READS)?;
    let memory = raw::anonymous(0x10000)?;
    raw::store(memory, 0x1111);
    raw::store(memory + 0x1000, 0x2222);
    let vcpu = vm.vcpu(0)?;
    say("without the slot", vcpu.run());
    vcpu.answer(0x77);
    say("answered", vcpu.run());
    say("added", vm.set_slot(5, 0, DATA, 0x4000, memory));
    say("read", vcpu.run());
    say("added again", vm.set_slot(5, 0, DATA, 0x4000, memory));
    say("resized", vm.set_slot(5, 0, DATA, 0x8000, memory));
    say("other memory", vm.set_slot(5, 0, DATA, 0x4000, memory + 0x1000));
    say("read", vcpu.run());
    say("over it", vm.set_slot(6, 0, DATA + 0x3000, 0x4000, memory));
    say("beside it", vm.set_slot(6, 0, DATA + 0x4000, 0x4000, memory));
    say("moved", vm.set_slot(5, 0, DATA + 0x10000, 0x4000, memory));
    say("moved onto another", vm.set_slot(5, 0, DATA + 0x4000, 0x4000, memory));
    say("moved back", vm.set_slot(5, 0, DATA, 0x4000, memory));
    say("dirty log", vm.set_slot(5, 1, DATA, 0x4000, memory));
    say("bad flags", vm.set_slot(5, 0xff00, DATA, 0x4000, memory));
    say("misaligned", vm.set_slot(7, 0, DATA + 0x20001, 0x4000, memory));
    say("misaligned memory", vm.set_slot(7, 0, DATA + 0x20000, 0x4000, memory + 1));
    say("bad slot", vm.set_slot(0x7fff_ffff, 0, DATA + 0x20000, 0x4000, memory));
    say("other address space", vm.set_slot(1 << 16 | 5, 0, DATA, 0x4000, memory));
    say("deleted", vm.set_slot(5, 0, DATA, 0, memory));
    say("deleted again", vm.set_slot(5, 0, DATA, 0, memory));
    say("exits", vcpu.run());
    say("a slot of a null pointer", raw::ioctl(vm.fd, 0x4020_ae46, 0));
    say("a slot of a bad pointer", raw::ioctl(vm.fd, 0x4020_ae46, 0xdead_0000));
    say("a region of a bad pointer", raw::ioctl(vm.fd, 0x40a0_ae49, 0xdead_0000));
    Ok(())
}

/// Exits that are the VMM's: ports, MMIO, halts.
pub(crate) fn exits() -> Outcome {
    let vm = Vm::new(WRITES)?;
    let vcpu = vm.vcpu(0)?;
    for _ in 0..3 {
        say("writes", vcpu.run());
    }
    let vm = Vm::new(READS)?;
    let vcpu = vm.vcpu(0)?;
    say("reads", vcpu.run());
    vcpu.answer(0);
    say("what was answered with 0", vcpu.run());
    let vm = Vm::new(EXITS)?;
    let vcpu = vm.vcpu(0)?;
    say("ports", vcpu.run());
    let vm = Vm::new(HALTS)?;
    let vcpu = vm.vcpu(0)?;
    say("halts", vcpu.run());
    Ok(())
}

/// Requests that nobody knows, on descriptors of every kind.
pub(crate) fn unknown_ioctls() -> Outcome {
    let vm = Vm::new(EXITS)?;
    let vcpu = vm.vcpu(0)?;
    let kvm = kvm()?;
    let file = raw::memfd(0x1000)?;
    let kinds = [("kvm", kvm), ("vm", vm.fd), ("vcpu", vcpu.fd), ("file", file), ("none", -1)];
    for (kind, fd) in kinds {
        for request in [0, 0xaeff, 0xae80, 0xae41, 0x4020_ae46, 0x3b6c, 0xffff_ffff_ffff_ffff] {
            // These are real on their own descriptors.
            let real = (kind == "vm" && request != 0xae80 && request < 1 << 32 && request > 0xaeff)
                || (kind == "vm" && request == 0xae41)
                || (kind == "vcpu" && request == 0xae80);
            if !real {
                say(&format!("{kind} {request:#x}"), raw::ioctl(fd, request, 0));
            }
        }
    }
    let mut count = 7i32;
    say("FIONREAD of a pipe's end", pipe_with_bytes(&mut count));
    say("bytes", count);
    say("closed on exec", raw::ioctl(file, 0x5451, 0));
    Ok(())
}

fn pipe_with_bytes(count: &mut i32) -> raw::Answer<i32> {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let (reader, mut writer) = std::io::pipe().map_err(|_| 0)?;
    writer.write_all(b"four").map_err(|_| 0)?;
    raw::ioctl_with(reader.as_raw_fd(), 0x541b, count)
}

pub(crate) fn several_vms() -> Outcome {
    let mut running = Vec::new();
    for value in 0..8u32 {
        let vm = Vm::new(READS)?;
        let memory = raw::anonymous(0x1000)?;
        raw::store(memory, value);
        vm.set_slot(1, 0, DATA, 0x1000, memory)?;
        let vcpus = [vm.vcpu(0)?, vm.vcpu(1)?];
        running.push((vm, vcpus));
    }
    for (vm, vcpus) in &running {
        vcpus.iter().for_each(|vcpu| say("value", vcpu.run()));
        say("deleted", vm.set_slot(1, 0, DATA, 0, 0));
    }
    for (vm, vcpus) in &running {
        vcpus.iter().for_each(|vcpu| say("nothing there", vcpu.run()));
        say("VM closed", raw::close(vm.fd));
        say("runs without it", {
            vcpus[0].answer(1);
            vcpus[0].run()
        });
    }
    Ok(())
}

pub(crate) fn vcpus_come_and_go() -> Outcome {
    let vm = Vm::new(EXITS)?;
    for round in 0..100 {
        let vcpu = vm.vcpu(round)?;
        let exit = vcpu.run();
        if round % 20 == 0 {
            say("exit", exit);
        }
        raw::munmap(vcpu.run, vcpu.run_size)?;
        raw::close(vcpu.fd)?;
    }
    say("an id twice", vm.vcpu(0).map(|_| ()));
    for _ in 0..20 {
        let vm = Vm::new(EXITS)?;
        let vcpu = vm.vcpu(0)?;
        raw::close(vm.fd)?;
        vcpu.run();
        raw::close(vcpu.fd)?;
        raw::munmap(vcpu.run, vcpu.run_size)?;
    }
    Ok(())
}

/// A virtual CPU runs whether its page is mapped or not, or mapped twice, or moved.
pub(crate) fn run_page() -> Outcome {
    let vm = Vm::new(READS)?;
    let mut vcpu = vm.vcpu(0)?;
    say("first", vcpu.run());
    let second = raw::shared(vcpu.fd, vcpu.run_size)?;
    raw::munmap(vcpu.run, vcpu.run_size)?;
    say("runs by its second page", raw::ioctl(vcpu.fd, KVM_RUN, 0));
    vcpu.run = second;
    say("second", vcpu.run());
    raw::munmap(second, vcpu.run_size)?;
    say("runs without a page", raw::ioctl(vcpu.fd, KVM_RUN, 0));
    say("and again", raw::ioctl(vcpu.fd, KVM_RUN, 0));
    vcpu.run = raw::shared(vcpu.fd, vcpu.run_size)?;
    say("third", vcpu.run());
    let place = raw::anonymous(0x10000)?;
    say("over other memory", {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        raw::mmap(place, vcpu.run_size, READ_WRITE, flags, vcpu.fd, 0).map(|at| at == place)
    });
    raw::munmap(vcpu.run, vcpu.run_size)?;
    vcpu.run = place;
    say("fourth", vcpu.run());
    say("memory over it", {
        let flags = ANONYMOUS | libc::MAP_FIXED;
        raw::mmap(place, vcpu.run_size, READ_WRITE, flags, -1, 0).map(|at| at == place)
    });
    say("runs all the same", raw::ioctl(vcpu.fd, KVM_RUN, 0));
    raw::mmap(place, vcpu.run_size, READ_WRITE, ANONYMOUS | libc::MAP_FIXED, -1, 0)?;
    say("what is there", raw::load(place + 8));
    Ok(())
}

pub(crate) fn immediate_exit() -> Outcome {
    let vm = Vm::new(READS)?;
    let vcpu = vm.vcpu(0)?;
    say("runs", vcpu.run());
    vcpu.set_immediate_exit(true);
    // Completes the read that it stopped for.
    vcpu.answer(5);
    say("at once", vcpu.run());
    say("at once again", vcpu.run());
    vcpu.set_immediate_exit(false);
    say("goes on", vcpu.run());
    Ok(())
}

/// A signal ends `KVM_RUN` with EINTR, and the VMM sees it.
pub(crate) fn interrupted() -> Outcome {
    let spin = [0xeb, 0xfe];
    let vm = Vm::new(&spin)?;
    let vcpu = vm.vcpu(0)?;
    raw::sigaction(
        libc::SIGALRM,
        Some(&raw::action(raw::ignore_signal as *const () as usize, 0, &[])),
    )?;
    for _ in 0..3 {
        raw::alarm_in_ms(20);
        say("interrupted", vcpu.run());
    }
    Ok(())
}

/// What succeeds leaves errno alone, as the C library's functions do.
pub(crate) fn errno_is_kept() -> Outcome {
    let vm = Vm::new(READS)?;
    let vcpu = vm.vcpu(0)?;
    let memory = raw::anonymous(0x1000)?;
    let file = raw::memfd(0x2000)?;
    let kept = |what: &str, work: &dyn Fn() -> bool| {
        raw::set_errno(123);
        let done = work();
        say(what, (done, raw::errno()));
    };
    kept("run", &|| raw::ioctl(vcpu.fd, KVM_RUN, 0).is_ok());
    kept("slot", &|| vm.set_slot(1, 0, DATA, 0x1000, memory).is_ok());
    kept("run with the slot", &|| raw::ioctl(vcpu.fd, KVM_RUN, 0).is_ok());
    kept("delete", &|| vm.set_slot(1, 0, DATA, 0, memory).is_ok());
    kept("mmap", &|| raw::shared(file, 0x2000).is_ok());
    kept("munmap", &|| raw::munmap(memory, 0x1000).is_ok());
    kept("dup and close", &|| raw::dup(vm.fd).and_then(raw::close).is_ok());
    kept("fcntl", &|| raw::fcntl(vm.fd, libc::F_GETFD, 0).is_ok());
    kept("pread", &|| raw::pread(file, &mut [0; 8], 0).is_ok());
    kept("another VM", &|| Vm::bare().and_then(|vm| raw::close(vm.fd)).is_ok());
    kept("another vCPU", &|| raw::ioctl(vm.fd, 0xae41, 9).is_ok());
    kept("sigaction", &|| raw::sigaction(libc::SIGBUS, None).is_ok());
    kept("sigprocmask", &|| raw::sigprocmask(libc::SIG_BLOCK, Some(&[libc::SIGBUS])).is_ok());
    kept("pthread_sigmask", &|| raw::pthread_sigmask(libc::SIG_BLOCK, None).is_ok());
    Ok(())
}

/// Threads run VMs of their own while others appear and vanish.
pub(crate) fn threads() -> Outcome {
    const THREADS: usize = 6;
    let start = Barrier::new(THREADS);
    let totals = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    (0..30).map(|_| one_life()).sum::<raw::Answer<u32>>()
                })
            })
            .collect();
        let totals = workers.into_iter().map(|worker| worker.join().map_err(|_| 0).flatten());
        totals.collect::<raw::Answer<Vec<u32>>>()
    })?;
    say("exits", totals);
    one_slot_many_threads()
}

/// A whole VM, from its making to its end. Returns how many exits were as they should be.
fn one_life() -> raw::Answer<u32> {
    let vm = Vm::new(READS)?;
    let memory = raw::anonymous(0x1000)?;
    raw::store(memory, 0x4c49_4645);
    vm.set_slot(3, 0, DATA, 0x1000, memory)?;
    let vcpu = vm.vcpu(0)?;
    let mut good = 0;
    for _ in 0..20 {
        good += u32::from(format!("{:?}", vcpu.run()) == "out 0x10 0x4c494645");
    }
    vm.set_slot(3, 0, DATA, 0, memory)?;
    good += u32::from(format!("{:?}", vcpu.run()) == format!("mmio read {DATA:#x} 4"));
    raw::close(vcpu.fd)?;
    raw::munmap(vcpu.run, vcpu.run_size)?;
    raw::close(vm.fd)?;
    raw::munmap(memory, 0x1000)?;
    Ok(good)
}

/// A slot comes and goes under virtual CPUs that use it.
fn one_slot_many_threads() -> Outcome {
    let vm = Vm::new(READS)?;
    let memory = raw::anonymous(0x1000)?;
    raw::store(memory, 0x4c49_4645);
    let stop = AtomicBool::new(false);
    let vcpus = [vm.vcpu(0)?, vm.vcpu(1)?];
    let strange = std::thread::scope(|scope| {
        let runners: Vec<_> = vcpus
            .iter()
            .map(|vcpu| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut strange = Vec::new();
                    while !stop.load(Ordering::SeqCst) {
                        let exit = format!("{:?}", vcpu.run());
                        vcpu.answer(0);
                        let known =
                            ["out 0x10 0x4c494645", "out 0x10 0x0", "mmio read 0xe0000000 4"];
                        if !known.contains(&exit.as_str()) {
                            strange.push(exit);
                        }
                    }
                    strange
                })
            })
            .collect();
        for _ in 0..200 {
            vm.set_slot(3, 0, DATA, 0x1000, memory)?;
            vm.set_slot(3, 0, DATA, 0, memory)?;
        }
        stop.store(true, Ordering::SeqCst);
        let seen = runners.into_iter().map(|runner| runner.join().unwrap_or_default());
        raw::Answer::Ok(seen.flatten().collect::<Vec<_>>())
    })?;
    say("strange exits", strange);
    Ok(())
}

/// RAM whose memory went away is as fatal as it was.
pub(crate) fn lost_ram() -> Outcome {
    let vm = Vm::new(READS)?;
    let file = raw::memfd(0x2000)?;
    let memory = raw::shared(file, 0x2000)?;
    vm.set_slot(1, 0, DATA, 0x2000, memory)?;
    let vcpu = vm.vcpu(0)?;
    say("there", vcpu.run());
    raw::truncate(file, 0)?;
    for _ in 0..3 {
        say("gone", vcpu.run());
    }
    say("other calls go on", raw::ioctl_with(vcpu.fd, KVM_GET_REGS, &mut [0u64; 18]));
    raw::munmap(memory, 0x2000)?;
    say("unmapped", vcpu.run());
    Ok(())
}
