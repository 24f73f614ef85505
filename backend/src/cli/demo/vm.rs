use std::io::{BufRead, BufReader, IsTerminal};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use barkeep_shim::vmm::{Line, Progress, Report};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Arguments;
use super::sidecar::{myself, terminate};

/// Runs the VMM in a process of its own, until its end or that of the demo. Returns its report, and
/// whether the VM was alive in the end; a VMM that died has no report.
pub(super) fn run(
    arguments: &Arguments,
    sockets: &[&Path],
    interrupted: &AtomicBool,
) -> Result<(Option<Report>, bool), String> {
    let mut vmm = start(arguments, sockets)?;
    let stdout = vmm.stdout.take().expect("stdout is piped");
    let bar = progress_bar(arguments);
    let mut report = None;
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        // The VMM tells its progress several times a second. A terminal has interrupted it as well;
        // whoever meant this process alone has not.
        if interrupted.load(Ordering::Relaxed) {
            terminate(&vmm);
        }
        match serde_json::from_str(&line) {
            Ok(Line::Progress(Progress { done, .. })) => bar.set_position(done),
            Ok(Line::Report(last)) => report = Some(*last),
            Err(failure) => tracing::warn!("the VMM says {line:?}: {failure}"),
        }
    }
    bar.finish_and_clear();
    let status = vmm.wait().map_err(|failure| format!("VMM: {failure}"))?;
    match status.code() {
        // It did not start, and has said why.
        Some(2) => Err("the VMM did not start".into()),
        // 1 is a violation that the report tells about.
        Some(0 | 1) => Ok((report, true)),
        _ if interrupted.load(Ordering::Relaxed) => Ok((report, false)),
        _ => {
            tracing::error!("the VMM died: {status}");
            Ok((report, false))
        }
    }
}

fn start(arguments: &Arguments, sockets: &[&Path]) -> Result<Child, String> {
    let mut command = myself()?;
    command.args(["--log", "warn", "vmm", "--json", "--program", "toggle"]);
    command.args(["--cycles", &arguments.cycles.to_string()]);
    command.args(["--vcpus", &arguments.vcpus.to_string()]);
    command.args(["--hypervisor", &name(&arguments.hypervisor)]);
    command.args(["--suspend-order", &name(&arguments.suspend_order)]);
    for socket in sockets {
        command.arg("--device").arg(socket);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|failure| format!("can't start the VMM: {failure}"))
}

/// An option's value as it is written on the command line.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is hidden").get_name().to_owned()
}

/// On standard error, where a terminal is; standard output is for the result.
fn progress_bar(arguments: &Arguments) -> ProgressBar {
    if arguments.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} cycles, {eta} left")
        .expect("the template is valid");
    let bar = ProgressBar::with_draw_target(Some(arguments.cycles), ProgressDrawTarget::stderr());
    bar.with_style(style)
}
