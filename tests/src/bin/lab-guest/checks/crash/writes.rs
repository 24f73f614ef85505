//! A disk under load, and registers, while something happens to those who serve them.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::super::decode;
use super::super::virtio::blk::DISK;
use super::super::virtio::disk::{Disk, run};
use super::super::virtio::toggle::{Bit, Doorbells};
use super::super::virtio::verified::{Area, Writers};
use super::functions::{Registers, use_registers};
use super::kernel;
use super::kills::{Kills, await_that};
use crate::edu::register;
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

/// As many as there are entries in the queue of the lab's disk.
const WRITERS: u64 = 32;
const BLOCKS: u64 = 4096;
/// What is in a register meanwhile.
const LEFT: u32 = 0x0c0f_fee0;
/// For what is stopped until a watchdog sees it, too.
const PATIENCE: Duration = Duration::from_secs(30);

/// Memory Space Enable comes and goes.
pub(super) fn run_toggled(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    kernel::look_for_hung_tasks();
    check_writes(report, "toggle-writes", || toggle_disk(nonce))?;
    report.check("toggle-edu", || {
        let edu = Registers::take()?;
        let rounds = Kills::begin("edu")?
            .during(|_| decode::check_edu(&edu.function, &edu.driver).map(|_| ()))?;
        Ok(format!("{rounds} rounds"))
    })?;
    report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
    Ok(())
}

/// The host does `request` a number of times under load; `name` is what the checks are called after.
pub(super) fn run_during(
    report: &mut Report<impl Write>,
    nonce: &str,
    request: &str,
    name: &str,
    rounds: u32,
) -> Result<()> {
    kernel::look_for_hung_tasks();
    let edu = Registers::take()?;
    edu.driver.liveness_of(LEFT);
    let stopped = Arc::<AtomicBool>::default();
    let reader = thread::spawn({
        let stopped = Arc::clone(&stopped);
        move || read_all_the_time(&stopped).map_err(|error| error.to_string())
    });
    check_writes(report, &format!("{name}-writes"), || {
        let mut requests = Requests::open()?;
        let area = area(nonce, name)?;
        let writers = area.start(WRITERS, None)?;
        let went_on = (0..rounds).try_for_each(|round| {
            goes_on(&writers).map_err(|error| format!("before {request} {round}: {error}"))?;
            requests.ask_and_await(request)
        });
        let goes_on = goes_on(&writers);
        // Why a writer has failed says more than that it has.
        let seen = stop(&area, writers)?;
        went_on?;
        goes_on.map_err(|error| format!("after the last {request}: {error}"))?;
        Ok(seen)
    })?;
    report.check(&format!("{name}-edu"), || {
        stopped.store(true, Ordering::Relaxed);
        let reads = reader.join().map_err(|_| "the reader panicked")??;
        use_registers(&edu)?;
        Ok(format!("{reads} reads meanwhile; registers and DMA work"))
    })?;
    report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
    Ok(())
}

/// A register keeps its value, and every read is answered. How many there were.
fn read_all_the_time(stopped: &AtomicBool) -> Result<u32> {
    let edu = Registers::take()?;
    let mut reads = 0;
    while !stopped.load(Ordering::Relaxed) {
        let read = edu.driver.read(register::LIVENESS);
        ensure!(read == !LEFT, "after {reads} reads, liveness of {LEFT:#x} reads {read:#x}");
        reads += 1;
        thread::sleep(Duration::from_millis(1));
    }
    Ok(reads)
}

/// A disk that hangs can't be shut down as usual: then the guest is off before this returns.
fn check_writes(
    report: &mut Report<impl Write>,
    name: &str,
    check: impl FnOnce() -> Result<String>,
) -> Result<()> {
    let mut hangs = false;
    report.check(name, || {
        let seen = check();
        hangs = seen.is_err();
        seen
    })?;
    if hangs {
        report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
        run(&["poweroff", "-n", "-f"])?;
    }
    Ok(())
}

/// Requests may wait while the bit is clear, but none fails and none is lost.
fn toggle_disk(nonce: &str) -> Result<String> {
    let function = Disk::find(DISK)?.function()?;
    let doorbells = Doorbells::of(&function)?;
    let area = area(nonce, "toggled")?;
    let writers = area.start(WRITERS, None)?;
    let toggles = Kills::begin("disk")?.during(|_| {
        goes_on(&writers)?;
        Bit::MemorySpace.toggle(&function, &doorbells)
    });
    let went_on = goes_on(&writers);
    // Why a writer has failed says more than that it has.
    let seen = stop(&area, writers)?;
    went_on.map_err(|error| format!("after the last toggle: {error}"))?;
    Ok(format!("{} toggles, {seen}", toggles?))
}

fn area(nonce: &str, of: &str) -> Result<Area> {
    let path = Disk::find(DISK)?.path();
    Ok(Area { path, direct: true, blocks: BLOCKS, tag: Area::tag(nonce, of) })
}

/// Writers complete more than what can have been in flight.
fn goes_on(writers: &Writers) -> Result<()> {
    let before = writers.writes();
    await_that(&format!("more than {before} writes"), PATIENCE, || {
        ensure!(!writers.have_ended(), "every writer has failed");
        Ok(writers.writes() > before + WRITERS)
    })
}

fn stop(area: &Area, writers: Writers) -> Result<String> {
    let writes = writers.writes();
    let ledger = writers.stop(PATIENCE)?;
    ensure!(ledger.failures.is_empty(), "{}", ledger.failures.join("; "));
    Ok(format!("{writes} writes, {}", area.verify(&ledger)?))
}
