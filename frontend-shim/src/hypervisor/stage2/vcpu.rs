use super::{Abort, Access, Answer, GuestMemory, Policy, Resolution, Resolved, TableError};
use crate::fault::{NoProgress, ProgressGuard, Verdict};

/// A virtual CPU whose instructions are memory accesses, with a fault handler behind it.
#[derive(Debug)]
pub struct Vcpu<'m> {
    memory: &'m GuestMemory,
    policy: Policy,
    program: Vec<Access>,
    done: Vec<Done>,
    /// Faults of the instruction that is being executed.
    faults: Vec<Resolved>,
    state: State<'m>,
    guard: ProgressGuard,
}

#[derive(Debug)]
enum State<'m> {
    /// About to do the access.
    Execute,
    /// The last fault lost against a walk that is replacing the entry; the access can't succeed
    /// before that walk has gone on.
    Lost {
        changes: u64,
    },
    Fault(Resolution<'m>),
    Stuck(NoProgress),
}

/// An instruction that is behind us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// The access.
    pub access: Access,
    /// How it ended.
    pub completion: Completion,
    /// The faults it took on the way.
    pub faults: Vec<Resolved>,
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It reached memory.
    Retired,
    /// It was completed as MMIO.
    Mmio,
    /// Its fault was the VMM's own business; what the VMM does then is to skip it.
    NotMine,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuStep {
    /// It went on.
    Ran,
    /// Nothing: another walk has to go on first.
    Blocked,
    /// Nothing: the program is at its end.
    Finished,
    /// Nothing: the instruction faults again and again.
    Stuck(NoProgress),
}

impl<'m> Vcpu<'m> {
    /// A vCPU about to execute the first of `program`.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, policy: Policy, program: Vec<Access>) -> Self {
        Self {
            memory,
            policy,
            program,
            done: Vec::new(),
            faults: Vec::new(),
            state: State::Execute,
            guard: ProgressGuard::default(),
        }
    }

    /// The instructions that are behind it.
    #[must_use]
    pub fn done(&self) -> &[Done] {
        &self.done
    }

    /// The faults so far of the instruction that is being executed.
    #[must_use]
    pub fn faults(&self) -> &[Resolved] {
        &self.faults
    }

    /// The instruction that is being executed; `None` at the end of the program.
    #[must_use]
    pub fn current(&self) -> Option<Access> {
        self.program.get(self.done.len()).copied()
    }

    /// What [`step`](Self::step) would say if it can't go on.
    #[must_use]
    pub fn standstill(&self) -> Option<VcpuStep> {
        let Some(access) = self.current() else { return Some(VcpuStep::Finished) };
        let table = self.memory.table();
        let blocked = match &self.state {
            State::Stuck(why) => return Some(VcpuStep::Stuck(why.clone())),
            State::Execute => false,
            State::Lost { changes } => {
                table.is_being_replaced(access.ipa) && table.changes(access.ipa) == *changes
            }
            State::Fault(resolution) => resolution.is_blocked(),
        };
        blocked.then_some(VcpuStep::Blocked)
    }

    /// Executes, or goes on with the fault handler, by one step that others can see.
    pub fn step(&mut self) -> VcpuStep {
        if let Some(standstill) = self.standstill() {
            return standstill;
        }
        let Some(access) = self.current() else { return VcpuStep::Finished };
        if let State::Fault(resolution) = &mut self.state {
            if let Some(resolved) = resolution.step() {
                self.resolved(access, resolved);
            }
        } else {
            match self.memory.access(access) {
                Ok(()) => self.complete(access, Completion::Retired),
                Err(abort) => self.fault(abort),
            }
        }
        VcpuStep::Ran
    }

    /// Steps to the end of the program.
    ///
    /// # Errors
    /// [`NoProgress`] where one instruction faults too often.
    pub fn run(&mut self) -> Result<&[Done], NoProgress> {
        loop {
            match self.step() {
                VcpuStep::Ran => {}
                VcpuStep::Blocked => std::thread::yield_now(),
                VcpuStep::Finished => return Ok(&self.done),
                VcpuStep::Stuck(why) => return Err(why),
            }
        }
    }

    fn fault(&mut self, abort: Abort) {
        let changes = self.memory.table().changes(abort.access.ipa);
        self.state = match self.guard.fault(&abort.memory_fault(), changes) {
            Ok(()) => State::Fault(Resolution::new(self.memory, abort, self.policy)),
            Err(why) => State::Stuck(why),
        };
    }

    fn resolved(&mut self, access: Access, resolved: Resolved) {
        self.faults.push(resolved);
        match resolved.answer {
            Answer::Mmio => return self.complete(access, Completion::Mmio),
            Answer::Verdict(Verdict::NotMine) => {
                return self.complete(access, Completion::NotMine);
            }
            // Something was invalidated meanwhile. That is how often it can happen, no oftener.
            Answer::Verdict(Verdict::Retry) => self.guard.progress(),
            Answer::Verdict(_) => {}
        }
        let table = self.memory.table();
        let lost =
            resolved.code == Some(Err(TableError::Again)) && table.is_being_replaced(access.ipa);
        self.state =
            if lost { State::Lost { changes: table.changes(access.ipa) } } else { State::Execute };
    }

    fn complete(&mut self, access: Access, completion: Completion) {
        let faults = std::mem::take(&mut self.faults);
        self.done.push(Done { access, completion, faults });
        self.state = State::Execute;
        self.guard.progress();
    }
}
