//! Pages of memory that one process writes and others only read, without a message.
//!
//! A page is a run of 64-bit words, as whoever has mapped it gives them: nothing in here maps memory. All
//! words are in host byte order.
#![forbid(unsafe_code)]

pub mod decode;
pub mod wrap;
