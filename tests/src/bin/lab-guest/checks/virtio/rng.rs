//! A source of entropy.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use super::disk::function_of;
use crate::report::Report;
use crate::{Result, ensure};

const CLASS: &str = "/sys/class/misc/hw_random";
/// virtio 1.2, 4.1.2.1.
const ENTROPY_DEVICE: u64 = 0x1044;

/// Runs every check of a source of entropy.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_all(report: &mut Report<impl Write>) -> Result<()> {
    report.check("rng-current", current)?;
    report.check("rng-reads", reads)?;
    Ok(())
}

/// The kernel takes entropy from it.
pub(crate) fn current() -> Result<String> {
    let available = attribute("rng_available")?;
    let name = available
        .split_whitespace()
        .find(|name| name.starts_with("virtio_rng"))
        .ok_or_else(|| format!("available are only: {available}"))?;
    fs::write(Path::new(CLASS).join("rng_current"), name)?;
    let current = attribute("rng_current")?;
    ensure!(current == name, "the current one is {current}");
    let mut found = false;
    for entry in fs::read_dir("/sys/bus/virtio/drivers/virtio_rng")? {
        let path = entry?.path();
        if path.join("features").exists() {
            let id = function_of(&path)?.hex_attribute("device")?;
            ensure!(id == ENTROPY_DEVICE, "device id {id:#x}");
            found = true;
        }
    }
    ensure!(found, "the driver has no device");
    Ok(current)
}

/// What is read differs each time.
pub(crate) fn reads() -> Result<String> {
    let mut source = File::open("/dev/hwrng")?;
    let mut seen: Vec<[u8; 256]> = Vec::new();
    for _ in 0..8 {
        let mut bytes = [0; 256];
        source.read_exact(&mut bytes)?;
        ensure!(!seen.contains(&bytes), "the same bytes twice");
        let mut values = [false; 256];
        for byte in bytes {
            values[usize::from(byte)] = true;
        }
        let different = values.into_iter().filter(|&seen| seen).count();
        // About 162 of 256 are expected; fewer than 100 do not happen by chance.
        ensure!(different > 100, "only {different} different values in 256 bytes");
        seen.push(bytes);
    }
    Ok(format!("{} reads of 256 bytes", seen.len()))
}

fn attribute(name: &str) -> Result<String> {
    Ok(fs::read_to_string(Path::new(CLASS).join(name))?.trim().to_owned())
}
