//! `KVM_RUN`, until there is an exit that is the VMM's.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use barkeep_protocol::wire;
use barkeep_shim::GuestAddress;
use barkeep_shim::fault::{FaultAccess, FaultPlace, GuestAccess, MemoryFault, Unlocated};
use kvm_bindings::{KVM_EXIT_INTR, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_UNKNOWN};
use rustix::io::Errno;

use super::around::Around;
use super::arrivals::this_thread;
use super::run_area::{MmioExit, RunArea};
use super::slots::Slot;
use super::stopped::{Stopped, xsave_layout};
use super::tables::{Handed, Vcpu};
use super::{Vms, abi};
use crate::device::{BarAddress, BarMapping, Decode};
use crate::status::{Count, FailOpen};
use crate::system::{Answer, System as _};

/// How many exits are completed here before the VMM gets to look up: it may wait for nothing but the
/// return of `KVM_RUN`, and without us each access is one. To go round costs a hundredth of so many.
///
/// It is one of them until the VMM was seen to keep its kicks, by `immediate_exit` or by a mask for `KVM_RUN`:
/// the signal of another may come while an exit is completed, and its handler leave nothing behind
/// that would end the next `KVM_RUN`.
const MOST: u32 = 64;

/// What is done about the end of a `KVM_RUN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The guest goes on.
    Enter,
    /// The VMM gets it, as it is.
    Vmm,
}

impl Vms {
    /// `KVM_RUN` on a virtual CPU. What is not about a BAR that does not decode costs no lock, no
    /// allocation and no system call but the one that the VMM makes.
    ///
    /// A guest that does nothing else than accesses to such a BAR leaves now and then as it does for a
    /// signal: with `EINTR`, which every VMM expects, and after the access, as far as KVM can.
    pub(super) fn run<A: Around>(
        &self,
        around: &A,
        fd: RawFd,
        vcpu: u32,
        argument: usize,
    ) -> Answer<i32> {
        self.arrivals.end();
        let enter = || around.system().ioctl(fd, abi::RUN.into(), argument);
        let Some(vcpu) = self.vcpus.get(vcpu) else { return enter() };
        let generation = vcpu.generation();
        vcpu.thread.store(this_thread(), Ordering::Relaxed);
        if let Some(handed) = vcpu.take_handed() {
            let _ = around.shielded(|| self.check(around, vcpu, handed));
        }
        let mut again = 0;
        loop {
            let most = if self.keeps_kicks.load(Ordering::Relaxed) { MOST } else { 1 };
            let leaves = again >= most && vcpu.run().is_some_and(RunArea::ask_to_leave);
            let answer = enter();
            if vcpu.generation() != generation {
                // Closed meanwhile. The entry, and the descriptor's number, may be another's.
                return answer;
            }
            let Some(run) = vcpu.run() else { return answer };
            if leaves {
                run.ask_no_more();
            }
            let next = match answer {
                Ok(_) => {
                    vcpu.progress();
                    if run.exit_reason() != KVM_EXIT_MMIO {
                        return answer;
                    }
                    self.mmio(around, vcpu, run)
                }
                Err(Errno::FAULT) => {
                    let next = around.shielded(|| self.fault(around, fd, vcpu, run));
                    next.unwrap_or(Next::Vmm)
                }
                // A signal: the VMM wants to be asked. It will enter again.
                Err(error) => {
                    if run.is_asked_to_leave() {
                        self.keeps_kicks.store(true, Ordering::Relaxed);
                    }
                    if error == Errno::INTR && again > 0 {
                        // With `immediate_exit` KVM leaves the last reason, of an exit that is completed.
                        run.set_exit_reason(KVM_EXIT_INTR);
                    }
                    return answer;
                }
            };
            if next == Next::Vmm || vcpu.generation() != generation {
                return answer;
            }
            // Faults without an exit in between are bounded already.
            again += u32::from(answer.is_ok());
            if again >= 2 * MOST {
                // An instruction that repeats: KVM goes on with it whatever it is asked.
                run.set_exit_reason(KVM_EXIT_INTR);
                return Err(Errno::INTR);
            }
        }
    }

