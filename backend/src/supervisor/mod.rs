//! Keeps functions alive while the processes that serve them come and go.
//!
//! The supervisor holds what must not die with a worker: the listening socket, the client's socket,
//! the state and every descriptor that the worker has been given since. It reads nothing that a guest
//! or a client writes, so neither can harm it.

pub mod link;
pub mod systemd;
pub mod upgrade;
