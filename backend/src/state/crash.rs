//! Crash points: everywhere that the memory or a socket changes, a process may be killed.
//!
//! In a release they are nothing. Tests of this crate have a plan that unwinds at the n-th one. With
//! the feature `failpoints` the process kills itself, so that what is found here is found with real
//! processes as well.

/// Between two steps of which each must leave a state to go on from.
#[inline]
pub(super) fn crash_point() {
    #[cfg(test)]
    plan::crash_point();
    #[cfg(feature = "failpoints")]
    process::crash_point();
}

/// How much of so many bytes is copied before the process may be killed.
#[inline]
pub(super) fn torn(length: usize) -> usize {
    if cfg!(any(test, feature = "failpoints")) { length.div_ceil(2) } else { length }
}

#[cfg(test)]
pub(crate) mod plan {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        static PASSED: Cell<u64> = const { Cell::new(0) };
        static LAST: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// The process was killed, in the words of a test.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Killed;

    pub(super) fn crash_point() {
        // What is dropped while it unwinds would not run in a process that is dead.
        if std::thread::panicking() {
            return;
        }
        PASSED.set(PASSED.get() + 1);
        if PASSED.get() == LAST.get() {
            resume_unwind(Box::new(Killed));
        }
    }

    /// Runs until the n-th crash point, the first one being 1, or to the end if there are fewer. In
    /// this thread only, and not within itself.
    pub(crate) fn killed_at<T>(point: u64, run: impl FnOnce() -> T) -> Result<T, Killed> {
        PASSED.set(0);
        LAST.set(point);
        let result = catch_unwind(AssertUnwindSafe(run));
        LAST.set(u64::MAX);
        result.map_err(|panic| match panic.downcast::<Killed>() {
            Ok(killed) => *killed,
            Err(panic) => resume_unwind(panic),
        })
    }

    /// How many crash points the last [`killed_at`] has passed.
    pub(crate) fn passed() -> u64 {
        PASSED.get()
    }
}

#[cfg(feature = "failpoints")]
pub(super) mod process {
    use std::env;
    use std::io::Write;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static PASSED: AtomicU64 = AtomicU64::new(0);

    /// `BARKEEP_FAILPOINTS` has a number for each incarnation, and none for the last, which lives.
    static LAST: LazyLock<u64> = LazyLock::new(|| {
        let incarnation = env::var("BARKEEP_INCARNATION").ok().and_then(|text| text.parse().ok());
        let points = env::var("BARKEEP_FAILPOINTS").unwrap_or_default();
        let point = points.split(',').nth(incarnation.unwrap_or(0));
        point.and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX)
    });

    pub(super) fn crash_point() {
        if PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *LAST {
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }

    /// Appends how many crash points this process has passed to `BARKEEP_FAILPOINT_LOG`, if there is
    /// such a file to be. For the end of a process.
    pub fn log_crash_points() {
        let Some(path) = env::var_os("BARKEEP_FAILPOINT_LOG") else { return };
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        let passed = PASSED.load(Ordering::Relaxed);
        let _ = file.and_then(|mut file| file.write_all(format!("{passed}\n").as_bytes()));
    }
}
