use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use barkeep_protocol::wire::{DmaAccess, DmaMap};
use thiserror::Error;

use super::guest::{self, GuestError, Parameters, Program as GuestProgram, RAM_SIZE};
use super::guest_memory::{GuestMemory, LOST_RAM_SLOT, RamByMessages};
use super::monitor::Monitor;
use super::pci_host::{ECAM_BASE, ECAM_SIZE, PciHost};
use super::placement::Placement;
use super::report::{self, Report};
use super::vcpu::{VcpuEnd, VcpuThread};
use super::{Arguments, Dma, HypervisorChoice, Loss, Order, Program, instructions};
use crate::Frontend;
use crate::bar::AttachError;
use crate::client::{ClientError, ClientOptions};
use crate::hypervisor::kvm::Kvm;
use crate::hypervisor::model::Model;
#[cfg(feature = "mshv")]
use crate::hypervisor::mshv::{MapPolicy, Mshv};
use crate::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, HypervisorError, HypervisorKind, SlotId, Vm,
};

/// A VM that is set up: RAM mapped, functions attached and their BARs placed.
pub struct Machine {
    vm: Arc<dyn Vm>,
    memory: GuestMemory,
    host: PciHost,
    placement: Placement,
}

/// Why a VM can't be set up.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The hypervisor.
    #[error("hypervisor: {0}")]
    Hypervisor(#[from] HypervisorError),
    /// The host refused memory or a thread.
    #[error("{what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A function can't be attached.
    #[error("--device {}: {source}", path.display())]
    Attach {
        /// Its socket.
        path: PathBuf,
        /// The reason.
        source: AttachError,
    },
    /// A backend refused to share RAM.
    #[error("--device {}: can't share guest memory: {source}", path.display())]
    Share {
        /// Its socket.
        path: PathBuf,
        /// The reason.
        source: ClientError,
    },
    /// More functions than bus 0 has devices.
    #[error("{0} functions do not fit on one bus of 32 devices")]
    TooManyFunctions(usize),
    /// The BARs do not fit into the address space that guests can reach.
    #[error("--device {}: BAR{bar} of {size:#x} bytes does not fit", path.display())]
    NoRoom {
        /// Whose.
        path: PathBuf,
        /// BAR number.
        bar: u8,
        /// Its length in bytes.
        size: u64,
    },
    /// The program needs functions that are not attached.
    #[error(
        "--program {0:?}: it needs an edu function, and toggle, hammer and recover an ivshmem function as well; instructions, an ivshmem or a passed-through edu function"
    )]
    NothingToDo(Program),
    /// The model accesses RAM itself: without its file it would die of SIGBUS.
    #[error("--loss vanished: only a hypervisor in the kernel survives that")]
    ModelLosesItself,
    /// The guest program.
    #[error("guest: {0}")]
    Guest(#[from] GuestError),
}

const FIRST_BAR_SLOT: SlotId = SlotId(LOST_RAM_SLOT.0 + 1);
/// PCI_COMMAND: memory and bus mastering.
const COMMAND_ON: u16 = 0x6;
/// PCI_COMMAND: bus mastering alone.
const COMMAND_OFF: u16 = 0x4;
/// Far more polls than an edu function needs; each is a round trip.
const POLL_LIMIT: u64 = 100_000;

