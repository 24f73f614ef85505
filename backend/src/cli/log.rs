//! Logs on standard error, which may be full, closed, or a pipe that nobody reads. None of that is a
//! reason to stop serving: lines are lost instead.

use std::io::{self, IsTerminal, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines that wait to be written; further ones are lost.
const WAITING_LINES: usize = 1024;
/// How long a reader may let a line wait; less than the guard waits at the end of the process.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
const NO_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Starts logging. Lines are written by a thread of their own, and what waits is written when the
/// guard is dropped.
pub(crate) fn start(filter: EnvFilter) -> WorkerGuard {
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(WAITING_LINES)
        .thread_name("log")
        .finish(StandardError::default());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal())
        // It would report a failed write to standard error, and panic when that fails as well.
        .log_internal_errors(false)
        .init();
    guard
}

/// Writes one line to standard error, for what is said before logging starts or beside it. Whether
/// anybody can read it changes nothing.
pub(crate) fn say(line: &str) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Standard error, whose reader is waited for once and not again before it reads: the thread must
/// get to the end of its queue, or dropping the guard would complain on standard output.
#[derive(Debug, Default)]
struct StandardError {
    reader_is_gone: bool,
}

impl StandardError {
    fn takes_a_line(&self) -> bool {
        let patience = if self.reader_is_gone { NO_TIME } else { PATIENCE };
        let stderr = io::stderr();
        // An error, as of a closed pipe, is the write's to report.
        poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience)) != Ok(0)
    }
}

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.reader_is_gone = !self.takes_a_line();
        if self.reader_is_gone { Ok(line.len()) } else { io::stderr().write(line) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
