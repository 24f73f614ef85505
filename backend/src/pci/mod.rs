//! The pure model of one PCI function: configuration space, BARs and capabilities.
//!
//! Nothing in here does I/O, owns a file descriptor or writes a log. A configuration write changes
//! the model and returns what that means for the world outside as plain data, [`Effects`]; whoever
//! owns the world applies them. So the model can be tested, fuzzed and saved on its own.
//!
//! ```
//! use barkeep_backend::pci::{
//!     BarIndex, BarKind, BarSpec, ClassCode, Decode, Function, FunctionSpec, Ids, spec,
//! };
//!
//! let ids = Ids {
//!     vendor: 0x1234,
//!     device: 0x11e8,
//!     subsystem_vendor: 0,
//!     subsystem: 0,
//!     revision: 1,
//!     class: ClassCode { base: 0xff, sub: 0, interface: 0 },
//! };
//! let mut function = Function::new(FunctionSpec {
//!     bars: vec![BarSpec {
//!         index: BarIndex::BAR0,
//!         kind: BarKind::Memory32 { prefetchable: false },
//!         size: 0x1000,
//!     }],
//!     ..FunctionSpec::new(ids)
//! })?;
//!
//! // A guest places BAR 0 and lets the function claim memory.
//! let moved = function.config_write(spec::header::BAR0, &0xfebf_0000_u32.to_le_bytes());
//! assert!(moved.bars_moved.contains(BarIndex::BAR0));
//! let enabled = function.config_write(spec::header::COMMAND, &[0b10]);
//! assert_eq!(enabled.decode, Some(Decode { memory: true, ..Decode::default() }));
//! assert!(function.claims(BarIndex::BAR0));
//! # Ok::<(), barkeep_backend::pci::SpecError>(())
//! ```

#![forbid(unsafe_code)]

mod bar;
mod bar_access;
mod capabilities;
mod command;
mod config_space;
mod effects;
mod function;
mod function_spec;
mod header;
mod request;
mod rom;
pub mod spec;
mod state;

#[cfg(test)]
mod tests;

pub use self::bar::{Bar, BarIndex, BarKind, BarOffset, BarSet, BarSpec};
pub use self::bar_access::{BarOwner, BarPiece, BarPieces};
pub use self::capabilities::express::{DeviceControl, DeviceStatus, ExpressSpec};
pub use self::capabilities::msi::{MsiOutcome, MsiSpec, MsiVectorSet, MsiVectors};
pub use self::capabilities::msix::{MsixSpec, MsixVectorSet, MsixVectors};
pub use self::capabilities::power::{PowerSpec, PowerState};
pub use self::capabilities::vendor::{VendorByte, VendorSpec};
pub use self::command::{Command, Status};
pub use self::config_space::{Register, RegisterWidth};
pub use self::effects::{Decode, Effects, MsiEffects, MsixEffects, ResetKind};
pub use self::function::Function;
pub use self::function_spec::{ClassCode, Decoding, FunctionSpec, Ids, InterruptPin, SpecError};
pub use self::request::{ErrorMessage, RequestKind, UnsupportedRequest};
pub use self::rom::{Rom, RomSpec};
pub use self::state::{FunctionState, StateError, StateV1};
