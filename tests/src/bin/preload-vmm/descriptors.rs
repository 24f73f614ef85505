//! What becomes of descriptors: copies, numbers that are used again, ranges that are closed.

use crate::raw;
use crate::vm::{DATA, EXITS, KVM_RUN, READS, Vm};
use crate::{Outcome, say};

pub(crate) fn dups() -> Outcome {
    let vm = Vm::new(READS)?;
    let memory = raw::anonymous(0x1000)?;
    raw::store(memory, 0xd0b);
    let copy = raw::dup(vm.fd)?;
    raw::close(vm.fd)?;
    let vm = Vm { fd: copy, ..vm };
    say("a slot by the copy", vm.set_slot(1, 0, DATA, 0x1000, memory));
    let vcpu = vm.vcpu(0)?;
    say("read", vcpu.run());
    let high = raw::dup2(vcpu.fd, 900)?;
    say("its number", high);
    raw::close(vcpu.fd)?;
    let vcpu = crate::vm::Vcpu { fd: high, ..vcpu };
    say("runs by the copy", vcpu.run());
    say("dup3", raw::dup3(high, 901, libc::O_CLOEXEC));
    say("dup3 onto itself", raw::dup3(high, high, 0));
    say("dup2 onto itself", raw::dup2(high, high));
    say("dup2 of nothing", raw::dup2(899, 902));
    say("dup2 to a bad number", raw::dup2(high, -1));
    say("dup of nothing", raw::dup(-1));
    let file = raw::memfd(0x1000)?;
    say("a file over the copy", raw::dup2(file, 901));
    say("which runs nothing", raw::ioctl(901, KVM_RUN, 0));
    say("a file over the virtual CPU", raw::dup2(file, 900));
    say("which runs nothing either", raw::ioctl(900, KVM_RUN, 0));
    say("closed", (raw::close(900), raw::close(900), raw::close(-1)));
    Ok(())
}

pub(crate) fn fcntl() -> Outcome {
    let vm = Vm::new(EXITS)?;
    let vcpu = vm.vcpu(0)?;
    let copy = raw::fcntl(vcpu.fd, libc::F_DUPFD, 800)?;
    say("F_DUPFD", copy);
    say("its flags", raw::fcntl(copy, libc::F_GETFD, 0));
    let closed = raw::fcntl(vcpu.fd, libc::F_DUPFD_CLOEXEC, 800)?;
    say("F_DUPFD_CLOEXEC", closed);
    say("its flags", raw::fcntl(closed, libc::F_GETFD, 0));
    raw::close(vcpu.fd)?;
    let vcpu = crate::vm::Vcpu { fd: closed, ..vcpu };
    say("runs", vcpu.run());
    say("a bad minimum", raw::fcntl(copy, libc::F_DUPFD, usize::MAX));
    say("of nothing", raw::fcntl(-1, libc::F_DUPFD, 0));
    say("a bad command", raw::fcntl(copy, 0x7777, 0));
    say("F_SETFD", raw::fcntl(copy, libc::F_SETFD, 1));
    say("F_GETFD", raw::fcntl(copy, libc::F_GETFD, 0));
    let file = raw::memfd(0x1000)?;
    say("seals", raw::fcntl(file, libc::F_GET_SEALS, 0));
    let mut lock = [0u64; 4];
    lock[0] = 1;
    say("a lock", raw::fcntl_with(file, libc::F_OFD_SETLK, &mut lock));
    say("F_SETFL", raw::fcntl(file, libc::F_SETFL, 0x800));
    say("F_GETFL", raw::fcntl(file, libc::F_GETFL, 0).map(|flags| flags & 0x800));
    Ok(())
}

pub(crate) fn close_range() -> Outcome {
    let vm = Vm::new(EXITS)?;
    let vcpu = vm.vcpu(0)?;
    for number in 700..710 {
        raw::dup2(vcpu.fd, number)?;
    }
    say("closed", raw::close_range(702, 707));
    for number in 700..710 {
        say(&number.to_string(), raw::ioctl(number, KVM_RUN, 0));
    }
    say("backwards", raw::close_range(9, 8));
    // Not closed, but closed by a program that takes this one's place.
    say("for exec", raw::close_range_flags(700, 701, 4));
    say("runs", raw::ioctl(700, KVM_RUN, 0));
    say("bad flags", raw::close_range_flags(700, 701, 0x100));
    Ok(())
}

/// A number that was something else means what it is now.
pub(crate) fn reuse() -> Outcome {
    for _ in 0..3 {
        let vm = Vm::new(EXITS)?;
        let vcpu = vm.vcpu(0)?;
        say("a virtual CPU", vcpu.run());
        let number = vcpu.fd;
        raw::close(number)?;
        let file = raw::memfd(0x1000)?;
        say("its number is used again", file == number);
        say("it is none", raw::ioctl(number, KVM_RUN, 0));
        let at = raw::shared(file, 0x1000)?;
        raw::store(at + 8, 6);
        say("it is a file", raw::load(at + 8));
        raw::munmap(at, 0x1000)?;
        raw::close(file)?;
        raw::munmap(vcpu.run, vcpu.run_size)?;
        raw::close(vm.fd)?;
    }
    // Behind the library's back, as by `close` inside the C library.
    let vm = Vm::new(EXITS)?;
    let vcpu = vm.vcpu(0)?;
    let file = raw::memfd(0x1000)?;
    raw::hidden_dup2(file, vcpu.fd)?;
    say("replaced", raw::ioctl(vcpu.fd, KVM_RUN, 0));
    let other = Vm::new(READS)?;
    let second = other.vcpu(0)?;
    raw::hidden_dup2(second.fd, vcpu.fd)?;
    say("by another", raw::ioctl(vcpu.fd, KVM_RUN, 0));
    Ok(())
}

pub(crate) fn pread() -> Outcome {
    let file = raw::memfd(0x1000)?;
    say("written", raw::pwrite(file, b"barkeep", 3));
    let mut data = [0; 10];
    say("read", raw::pread(file, &mut data, 0));
    say("data", data);
    say("behind the end", raw::pread(file, &mut data, 0x1000));
    say("a negative offset", raw::pread(file, &mut data, -1));
    say("written there", raw::pwrite(file, b"x", -1));
    say("no file", raw::pread(-1, &mut data, 0));
    Ok(())
}
