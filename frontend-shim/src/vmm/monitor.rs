//! Watches a running guest: tells how far it is, and notices when it stands still.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::guest::StatBlock;
use super::report::{self, Line, Progress};
use super::{Arguments, Program, STALL_LIMIT};
use crate::hypervisor::HostMapping;

const INTERVAL: Duration = Duration::from_millis(100);

pub(super) struct Monitor<'a> {
    ram: &'a HostMapping,
    total: u64,
    tell: bool,
    bell: mpsc::Sender<()>,
    ended: mpsc::Receiver<()>,
}

impl<'a> Monitor<'a> {
    pub(super) fn new(ram: &'a HostMapping, arguments: &Arguments) -> Self {
        let (bell, ended) = mpsc::channel();
        let tell = arguments.json && arguments.program == Program::Toggle;
        Self { ram, total: arguments.cycles, tell, bell, ended }
    }

    /// To be held by a vCPU until it ends.
    pub(super) fn bell(&self) -> mpsc::Sender<()> {
        self.bell.clone()
    }

    /// Returns when every vCPU has ended. A guest that makes no progress for [`STALL_LIMIT`] ends
    /// the process: its vCPU threads can't be stopped from outside.
    pub(super) fn watch(self) {
        let Self { ram, total, tell, bell, ended } = self;
        drop(bell);
        let mut seen = (u64::MAX, Instant::now());
        while ended.recv_timeout(INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
            let done = StatBlock::read(ram, 0).map_or(0, |block| block.progress);
            if tell {
                report::print_line(&Line::Progress(Progress { done, total }));
            }
            if done != seen.0 {
                seen = (done, Instant::now());
            } else if seen.1.elapsed() > STALL_LIMIT {
                report::say(&format!("the guest made no progress for {STALL_LIMIT:?}: it hangs"));
                std::process::exit(1);
            }
        }
    }
}
