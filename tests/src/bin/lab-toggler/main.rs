//! Toggles `PCI_COMMAND.MEM` of a function that vfio-pci drives for another process, behind that
//! process's back: `lab-toggler PID BDF COUNT`.
//!
//! It takes the vfio device's descriptor out of the running process, so that the writes are those
//! of the one user the kernel allows, and nothing in that process is asked or told. Decode is off
//! and on again COUNT times, and on at the end, whatever happens in between.
//!
//! `tests/lab/nested` runs it against a sidecar or a VMM. It prints how many toggles were done and
//! how long they took, in seconds.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::Instant;

use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// A failure is a sentence for the log; nobody handles its cause.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "usage: lab-toggler PID BDF COUNT";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [pid, address, count] = arguments.as_slice() else {
        return fatal(USAGE);
    };
    match run(pid, address, count) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fatal(&error.to_string()),
    }
}

fn run(pid: &str, address: &str, count: &str) -> Result<()> {
    let pid = pid.parse().ok().and_then(Pid::from_raw).ok_or("PID is not a process id")?;
    let count: u64 = count.parse().map_err(|error| format!("COUNT: {error}"))?;
    let function = Function::taken_from(pid, address)?;

    let started = Instant::now();
    let toggled = function.toggle(count);
    let seconds = started.elapsed().as_secs_f64();
    // A failure half-way must not leave the function off.
    function.set_decode(true)?;
    toggled?;
    writeln!(io::stdout(), "toggles {count} in {seconds:.3} s")?;
    Ok(())
}

/// A function in the hands of another process.
#[derive(Debug)]
struct Function {
    device: File,
}

/// Where vfio-pci has configuration space in a device's file: region index times 2^40.
const CONFIG: u64 = 7 << 40;
/// Offsets and bits of configuration space (PCI Express Base Specification, 7.5.1.1).
const IDS: u64 = 0x00;
const COMMAND: u64 = 0x04;
const MEMORY_SPACE: u16 = 1 << 1;

impl Function {
    /// Finds the function at `address` (such as `0000:00:02.0`) among the descriptors of a process.
    /// Functions of the same vendor and device id are not told apart.
    fn taken_from(pid: Pid, address: &str) -> Result<Self> {
        let wanted = {
            let path = format!("/sys/bus/pci/devices/{address}/config");
            let config = File::open(&path).map_err(|error| format!("{path}: {error}"))?;
            read_at::<4>(&config, IDS)?
        };
        let process = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|errno| format!("process {pid}: {}", io::Error::from(errno)))?;
        for number in vfio_descriptors(pid)? {
            let device = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
                Ok(device) => File::from(device),
                // The process has closed it since.
                Err(rustix::io::Errno::BADF) => continue,
                Err(errno) => {
                    let error = io::Error::from(errno);
                    return Err(format!("descriptor {number} of process {pid}: {error}").into());
                }
            };
            if read_at::<4>(&device, CONFIG + IDS)? == wanted {
                return Ok(Self { device });
            }
        }
        Err(format!("process {pid} has not opened {address}").into())
    }

    fn toggle(&self, count: u64) -> Result<()> {
        for _ in 0..count {
            self.set_decode(false)?;
            self.set_decode(true)?;
        }
        Ok(())
    }

    fn set_decode(&self, on: bool) -> Result<()> {
        let before = u16::from_le_bytes(read_at(&self.device, CONFIG + COMMAND)?);
        let after = if on { before | MEMORY_SPACE } else { before & !MEMORY_SPACE };
        self.device
            .write_all_at(&after.to_le_bytes(), CONFIG + COMMAND)
            .map_err(|error| format!("Command: {error}").into())
    }
}

/// The descriptors of a process that are vfio devices, however they were opened: by their group, or
/// as a character device of their own.
fn vfio_descriptors(pid: Pid) -> Result<Vec<ForeignRawFd>> {
    let directory = format!("/proc/{pid}/fd");
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).map_err(|error| format!("{directory}: {error}"))? {
        let entry = entry?;
        // One that was closed since has no target.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let is_device = target.as_os_str() == "anon_inode:[vfio-device]"
            || target.starts_with("/dev/vfio/devices");
        if let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && is_device
        {
            found.push(number);
        }
    }
    Ok(found)
}

fn read_at<const N: usize>(file: &File, offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, offset)
        .map_err(|error| format!("configuration space: {error}"))?;
    Ok(bytes)
}

#[expect(clippy::print_stderr, reason = "the guest's console is this program's error channel")]
fn fatal(why: &str) -> ExitCode {
    eprintln!("lab-toggler: {why}");
    ExitCode::FAILURE
}
