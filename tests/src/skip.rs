use std::fmt::Display;
use std::io::Write;

/// Says that the running test can't run here, and why.
///
/// A skipped test returns early and counts as passed for the test runner, so the reason also goes to
/// the file that `BARKEEP_SKIPPED` names: `tests/run` takes it off the passed ones and shows it.
///
/// # Panics
/// If that file can't be written: a skip must never be counted as a pass.
#[expect(clippy::print_stdout, reason = "a test's output is shown with its name")]
pub fn skip(reason: &dyn Display) {
    let test = std::thread::current().name().unwrap_or("unknown test").to_owned();
    // In one piece: tests run side by side.
    let line = format!("skipped {test}: {reason}\n");
    print!("{line}");
    if let Some(path) = std::env::var_os("BARKEEP_SKIPPED") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("the list of skipped tests is writable");
    }
}
