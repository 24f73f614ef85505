//! `ioctl`.
