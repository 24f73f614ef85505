//! Functions whose workers are killed, stopped or replaced while Linux uses them.

mod copy;
mod full;
mod functions;
mod kernel;
mod kills;
mod mapped;
mod tree;
mod writes;

use std::io::Write;

use crate::Result;
use crate::report::Report;

/// Files are copied while the disk's worker is killed again and again; beside it a disk whose worker is
/// not.
///
/// # Errors
/// The report or the host can't be reached.
pub(crate) fn run_copy(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    copy::run_killed(report, nonce)
}

/// Every other kind of function, each used while its worker is killed.
///
/// # Errors
/// The report or the host can't be reached, or a function is missing.
pub(crate) fn run_functions(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    functions::run_all(report, nonce)
}

/// Functions behind the guest's IOMMU, whose workers are killed.
///
/// # Errors
/// The report or the host can't be reached, or a function is missing.
pub(crate) fn run_mapped(report: &mut Report<impl Write>) -> Result<()> {
    mapped::run_all(report)
}

/// Functions that lose Memory Space Enable and their workers.
///
/// # Errors
/// The report or the host can't be reached, or a function is missing.
pub(crate) fn run_toggled(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    writes::run_toggled(report, nonce)
}

/// The supervisor is killed under load.
///
/// # Errors
/// The report or the host can't be reached, or a function is missing.
pub(crate) fn run_unsupervised(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    writes::run_during(report, nonce, "kill-supervisor", "unsupervised", 1)
}

/// Workers are stopped, which nothing but a watchdog sees.
///
/// # Errors
/// The report or the host can't be reached, or a function is missing.
pub(crate) fn run_stopped(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    writes::run_during(report, nonce, "stop-worker", "stopped", rounds)
}

/// The program is replaced by another while files are copied.
///
/// # Errors
/// The report or the host can't be reached.
pub(crate) fn run_upgraded(
    report: &mut Report<impl Write>,
    nonce: &str,
    rounds: u32,
) -> Result<()> {
    copy::run_upgraded(report, nonce, rounds)
}

/// A disk whose image can't grow for a while.
///
/// # Errors
/// The report or the host can't be reached.
pub(crate) fn run_full(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    full::run_all(report, nonce)
}
