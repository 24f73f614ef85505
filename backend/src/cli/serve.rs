//! `barkeep serve`

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use barkeep_backend::config::DeviceSpec;
use barkeep_backend::devices;
use barkeep_backend::server::{HostedFunction, ServedFunction, Server, SocketPath};
#[cfg(feature = "passthrough")]
use barkeep_backend::{devices::passthrough, server::PassthroughFunction};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::error;

use crate::usage_error;

/// Each --socket goes with the --device of the same position.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  barkeep serve --socket /run/vm1/edu.sock --device edu \\\n                \
    --socket /run/vm1/shm.sock --device ivshmem,size=4M\n\n\
    Devices:\n  edu[,dma_mask=MASK]              QEMU's educational device\n  \
    ivshmem,size=SIZE[,path=FILE]    shared memory (ivshmem-plain)\n  \
    passthrough,host=BDF[,map=WHOM]  a real PCI device that is bound to vfio-pci"
)]
pub(crate) struct Arguments {
    /// UNIX socket to serve a function on; may repeat
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,
    /// Device to serve, as NAME[,KEY=VALUE...]; may repeat
    #[arg(long = "device", value_name = "SPEC", required = true)]
    devices: Vec<String>,
}

pub(crate) fn run(arguments: Arguments) -> ExitCode {
    // Before anything can be left behind: a signal from here on means a clean stop.
    let stop = match stop_signal() {
        Ok(stop) => stop,
        Err(failure) => return fatal(&format!("can't handle signals: {failure}")),
    };
    let server = match prepare(arguments) {
        Ok(server) => server,
        Err(message) => return usage_error(&message),
    };
    match server.run(stop.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fatal(&format!("event loop: {failure}")),
    }
}

/// A descriptor that becomes readable on SIGTERM or SIGINT.
fn stop_signal() -> std::io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

fn prepare(arguments: Arguments) -> Result<Server, String> {
    let Arguments { sockets, devices } = arguments;
    if sockets.len() != devices.len() {
        let (sockets, devices) = (sockets.len(), devices.len());
        return Err(format!(
            "--socket and --device go in pairs: {sockets} sockets, {devices} devices"
        ));
    }
    // Every device is made before the first socket appears: a client that can connect is served.
    let functions = devices.into_iter().map(function).collect::<Result<Vec<_>, _>>()?;
    let mut server = Server::new().map_err(|failure| format!("event loop: {failure}"))?;
    let mut ready = String::new();
    for (path, (spec, function)) in sockets.into_iter().zip(functions) {
        let option = format!("--socket {}", path.display());
        let socket = SocketPath::claim(&path).map_err(|error| format!("{option}: {error}"))?;
        ready.push_str(&format!("serving {spec} on {socket}\n"));
        server.add(socket, function).map_err(|error| format!("{option}: {error}"))?;
    }
    // For whoever started us: the sockets are there. Nobody may be reading, which is fine.
    let _ = std::io::stdout().write_all(ready.as_bytes());
    Ok(server)
}

fn function(text: String) -> Result<(String, ServedFunction), String> {
    // Whatever the specification holds, the answer is one line.
    let shown = text.replace(char::is_control, "?");
    let option = |error: &dyn std::fmt::Display| format!("--device {shown}: {error}");
    let spec: DeviceSpec = text.parse().map_err(|error| option(&error))?;
    #[cfg(feature = "passthrough")]
    if spec.name == passthrough::NAME {
        let (function, map) = passthrough::create(spec).map_err(|error| option(&error))?;
        let function = PassthroughFunction::new(&text, function, map);
        return Ok((text, function.into()));
    }
    let device = devices::create(spec).map_err(|error| option(&error))?;
    let function = HostedFunction::new(&text, device).map_err(|error| option(&error))?;
    Ok((text, function.into()))
}

fn fatal(message: &str) -> ExitCode {
    error!("{message}");
    ExitCode::FAILURE
}
