//! systemd, or any service manager that speaks `sd_notify(3)` and `sd_listen_fds(3)`.
//!
//! It is told what the service does, watches over it, opens its sockets, and above all holds its
//! descriptors: whatever ends the supervisor, the next one gets them back under the names that they
//! were stored with. Without such a manager all of this does nothing.

mod fd_name;

pub use fd_name::{FdName, What};