    fn mmio<A: Around>(&self, around: &A, vcpu: &Vcpu, run: RunArea) -> Next {
        let number = vcpu.vm.load(Ordering::Relaxed);
        let Some(vm) = self.vms.get(number) else { return Next::Vmm };
        let address = run.mmio_address();
        let answered = around.shielded(|| {
            let Some((region, bar)) = vm.suspended_at(run.address_space(), address) else {
                let place = around.window_at(number, address);
                return place
                    .map_or(Next::Vmm, |place| self.answer(around, vcpu, place, run, || {}));
            };
            let last = address.saturating_add(run.mmio().len as u64 - 1);
            if !region.contains(last) {
                return Next::Vmm;
            }
            around.look(bar.device);
            let restore = || vm.restore(around, number, &region);
            self.answer(around, vcpu, region.in_bar(&bar, address), run, restore)
        });
        answered.unwrap_or(Next::Vmm)
    }

    /// An exit for a BAR that has no slot there. The VMM gets it if the BAR decodes, after `restore`.
    fn answer<A: Around>(
        &self,
        around: &A,
        vcpu: &Vcpu,
        place: BarAddress,
        run: RunArea,
        restore: impl FnOnce(),
    ) -> Next {
        let losses = self.losses.of(place.device);
        match around.decode(place.device, place.bar) {
            Decode::Off => {
                complete(around, place, run, run.mmio());
                Next::Enter
            }
            Decode::On if self.arrivals.has(place.device, Instant::now()) => not_yet(around, run),
            Decode::On => {
                restore();
                hand(vcpu, place, losses, run)
            }
            Decode::Unknown => Next::Vmm,
        }
    }

    /// The VMM has completed a read. Where the BAR was lost to it meanwhile, it has found nothing there
    /// and made that a 0.
    fn check<A: Around>(&self, around: &A, vcpu: &Vcpu, handed: Handed) {
        let Some(run) = vcpu.run() else { return };
        let Handed { place, len, losses } = handed;
        if run.exit_reason() != KVM_EXIT_MMIO
            || run.mmio().data[..len].iter().any(|byte| *byte != 0)
        {
            return;
        }
        let lost = self.losses.of(place.device) != losses
            || around.decode(place.device, place.bar) == Decode::Off;
        if lost {
            run.set_mmio_data([0xff; 8]);
            around.status().count(Count::UrReads);
        }
    }

    /// `KVM_RUN` has failed with `EFAULT`. Only what is mapped changes: the instruction is executed again
    /// and exits as MMIO, which says all that is needed to complete it.
    fn fault<A: Around>(&self, around: &A, fd: RawFd, vcpu: &Vcpu, run: RunArea) -> Next {
        let number = vcpu.vm.load(Ordering::Relaxed);
        let Some(vm) = self.vms.get(number).filter(|vm| vm.has_bars()) else { return Next::Vmm };
        let reported = run.exit_reason() == KVM_EXIT_MEMORY_FAULT;
        if reported && run.memory_fault().flags != 0 {
            // Conversions of confidential memory, and what is not known here.
            return Next::Vmm;
        }
        let slots: Vec<Slot> = vm.slots().iter().copied().collect();
        let bars: Vec<(Slot, BarMapping)> =
            slots.iter().filter_map(|slot| Some((*slot, bar_of(around, slot)?))).collect();
        let space = run.address_space();
        let place = if reported {
            let fault = run.memory_fault();
            let address = GuestAddress(fault.address);
            FaultPlace::Reported(GuestAccess { address, size: fault.size, kind: None })
        } else {
            let layout = self.xsave.get_or_init(xsave_layout);
            let stopped = Stopped::new(around.system(), fd, &slots, space, layout);
            let is_bar = |slot: &Slot| bars.iter().any(|(bar, _)| bar == slot);
            stopped.map_or_else(FaultPlace::Unknown, |stopped| stopped.find(is_bar))
        };
        if !is_about_a_bar(&place, space, &slots, &bars) {
            return Next::Vmm;
        }
        let fault = MemoryFault { place, private: false };
        let off = off(around, space, &bars, &fault);
        let Some(suspended) = vm.suspend(around, number, &off) else { return Next::Vmm };
        if suspended > 0 {
            around.status().count(Count::FaultsLocated);
        }
        // A guest that toggles meets faults that are over when they are looked at.
        let changes = vm.changes().wrapping_add(self.losses.in_all());
        if vcpu.with_guard(|guard| guard.fault(&fault, changes)).is_err() {
            around.status().fail_open(FailOpen::NoProgress);
            return Next::Vmm;
        }
        if reported {
            // Nobody but us has seen it.
            run.set_exit_reason(KVM_EXIT_UNKNOWN);
        }
        Next::Enter
    }
}

