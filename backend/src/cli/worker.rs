//! `barkeep worker`: what `barkeep run` starts to serve some of its functions.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use barkeep_backend::devices::Registry;
use barkeep_backend::server::Server;
use barkeep_backend::supervisor::link::{LinkError, WorkerLink};
use clap::Parser;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::serve::{Described, fatal, signals};
use crate::usage_error;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which of the devices, by position from 0 on
    #[arg(long, value_name = "I,J", value_delimiter = ',', required = true)]
    functions: Vec<u16>,
    /// What describes all devices
    #[arg(last = true, value_name = "ARGUMENTS")]
    run: Vec<OsString>,
}

/// What a worker needs of the arguments of `barkeep run`.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct RunArguments {
    #[arg(long = "device")]
    devices: Vec<String>,
    #[arg(long, default_value_t = 0)]
    poll: u64,
}

pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let (stop, reload) =
        match signals(&[SIGTERM, SIGINT]).and_then(|stop| Ok((stop, signals(&[SIGHUP])?))) {
            Ok(both) => both,
            Err(failure) => return fatal(&format!("can't handle signals: {failure}")),
        };
    let link = match WorkerLink::from_stdin() {
        Ok(link) => link,
        Err(failure) => return usage_error(&format!("standard input is no link: {failure}")),
    };
    let Arguments { functions, run } = arguments;
    let run = match RunArguments::try_parse_from(run) {
        Ok(run) => run,
        Err(error) => return usage_error(&error.to_string()),
    };
    let held = match link.begin() {
        Ok(held) => held,
        // Nobody needs this worker any more.
        Err(LinkError::Closed) => return ExitCode::SUCCESS,
        Err(failure) => return fatal(&format!("link: {failure}")),
    };
    let mut server = match Server::new() {
        Ok(server) => server,
        Err(failure) => return fatal(&format!("event loop: {failure}")),
    };
    server.set_poll_budget(Duration::from_micros(run.poll));
    if let Err(failure) = server.supervise(link).and_then(|()| server.set_reload(reload)) {
        return fatal(&format!("event loop: {failure}"));
    }
    // Every device is made before the first of them goes on with its client.
    let mut registry = Registry::default();
    let mut described = Vec::new();
    for held in held {
        let Some(text) = device(&functions, &run.devices, held.function) else {
            return usage_error(&format!("there is no device {} here", held.function));
        };
        match Described::new(text, &mut registry) {
            Ok(device) => described.push((held, device)),
            Err(message) => return usage_error(&message),
        }
    }
    for (held, Described { text, served, .. }) in described {
        if let Err(failure) = server.add_held(&text, held, served) {
            return fatal(&format!("{text}: {failure}"));
        }
    }
    let ended = server.run(stop.as_fd());
    #[cfg(feature = "failpoints")]
    barkeep_backend::state::log_crash_points();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fatal(&format!("event loop: {failure}")),
    }
}

/// A device of this worker's.
fn device(functions: &[u16], devices: &[String], function: u16) -> Option<String> {
    let text = devices.get(usize::from(function)).filter(|_| functions.contains(&function))?;
    Some(text.clone())
}
