//! Kills at random instants, while something else goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use barkeep_tests::supervised::Supervised;

use crate::random::Random;
use crate::recovery::Recovery;

/// How many there are: `BARKEEP_CRASH_KILLS`, or 100.
pub(crate) fn number_of_kills() -> u64 {
    let given = std::env::var("BARKEEP_CRASH_KILLS").ok();
    given.map_or(100, |count| count.parse().expect("a number"))
}

/// How long a worker serves before it is killed: from its first success on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lives {
    /// For so long that its supervisor does not wait before it starts the next one.
    Settled,
    /// From nothing to 20 ms, short ones as frequently as long ones. Its supervisor waits longer and
    /// longer.
    Short,
}

/// Repeats `work` while another thread kills the worker of a function so many times. `progress` is
/// something that changes by nothing but the work of a worker.
pub(crate) fn while_killed<T: PartialEq>(
    run: &Supervised,
    function: usize,
    (kills, lives): (u64, Lives),
    random: &mut Random,
    progress: impl Fn() -> T + Sync,
    mut work: impl FnMut(),
) -> Recovery {
    let (enough, mut random) = (AtomicBool::new(false), random.fork());
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut recovery = Recovery::new();
            while recovery.kills() < kills && !enough.load(Ordering::Relaxed) {
                lives.pass(&mut random);
                recovery.add(kill(run, function, &progress));
            }
            recovery
        });
        // A failure of the work must end the other thread, too.
        let stop = Stop(&enough);
        while !killer.is_finished() {
            work();
        }
        drop(stop);
        killer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Lives {
    fn pass(self, random: &mut Random) {
        let (least, longest) = match self {
            Self::Settled => (25_000_000, 75_000_000),
            Self::Short => (0, (20_000_000 >> random.below(16)) + 1),
        };
        std::thread::sleep(Duration::from_nanos(least + random.below(longest - least)));
    }
}

/// Kills a worker; the time until there is progress that is not its own.
fn kill<T: PartialEq>(run: &Supervised, function: usize, progress: impl Fn() -> T) -> Duration {
    let worker = run.worker(function);
    let start = Instant::now();
    worker.kill();
    let before = progress();
    run.until("progress after a kill", || (progress() != before).then(|| start.elapsed()))
}
