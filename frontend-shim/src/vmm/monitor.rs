//! Watches a running guest: tells how far it is, and notices when it stands still.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::guest::StatBlock;
use super::report::{self, Line, Progress};
use super::{Arguments, Program, STALL_LIMIT};
use crate::Frontend;
use crate::client::DeadBackend;
use crate::hypervisor::HostMapping;

const INTERVAL: Duration = Duration::from_millis(100);

pub(super) struct Monitor<'a> {
    ram: &'a HostMapping,
    frontend: &'a Frontend,
    vcpus: u32,
    total: u64,
    tell: bool,
    stall_limit: Duration,
    bell: mpsc::Sender<()>,
    ended: mpsc::Receiver<()>,
}

impl<'a> Monitor<'a> {
    pub(super) fn new(ram: &'a HostMapping, frontend: &'a Frontend, arguments: &Arguments) -> Self {
        let (bell, ended) = mpsc::channel();
        let (total, tells) = match arguments.program {
            Program::Toggle => (arguments.cycles, true),
            Program::Recover => (0, true),
            _ => (0, false),
        };
        let stall_limit = match arguments.dead_backend {
            DeadBackend::UnsupportedRequest => STALL_LIMIT,
            DeadBackend::Stall(limit) => STALL_LIMIT + limit,
        };
        let (vcpus, tell) = (arguments.vcpus, tells && arguments.json);
        Self { ram, frontend, vcpus, total, tell, stall_limit, bell, ended }
    }

    /// To be held by a vCPU until it ends.
    pub(super) fn bell(&self) -> mpsc::Sender<()> {
        self.bell.clone()
    }

    /// Returns when every vCPU has ended. A guest that makes no progress for [`STALL_LIMIT`], beyond
    /// what accesses may wait for a backend, ends the process: its vCPU threads can't be stopped from
    /// outside.
    pub(super) fn watch(self) {
        let Self { ram, frontend, vcpus, total, tell, stall_limit, bell, ended } = self;
        drop(bell);
        let mut seen = (u64::MAX, Instant::now());
        while ended.recv_timeout(INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
            let done = StatBlock::read(ram, 0).map_or(0, |block| block.progress);
            if tell {
                let progress = Progress { done, total, ..Progress::read(ram, vcpus, frontend) };
                report::print_line(&Line::Progress(progress));
            }
            if done != seen.0 {
                seen = (done, Instant::now());
            } else if seen.1.elapsed() > stall_limit {
                report::say(&format!("the guest made no progress for {stall_limit:?}: it hangs"));
                std::process::exit(1);
            }
        }
    }
}
