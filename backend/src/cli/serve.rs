//! `barkeep serve`

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use barkeep_backend::config::{ConfigError, DeviceSpec};
use barkeep_backend::devices::Registry;
use barkeep_backend::server::{HostedFunction, ServedFunction, Server, SocketError, SocketPath};
#[cfg(feature = "passthrough")]
use barkeep_backend::{devices::passthrough, server::PassthroughFunction};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing::error;

use crate::{usage_error, vhost_user};

/// Each --socket goes with the --device of the same position, or all sockets are in --socket-dir.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  barkeep serve --socket /run/vm1/edu.sock --device edu \\\n                \
    --socket /run/vm1/shm.sock --device ivshmem,size=4M\n\n\
    Devices:\n  edu[,dma_mask=MASK]              QEMU's educational device\n  \
    ivshmem,size=SIZE[,path=FILE][,vectors=N]\n                                   \
    shared memory (ivshmem-plain, ivshmem-doorbell)\n  \
    passthrough,host=BDF[,map=WHOM]  a real PCI device that is bound to vfio-pci\n  \
    virtio-blk,path=IMAGE[,...]      a disk\n  \
    virtio-net,tap=IFNAME[,...]      a network card; also with socket=PATH or fd=N\n  \
    virtio-rng                       random bytes of this machine's kernel\n  \
    virtio-console,socket=PATH       a console; also with pty=PATH\n  \
    vhost-user,type=TYPE,socket=PATH any vhost-user daemon's device\n\n\
    With --transport vhost-user, the four virtio devices. docs/virtio.md has their options.\n\n\
    Options of every device but passthrough:\n  \
    decode=strict|always             'always' serves clients that never enable memory or\n                                   \
    bus mastering in the Command register\n  \
    romfile=FILE                     expansion ROM\n\
    Options of every device:\n  \
    id=NAME                          its socket in --socket-dir is NAME.sock\n  \
    group=NAME                       'barkeep run' has one worker for all devices of a group"
)]
pub(crate) struct Arguments {
    /// UNIX socket to serve a function on; may repeat
    #[arg(long = "socket", value_name = "PATH", required_unless_present = "socket_dir")]
    sockets: Vec<PathBuf>,
    /// How clients reach the devices
    #[arg(long, value_enum, default_value_t, value_name = "PROTOCOL")]
    transport: Transport,
    /// Directory for a socket of each device: its id, or its name and position, and .sock
    #[arg(long, value_name = "DIR", conflicts_with = "sockets")]
    socket_dir: Option<PathBuf>,
    /// Device to serve, as NAME[,KEY=VALUE...]; may repeat
    #[arg(long = "device", value_name = "SPEC", required = true)]
    devices: Vec<String>,
    /// Microseconds to look for a client's next request before sleeping, while its requests follow
    /// each other closely; costs a processor for as long
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    pub(crate) poll: u64,
}

/// What is spoken on the sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Transport {
    /// PCI functions, for VMMs with vfio-user
    #[default]
    VfioUser,
    /// Virtio devices, for VMMs that bring their own functions: QEMU's vhost-user-blk-pci and others
    VhostUser,
}

impl Arguments {
    /// Whether each device has a socket.
    pub(crate) fn check_pairs(&self) -> Result<(), String> {
        let (sockets, devices) = (self.sockets.len(), self.devices.len());
        if self.socket_dir.is_some() || sockets == devices {
            return Ok(());
        }
        Err(format!("--socket and --device go in pairs: {sockets} sockets, {devices} devices"))
    }

    pub(crate) fn is_vfio_user(&self) -> bool {
        self.transport == Transport::VfioUser
    }

    /// Reads the specification of every device.
    pub(crate) fn describe<T>(
        &self,
        describe: impl FnMut(String) -> Result<Described<T>, String>,
    ) -> Result<Vec<Described<T>>, String> {
        self.devices.iter().cloned().map(describe).collect()
    }

    /// Has each device served on a socket that `claim` gets for its position and path, by `add` with
    /// what the operator called it.
    pub(crate) fn claim<T>(
        &self,
        devices: Vec<Described<T>>,
        mut claim: impl FnMut(usize, &Path) -> Result<SocketPath, SocketError>,
        mut add: impl FnMut(SocketPath, String, T) -> io::Result<()>,
    ) -> Result<(), String> {
        let sockets = match &self.socket_dir {
            Some(directory) => in_directory(directory, &devices)?,
            None => self.sockets.clone(),
        };
        let mut ready = String::new();
        let pairs = sockets.into_iter().zip(devices).enumerate();
        for (position, (path, Described { text, served, .. })) in pairs {
            let option = format!("--socket {}", path.display());
            let socket = claim(position, &path).map_err(|error| format!("{option}: {error}"))?;
            ready.push_str(&format!("serving {text} on {socket}\n"));
            add(socket, text, served).map_err(|error| format!("{option}: {error}"))?;
        }
        // For whoever started us: the sockets are there. Nobody may be reading, which is fine.
        let _ = io::stdout().write_all(ready.as_bytes());
        Ok(())
    }

    /// What describes the devices to a worker.
    pub(crate) fn for_workers(&self) -> Vec<String> {
        // Sockets are the supervisor's.
        let Self { sockets: _, socket_dir: _, transport: _, devices, poll } = self;
        let devices = devices.iter().map(|spec| format!("--device={spec}"));
        devices.chain([format!("--poll={poll}")]).collect()
    }
}

