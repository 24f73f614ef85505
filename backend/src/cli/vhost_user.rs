//! `barkeep serve --transport vhost-user`

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use barkeep_backend::devices::virtio::{Core, models};
use barkeep_backend::dma::SharedMemory;
use barkeep_backend::server::{SocketPath, VhostUserServer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::serve::{Arguments, fatal, in_directory, parse};
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
    let Arguments { sockets, socket_dir, devices, .. } = arguments;
    // Every device is made before the first socket appears: a client that can connect is served.
    let devices = devices.into_iter().map(Device::new).collect::<Result<Vec<_>, _>>()?;
    let sockets = match socket_dir {
        Some(directory) => {
            let names = devices.iter().map(|device| (&*device.name, device.id.as_deref()));
            in_directory(&directory, names)?
        }
        None => sockets,
    };
    let mut server = VhostUserServer::new().map_err(|failure| format!("vhost-user: {failure}"))?;
    let mut ready = String::new();
    for (path, Device { text, core, .. }) in sockets.into_iter().zip(devices) {
        let option = format!("--socket {}", path.display());
        let socket = SocketPath::claim(&path).map_err(|error| format!("{option}: {error}"))?;
        ready.push_str(&format!("serving {text} on {socket}\n"));
        server.add(socket, text, core).map_err(|error| format!("{option}: {error}"))?;
    }
    // For whoever started us: the sockets are there. Nobody may be reading, which is fine.
    let _ = std::io::stdout().write_all(ready.as_bytes());
    Ok(server)
}

/// A device, and what the operator called it.
struct Device {
    text: String,
    name: String,
    id: Option<String>,
    core: Box<dyn Core<SharedMemory>>,
}

/// Options of PCI functions.
const PCI_ONLY: [&str; 2] = ["decode", "romfile"];

impl Device {
    fn new(text: String) -> Result<Self, String> {
        // Whatever the specification holds, the answer is one line.
        let shown = text.replace(char::is_control, "?");
        let option = |error: &dyn std::fmt::Display| format!("--device {shown}: {error}");
        let (spec, id) = parse(&text).map_err(|error| option(&error))?;
        let (name, mut parameters) = (spec.name, spec.parameters);
        let known = models::NAMES.join(", ");
        if !models::NAMES.contains(&&*name) {
            let reason = format!("not a device for --transport vhost-user (known: {known})");
            return Err(option(&reason));
        }
        for key in PCI_ONLY {
            if parameters.take_string(key).is_some() {
                let reason = format!("parameter '{key}': not with --transport vhost-user");
                return Err(option(&reason));
            }
        }
        let created = models::create(&name, &mut parameters).expect("it is one of those");
        let core = created.map_err(|error| option(&error))?;
        parameters.finish().map_err(|error| option(&error))?;
        Ok(Self { text, name, id, core })
    }
}
