//! `barkeep run`

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use barkeep_backend::supervisor::{End, Holding, Setup, Signals, Start, StartError, Supervisor};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use tracing::info;

use crate::serve::{self, Described, fatal, option, parse, signals, unique_names};
use crate::{EXIT_USAGE, usage_error};

/// The program that this process runs, even if its file has been replaced.
const THIS_PROGRAM: &str = "/proc/self/exe";

#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(
    after_help = "Example:\n  barkeep run --socket /run/vm1/disk.sock --device virtio-blk,path=/vm1/disk.raw \\\n              \
    --socket /run/vm1/edu.sock --device edu\n\n\
    The devices and their options are those of 'barkeep serve --help', and for every device:\n  \
    group=NAME                       one worker for all devices with this name; without it,\n                                   \
    each has its own"
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    serve: serve::Arguments,
    /// Seconds that a worker may take to answer before it is replaced; 0 to wait for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    watchdog: u64,
}

pub(crate) fn run(arguments: &Arguments, log: String) -> ExitCode {
    // Before anything can be left behind: a signal from here on means a clean stop.
    let asked = match listen_to_signals() {
        Ok(asked) => asked,
        Err(failure) => return fatal(&format!("can't handle signals: {failure}")),
    };
    let mut supervisor = match start(arguments, log, asked) {
        Ok(supervisor) => supervisor,
        Err(end) => return end.report(),
    };
    loop {
        match supervisor.run() {
            Ok(End::Stopped) => return ExitCode::SUCCESS,
            Ok(End::Drained) => info!("starting new workers"),
            Err(failure) => return fatal(&format!("event loop: {failure}")),
        }
    }
}

fn listen_to_signals() -> io::Result<Signals> {
    // Whoever started us may ignore it, and then the kernel would not tell how a worker has ended.
    signals(&[SIGCHLD])?;
    Ok(Signals {
        stop: signals(&[SIGTERM, SIGINT])?.into(),
        reload: signals(&[SIGHUP])?.into(),
        upgrade: signals(&[SIGUSR2])?.into(),
    })
}

/// Why nothing is served.
enum Unserved {
    /// A mistake of the operator's.
    Usage(String),
    /// One that a worker has told.
    UsageTold,
    Failure(String),
    Stopped,
}

impl Unserved {
    fn report(self) -> ExitCode {
        match self {
            Self::Usage(message) => usage_error(&message),
            Self::UsageTold => ExitCode::from(EXIT_USAGE),
            Self::Failure(message) => fatal(&message),
            Self::Stopped => ExitCode::SUCCESS,
        }
    }
}

/// Has every worker ready, and then every socket: a client that can connect is served.
fn start(arguments: &Arguments, log: String, asked: Signals) -> Result<Supervisor, Unserved> {
    let Arguments { serve, watchdog } = arguments;
    if !serve.is_vfio_user() {
        return Err(Unserved::Usage("--transport vhost-user: not with 'barkeep run'".into()));
    }
    serve.check_pairs().map_err(Unserved::Usage)?;
    let mut positions = 0..;
    let described = |text| described(text, &mut positions);
    let devices = serve.describe(described).map_err(Unserved::Usage)?;
    let names = unique_names(&devices).map_err(Unserved::Usage)?;
    let failed = |failure: io::Error| Unserved::Failure(format!("supervisor: {failure}"));
    let setups = names.into_iter().zip(&devices).map(|(name, device)| {
        Ok(Setup { name, group: device.labels.group.clone(), holding: Holding::fresh()? })
    });
    let setups = setups.collect::<Result<_, _>>().map_err(failed)?;
    let watchdog = Some(Duration::from_secs(*watchdog)).filter(|time| !time.is_zero());
    let mut supervisor =
        Supervisor::new(setups, worker(serve, log), asked, watchdog).map_err(failed)?;
    supervisor.start().map_err(|error| match error {
        StartError::Refused => Unserved::UsageTold,
        StartError::Stopped => Unserved::Stopped,
        StartError::Failed | StartError::System(_) => {
            Unserved::Failure(format!("supervisor: {error}"))
        }
    })?;
    let listen = |socket, _, function| {
        supervisor.listen(function, socket);
        Ok(())
    };
    serve.claim(devices, listen).map_err(Unserved::Usage)?;
    Ok(supervisor)
}

/// What the supervisor has to know of a device. The rest is checked by the worker that makes it.
fn described(
    text: String,
    positions: &mut impl Iterator<Item = usize>,
) -> Result<Described<usize>, String> {
    let (spec, labels) = parse(&text).map_err(|error| option(&text, &error))?;
    let position = positions.next().ok_or("too many devices")?;
    Ok(Described { text, name: spec.name, labels, served: position })
}

/// How workers are started.
fn worker(serve: &serve::Arguments, log: String) -> Start {
    let devices = serve.for_workers();
    Box::new(move |functions| {
        let functions: Vec<_> = functions.iter().map(u16::to_string).collect();
        let mut command = Command::new(THIS_PROGRAM);
        command.arg0("barkeep").arg("--log").arg(&log);
        command.args(["worker", "--functions", &functions.join(","), "--"]).args(&devices);
        command
    })
}
