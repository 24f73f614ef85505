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
    if std::env::var_os("BARKEEP_BIN").is_none() {
        build(&["--package", "barkeep-backend", "--bin", "barkeep"]);
    }
}

/// The library that is preloaded, brought up to date with the tree; or the one that `BARKEEP_PRELOAD`
/// names.
///
/// # Panics
/// If it can't be built.
#[must_use]
pub fn preload_for_benchmark() -> PathBuf {
    if let Some(path) = std::env::var_os("BARKEEP_PRELOAD") {
        return path.into();
    }
    build(&["--package", "barkeep-preload", "--lib"]).join("libbarkeep_preload.so")
}

/// The library that lies beneath it when its cost is measured.
///
/// # Panics
/// If it can't be built.
#[must_use]
pub fn beneath_for_benchmark() -> PathBuf {
    let folder = build(&["--package", "barkeep-tests", "--example", "preload_beneath"]);
    folder.join("examples/libpreload_beneath.so")
}

/// Builds something as this benchmark was built. Returns the folder in which it is.
fn build(what: &[&str]) -> PathBuf {
    let program = std::env::current_exe().expect("a benchmark has a path");
    // target/PROFILE/deps/BENCH
    let folder = program.ancestors().nth(2).expect("benchmarks are in target/PROFILE/deps");
    let target = folder.parent().expect("a target folder");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--quiet"])
        .args(what)
        .arg("--target-dir")
        .arg(target)
        .status()
        .expect("cargo starts");
    assert!(status.success(), "{what:?} does not build");
    folder.to_owned()
}
