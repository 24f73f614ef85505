//! The binaries under test.

use std::path::PathBuf;

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
