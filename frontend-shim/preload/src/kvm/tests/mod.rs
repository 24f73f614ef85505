#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic in a test is a failed test")]

mod kernel;
mod lifetime;
mod run;
mod slots;
mod world;
