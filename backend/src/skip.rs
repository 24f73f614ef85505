use std::fmt::Display;
use std::io::Write;

/// Says that the running test can't run here, and why. The test counts as passed for its runner, so
/// the reason also goes to the list that `tests/run` keeps, in one piece: tests run side by side.
pub(crate) fn skip(reason: impl Display) {
    let test = std::thread::current().name().unwrap_or("unknown test").to_owned();
    let line = format!("skipped {test}: {reason}\n");
    print!("{line}");
    if let Some(path) = std::env::var_os("BARKEEP_SKIPPED") {
        let list = std::fs::File::options().append(true).create(true).open(path);
        list.and_then(|mut list| list.write_all(line.as_bytes())).expect("a list of skipped tests");
    }
}
