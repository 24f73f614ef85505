//! A file system on a disk, files that are copied to it, and what is there afterwards.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::virtio::blk::{DISK, make_file_system};
use super::super::virtio::disk::{Disk, run};
use super::super::virtio::verified::{Area, Writers};
use super::kernel;
use super::kills::Kills;
use super::tree::Tree;
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

/// The disk beside it, in MiB.
const BESIDE: u64 = 48;
const PATIENCE: Duration = Duration::from_secs(30);

const SOURCE: &str = "/tmp/tree";
const MOUNT: &str = "/tmp/disk";

/// While the disk's workers are killed.
pub(super) fn run_killed(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    kernel::look_for_hung_tasks();
    let tree = Tree::make(Path::new(SOURCE), nonce)?;
    let beside = beside(nonce)?;
    let writers = beside.start(4, None)?;
    let mut kills = Kills::begin("disk")?;
    report.check("copy-format", format_and_mount)?;
    let mut copies = Copies::default();
    report.check("copy-files", || {
        while kills.go_on()? {
            copies.make(&tree)?;
        }
        copies.make(&tree)?;
        Ok(format!("{} copies", copies.made))
    })?;
    report.check("copy-remount", || copies.remount(&tree))?;
    report.check("copy-checksum", checksum)?;
    report.check("beside-writes", || stop(&beside, writers))?;
    report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
    Ok(())
}

/// While the program is replaced.
pub(super) fn run_upgraded(
    report: &mut Report<impl Write>,
    nonce: &str,
    rounds: u32,
) -> Result<()> {
    kernel::look_for_hung_tasks();
    let tree = Tree::make(Path::new(SOURCE), nonce)?;
    let beside = beside(nonce)?;
    let writers = beside.start(4, None)?;
    let mut requests = Requests::open()?;
    let mut copies = Copies::default();
    format_and_mount()?;
    report.check("upgrade-copy", || {
        copies.make(&tree)?;
        for round in 0..rounds {
            // The writers beside it are at work then, too.
            requests
                .ask_and_await("upgrade")
                .map_err(|error| format!("upgrade {round}: {error}"))?;
            copies.make(&tree).map_err(|error| format!("after upgrade {round}: {error}"))?;
        }
        Ok(format!("{rounds} upgrades, {} copies", copies.made))
    })?;
    report.check("copy-remount", || copies.remount(&tree))?;
    report.check("copy-checksum", checksum)?;
    report.check("beside-writes", || stop(&beside, writers))?;
    report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
    Ok(())
}

fn beside(nonce: &str) -> Result<Area> {
    let path = Disk::find(BESIDE)?.path();
    Ok(Area { path, direct: true, blocks: BESIDE << 8, tag: Area::tag(nonce, "beside") })
}

fn stop(area: &Area, writers: Writers) -> Result<String> {
    let writes = writers.writes();
    let ledger = writers.stop(PATIENCE)?;
    ensure!(ledger.failures.is_empty(), "{}", ledger.failures.join("; "));
    Ok(format!("{writes} writes, {}", area.verify(&ledger)?))
}

fn format_and_mount() -> Result<String> {
    let path = Disk::find(DISK)?.path();
    make_file_system(path.to_str().ok_or("a path is not text")?)?;
    fs::create_dir_all(MOUNT)?;
    mount()?;
    Ok("ext4".to_owned())
}

fn mount() -> Result<()> {
    let path = Disk::find(DISK)?.path();
    run(&["mount", "-t", "ext4", path.to_str().ok_or("a path is not text")?, MOUNT])?;
    Ok(())
}

fn checksum() -> Result<String> {
    run(&["umount", MOUNT])?;
    Ok(format!("sha256 {}", Disk::find(DISK)?.checksum()?))
}

/// Copies of the tree, of which the disk holds the last.
#[derive(Debug, Default)]
struct Copies {
    made: u32,
}

impl Copies {
    /// Makes one more and compares it as the disk has it.
    fn make(&mut self, tree: &Tree) -> Result<()> {
        let (last, next) = (self.last(), Path::new(MOUNT).join(format!("copy {}", self.made + 1)));
        run(&["cp", "-a", SOURCE, next.to_str().ok_or("a path is not text")?])?;
        self.made += 1;
        run(&["sync"])?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        tree.compare(&next).map_err(|error| format!("copy {}: {error}", self.made))?;
        if self.made > 1 {
            fs::remove_dir_all(last)?;
        }
        Ok(())
    }

    fn last(&self) -> PathBuf {
        Path::new(MOUNT).join(format!("copy {}", self.made))
    }

    fn remount(&self, tree: &Tree) -> Result<String> {
        run(&["umount", MOUNT])?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        mount()?;
        tree.compare(&self.last())
    }
}
