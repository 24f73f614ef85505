//! What happened so far: counters in a page that others can read, and one line for each first time.
//!
//! All of it is safe in a signal handler, but for the beginning of a page.

mod fail_open;
mod line;
mod memory;
#[cfg(test)]
mod tests;

use barkeep_protocol::page::wrap::Page;
use rustix::io::Errno;
use rustix::process::getpid;

pub(crate) use barkeep_protocol::page::wrap::Count;
pub(crate) use fail_open::FailOpen;

use line::Line;
use memory::Memory;

/// Counters and log of a process.
#[derive(Debug)]
pub(crate) struct Status {
    page: Page<Memory>,
    quiet: bool,
}

impl Status {
    /// A page that other processes can find. Where the kernel refuses one, only this process has it.
    pub(crate) fn shared(quiet: bool) -> Result<Self, Errno> {
        Ok(Self::on(Memory::shared()?, quiet))
    }

    /// A page of this process's own.
    pub(crate) fn private(quiet: bool) -> Self {
        Self::on(Memory::private(), quiet)
    }

    fn on(memory: Memory, quiet: bool) -> Self {
        let page = Page::new(memory).expect("memory has the length of a page");
        page.publish(pid(), env!("CARGO_PKG_VERSION"), FailOpen::ALL.map(FailOpen::text));
        Self { page, quiet }
    }

    pub(crate) fn count(&self, count: Count) {
        self.page.add(count, 1);
    }

    pub(crate) fn get(&self, count: Count) -> u64 {
        self.page.count(count)
    }

    /// Counts something that is left to the VMM, and says so the first time that it happens.
    pub(crate) fn fail_open(&self, why: FailOpen) {
        if self.page.leave(why as usize) {
            self.say(Line::new().text(why.text()).text(" (goes on as without barkeep)"));
        }
    }

    /// A VM was made.
    pub(crate) fn vm_made(&self) {
        self.page.vm_made();
    }

    /// A VM is gone.
    pub(crate) fn vm_gone(&self) {
        self.page.vm_gone();
    }

    /// Tells of a device: by the number of its `DeviceId`, and a name such as `vfio 0000:03:00.0`.
    pub(crate) fn device_came(&self, device: u32, name: &str) {
        self.page.device_came(device as usize, name);
    }

    /// A device is gone.
    pub(crate) fn device_went(&self, device: u32) {
        self.page.device_went(device as usize);
    }

    /// In a process that was just forked: a page of its own, since the parent's is the parent's.
    pub(crate) fn forked(&self) {
        self.page.words().separate();
        self.page.forked(pid());
    }

    /// Says in one line what was done, if this process ever had a VM.
    #[cfg_attr(test, expect(dead_code, reason = "the library's end is no part of its tests"))]
    pub(crate) fn say_summary(&self) {
        if let Some(line) = self.summary() {
            self.say(line);
        }
    }

    fn summary(&self) -> Option<Line> {
        let vms = self.page.vms_ever();
        let vms = match vms {
            0 => return None,
            1 => Line::new().text("1 VM"),
            _ => Line::new().number(vms).text(" VMs"),
        };
        let count = |line: Line, count: Count| {
            line.text(", ").number(self.get(count)).text(" ").text(count.text())
        };
        Some(Count::ALL.into_iter().fold(vms, count))
    }

    fn say(&self, line: Line) {
        if !self.quiet {
            line.write();
        }
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::private(false)
    }
}

fn pid() -> u32 {
    getpid().as_raw_nonzero().get().unsigned_abs()
}
