//! What the kernel has to say about it: nothing.

use std::fs;

use super::super::virtio::disk::run;
use crate::{Result, ensure};

/// A task that waits this long for a request is reported by the kernel, in seconds.
const PATIENCE: &str = "40";

/// Parts of complaints, in lower case. Those about processors that stand still are not among them: a busy
/// host does that to emulated ones.
const COMPLAINTS: [&str; 11] = [
    "i/o error",
    "ext4-fs error",
    "ext4-fs warning",
    "aborting journal",
    "blocked for more than",
    "call trace",
    "bug:",
    "warning: cpu",
    "netdev watchdog",
    "nobody cared",
    "is not a head",
];

/// Has the kernel report tasks that hang, where it can.
pub(crate) fn look_for_hung_tasks() {
    // A kernel without the detector has no such file.
    let _ = fs::write("/proc/sys/kernel/hung_task_timeout_secs", PATIENCE);
}

/// No complaint but those that were `expected`.
///
/// # Errors
/// There is one, or the log can't be read.
pub(crate) fn is_quiet(expected: &[&str]) -> Result<String> {
    let log = run(&["dmesg"])?;
    for line in log.lines() {
        let lower = line.to_lowercase();
        let complains = |words: &[&str]| words.iter().any(|words| lower.contains(words));
        ensure!(!complains(&COMPLAINTS) || complains(expected), "{line}");
    }
    Ok(format!("{} lines", log.lines().count()))
}
