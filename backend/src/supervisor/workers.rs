//! What the supervisor does about its workers.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use tracing::{error, warn};

use super::holding::Stored;
use super::link::{FromWorker, LinkError, ToWorker};
use super::poll::Token;
use super::process::{Process, Watched};
use super::slot::{Delay, Ending, Ordinal, Slot};
use super::systemd::What;
use super::{Phase, StartError, Supervisor, token_index};

/// More than fit into a link: what a dead worker has left.
const LAST_FRAMES: usize = 1 << 17;
/// How long telling a worker pauses when the kernel has no room for it.
const FLUSH_PAUSE: Duration = Duration::from_millis(10);
/// Workers that may be killed in a row before the first is ready.
const FIRST_TRIES: u32 = 10;
/// The status of a process that found a mistake of the operator's.
const REFUSED: i32 = 2;

impl Supervisor {
    /// Starts the next worker in this place, with all that is held.
    pub(super) fn begin(&mut self, slot: usize) -> io::Result<()> {
        let index = token_index(slot);
        let slot = &mut self.slots[slot];
        slot.restart_at = None;
        let mut process = Process::spawn((self.start)(&slot.functions), slot.incarnation)?;
        slot.incarnation = slot.incarnation.wrapping_add(1);
        for function in &slot.functions {
            self.functions[usize::from(*function)].holding.tell(*function, &mut process.link);
        }
        let previous_end = slot.previous_end;
        process.link.tell(ToWorker::Begin { limit: self.share, previous_end });
        self.epoll.add(process.pidfd(), Token::Ended(index), EventFlags::IN)?;
        self.epoll.add(process.link.as_fd(), Token::Link(index), EventFlags::IN)?;
        process.watched = Watched::Read;
        slot.process = Some(process);
        self.flush(index as usize)
    }

    /// As [`begin`](Self::begin), when there has been a worker before.
    pub(super) fn restart(&mut self, slot: usize) -> io::Result<()> {
        let Err(failure) = self.begin(slot) else { return Ok(()) };
        let slot = &mut self.slots[slot];
        slot.process = None;
        let delay = slot.backoff.delay(None);
        if let Some(suppressed) = slot.log.admit() {
            error!(suppressed, "can't start a worker of {}: {failure}", slot.name);
        }
        slot.restart_at = Some(Instant::now() + delay);
        Ok(())
    }

