//! Virtio devices, driven by Linux's own drivers.

pub(super) mod blk;
mod bridge;
pub(super) mod console;
pub(super) mod disk;
pub(super) mod net;
pub(super) mod rng;
pub(super) mod toggle;
pub(super) mod verified;

use std::io::Write;

use crate::Result;
use crate::report::Report;
use toggle::Bit;

/// A disk, a network interface, a source of entropy and a console.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_devices(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    rng::run_all(report)?;
    net::run_all(report, nonce)?;
    blk::run_all(report, nonce, rounds.into())?;
    blk::resize(report, nonce)?;
    console::run_all(report)
}

/// Those of them that QEMU has a vhost-user device for.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_vhost_user(
    report: &mut Report<impl Write>,
    nonce: &str,
    rounds: u32,
) -> Result<()> {
    blk::run_all(report, nonce, rounds.into())?;
    rng::run_all(report)?;
    net::run_all(report, nonce)
}

/// A disk whose memory is switched off under load.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_memory(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    toggle::run_all(report, nonce, Bit::MemorySpace, rounds)
}

/// A disk that is kept from memory under load.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_master(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    toggle::run_all(report, nonce, Bit::BusMaster, rounds)
}

/// Disks and a file system of vhost-user daemons.
///
/// # Errors
/// The report or the host can't be reached.
pub(crate) fn run_bridge(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    bridge::run_all(report, nonce, rounds)
}
