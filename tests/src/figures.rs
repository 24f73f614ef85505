use std::fmt::Display;
use std::io::Write;

/// Shows a figure that the running test has found: with its output, and in the file that
/// `BARKEEP_FIGURES` names, which `tests/run` shows even when all is well.
///
/// # Panics
/// If that file can't be written.
#[expect(clippy::print_stdout, reason = "a test's output is shown with its name")]
pub fn figure(figure: &dyn Display) {
    let test = std::thread::current().name().unwrap_or("unknown test").to_owned();
    // In one piece: tests run side by side.
    let line = format!("{test}: {figure}\n");
    print!("{line}");
    if let Some(path) = std::env::var_os("BARKEEP_FIGURES") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("the list of figures is writable");
    }
}