/// Completes an exit for a BAR that decodes already, but not yet for the guest. A backend would answer; what the VMM
/// itself emulates in the BAR it would not know.
fn not_yet<A: Around>(around: &A, run: RunArea) -> Next {
    if run.mmio().write {
        around.status().count(Count::UrWrites);
    } else {
        run.set_mmio_data([0xff; 8]);
        around.status().count(Count::UrReads);
    }
    Next::Enter
}

/// The VMM completes an exit, since the BAR decodes. By the time that it does, it may not any more: `losses` is
/// from before it was asked whether it does.
fn hand(vcpu: &Vcpu, place: BarAddress, losses: u64, run: RunArea) -> Next {
    let exit = run.mmio();
    if !exit.write {
        // What a VMM that knows of nothing there leaves as it is.
        run.set_mmio_data([0xff; 8]);
        vcpu.hand(Handed { place, len: exit.len, losses });
    }
    Next::Vmm
}

/// Whether a fault can be about a BAR: it is in one, or in what was one a moment ago.
fn is_about_a_bar(
    place: &FaultPlace,
    space: u32,
    slots: &[Slot],
    bars: &[(Slot, BarMapping)],
) -> bool {
    match place {
        FaultPlace::Reported(access) => {
            let here = |slot: &&Slot| {
                slot.region.space() == space && slot.region.contains(access.address.0)
            };
            slots
                .iter()
                .find(here)
                .is_none_or(|slot| !slot.is_installed() || bars.iter().any(|(bar, _)| bar == slot))
        }
        // Every access of the instruction is to RAM, which refuses for reasons of its own.
        FaultPlace::Unknown(Unlocated::NoSlot(_)) => false,
        _ => true,
    }
}

/// The installed slots of BARs that do not decode, among those that the fault can be about.
fn off<A: Around>(
    around: &A,
    space: u32,
    bars: &[(Slot, BarMapping)],
    fault: &MemoryFault,
) -> Vec<(Slot, BarMapping)> {
    let mut off: Vec<(Slot, BarMapping)> = Vec::new();
    let unknown = matches!(fault.place, FaultPlace::Unknown(_));
    for (slot, bar) in bars {
        if off.iter().any(|(_, known)| (known.device, known.bar) == (bar.device, bar.bar)) {
            off.push((*slot, *bar));
            continue;
        }
        let decode = if unknown {
            around.decode(bar.device, bar.bar)
        } else {
            let here = fault.candidates().iter().find(|access| {
                slot.region.space() == space && slot.region.contains(access.address.0)
            });
            let Some(access) = here else { continue };
            let place = slot.region.in_bar(bar, access.address.0);
            around.verdict(place, kind(access))
        };
        if decode == Decode::Off {
            off.push((*slot, *bar));
        }
    }
    off
}

/// The BAR that an installed slot is a part of.
fn bar_of<A: Around>(around: &A, slot: &Slot) -> Option<BarMapping> {
    let region = &slot.region;
    let suspendable = slot.is_installed() && region.is_plain();
    suspendable.then(|| around.mapping(region.host, region.size)).flatten()
}

fn kind(access: &GuestAccess) -> wire::FaultAccess {
    match access.kind {
        Some(FaultAccess::Write) => wire::FaultAccess::WRITE,
        Some(FaultAccess::Execute) => wire::FaultAccess::EXECUTE,
        Some(FaultAccess::Read) => wire::FaultAccess::READ,
        None => wire::FaultAccess::empty(),
    }
}

/// Completes an exit for MMIO; the next `KVM_RUN` takes it from there.
fn complete<A: Around>(around: &A, place: BarAddress, run: RunArea, exit: MmioExit) {
    let mut data = if exit.write { exit.data } else { [0xff; 8] };
    around.complete(place, &mut data[..exit.len], exit.write);
    if !exit.write {
        run.set_mmio_data(data);
    }
}
