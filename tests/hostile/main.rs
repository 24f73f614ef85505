//! Peers that break the protocol, lie about lengths, hang up, or do not read.
//!
//! A peer may cost its own session and nothing else: after each of these, the next client is served
//! by a function at power-on, and the server thread has not panicked (see `Backend`).

mod back_pressure;
mod descriptors_sent;
mod disconnects;
mod floods;
mod garbage;
mod order;
mod page;
mod revoked;
mod rows;
mod sizes;
mod slow;
mod suite;
mod table;
