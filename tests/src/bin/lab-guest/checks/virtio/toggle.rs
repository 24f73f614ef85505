//! A disk that loses Memory Space Enable or Bus Master Enable, and then its driver, while as many
//! requests are in flight as it takes.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use super::blk::DISK;
use super::disk::{Disk, run};
use super::verified::{Area, Writers};
use crate::mmio::Mapping;
use crate::pci::command::{BUS_MASTER, MEMORY_SPACE};
use crate::pci::{Capability, Function};
use crate::report::Report;
use crate::{Result, ensure};

/// As many as there are entries in the queues of the lab's disk.
const WRITERS: u64 = 32;
const BLOCKS: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

/// What is switched off.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bit {
    MemorySpace,
    BusMaster,
}

/// Runs every check of this kind of guest.
///
/// # Errors
/// The report can't be written, or the disk hangs: then the guest can't be shut down as usual and is
/// off before this returns.
pub(crate) fn run_all(
    report: &mut Report<impl Write>,
    nonce: &str,
    bit: Bit,
    rounds: u32,
) -> Result<()> {
    let mut hangs = false;
    report.check("toggle-writes", || {
        let seen = toggled(nonce, bit, rounds);
        hangs = seen.is_err();
        seen
    })?;
    if hangs {
        return power_off();
    }
    let mut written = None;
    report.check("rebind", || {
        let area = area("rebind", nonce)?;
        let (seen, ledger) = rebind(&area, bit)?;
        written = Some((area, ledger));
        Ok(seen)
    })?;
    let Some((area, ledger)) = written else { return power_off() };
    report.check("rebind-intact", || area.verify(&ledger))?;
    report.check("rebind-works", || {
        let area = self::area("again", nonce)?;
        area.verify(&area.write(8, 64)?)
    })?;
    Ok(())
}

/// A process with a request that never completes can't end, and a file system can't be synced.
fn power_off() -> Result<()> {
    run(&["poweroff", "-n", "-f"])?;
    Ok(())
}

fn area(of: &str, nonce: &str) -> Result<Area> {
    let path = Disk::find(DISK)?.path();
    Ok(Area { path, direct: true, blocks: BLOCKS, tag: Area::tag(nonce, of) })
}

/// Requests may wait while the bit is clear, but none fails and none is lost.
fn toggled(nonce: &str, bit: Bit, rounds: u32) -> Result<String> {
    let function = Disk::find(DISK)?.function()?;
    let doorbells = Doorbells::of(&function)?;
    let area = area("toggled", nonce)?;
    let writers = area.start(WRITERS, None)?;
    for round in 0..rounds {
        goes_on(&writers).map_err(|error| format!("before toggle {round}: {error}"))?;
        bit.toggle(&function, &doorbells)?;
    }
    goes_on(&writers).map_err(|error| format!("after the last toggle: {error}"))?;
    let writes = writers.writes();
    let ledger = writers.stop(PATIENCE)?;
    ensure!(ledger.failures.is_empty(), "{}", ledger.failures.join("; "));
    Ok(format!("{rounds} toggles, {writes} writes, {}", area.verify(&ledger)?))
}

/// Takes the disk from its driver and gives it back, with writers at work.
fn rebind(area: &Area, bit: Bit) -> Result<(String, super::verified::Ledger)> {
    let function = Disk::find(DISK)?.function()?;
    let doorbells = Doorbells::of(&function)?;
    let writers = area.start(WRITERS, None)?;
    // Long enough for each to sync now and then.
    for _ in 0..8 {
        goes_on(&writers)?;
    }
    bit.toggle(&function, &doorbells)?;
    goes_on(&writers)?;
    drop(doorbells);
    function.unbind()?;
    // With the disk gone, each of them fails.
    let ledger = writers.stop(PATIENCE)?;
    function.bind("virtio-pci")?;
    Disk::find(DISK)?;
    Ok((format!("{} writers failed meanwhile", ledger.failures.len()), ledger))
}

/// Writers complete more than what can have been in flight.
fn goes_on(writers: &Writers) -> Result<()> {
    let (before, deadline) = (writers.writes(), Instant::now() + PATIENCE);
    while writers.writes() <= before + WRITERS {
        ensure!(!writers.have_ended(), "every writer has failed");
        ensure!(
            Instant::now() < deadline,
            "{} writes and then none for {PATIENCE:?}",
            writers.writes()
        );
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

impl Bit {
    /// Clears it for a moment, under load.
    pub(crate) fn toggle(self, function: &Function, doorbells: &Doorbells) -> Result<()> {
        let bit = match self {
            Self::MemorySpace => MEMORY_SPACE,
            Self::BusMaster => BUS_MASTER,
        };
        function.set_command(bit, false)?;
        // The writers run into it.
        thread::sleep(Duration::from_millis(10));
        function.set_command(bit, true)?;
        doorbells.ring();
        Ok(())
    }
}

/// Where the driver notifies the device (virtio 1.2, 4.1.4.4). A notification that is written while
/// memory space is off is lost, as it is with any device, and no driver repeats it; so the one who
/// switched memory off does.
pub(crate) struct Doorbells {
    bar: Mapping,
    first: usize,
    distance: usize,
    queues: usize,
}

impl Doorbells {
    pub(crate) fn of(function: &Function) -> Result<Self> {
        const NOTIFY: u8 = 2;
        for at in function.capabilities(Capability::Vendor)? {
            if function.read_u8(at + 3)? == NOTIFY {
                let bar = usize::from(function.read_u8(at + 4)?);
                return Ok(Self {
                    bar: function.map_bar(bar)?,
                    first: usize::try_from(function.read_u32(at + 8)?)?,
                    distance: usize::try_from(function.read_u32(at + 16)?)?,
                    queues: Disk::find(DISK)?.queues()?,
                });
            }
        }
        Err("the function has no notification capability".into())
    }

    fn ring(&self) {
        for (queue, number) in (0..self.queues).zip(0_u16..) {
            self.bar.write(self.first + queue * self.distance, number);
        }
    }
}