impl Machine {
    /// Sets a VM up.
    ///
    /// # Errors
    /// [`MachineError`], which names the option at fault.
    pub fn new(arguments: &Arguments) -> Result<Self, MachineError> {
        if arguments.devices.len() > 32 {
            return Err(MachineError::TooManyFunctions(arguments.devices.len()));
        }
        let vm = choose_hypervisor(arguments.hypervisor)?;
        if (arguments.loss, vm.kind()) == (Loss::Vanished, HypervisorKind::Model) {
            return Err(MachineError::ModelLosesItself);
        }
        let memory = GuestMemory::new(arguments.loss)
            .map_err(|source| MachineError::Host { what: "guest memory", source })?;
        memory.map(vm.as_ref())?;

        let hypervisor: Arc<dyn Hypervisor> = Arc::clone(&vm) as _;
        let mut claimed = GuestMemory::ranges().to_vec();
        claimed.push((ECAM_BASE, ECAM_SIZE));
        let mut frontend = Frontend::new(hypervisor, claimed, FIRST_BAR_SLOT);
        let deadline = Duration::from_secs(arguments.deadline);
        for path in &arguments.devices {
            let target = Arc::new(RamByMessages(Arc::clone(&memory.ram)));
            let options = ClientOptions {
                deadline,
                dma_target: Some(target),
                twin_socket: true,
                reconnect: arguments.reconnect,
                dead_backend: arguments.dead_backend,
            };
            let index = frontend
                .attach_with(path, options, arguments.suspend_order.into())
                .map_err(|source| MachineError::Attach { path: path.clone(), source })?;
            let share = |source| MachineError::Share { path: path.clone(), source };
            let file = memory
                .file
                .try_clone()
                .map_err(|source| MachineError::Host { what: "guest memory", source })?;
            let access = DmaAccess::READ | DmaAccess::WRITE;
            let window = DmaMap { access, file_offset: 0, address: 0, size: RAM_SIZE };
            let file = (arguments.dma == Dma::Shared).then_some(file);
            frontend.functions()[index].client().dma_map(&window, file).map_err(share)?;
        }
        let placement = Placement::assign(&frontend)?;
        Ok(Self { vm, memory, host: PciHost::new(frontend), placement })
    }

    /// Runs the program of `arguments` to its end.
    ///
    /// # Errors
    /// [`MachineError`] when it can't start. What goes wrong later is in the report.
    pub fn run(&self, arguments: &Arguments) -> Result<Report, MachineError> {
        let frontend = self.host.frontend();
        self.placement.enable(frontend, COMMAND_ON);
        let devices = match arguments.program {
            Program::Toggle | Program::Hammer | Program::Recover => self.placement.pairs(frontend),
            Program::Edu | Program::Probe | Program::LostRam => self.placement.edu_alone(frontend),
            Program::Instructions => self.placement.mapped_alone(frontend),
        };
        let needs_none = matches!(arguments.program, Program::Probe | Program::LostRam);
        if devices.is_empty() && !needs_none {
            return Err(MachineError::NothingToDo(arguments.program));
        }
        Parameters {
            cycles: arguments.cycles,
            command_on: COMMAND_ON,
            command_off: COMMAND_OFF,
            ecam: GuestAddress(ECAM_BASE),
            poll_limit: POLL_LIMIT,
            resets: arguments.program == Program::Recover,
            devices,
        }
        .install(&self.memory.ram)?;

        if arguments.program == Program::Instructions {
            let memory = self.placement.ivshmem_functions().next().is_some();
            // With the slots left to faults, each kind shall have a fault of its own.
            let each = arguments.suspend_order == Order::FaultsOnly;
            instructions::parameters(self.vm.kind(), memory, each).install(&self.memory.ram)?;
        }

        let started = Instant::now();
        let ends = self.run_vcpus(arguments)?;
        Ok(report::collect(report::Finished {
            arguments,
            kind: self.vm.kind(),
            ram: &self.memory.ram,
            frontend,
            placement: &self.placement,
            ends,
            elapsed: started.elapsed(),
        }))
    }

