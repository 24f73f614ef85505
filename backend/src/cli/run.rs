//! `barkeep run`

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use barkeep_backend::supervisor::systemd::{FdName, PRIVATE_ENVIRONMENT};
use barkeep_backend::supervisor::upgrade::{Handover, Program, ready_for_signals};
use barkeep_backend::supervisor::{End, Setup, Signals, Start, StartError, Supervisor};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use tracing::{error, info};

use crate::heritage::Heritage;
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
    // The program before this one has held them back.
    ready_for_signals();
    let program = match Program::running() {
        Ok(program) => program,
        Err(failure) => return fatal(&format!("can't find this program: {failure}")),
    };
    let mut heritage = match Heritage::take() {
        Ok(heritage) => heritage,
        Err(message) => return fatal(&message),
    };
    let mut supervisor = match start(arguments, log, asked, &mut heritage) {
        Ok(supervisor) => supervisor,
        Err(end) => return end.report(),
    };
    let successor = program.clone();
    supervisor.set_upgrade_check(Box::new(move || can_succeed(&successor)));
    loop {
        match supervisor.run() {
            Ok(End::Stopped) => {
                supervisor.leave();
                return ExitCode::SUCCESS;
            }
            Ok(End::Drained) => {
                supervisor.service_manager().finish();
                let failure = program.replace(heritage.upgrades + 1, &supervisor.held());
                error!("no upgrade: {failure}: this program goes on");
            }
            Err(failure) => return fatal(&format!("event loop: {failure}")),
        }
    }
}

/// Whether what is at the path of this program now can take its place. The log says why not.
fn can_succeed(program: &Program) -> bool {
    let path = program.path().display();
    match program.check(Some(&Handover::default())) {
        Ok(()) => {
            info!("upgrade to {path}: ending all workers");
            true
        }
        Err(refusal) => {
            error!("no upgrade: {refusal}");
            false
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
fn start(
    arguments: &Arguments,
    log: String,
    asked: Signals,
    heritage: &mut Heritage,
) -> Result<Supervisor, Unserved> {
    let Arguments { serve, watchdog } = arguments;
    let (devices, names) = arguments.functions().map_err(Unserved::Usage)?;
    let failed = |failure: std::io::Error| Unserved::Failure(format!("supervisor: {failure}"));
    let setups = names.iter().zip(&devices).enumerate().map(|(position, (name, device))| {
        let holding = heritage.holding(name, position)?;
        Ok(Setup { name: name.clone(), group: device.labels.group.clone(), holding })
    });
    let setups = setups.collect::<Result<_, _>>().map_err(failed)?;
    let watchdog = Some(Duration::from_secs(*watchdog)).filter(|time| !time.is_zero());
    let mut supervisor =
        Supervisor::new(setups, worker(serve, log), asked, watchdog).map_err(failed)?;
    heritage.forget_rest();
    supervisor.set_service_manager(std::mem::take(&mut heritage.manager)).map_err(failed)?;
    match supervisor.start() {
        Ok(()) => {}
        Err(StartError::Stopped) => return Err(Unserved::Stopped),
        // Clients wait for what is held; it would be lost, and the next try may succeed.
        Err(error) if heritage.resumes() => error!("{error}: trying again"),
        Err(StartError::Refused) => return Err(Unserved::UsageTold),
        Err(error @ (StartError::Failed | StartError::System(_))) => {
            return Err(Unserved::Failure(format!("supervisor: {error}")));
        }
    }
    let mut sockets = Vec::new();
    let manager = supervisor.service_manager();
    let claim =
        |position: usize, path: &Path| heritage.socket(&names[position], position, path, manager);
    let listen = |socket, _, function| {
        sockets.push((function, socket));
        Ok(())
    };
    serve.claim(devices, claim, listen).map_err(Unserved::Usage)?;
    for (function, socket) in sockets {
        supervisor.listen(function, socket);
    }
    let manager = supervisor.service_manager();
    manager.status(&format!("serving {}", names.join(", ")));
    manager.ready();
    Ok(supervisor)
}

impl Arguments {
    /// The functions that are described, and what they are called.
    fn functions(&self) -> Result<(Vec<Described<usize>>, Vec<String>), String> {
        let Self { serve, watchdog: _ } = self;
        if !serve.is_vfio_user() {
            return Err("--transport vhost-user: not with 'barkeep run'".into());
        }
        serve.check_pairs()?;
        let mut positions = 0..;
        let devices = serve.describe(|text| described(text, &mut positions))?;
        let names = unique_names(&devices)?;
        if let Some(name) = names.iter().find(|name| !FdName::suits(name)) {
            return Err(format!("device {name}: its name is too long to be held under"));
        }
        Ok((devices, names))
    }

    /// Whether they can be understood.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.functions().map(|_| ())
    }
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
        for variable in PRIVATE_ENVIRONMENT {
            command.env_remove(variable);
        }
        command.args(["worker", "--functions", &functions.join(","), "--"]).args(&devices);
        command
    })
}
