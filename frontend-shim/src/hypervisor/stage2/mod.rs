//! Stage-2 translation as on arm64, in software: what a hypervisor does with the faults of a guest
//! whose pages are mapped one by one, and each with its own permissions.
//!
//! A fault there is one of two: nothing is mapped at the address (translation fault), or something is,
//! and it permits too little (permission fault). The first needs
//! [`Map`](crate::fault::Verdict::Map), the second [`Relax`](crate::fault::Verdict::Relax). Whoever maps
//! in both cases never gets on: mapping what is mapped already is refused with "again", so the
//! instruction is executed again, and faults again. [`Policy::AlwaysMap`] is that mistake, kept to be
//! looked at; `cargo run -p barkeep-shim --example stage2_livelock` shows it.
//!
//! [`Stage2`] is the page table, [`GuestMemory`] what lies behind it, [`Resolution`] the fault handler,
//! and [`Vcpu`] a processor that knows reads, writes and instruction fetches. All of them go in single
//! steps, so that tests can interleave vCPUs in every possible order. The rules are those of Linux'
//! arch/arm64/kvm/hyp/pgtable.c and mmu.c; the function is named where one is followed. Left out: TLBs
//! and caches, the access flag, nesting, and blocks of 1 GiB.
#![forbid(unsafe_code)]

mod abort;
mod memory;
mod perms;
mod resolve;
mod table;
#[cfg(test)]
mod tests;
mod vcpu;
mod walk;

pub use abort::{Abort, Access, FaultStatus};
pub use memory::{Backing, GuestMemory, Region, RegionError, RegionKind};
pub use perms::Perms;
pub use resolve::{Answer, Policy, Resolution, Resolved, answer};
pub use table::{BLOCK_SIZE, Entry, Exclusive, IPA_LIMIT, Leaf, Shared, Stage2, TableError};
pub use vcpu::{Completion, Done, Vcpu, VcpuStep};
pub use walk::Walk;