    fn run_vcpus(&self, arguments: &Arguments) -> Result<Vec<VcpuEnd>, MachineError> {
        let programs = match arguments.program {
            Program::Probe => vec![GuestProgram::Probe],
            Program::Edu => vec![GuestProgram::Edu],
            Program::LostRam => vec![GuestProgram::LostRam],
            Program::Instructions => vec![GuestProgram::Instructions],
            Program::Hammer => vec![GuestProgram::Hammer; arguments.vcpus as usize],
            Program::Toggle => among_hammers(GuestProgram::Toggle, arguments.vcpus),
            Program::Recover => among_hammers(GuestProgram::Recover, arguments.vcpus),
        };
        let mut vcpus = Vec::new();
        for (id, program) in (0..).zip(programs) {
            program.load(&self.memory.ram)?;
            vcpus.push((id, self.vm.create_vcpu(id, &program.entry(id)?)?));
        }
        if matches!(arguments.program, Program::Hammer | Program::Recover) {
            stop_with_standard_input(&self.memory.ram)?;
        }
        let frontend = self.host.frontend();
        let monitor = Monitor::new(&self.memory.ram, frontend, arguments);
        std::thread::scope(|scope| {
            let _attendants = Attendants::start(scope, frontend)?;
            let mut threads = Vec::new();
            for (id, vcpu) in vcpus {
                let thread = VcpuThread {
                    id,
                    vcpu,
                    host: &self.host,
                    memory: &self.memory,
                    memory_faults: arguments.memory_faults,
                    bell: monitor.bell(),
                };
                let named = std::thread::Builder::new().name(format!("vcpu{id}"));
                let spawned = named.spawn_scoped(scope, move || thread.run()).map_err(|source| {
                    // Those that run already would wait for the missing one for ever.
                    request_stop(&self.memory.ram);
                    MachineError::Host { what: "vCPU thread", source }
                });
                threads.push(spawned?);
            }
            monitor.watch();
            let end = |thread: ScopedJoinHandle<'_, VcpuEnd>| {
                thread.join().unwrap_or(VcpuEnd::panicked())
            };
            Ok(threads.into_iter().map(end).collect())
        })
    }
}

/// A thread for each function, which learns at once when its backend has gone, connects again if that is
/// wanted, and serves what it asks for. They end with this value.
struct Attendants<'a>(&'a Frontend);

impl<'a> Attendants<'a> {
    fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        frontend: &'scope Frontend,
    ) -> Result<Self, MachineError>
    where
        'scope: 'a,
    {
        let attendants = Self(frontend);
        for index in 0..frontend.functions().len() {
            std::thread::Builder::new()
                .name(format!("attendant{index}"))
                .spawn_scoped(scope, move || frontend.attend(index))
                .map_err(|source| MachineError::Host { what: "attendant's thread", source })?;
        }
        Ok(attendants)
    }
}

impl Drop for Attendants<'_> {
    fn drop(&mut self) {
        (0..self.0.functions().len()).for_each(|index| self.0.stop_attending(index));
    }
}

fn choose_hypervisor(choice: HypervisorChoice) -> Result<Arc<dyn Vm>, MachineError> {
    match choice {
        HypervisorChoice::Model => return Ok(Arc::new(Model::new())),
        #[cfg(feature = "mshv")]
        HypervisorChoice::Mshv => {
            return Ok(Arc::new(Mshv::open(MapPolicy::default())?));
        }
        HypervisorChoice::Kvm => Kvm::probe()?,
        HypervisorChoice::Auto => {
            if let Err(error) = Kvm::probe() {
                tracing::warn!("running on the software model: {error}");
                return Ok(Arc::new(Model::new()));
            }
        }
    }
    Ok(Arc::new(Kvm::open()?))
}

/// `program` on vCPU 0, `hammer` on the others.
fn among_hammers(program: GuestProgram, vcpus: u32) -> Vec<GuestProgram> {
    let mut programs = vec![program];
    programs.resize(vcpus as usize, GuestProgram::Hammer);
    programs
}

/// Stops `hammer` and `recover` when standard input ends. The thread dies with the process.
fn stop_with_standard_input(ram: &Arc<HostMapping>) -> Result<(), MachineError> {
    let ram = Arc::clone(ram);
    let wait = move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        request_stop(&ram);
    };
    std::thread::Builder::new()
        .name("stdin".into())
        .spawn(wait)
        .map_err(|source| MachineError::Host { what: "thread", source })?;
    Ok(())
}

/// Asks the vCPUs that run `hammer` or `recover` to stop.
pub(super) fn request_stop(ram: &HostMapping) {
    if let Err(error) = guest::request_stop(ram) {
        tracing::error!("can't stop the guest: {error}");
    }
}
