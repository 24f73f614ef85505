//! `barkeep serve --transport vhost-user`

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use barkeep_backend::devices::virtio::{Core, models};
use barkeep_backend::dma::SharedMemory;
use barkeep_backend::server::VhostUserServer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::serve::{Arguments, Described, fatal, open_sockets, option, parse};
use crate::usage_error;

pub(crate) fn run(arguments: Arguments, stop: &UnixStream, reload: &UnixStream) -> ExitCode {
    allow_descriptors();
    let server = match prepare(arguments) {
        Ok(server) => server,
        Err(message) => return usage_error(&message),
    };
    match server.run(stop.as_fd(), reload.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fatal(&format!("vhost-user: {failure}")),
    }
}

/// A front-end's memory keeps a descriptor open for each of up to 509 regions: the customary limit
/// of 1024 would let two of them take what the others need.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = setrlimit(Resource::Nofile, most) {
        warn!("can't raise the limit of open files: {errno}");
    }
}

fn prepare(arguments: Arguments) -> Result<VhostUserServer, String> {
    arguments.check_pairs()?;
    if arguments.poll != 0 {
        return Err("--poll: not with --transport vhost-user".into());
    }
    let mut server = VhostUserServer::new().map_err(|failure| format!("vhost-user: {failure}"))?;
    open_sockets(&arguments, described, |socket, text, core| server.add(socket, text, core))?;
    Ok(server)
}

/// Options of PCI functions.
const PCI_ONLY: [&str; 2] = ["decode", "romfile"];

fn described(text: String) -> Result<Described<Box<dyn Core<SharedMemory>>>, String> {
    let option = |error: &dyn std::fmt::Display| option(&text, error);
    let (spec, labels) = parse(&text).map_err(|error| option(&error))?;
    labels.refuse_group(&text)?;
    let (name, mut parameters) = (spec.name, spec.parameters);
    let Some(constructor) = models::constructor(&name) else {
        let known = models::NAMES.join(", ");
        let reason = format!("not a device for --transport vhost-user (known: {known})");
        return Err(option(&reason));
    };
    for key in PCI_ONLY {
        if parameters.take_string(key).is_some() {
            let reason = format!("parameter '{key}': not with --transport vhost-user");
            return Err(option(&reason));
        }
    }
    let served = constructor(&mut parameters).map_err(|error| option(&error))?;
    parameters.finish().map_err(|error| option(&error))?;
    Ok(Described { text, name, labels, served })
}