pub(crate) fn run(arguments: Arguments) -> ExitCode {
    // Before anything can be left behind: a signal from here on means a clean stop.
    let (stop, reload) =
        match signals(&[SIGTERM, SIGINT]).and_then(|stop| Ok((stop, signals(&[SIGHUP])?))) {
            Ok(both) => both,
            Err(failure) => return fatal(&format!("can't handle signals: {failure}")),
        };
    if arguments.transport == Transport::VhostUser {
        return vhost_user::run(arguments, &stop, &reload);
    }
    let mut server = match prepare(arguments) {
        Ok(server) => server,
        Err(message) => return usage_error(&message),
    };
    if let Err(failure) = server.set_reload(reload) {
        return fatal(&format!("event loop: {failure}"));
    }
    match server.run(stop.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fatal(&format!("event loop: {failure}")),
    }
}

/// A descriptor that becomes readable on one of these signals.
pub(crate) fn signals(signals: &[i32]) -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

fn prepare(arguments: Arguments) -> Result<Server, String> {
    arguments.check_pairs()?;
    let mut registry = Registry::default();
    let mut server = Server::new().map_err(|failure| format!("event loop: {failure}"))?;
    server.set_poll_budget(Duration::from_micros(arguments.poll));
    let described = |text| {
        let described = Described::new(text, &mut registry)?;
        described.labels.refuse_group(&described.text)?;
        Ok(described)
    };
    open_sockets(&arguments, described, |socket, _, function| server.add(socket, function))?;
    Ok(server)
}

/// Makes the devices and has each of them served on its socket, by `add` with what the operator called
/// it. Every device is made before the first socket appears: a client that can connect is served.
pub(crate) fn open_sockets<T>(
    arguments: &Arguments,
    describe: impl FnMut(String) -> Result<Described<T>, String>,
    add: impl FnMut(SocketPath, String, T) -> io::Result<()>,
) -> Result<(), String> {
    arguments.claim(arguments.describe(describe)?, |_, path| SocketPath::claim(path), add)
}

/// What is to be served, and what the operator called it.
pub(crate) struct Described<T> {
    pub(crate) text: String,
    pub(crate) name: String,
    pub(crate) labels: Labels,
    pub(crate) served: T,
}

/// What an operator adds to a device's specification for its surroundings.
#[derive(Debug, Default)]
pub(crate) struct Labels {
    /// What its socket is called.
    id: Option<String>,
    /// With whom it shares a worker.
    pub(crate) group: Option<String>,
}

impl Labels {
    /// What a device is called that has this name and position.
    pub(crate) fn device(&self, name: &str, position: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("{name}{position}"))
    }

    /// Where all devices are in one process anyway.
    pub(crate) fn refuse_group(&self, spec: &str) -> Result<(), String> {
        match self.group {
            None => Ok(()),
            Some(_) => Err(option(spec, &"parameter 'group': only with 'barkeep run'")),
        }
    }
}

impl Described<ServedFunction> {
    pub(crate) fn new(text: String, registry: &mut Registry) -> Result<Self, String> {
        let option = |error: &dyn std::fmt::Display| option(&text, error);
        let (spec, labels) = parse(&text).map_err(|error| option(&error))?;
        let name = spec.name.clone();
        let described = |served| Self { text: text.clone(), name, labels, served };
        #[cfg(feature = "passthrough")]
        if spec.name == passthrough::NAME {
            let (function, map) = passthrough::create(spec).map_err(|error| option(&error))?;
            return Ok(described(PassthroughFunction::new(&text, function, map).into()));
        }
        let (device, options) = registry.create(spec).map_err(|error| option(&error))?;
        let function = HostedFunction::with_options(&text, device, options);
        Ok(described(function.map_err(|error| option(&error))?.into()))
    }
}

/// What is wrong with a device's specification. Whatever that holds, the answer is one line.
pub(crate) fn option(spec: &str, error: &dyn std::fmt::Display) -> String {
    format!("--device {}: {error}", spec.replace(char::is_control, "?"))
}

/// A device's specification, and what is not the device's own in it.
pub(crate) fn parse(text: &str) -> Result<(DeviceSpec, Labels), ConfigError> {
    let mut spec: DeviceSpec = text.parse()?;
    let id = spec.parameters.take_string("id");
    if let Some(id) = id.as_deref().filter(|id| !is_file_name(id)) {
        return Err(ConfigError::invalid("id", format!("'{id}' can't name a socket")));
    }
    let group = spec.parameters.take_string("group");
    if group.as_deref().is_some_and(str::is_empty) {
        return Err(ConfigError::invalid("group", "it has no name".to_owned()));
    }
    Ok((spec, Labels { id, group }))
}

/// Whether this can be a part of a file's name.
fn is_file_name(id: &str) -> bool {
    !id.is_empty() && !id.starts_with('.') && !id.contains(|c: char| c == '/' || c.is_control())
}

/// A path for each device, by its name and id: unique, or it is an error.
fn in_directory<T>(directory: &Path, devices: &[Described<T>]) -> Result<Vec<PathBuf>, String> {
    let path = |name| directory.join(format!("{name}.sock"));
    Ok(unique_names(devices)?.into_iter().map(path).collect())
}

/// What the devices are called, by their names and ids: unique, or it is an error.
pub(crate) fn unique_names<T>(devices: &[Described<T>]) -> Result<Vec<String>, String> {
    let mut names = BTreeSet::new();
    let unique = devices.iter().enumerate().map(|(position, Described { name, labels, .. })| {
        let name = labels.device(name, position);
        if !names.insert(name.clone()) {
            return Err(format!("two devices are called '{name}'"));
        }
        Ok(name)
    });
    unique.collect()
}

pub(crate) fn fatal(message: &str) -> ExitCode {
    error!("{message}");
    ExitCode::FAILURE
}
