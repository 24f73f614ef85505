//! Disks and a file system of daemons that the guest knows nothing of, and that are killed and
//! started again while it writes.

use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use super::disk::{Disk, checksum, run};
use super::verified::{Area, Ledger, Writers};
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

/// The disks, told apart by their size in MiB.
const DISKS: [(&str, u64); 2] = [("qcow2", 64), ("nbd", 48)];
const BLOCKS: u64 = 8192;
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk's name and what was written to it.
type Written = (&'static str, Area, Ledger);

const SHARED: &str = "/tmp/shared";

/// Runs every check of this kind of guest. `restarts` is how often the daemon is killed.
///
/// # Errors
/// The report or the host can't be reached, or a disk hangs: then the guest is off before this
/// returns.
pub(crate) fn run_all(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    file_system(report, nonce)?;
    let mut written = Vec::new();
    report.check("storage-restarts", || {
        let (seen, ledgers) = restarts(nonce, rounds)?;
        written = ledgers;
        Ok(seen)
    })?;
    if written.is_empty() {
        run(&["poweroff", "-n", "-f"])?;
    }
    for (name, area, ledger) in &written {
        report.check(&format!("{name}-intact"), || area.verify(ledger))?;
    }
    for (name, mebibytes) in DISKS {
        report.check(&format!("{name}-checksum"), || {
            Ok(format!("sha256 {}", Disk::find(mebibytes)?.checksum()?))
        })?;
    }
    Ok(())
}

/// How many requests of a disk are in flight at once. The daemon does not keep a record of them, and QEMU's
/// own front end recovers one only.
fn writers() -> Result<u64> {
    Ok(env::var("lab_writers")?.parse()?)
}

/// Writers on every disk go on, whatever happens to the daemon.
fn restarts(nonce: &str, rounds: u32) -> Result<(String, Vec<Written>)> {
    let mut requests = Requests::open()?;
    let count = writers()?;
    let mut at_work = Vec::new();
    for (name, mebibytes) in DISKS {
        let path = Disk::find(mebibytes)?.path();
        let area = Area { path, direct: true, blocks: BLOCKS, tag: Area::tag(nonce, name) };
        let writers = area.start(count, None)?;
        at_work.push((name, area, writers));
    }
    for round in 0..=rounds {
        for (name, _, writers) in &at_work {
            goes_on(writers, count)
                .map_err(|error| format!("{name} after {round} restarts: {error}"))?;
        }
        if round < rounds {
            requests.ask_and_await("restart-storage")?;
        }
    }
    let (mut writes, mut written) = (0, Vec::new());
    for (name, area, writers) in at_work {
        writes += writers.writes();
        let ledger = writers.stop(PATIENCE).map_err(|error| format!("{name}: {error}"))?;
        ensure!(ledger.failures.is_empty(), "{name}: {}", ledger.failures.join("; "));
        written.push((name, area, ledger));
    }
    Ok((format!("{rounds} restarts, {writes} writes"), written))
}

fn goes_on(writers: &Writers, count: u64) -> Result<()> {
    let (before, deadline) = (writers.writes(), Instant::now() + PATIENCE);
    while writers.writes() <= before + (4 * count).max(64) {
        ensure!(!writers.have_ended(), "every writer has failed");
        ensure!(Instant::now() < deadline, "{} writes and then none", writers.writes());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Files that guest and host exchange.
fn file_system(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    let shared = Path::new(SHARED);
    report.check("fs-mount", || {
        fs::create_dir_all(shared)?;
        run(&["mount", "-t", "virtiofs", "lab", SHARED])?;
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mounted = mounts.lines().find(|line| line.contains(SHARED));
        Ok(mounted.ok_or("it is not mounted")?.to_owned())
    })?;
    report.check("fs-from-host", || {
        let is = fs::read(shared.join("from-host"))?;
        ensure!(is.len() == 4 << 20, "the host's file has {} bytes", is.len());
        let line = format!("host {nonce}\n");
        ensure!(is.iter().copied().eq(line.bytes().cycle().take(is.len())), "it is damaged");
        Ok(format!("{} bytes", is.len()))
    })?;
    report.check("fs-to-host", || {
        let line = format!("guest {nonce}\n");
        let bytes: Vec<u8> = line.bytes().cycle().take(4 << 20).collect();
        fs::create_dir(shared.join("folder"))?;
        fs::write(shared.join("folder/written"), bytes)?;
        fs::rename(shared.join("folder/written"), shared.join("folder/to-host"))?;
        fs::remove_file(shared.join("to-remove"))?;
        run(&["sync"])?;
        Ok("written, renamed; another removed".to_owned())
    })?;
    report.check("fs-checksum", || {
        let path = shared.join("verified");
        fs::File::create(&path)?;
        let area = Area { path, direct: false, blocks: 2048, tag: Area::tag(nonce, "verified") };
        let ledger = area.write(4, 128)?;
        run(&["umount", SHARED])?;
        run(&["mount", "-t", "virtiofs", "lab", SHARED])?;
        area.verify(&ledger)?;
        Ok(format!("sha256 {}", checksum(&area.path)?))
    })?;
    Ok(())
}
