//! A disk: what it is, a file system on it, and writes that are there when they are said to be.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

use super::disk::{Disk, run};
use super::verified::{Area, Ledger};
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

/// Sizes by which the disks are told apart, in MiB.
pub(crate) const DISK: u64 = 64;
const READ_ONLY: u64 = 8;
const GROWN: u64 = 80;
/// Device ids of virtio 1 are 0x1040 and the type (virtio 1.2, 4.1.2.1).
const BLOCK_DEVICE: u64 = 0x1042;

const MOUNT: &str = "/tmp/disk";

/// Runs every check of a disk. `rounds` scales the number of writes.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_all(report: &mut Report<impl Write>, nonce: &str, rounds: u64) -> Result<()> {
    report.check("blk-identity", identity)?;
    report.check("blk-serial", || serial(nonce))?;
    report.check("blk-write-cache", write_cache)?;
    report.check("blk-read-only", || read_only(nonce))?;
    report.check("blk-format", format_and_mount)?;
    let direct = file("direct", true, nonce);
    let buffered = file("buffered", false, nonce);
    let mut written = [None, None];
    report.check("blk-direct", || write(&direct, rounds, &mut written[0]))?;
    report.check("blk-buffered", || write(&buffered, rounds, &mut written[1]))?;
    report.check("blk-discard", discard)?;
    report.check("blk-remount", || remount([&direct, &buffered], &written))?;
    report.check("blk-checksum", || {
        run(&["umount", MOUNT])?;
        Ok(format!("sha256 {}", Disk::find(DISK)?.checksum()?))
    })?;
    Ok(())
}

/// The host makes the disk larger, which the driver learns from a change of the configuration.
///
/// # Errors
/// The report can't be written.
pub(crate) fn resize(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    report.check("blk-resize", || {
        Requests::open()?.ask_and_await("grow-disk")?;
        let path = Disk::find(GROWN)?.path();
        let area = Area { path, direct: true, blocks: GROWN << 8, tag: Area::tag(nonce, "grown") };
        let (first, last) = (DISK << 8, area.blocks - 1);
        area.write_one(first)?;
        area.write_one(last)?;
        Ok(format!("{GROWN} MiB, blocks {first} and {last} hold what was written"))
    })?;
    Ok(())
}

fn identity() -> Result<String> {
    let disk = Disk::find(DISK)?;
    let id = disk.function()?.hex_attribute("device")?;
    ensure!(id == BLOCK_DEVICE, "device id {id:#x}");
    for (name, expected) in [("ro", "0"), ("queue/logical_block_size", "512")] {
        let is = disk.attribute(name)?;
        ensure!(is == expected, "{name} is '{is}', not '{expected}'");
    }
    let queues = disk.queues()?;
    ensure!(queues == 2, "{queues} queues");
    Ok(format!("{DISK} MiB, {queues} queues"))
}

/// The driver sends a flush when it has to.
fn write_cache() -> Result<String> {
    let is = Disk::find(DISK)?.attribute("queue/write_cache")?;
    ensure!(is == "write back", "it is '{is}'");
    Ok(is)
}

/// The start of the nonce: a serial number has 20 bytes (virtio 1.2, 5.2.6).
fn serial(nonce: &str) -> Result<String> {
    let is = Disk::find(DISK)?.attribute("serial")?;
    let expected = nonce.get(..20).ok_or("the nonce is too short")?;
    ensure!(is == expected, "the serial is '{is}', not '{expected}'");
    Ok(is)
}

fn read_only(nonce: &str) -> Result<String> {
    let disk = Disk::find(READ_ONLY)?;
    for (name, expected) in [("ro", "1"), ("queue/logical_block_size", "4096")] {
        let is = disk.attribute(name)?;
        ensure!(is == expected, "{name} is '{is}', not '{expected}'");
    }
    let mut is = Vec::new();
    File::open(disk.path())?.read_to_end(&mut is)?;
    let line = format!("host {nonce}\n");
    let expected = line.bytes().cycle().take(is.len());
    ensure!(is.iter().copied().eq(expected), "it does not hold what the host put there");
    let opened = OpenOptions::new().write(true).open(disk.path());
    let Err(error) = opened.and_then(|mut file| file.write_all(&is[..4096]).and(file.sync_all()))
    else {
        return Err("it can be written".into());
    };
    Ok(format!("{} bytes; writing: {error}", is.len()))
}

fn format_and_mount() -> Result<String> {
    let disk = Disk::find(DISK)?;
    let path = disk.path();
    let path = path.to_str().ok_or("a path is not text")?;
    make_file_system(path)?;
    fs::create_dir_all(MOUNT)?;
    run(&["mount", "-t", "ext4", path, MOUNT])?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mounted = mounts.lines().find(|line| line.contains(MOUNT));
    Ok(mounted.ok_or("it is not mounted")?.to_owned())
}

/// Debian's program, with its own libraries beside it.
///
/// # Errors
/// It fails.
pub(crate) fn make_file_system(path: &str) -> Result<()> {
    run(&[
        "ld-linux-x86-64.so.2",
        "--library-path",
        "/bin",
        "/bin/mke2fs",
        "-q",
        "-t",
        "ext4",
        path,
    ])?;
    Ok(())
}

fn file(name: &str, direct: bool, nonce: &str) -> Area {
    Area { path: Path::new(MOUNT).join(name), direct, blocks: 3072, tag: Area::tag(nonce, name) }
}

fn write(area: &Area, rounds: u64, written: &mut Option<Ledger>) -> Result<String> {
    File::create(&area.path)?;
    let ledger = area.write(8, 64 * rounds)?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let seen = area.verify(&ledger)?;
    *written = Some(ledger);
    Ok(seen)
}

fn discard() -> Result<String> {
    let path = Path::new(MOUNT).join("removed");
    fs::write(&path, vec![0xa5; 8 << 20])?;
    run(&["sync"])?;
    fs::remove_file(&path)?;
    run(&["sync"])?;
    let said = run(&["fstrim", "-v", MOUNT])?;
    let bytes: u64 = said
        .split(|character: char| !character.is_ascii_digit())
        .find_map(|word| word.parse().ok())
        .ok_or("fstrim does not say how much")?;
    ensure!(bytes >= 8 << 20, "{bytes} bytes were trimmed");
    Ok(said.trim().to_owned())
}

fn remount(areas: [&Area; 2], written: &[Option<Ledger>; 2]) -> Result<String> {
    let path = Disk::find(DISK)?.path();
    run(&["umount", MOUNT])?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    run(&["mount", "-t", "ext4", path.to_str().ok_or("a path is not text")?, MOUNT])?;
    let mut seen = Vec::new();
    for (area, ledger) in areas.into_iter().zip(written) {
        seen.push(area.verify(ledger.as_ref().ok_or("nothing was written")?)?);
    }
    Ok(seen.join("; "))
}