    /// Says what there is to say, and looks for room if there is none.
    pub(super) fn flush(&mut self, slot: usize) -> io::Result<()> {
        let index = token_index(slot);
        let slot = &mut self.slots[slot];
        let Some(process) = &mut slot.process else { return Ok(()) };
        process.flush_at = None;
        match process.link.flush() {
            // Its end is heard.
            Ok(()) | Err(LinkError::Closed) => {}
            Err(error) => {
                if let Some(suppressed) = slot.log.admit() {
                    let (id, name) = (process.id(), &slot.name);
                    warn!(suppressed, "can't tell worker {id} of {name}: {error}");
                }
                process.flush_at = Some(Instant::now() + FLUSH_PAUSE);
            }
        }
        let waits = process.link.has_unsent() && process.flush_at.is_none();
        let watched = if waits { Watched::ReadWrite } else { Watched::Read };
        if process.watched != Watched::Nothing && process.watched != watched {
            let flags = if waits { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            self.epoll.modify(process.link.as_fd(), Token::Link(index), flags)?;
            process.watched = watched;
        }
        Ok(())
    }

    /// Takes what a worker says.
    pub(super) fn hear(&mut self, slot: usize, frames: usize) -> io::Result<()> {
        for _ in 0..frames {
            let Some(process) = &mut self.slots[slot].process else { return Ok(()) };
            match process.link.next() {
                Ok(None) => return Ok(()),
                Ok(Some(told)) => {
                    if !self.apply(slot, told)? {
                        return self.unlink(slot, LinkError::Garbled);
                    }
                }
                Err(error) => return self.unlink(slot, error),
            }
        }
        Ok(())
    }

    /// Does what a worker says. Returns whether any worker would say that.
    fn apply(&mut self, slot: usize, told: FromWorker) -> io::Result<bool> {
        let slot = &mut self.slots[slot];
        let Some(process) = &mut slot.process else { return Ok(true) };
        if let FromWorker::SessionEnded(function)
        | FromWorker::Store(function, ..)
        | FromWorker::Lost(function, ..)
        | FromWorker::Forget(function, _) = &told
            && !slot.functions.contains(function)
        {
            if let Some(function) = slot.functions.first() {
                self.functions[usize::from(*function)].disposal.take(told);
            }
            return Ok(false);
        }
        match told {
            FromWorker::Ready => slot.became_ready(),
            FromWorker::Pong(number) => process.answered(number),
            FromWorker::Drained => {}
            FromWorker::SessionEnded(function) => {
                let function = usize::from(function);
                self.functions[function].forget_client();
                self.manager.forget(&self.functions[function].name, What::Client);
                if self.phase == Phase::Serving {
                    self.look_for_clients(function)?;
                }
            }
            FromWorker::Store(function, key, fd) => {
                let function = &mut self.functions[usize::from(function)];
                match function.store(key, fd, self.share) {
                    Stored::Held => {
                        let fd = function.holding.fds[&key].as_fd();
                        self.manager.store(&function.name, What::Fd(key), fd);
                    }
                    Stored::Lost => slot.note_loss(),
                    Stored::TooMany => return Ok(false),
                }
            }
            FromWorker::Forget(function, key) => {
                let function = &mut self.functions[usize::from(function)];
                if function.forget(key) {
                    self.manager.forget(&function.name, What::Fd(key));
                }
            }
            FromWorker::Lost(..) => slot.note_loss(),
        }
        Ok(true)
    }

    /// A worker that can't be spoken with any more is about to end, or made to.
    fn unlink(&mut self, slot: usize, error: LinkError) -> io::Result<()> {
        let slot = &mut self.slots[slot];
        let Some(process) = &mut slot.process else { return Ok(()) };
        if process.watched != Watched::Nothing {
            self.epoll.remove(process.link.as_fd())?;
            process.watched = Watched::Nothing;
        }
        if error == LinkError::Closed {
            process.leaves();
            return Ok(());
        }
        if let Some(suppressed) = slot.log.admit() {
            error!(suppressed, "worker {} of {}: {error}: killed", process.id(), slot.name);
        }
        process.kill();
        Ok(())
    }

    /// Asks a worker whether it is alive, and kills one that has not answered in time.
    pub(super) fn watch(&mut self, slot: usize, now: Instant) -> io::Result<()> {
        let is_due = |this: &Self| this.check_at(&this.slots[slot]).is_some_and(|at| at <= now);
        if !is_due(self) {
            return Ok(());
        }
        // Its answer may be here: it is we who may have been stopped for a while.
        self.hear(slot, LAST_FRAMES)?;
        if !is_due(self) {
            return Ok(());
        }
        let Slot { process: Some(process), name, log, .. } = &mut self.slots[slot] else {
            return Ok(());
        };
        if process.check(now) {
            return self.flush(slot);
        }
        if let Some(suppressed) = log.admit() {
            error!(suppressed, "worker {} of {name} does not answer: killed", process.id());
        }
        process.kill();
        Ok(())
    }

    /// Takes leave of a worker that has ended, and sees to the next one.
    pub(super) fn bury(&mut self, slot: usize) -> io::Result<()> {
        let Some(process) = &mut self.slots[slot].process else { return Ok(()) };
        let Some(status) = process.ended()? else { return Ok(()) };
        // The next one gets what this one has stored, to the last.
        self.hear(slot, LAST_FRAMES)?;
        let index = slot;
        let slot = &mut self.slots[slot];
        let Some(process) = slot.process.take() else { return Ok(()) };
        let (id, ending) = (process.id(), Ending(status));
        slot.previous_end = process.previous_end(status);
        let delay = slot.backoff.delay(process.served_for());
        self.epoll.remove(process.pidfd())?;
        if process.watched != Watched::Nothing {
            self.epoll.remove(process.link.as_fd())?;
        }
        // What it has said and nobody has read is closed with its link.
        if let Some(function) = slot.functions.first() {
            self.functions[usize::from(*function)].disposal.take(process);
        }
        match self.phase {
            Phase::Ending(..) | Phase::Failed(_) => return Ok(()),
            Phase::Starting if !slot.has_served => {
                if status.code() == Some(REFUSED) {
                    self.phase = Phase::Failed(StartError::Refused);
                    return Ok(());
                }
                if status.code().is_some() || slot.backoff.failures() >= FIRST_TRIES {
                    error!("worker {id} of {} {ending} before it was ready", slot.name);
                    self.phase = Phase::Failed(StartError::Failed);
                    return Ok(());
                }
            }
            Phase::Starting | Phase::Serving => {}
        }
        slot.down_since.get_or_insert_with(Instant::now);
        if let Some(suppressed) = slot.log.admit() {
            let (name, when, time) = (&slot.name, Delay(delay), Ordinal(slot.incarnation));
            warn!(suppressed, "worker {id} of {name} {ending}: restarting{when} ({time} time)");
        }
        if delay.is_zero() {
            return self.restart(index);
        }
        slot.restart_at = Some(Instant::now() + delay);
        Ok(())
    }
}
