//! The binary `barkeep`, as an operator and a service manager see it.

mod ctl;
mod demo;
mod idle;
mod logs;
mod process;
mod real_systemd;
mod run;
mod signals;
mod sockets;
mod systemd;
mod upgrade;
mod usage;
mod virtio;
mod wrap;
