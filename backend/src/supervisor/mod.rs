//! Keeps workers alive, and what they need for it.

pub mod systemd;
