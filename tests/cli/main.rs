//! The binary `barkeep serve`, as an operator and a service manager see it.

mod process;
mod signals;
mod sockets;
mod usage;
