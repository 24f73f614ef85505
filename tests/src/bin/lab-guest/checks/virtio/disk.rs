//! A disk of the guest, as Linux shows it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::pci::Function;
use crate::{Result, ensure};

const SECTOR: u64 = 512;

/// A disk, found by its size.
#[derive(Debug)]
pub(crate) struct Disk {
    name: String,
}

impl Disk {
    /// Finds the disk of `mebibytes`, which may take a moment to appear.
    ///
    /// # Errors
    /// It does not.
    pub(crate) fn find(mebibytes: u64) -> Result<Self> {
        let sectors = (mebibytes << 20) / SECTOR;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let disks = names_in(Path::new("/sys/block"))?;
            for name in &disks {
                let size = fs::read_to_string(format!("/sys/block/{name}/size"));
                if size.is_ok_and(|size| size.trim() == sectors.to_string()) {
                    return Ok(Self { name: name.clone() });
                }
            }
            ensure!(
                Instant::now() < deadline,
                "no disk of {mebibytes} MiB, only {}",
                disks.join(" ")
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its device node.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// An attribute in sysfs.
    pub(crate) fn attribute(&self, name: &str) -> Result<String> {
        let path = format!("/sys/block/{}/{name}", self.name);
        let value = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        Ok(value.trim().to_owned())
    }

    /// How many queues the driver uses.
    pub(crate) fn queues(&self) -> Result<usize> {
        Ok(names_in(&Path::new("/sys/block").join(&self.name).join("mq"))?.len())
    }

    /// The function that it is on.
    pub(crate) fn function(&self) -> Result<Function> {
        function_of(&Path::new("/sys/block").join(&self.name).join("device"))
    }

    /// SHA-256 of the whole disk, as it is and not as the page cache has it.
    pub(crate) fn checksum(&self) -> Result<String> {
        run(&["sync"])?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        checksum(&self.path())
    }
}

/// The PCI function of a virtio device's directory in sysfs.
pub(crate) fn function_of(virtio: &Path) -> Result<Function> {
    let device =
        fs::canonicalize(virtio).map_err(|error| format!("{}: {error}", virtio.display()))?;
    let function = device.parent().ok_or("a virtio device without a parent")?;
    Function::at(function.to_owned())
}

/// SHA-256 of a file.
pub(crate) fn checksum(path: &Path) -> Result<String> {
    let path = path.to_str().ok_or("a path is not text")?;
    let output = run(&["sha256sum", path])?;
    Ok(output.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Runs a program to its end; what it printed.
///
/// # Errors
/// It failed; its last words.
pub(crate) fn run(command: &[&str]) -> Result<String> {
    let [program, arguments @ ..] = command else {
        return Err("no program to run".into());
    };
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "`{}` ended with {}: {}",
        command.join(" "),
        output.status,
        said.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    fs::read_dir(directory)
        .map_err(|error| format!("{}: {error}", directory.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}
