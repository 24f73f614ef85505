//! The binaries under test.

use std::path::PathBuf;
use std::process::Command;

/// The built `barkeep`: `BARKEEP_BIN`, else the one of the profile that this test was built with.
///
/// # Panics
/// If it has not been built.
#[must_use]
pub fn barkeep() -> PathBuf {
    if let Some(path) = std::env::var_os("BARKEEP_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a test has a path");
    // target/PROFILE/deps/TEST
    let path = test.ancestors().nth(2).expect("tests are in target/PROFILE/deps").join("barkeep");
    assert!(path.exists(), "{} is missing: cargo build --bin barkeep", path.display());
    path
}

/// The library that is preloaded into a VMM: `BARKEEP_PRELOAD`, else the one of the profile that this
/// test was built with.
///
/// # Panics
/// If it has not been built.
#[must_use]
pub fn preload() -> PathBuf {
    if let Some(path) = std::env::var_os("BARKEEP_PRELOAD") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.ancestors().nth(2).expect("tests are in target/PROFILE/deps");
    let path = folder.join("libbarkeep_preload.so");
    assert!(path.exists(), "{} is missing: cargo build -p barkeep-preload", path.display());
    path
}

/// The `barkeep` that was built with its points of failure: `BARKEEP_FAILPOINTS_BIN`. `tests/run`
/// builds one.
#[must_use]
pub fn with_failpoints() -> Option<PathBuf> {
    std::env::var_os("BARKEEP_FAILPOINTS_BIN").map(PathBuf::from)
}

/// Brings `barkeep` up to date with the tree, next to this benchmark; not if `BARKEEP_BIN` names one.
///
/// # Panics
/// If it can't be built.
pub fn build_for_benchmark() {
    if std::env::var_os("BARKEEP_BIN").is_some() {
        return;
    }
    let program = std::env::current_exe().expect("a benchmark has a path");
    // target/PROFILE/deps/BENCH
    let target = program.ancestors().nth(3).expect("benchmarks are in target/PROFILE/deps");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--package", "barkeep-backend", "--bin", "barkeep"])
        .arg("--target-dir")
        .arg(target)
        .status()
        .expect("cargo starts");
    assert!(status.success(), "barkeep does not build");
}
