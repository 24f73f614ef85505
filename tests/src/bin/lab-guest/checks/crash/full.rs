//! A disk whose image the host has no room for.

use std::io::Write;
use std::time::Duration;

use super::super::virtio::blk::DISK;
use super::super::virtio::disk::Disk;
use super::super::virtio::verified::{Area, Ledger};
use super::kernel;
use super::kills::await_that;
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

const WRITERS: u64 = 4;
/// As long as a guest may take to write what the host has room for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Blocks that fit again when there is room.
const LATER: u64 = 512;

pub(super) fn run_all(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    kernel::look_for_hung_tasks();
    let path = Disk::find(DISK)?.path();
    let area = Area { path, direct: true, blocks: DISK << 8, tag: Area::tag(nonce, "before") };
    let mut written = None;
    report.check("full-fails", || {
        let (seen, ledger) = fill(&area)?;
        written = Some(ledger);
        Ok(seen)
    })?;
    report.check("full-intact", || area.verify(written.as_ref().ok_or("nothing was written")?))?;
    report.check("full-goes-on", || {
        Requests::open()?.ask_and_await("make-room")?;
        let later = Area { blocks: LATER, tag: Area::tag(nonce, "after"), ..area.clone() };
        later.verify(&later.write(WRITERS, 128)?)
    })?;
    report.check("full-checksum", || Ok(format!("sha256 {}", Disk::find(DISK)?.checksum()?)))?;
    report.check("kernel-quiet", || kernel::is_quiet(&["i/o error"]))?;
    Ok(())
}

/// Every writer ends by an I/O error, sooner or later.
fn fill(area: &Area) -> Result<(String, Ledger)> {
    let writers = area.start(WRITERS, None)?;
    await_that("a full disk", PATIENCE, || Ok(writers.have_ended()))?;
    let writes = writers.writes();
    let ledger = writers.finish()?;
    ensure!(ledger.failures.len() == usize::try_from(WRITERS)?, "{writes} writes succeeded");
    let first = ledger.failures.first().cloned().unwrap_or_default();
    Ok((format!("{writes} writes, then: {first}"), ledger))
}
