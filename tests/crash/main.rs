//! `barkeep run` whose workers are killed at every instant: nothing that was acknowledged is lost,
//! nothing is done twice, and nobody waits for ever.
//!
//! What is random comes from a seed that is printed; `BARKEEP_CRASH_SEED` sets it. The number of
//! random kills is `BARKEEP_CRASH_KILLS` (100), and `BARKEEP_CRASH_POINTS=all` kills at every point of
//! failure rather than at some of each session.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a panic in a test is a failed test, and figures are shown with its name"
)]

mod blk;
mod failpoints;
mod full;
mod guest;
mod hopeless;
mod kills;
mod page;
mod random;
mod recovery;
mod script;
mod scripts;
mod sessions;
mod supervisor;
