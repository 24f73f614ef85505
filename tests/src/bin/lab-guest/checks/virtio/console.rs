//! A console: whoever is at its other end is asked for lines and told what arrived.

use std::fs::OpenOptions;
use std::io::Write;

use super::disk::{function_of, run};
use crate::console_peer;
use crate::report::Report;
use crate::{Result, ensure};

const DEVICE: &str = "/dev/hvc0";
/// virtio 1.2, 4.1.2.1.
const CONSOLE_DEVICE: u64 = 0x1043;

/// Runs every check of a console.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_all(report: &mut Report<impl Write>) -> Result<()> {
    report.check("console-identity", identity)?;
    report.check("console-exchange", exchange)?;
    Ok(())
}

/// Prompts whoever is at the other end, and says what arrives.
pub(crate) fn exchange() -> Result<String> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|error| format!("{DEVICE}: {error}"))?;
    // As a program that is not a terminal; a read gives up after 20 s. Nobody else may be the last to
    // close it, which sets it back.
    run(&["stty", "-F", DEVICE, "raw", "-echo", "min", "0", "time", "200"])?;
    let bytes = console_peer::ask(&port)?;
    Ok(format!("{} lines, {bytes} bytes", console_peer::LINES))
}

fn identity() -> Result<String> {
    let driver = std::path::Path::new("/sys/bus/virtio/drivers/virtio_console");
    for entry in std::fs::read_dir(driver)? {
        let path = entry?.path();
        if path.join("features").exists() {
            let id = function_of(&path)?.hex_attribute("device")?;
            ensure!(id == CONSOLE_DEVICE, "device id {id:#x}");
            return Ok(path.display().to_string());
        }
    }
    Err("the driver has no device".into())
}
