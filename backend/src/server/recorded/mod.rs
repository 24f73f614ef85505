//! Ports whose every turn is recorded, so that another process can go on in this one's place
//! (docs/decisions/0018-every-turn-is-a-transaction.md).
//!
//! What is done for a client is done as without recording, by the same parts. Around it, each message is
//! taken into memory that outlives the process before it is looked at, and what came of it is committed
//! with the answer at once.

mod files;
mod legacy;
mod port;
mod quarantine;
mod recorder;
mod saved_session;
mod session;
#[cfg(test)]
mod tests;
mod windows;
mod wiring;

pub(super) use legacy::Legacy;
pub(super) use port::Port;
