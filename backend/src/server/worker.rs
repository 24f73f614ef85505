//! A server that another process starts and outlives ([`crate::supervisor`]).

use std::io;
use std::os::fd::AsFd;

use tracing::{error, info, warn};

use super::event_loop::{Interest, Token};
use super::ports::Port;
use super::recorded::{self, Legacy};
use super::{ServedFunction, Server};
use crate::supervisor::link::{Held, LinkError, Order, Report, WorkerLink};

/// The supervisor, as a worker sees it.
#[derive(Debug)]
pub(super) struct Supervised {
    link: WorkerLink,
    /// What the supervisor calls each port's function.
    functions: Vec<u16>,
    /// It has gone: the clients that are here are served, and no others come.
    alone: bool,
}

/// Whether the event loop goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Continue,
    End,
}

impl Server {
    /// Serves the clients that a supervisor accepts: those of functions that are
    /// [added](Self::add_held) from here on.
    ///
    /// # Errors
    /// When the kernel can't watch the link.
    pub fn supervise(&mut self, link: WorkerLink) -> io::Result<()> {
        self.epoll.add(link.as_fd(), Token::Link, Interest::Read)?;
        self.supervised = Some(Supervised { link, functions: Vec::new(), alone: false });
        Ok(())
    }

    /// Adds a function, which goes on where the last worker was. `name` tells it from others: it is
    /// the same whenever the function is.
    ///
    /// # Errors
    /// When its state can't be mapped, its descriptors can't be held, or the kernel can't watch its
    /// client.
    ///
    /// # Panics
    /// Without a [supervisor](Self::supervise).
    pub fn add_held(
        &mut self,
        name: &str,
        held: Held,
        function: impl Into<ServedFunction>,
    ) -> io::Result<()> {
        let Held { function: number, state, client, fds, previous_end } = held;
        let supervised = self.supervised.as_mut().expect("a supervisor comes first");
        let holder = Box::new(supervised.link.holder(number));
        let legacy = Legacy { state, client, fds, previous_end };
        let index = self.ports.len();
        let mut port = recorded::Port::new(index, name, function.into(), legacy, holder)?;
        port.add(&self.epoll)?;
        supervised.functions.push(number);
        self.ports.push(Port::Recorded(Box::new(port)));
        Ok(())
    }

    /// Tells the supervisor that everything is in place. Returns the ports that have something to do
    /// which no event tells of.
    pub(super) fn begin_work(&mut self) -> Vec<usize> {
        if let Some(supervised) = &self.supervised {
            supervised.report(Report::Ready);
            // A session may have turned out to be over.
            let _ = self.tell_ends();
        }
        let busy = |(index, port): (usize, &Port)| port.has_work().then_some(index);
        self.ports.iter().enumerate().filter_map(busy).collect()
    }

    /// Does what the supervisor wants.
    pub(super) fn hear_supervisor(&mut self, unfinished: &mut Vec<usize>) -> io::Result<Flow> {
        loop {
            let Some(supervised) = &mut self.supervised else { return Ok(Flow::Continue) };
            match supervised.link.next() {
                Ok(None) => return Ok(Flow::Continue),
                Ok(Some(Order::Ping(number))) => supervised.report(Report::Pong(number)),
                Ok(Some(Order::Client { function, socket })) => {
                    let known = supervised.functions.iter().position(|known| *known == function);
                    let Some((index, Port::Recorded(port))) =
                        known.and_then(|index| Some((index, self.ports.get_mut(index)?)))
                    else {
                        warn!("the supervisor has a client for a function that is not here");
                        continue;
                    };
                    port.start_session(&self.epoll, socket)?;
                    self.timed.insert(index);
                    if port.has_work() && !unfinished.contains(&index) {
                        unfinished.push(index);
                    }
                }
                Ok(Some(Order::Drain)) => {
                    self.drain();
                    if let Some(supervised) = &self.supervised {
                        supervised.report(Report::Drained);
                    }
                    return Ok(Flow::End);
                }
                Ok(Some(Order::Stop)) => {
                    self.stop_ports();
                    return Ok(Flow::End);
                }
                Err(LinkError::System(errno)) if errno == rustix::io::Errno::NOMEM => {
                    warn!("the supervisor can't be heard: {errno}");
                    return Ok(Flow::Continue);
                }
                Err(lost) => {
                    warn!("the supervisor is lost: {lost}; going on without one");
                    self.epoll.remove(supervised.link.as_fd())?;
                    supervised.alone = true;
                    return Ok(Flow::Continue);
                }
            }
        }
    }

    /// Tells the supervisor whose session is over. Without one, nobody else comes: the last client's
    /// end is ours.
    pub(super) fn tell_ends(&mut self) -> Flow {
        let Some(supervised) = &self.supervised else { return Flow::Continue };
        let mut busy = false;
        for (port, &function) in self.ports.iter_mut().zip(&supervised.functions) {
            let Port::Recorded(port) = port else { continue };
            if port.take_ended() {
                supervised.report(Report::SessionEnded { function });
            }
            busy |= port.is_busy();
        }
        if supervised.alone && !busy {
            info!("no supervisor and no client is left");
            return Flow::End;
        }
        Flow::Continue
    }

    /// Leaves everything to a successor.
    pub(super) fn drain(&mut self) {
        for port in &mut self.ports {
            match port {
                Port::Recorded(port) => port.drain(),
                Port::Listening(port) => port.stop(),
            }
        }
        info!("drained");
    }
}

impl Supervised {
    fn report(&self, report: Report) {
        if let Err(failure) = self.link.report(report) {
            error!("can't tell the supervisor: {failure}");
        }
    }
}
