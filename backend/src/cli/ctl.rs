//! `barkeep ctl`: questions to processes that are running.

mod prometheus;
mod wrapped;

use std::io::{self, Write};
use std::process::ExitCode;

use barkeep_protocol::page::wrap::Count;
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::log::say;
use wrapped::Wrapped;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    question: Question,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// What the library that 'barkeep wrap' preloads has done in a process
    WrapStatus(WrapStatus),
}

#[derive(Debug, clap::Args)]
struct WrapStatus {
    /// Process ID of the VMM
    pid: u32,
    /// How to tell it
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// A table
    Text,
    /// One object on one line
    Json,
    /// Prometheus' text format, as for the textfile collector
    Prometheus,
}

/// Exits with success when there is an answer.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let Question::WrapStatus(WrapStatus { pid, format }) = arguments.question;
    let wrapped = match Wrapped::find(pid) {
        Ok(wrapped) => wrapped,
        Err(error) => {
            say(&format!("barkeep: process {pid}: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let answer = match format {
        Format::Text => text(pid, &wrapped),
        Format::Json => format!("{}\n", json(pid, &wrapped)),
        Format::Prometheus => prometheus::page(pid, &wrapped.snapshot),
    };
    match io::stdout().write_all(answer.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("barkeep: standard output: {failure}"));
            ExitCode::FAILURE
        }
    }
}

fn text(pid: u32, Wrapped { command, snapshot }: &Wrapped) -> String {
    let mut lines = vec![
        (format!("process {pid}"), format!("{command}, wrapped by barkeep {}", snapshot.library)),
        ("VMs".into(), format!("{} now, {} in all", snapshot.vms, snapshot.vms_ever)),
        ("devices".into(), snapshot.devices.len().to_string()),
    ];
    lines.extend(snapshot.devices.iter().map(|device| (format!("  {device}"), String::new())));
    let counts = Count::ALL.map(|count| (count.text().into(), snapshot.count(count).to_string()));
    lines.extend(counts);
    let reasons = snapshot.reasons.iter();
    lines.extend(reasons.map(|(reason, times)| (format!("  {reason}"), times.to_string())));
    let width = Count::ALL.into_iter().map(|count| count.text().len()).max().unwrap_or_default();
    let line = |(what, value)| {
        let line = format!("{what:width$}  {value}");
        format!("{}\n", line.trim_end())
    };
    lines.into_iter().map(line).collect()
}

fn json(pid: u32, Wrapped { command, snapshot }: &Wrapped) -> Value {
    let reason = |(reason, count): &(String, u64)| json!({ "reason": reason, "count": count });
    let counts = Count::ALL.map(|count| (count.name().to_owned(), snapshot.count(count).into()));
    json!({
        "pid": pid,
        "command": command,
        "library": snapshot.library,
        "vms": snapshot.vms,
        "vms_ever": snapshot.vms_ever,
        "devices": snapshot.devices,
        "counts": serde_json::Map::from_iter(counts),
        "fail_opens": snapshot.reasons.iter().map(reason).collect::<Vec<_>>(),
    })
}
