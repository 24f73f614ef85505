//! The life of memory slots under shuttle's schedulers: the real map, relax, suspend and revoke, with
//! a backend, a hypervisor and virtual CPUs in memory. `BARKEEP_MODEL_CHECK=100000` runs each test
//! with so many schedules, and other ones each time.
//!
//! A failure prints its schedule, and before it the number of the search in its test. To see it again
//! run that test alone, of the same code, with `BARKEEP_REPLAY=<number>:<schedule>`.

mod device;
mod hypervisor;
mod scenarios;
mod windows;
mod world;

use std::env;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, MaxSteps, Runner};

use crate::fault::FaultCounts;

/// How to look for a schedule that fails.
#[derive(Clone, Copy, Debug)]
enum Search {
    /// Any thread goes on at any point.
    Random,
    /// Few changes of thread, at points that are drawn (Burckhardt et al., 2010).
    Pct,
    /// The first so many of all schedules, depth first.
    First(usize),
    /// All schedules.
    All,
}

/// Of each search, without `BARKEEP_MODEL_CHECK`.
const ITERATIONS: usize = 200;
const PCT_DEPTH: usize = 3;
const SEED: u64 = 0x6261_726b_6565_7021;

/// Runs `body` under many schedules.
fn check(
    name: &str,
    search: Search,
    effort: usize,
    body: impl Fn() -> FaultCounts + Send + Sync + 'static,
) {
    static SEARCHES: AtomicUsize = AtomicUsize::new(0);
    let number = SEARCHES.fetch_add(1, Ordering::Relaxed).to_string();
    eprint!("{number}: {name}, {search:?}: ");
    let total = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&total);
    let _failure = Failure(Arc::clone(&total));
    let body = move || {
        let counts = body();
        seen.lock().unwrap().push(counts);
    };
    if let Ok(replay) = env::var("BARKEEP_REPLAY") {
        let (wanted, schedule) = replay.split_once(':').unwrap();
        if wanted == number {
            shuttle::replay(body, schedule);
        }
        return;
    }
    let long = env::var("BARKEEP_MODEL_CHECK").ok().map(|text| text.parse().unwrap());
    let iterations = long.unwrap_or(ITERATIONS).div_ceil(effort);
    let executions = match (search, long) {
        (Search::Random, None) => run(RandomScheduler::new_from_seed(SEED, iterations), body),
        (Search::Random, Some(_)) => run(RandomScheduler::new(iterations), body),
        (Search::Pct, None) => run(PctScheduler::new_from_seed(SEED, PCT_DEPTH, iterations), body),
        (Search::Pct, Some(_)) => run(PctScheduler::new(PCT_DEPTH, iterations), body),
        (Search::First(most), long) => {
            run(DfsScheduler::new(Some(most.max(long.unwrap_or(0))), false), body)
        }
        (Search::All, _) => run(DfsScheduler::new(None, false), body),
    };
    let counts = total.lock().unwrap();
    let sum = |of: fn(&FaultCounts) -> u64| counts.iter().map(of).sum::<u64>();
    eprintln!(
        "{executions} executions; memory faults: {} UR, {} map, {} relax, {} \
         retry, {} not mine",
        sum(|counts| counts.unsupported_request),
        sum(|counts| counts.map),
        sum(|counts| counts.relax),
        sum(|counts| counts.retry),
        sum(|counts| counts.not_mine),
    );
}

/// Tells how much it took to fail.
struct Failure(Arc<Mutex<Vec<FaultCounts>>>);

impl Drop for Failure {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let passed = self.0.lock().unwrap_or_else(PoisonError::into_inner).len();
            eprintln!("\nfails in execution {}", passed + 1);
        }
    }
}

fn run(scheduler: impl Scheduler + 'static, body: impl Fn() + Send + Sync + 'static) -> usize {
    let mut config = Config::new();
    // Nothing here waits for anything but a lock: more steps are a thread that spins.
    config.max_steps = MaxSteps::FailAfter(1_000_000);
    config.silence_warnings = true;
    config.stack_size = 0x2_0000;
    Runner::new(scheduler, config).run(body)
}
