use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use tracing::info;

use super::legacy::{Legacy, Past};
use super::recorder::{Attempt, Recorder};
use super::session::Session;
use crate::log_limit::RateLimit;
use crate::server::event_loop::{Epoll, Source};
use crate::server::port::Turn;
use crate::server::served::ServedFunction;
use crate::server::session::{Progress, SessionEnd};
use crate::server::unmask_watch::UnmaskWatch;
use crate::state::{Activity, Holder};

/// How long a client may take from being accepted to its VERSION message.
pub(super) const HANDSHAKE_TIME: Duration = Duration::from_secs(1);

/// One function, and the client that somebody else has accepted for it. Everything that it does is
/// recorded, and begins with what was.
#[derive(Debug)]
pub(in crate::server) struct Port {
    index: usize,
    name: String,
    function: ServedFunction,
    recorder: Recorder,
    session: Option<Session>,
    unmask: UnmaskWatch,
    /// What a predecessor did not survive, or may have missed.
    left_over: Vec<Source>,
    /// The session is over, and nobody was told.
    ended: bool,
    client_log: RateLimit,
}

impl Port {
    /// Goes on with what a predecessor left. `name` is what the function was called then as well.
    ///
    /// # Errors
    /// Those of the state's memory and of what holds descriptors. The function can't be served.
    pub(in crate::server) fn new(
        index: usize,
        name: &str,
        mut function: ServedFunction,
        legacy: Legacy,
        holder: Box<dyn Holder>,
    ) -> io::Result<Self> {
        let Past { recorder, session, left_over, lost } =
            legacy.take_over(name, &mut function, holder)?;
        Ok(Self {
            index,
            name: name.to_owned(),
            function,
            recorder,
            session,
            unmask: UnmaskWatch::default(),
            left_over,
            ended: lost,
            client_log: RateLimit::default(),
        })
    }

    /// Adds it to the event loop.
    pub(in crate::server) fn add(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.function.watch_wakes(epoll, self.index)?;
        if let Some(session) = &mut self.session {
            session.watch(epoll, self.index, &mut self.recorder)?;
        }
        self.watch_unmask(epoll)
    }

    /// Serves a client from its first message on. There is none at the time.
    pub(in crate::server) fn start_session(
        &mut self,
        epoll: &Epoll,
        socket: OwnedFd,
    ) -> io::Result<()> {
        let mut session = Session::new(socket, Instant::now() + HANDSHAKE_TIME);
        session.watch(epoll, self.index, &mut self.recorder)?;
        self.session = Some(session);
        Ok(())
    }

    /// Whether it has a client.
    pub(in crate::server) fn is_busy(&self) -> bool {
        self.session.is_some()
    }

    /// Does what an event asks for.
    pub(in crate::server) fn turn(&mut self, epoll: &Epoll, source: Source) -> io::Result<Turn> {
        for source in std::mem::take(&mut self.left_over) {
            self.hear(source);
        }
        let has_work = self.function.0.has_work();
        if source == Source::Work && has_work
            || matches!(source, Source::Wake(_) | Source::Unmask | Source::Reload)
        {
            self.hear(source);
        }
        // An event of a session that ended earlier in this round finds none.
        let Some(session) = &mut self.session else { return Ok(Turn::Nothing) };
        let greeted = session.handshake_deadline().is_none();
        let progress = session.turn(source, &mut self.recorder, self.function.0.as_mut());
        let progress = match progress {
            Ok(progress) => progress,
            Err(end) => return self.end_session(epoll, &end).map(|()| Turn::Ended),
        };
        session.watch(epoll, self.index, &mut self.recorder)?;
        if !greeted && session.handshake_deadline().is_none() {
            self.log("client connected");
        }
        self.watch_unmask(epoll)?;
        Ok(if progress == Progress::Nothing { Turn::Nothing } else { Turn::Served })
    }

    /// Whether the function goes on by itself when it gets another turn.
    pub(in crate::server) fn has_work(&self) -> bool {
        !self.left_over.is_empty()
            || self.function.0.has_work()
            || self.session.as_ref().is_some_and(Session::has_more)
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(in crate::server) fn deadline(&self) -> Option<Instant> {
        self.session.as_ref()?.handshake_deadline()
    }

    /// Ends a handshake that takes too long.
    pub(in crate::server) fn expire(&mut self, epoll: &Epoll, now: Instant) -> io::Result<()> {
        if self.deadline().is_none_or(|at| at > now) {
            return Ok(());
        }
        self.end_session(epoll, &SessionEnd::Silent)
    }

    /// Whether a session has ended since this was asked last.
    pub(in crate::server) fn take_ended(&mut self) -> bool {
        std::mem::take(&mut self.ended)
    }

    /// The end of the server, which waits for nobody.
    pub(in crate::server) fn stop(&mut self) {
        if let Some(session) = &mut self.session {
            let _ = session.flush(&mut self.recorder);
        }
        self.function.0.client_left();
        if let Some(session) = &mut self.session {
            session.show(self.function.0.as_ref());
        }
        self.recorder.clear();
        if let Some(session) = self.session.take() {
            session.hang_up();
        }
    }

    /// The end of this process, not of the session: all that is in flight is finished, and recorded.
    pub(in crate::server) fn drain(&mut self) {
        let attempt = self.recorder.begin(Activity::Work);
        if attempt == Attempt::Do {
            self.function.0.quiesce();
        }
        self.commit();
        if let Some(session) = &mut self.session {
            let _ = session.flush(&mut self.recorder);
            session.suspend_page();
        }
    }

    /// Tells the function of an event that is its own: a transaction.
    fn hear(&mut self, source: Source) {
        let activity = match source {
            Source::Wake(index) => Activity::Wake(index),
            Source::Unmask => Activity::Unmask,
            Source::Reload => Activity::Reload,
            _ => Activity::Work,
        };
        match self.recorder.begin(activity) {
            Attempt::Do => self.function.hear(source),
            Attempt::GiveUp => {
                // Its registers are what they are after a reset, which a driver can deal with.
                let _ = self.function.0.device_reset();
            }
        }
        if source == Source::Unmask {
            self.recorder.note_unmasked();
        }
        self.commit();
    }

    fn commit(&mut self) {
        let function = self.function.0.as_mut();
        let committed = match &mut self.session {
            Some(session) => session.commit(&mut self.recorder, function, None, None),
            None => self.recorder.commit(function, None, None, None),
        };
        committed.expect("only what is to be sent can be refused");
    }

    fn end_session(&mut self, epoll: &Epoll, end: &SessionEnd) -> io::Result<()> {
        let mut session = self.session.take();
        if let Some(session) = &mut session {
            session.remove(epoll)?;
            // A probe that connects and leaves without a word is no client.
            if session.handshake_deadline().is_none() || !matches!(end, SessionEnd::Left) {
                self.log(&format!("client gone: {end}"));
            }
        }
        self.function.0.client_left();
        if let Some(session) = &mut session {
            session.show(self.function.0.as_ref());
        }
        self.watch_unmask(epoll)?;
        // Before anybody hears of it: the state of one client must not meet the next one.
        self.recorder.clear();
        // Not earlier: the end of the connection tells the client that its memory is given back.
        if let Some(session) = session {
            session.hang_up();
        }
        self.ended = true;
        Ok(())
    }

    fn watch_unmask(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.unmask.follow(self.function.0.unmask_eventfd(), epoll, self.index)
    }

    fn log(&mut self, what: &str) {
        if let Some(suppressed) = self.client_log.admit() {
            info!(function = self.name, suppressed, "{what}");
        }
    }
}
