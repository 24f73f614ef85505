//! What a VMM embeds to use PCI functions that live in barkeep processes.
//!
//! [`Frontend`] is the whole of it: it connects to the backends, keeps their BARs in the guest's
//! address space, forwards what the guest does, and resolves memory faults on BARs that do not
//! decode. A VMM implements [`hypervisor::Hypervisor`] for its own hypervisor, two methods about
//! memory slots, or uses an adapter that is here.

mod address;
pub mod bar;
pub mod client;
pub mod fault;
mod frontend;
pub mod hypervisor;
mod sync;
#[cfg(feature = "x86")]
pub mod vmm;
#[cfg(feature = "x86")]
pub mod x86;

pub use address::GuestAddress;
pub use frontend::{
    FaultOutcome, Frontend, HypervisorRoutes, InterruptError, InterruptRoutes, InterruptVector,
    MsiKind, SessionEvent,
};
