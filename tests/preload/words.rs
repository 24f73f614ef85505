//! What the library says, and where.

use std::process::Command;

use crate::wrapped::{With, has_kvm, scenario, text};

/// A disk that got the number of standard error is no place for words.
#[test]
fn a_process_without_standard_error_hears_no_word_on_kvm() {
    if !has_kvm() {
        return;
    }
    let disk = tempfile::NamedTempFile::new().expect("a file");
    let path = disk.path().display().to_string();
    let vmm = scenario("no-standard-error", &[&path], With::Library);
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$0\" \"$@\" 2>&-"]).arg(vmm.get_program()).args(vmm.get_args());
    shell.envs(vmm.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = shell.env_remove("BARKEEP_PRELOAD_QUIET").output().expect("a shell");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(text(&output), "the disk: Ok(2)\n");
    assert_eq!(std::fs::read_to_string(disk.path()).expect("still there"), "");
}
