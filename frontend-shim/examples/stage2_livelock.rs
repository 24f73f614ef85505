//! A guest writes to a page and then executes it, on an arm64 processor whose instruction cache needs
//! invalidation (no DIC), so that data accesses map pages without execute permission.
//!
//! A fault handler that answers the permission fault of the fetch by mapping the page again never gets
//! the guest any further; one that relaxes the mapping does.
//!
//!     cargo run -p barkeep-shim --no-default-features --example stage2_livelock
#![expect(clippy::print_stdout, reason = "showing something is what an example is for")]

use std::error::Error;

use barkeep_shim::GuestAddress;
use barkeep_shim::fault::FaultAccess;
use barkeep_shim::hypervisor::PAGE_SIZE;
use barkeep_shim::hypervisor::stage2::{
    Access, Done, GuestMemory, Perms, Policy, Region, RegionKind, Resolved, Vcpu,
};

const CODE: u64 = 0x8000_0000;

fn main() -> Result<(), Box<dyn Error>> {
    for policy in [Policy::AlwaysMap, Policy::RelaxOnPermission] {
        println!("{policy:?}");
        let memory = GuestMemory::new(false);
        memory.add(Region {
            ipa: GuestAddress(CODE),
            size: 16 * PAGE_SIZE,
            frame: 0x4_0000_0000,
            perms: Perms::RWX,
            kind: RegionKind::Ram { private: false },
        })?;
        let program =
            [FaultAccess::Write, FaultAccess::Execute].map(|kind| Access::new(kind, CODE));
        let mut vcpu = Vcpu::new(&memory, policy, program.to_vec());
        let end = vcpu.run().map(<[Done]>::len);
        for done in vcpu.done() {
            show(&done.access, &done.faults);
        }
        if let Some(access) = vcpu.current() {
            show(&access, vcpu.faults());
        }
        match end {
            Ok(instructions) => println!("  finished: {instructions} instructions retired"),
            Err(why) => println!("  escalated: {why}"),
        }
    }
    Ok(())
}

/// One line for an instruction: its faults, and what the last of them was answered with.
fn show(access: &Access, faults: &[Resolved]) {
    let last = match faults.last() {
        Some(Resolved { answer, code }) => format!("; the last: {answer:?}, table says {code:?}"),
        None => String::new(),
    };
    println!("  {:?} at {}: {} fault(s){last}", access.kind, access.ipa, faults.len());
}
