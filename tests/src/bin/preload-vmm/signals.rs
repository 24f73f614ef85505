//! SIGBUS that has to do with no BAR, and what the VMM is told about it.

use std::sync::atomic::Ordering;

use libc::{SIG_BLOCK, SIG_DFL, SIG_IGN, SIG_SETMASK, SIG_UNBLOCK, SIGBUS, SIGUSR1};

use crate::raw::{self, BLOCKED, CODE, HANDLED, PLACE, STACK};
use crate::{Outcome, say};

fn with_information() -> usize {
    raw::handler as *const () as usize
}

fn plain() -> usize {
    raw::plain_handler as *const () as usize
}

/// What is set, in words that do not differ from run to run.
fn shown(action: &libc::sigaction) -> String {
    let handler = match action.sa_sigaction {
        SIG_DFL => "default",
        SIG_IGN => "ignored",
        other if other == with_information() => "with information",
        other if other == plain() => "plain",
        _ => "another",
    };
    // The C library sets this one itself.
    let flags = action.sa_flags & !0x0400_0000;
    let mask = [SIGBUS, SIGUSR1].map(|signal| raw::contains(&action.sa_mask, signal));
    format!("{handler} {flags:#x} {mask:?}")
}

fn set(handler: usize, flags: i32, mask: &[i32]) -> raw::Answer<String> {
    raw::sigaction(SIGBUS, Some(&raw::action(handler, flags, mask))).map(|before| shown(&before))
}

/// A page of a file that has none any more.
fn lost_page() -> raw::Answer<usize> {
    let file = raw::memfd(0x1000)?;
    let at = raw::shared(file, 0x1000)?;
    raw::truncate(file, 0)?;
    Ok(at)
}

fn handled() -> (usize, u64) {
    (HANDLED.load(Ordering::SeqCst), CODE.load(Ordering::SeqCst))
}

pub(crate) fn disposition() -> Outcome {
    say("at first", set(SIG_IGN, 0, &[]));
    say("ignored", set(with_information(), libc::SA_SIGINFO, &[SIGUSR1]));
    say("handled", set(plain(), libc::SA_RESTART | libc::SA_NODEFER | libc::SA_ONSTACK, &[]));
    say("otherwise", set(SIG_DFL, 0, &[SIGUSR1, SIGBUS]));
    say("at last", raw::sigaction(SIGBUS, None).map(|action| shown(&action)));
    say("no such signal", raw::sigaction(99, None).map(|_| ()));
    say(
        "not this one",
        raw::sigaction(libc::SIGKILL, Some(&raw::action(SIG_IGN, 0, &[]))).map(|_| ()),
    );
    Ok(())
}

pub(crate) fn by_signal() -> Outcome {
    say("before", raw::signal(SIGBUS, plain()) == SIG_DFL);
    say("what it set", raw::sigaction(SIGBUS, None).map(|action| shown(&action)));
    raw::raise(SIGBUS);
    raw::raise(SIGBUS);
    say("handled", handled());
    say("before", raw::signal(SIGBUS, SIG_IGN) == plain());
    raw::raise(SIGBUS);
    say("handled", handled());
    say("before", raw::signal(SIGBUS, SIG_DFL) == SIG_IGN);
    say("no such signal", raw::signal(99, SIG_DFL) == libc::SIG_ERR);
    Ok(())
}

pub(crate) fn handler_runs() -> Outcome {
    set(with_information(), libc::SA_SIGINFO, &[])?;
    for _ in 0..5 {
        let at = lost_page()?;
        let seen = raw::load(at + 0x10);
        say("read", (seen, raw::load(at), PLACE.load(Ordering::SeqCst) == at + 0x10));
        let at = lost_page()?;
        raw::store(at + 0x20, 7);
        say("written", (raw::load(at + 0x20), raw::load(at)));
        let at = lost_page()?;
        say("by 16 bytes", raw::load_16_bytes(at + 0x40));
        let at = lost_page()?;
        let mut data = [1; 32];
        raw::copy_out(at, &mut data);
        say("copied", data);
        say("handled", handled());
    }
    Ok(())
}

/// The mask in a handler, and what is left of it after.
pub(crate) fn handler_details() -> Outcome {
    let cases: [(&str, i32, &[i32]); 4] = [
        ("nothing", 0, &[]),
        ("a mask", 0, &[SIGUSR1]),
        ("not deferred", libc::SA_NODEFER, &[]),
        ("not deferred, with a mask", libc::SA_NODEFER, &[SIGUSR1, SIGBUS]),
    ];
    for (case, flags, mask) in cases {
        set(with_information(), libc::SA_SIGINFO | flags, mask)?;
        raw::load(lost_page()?);
        say(case, (handled(), BLOCKED.load(Ordering::SeqCst)));
        raw::raise(SIGBUS);
        say("raised", (handled(), BLOCKED.load(Ordering::SeqCst)));
        raw::kill_self(SIGBUS)?;
        say("sent", (handled(), BLOCKED.load(Ordering::SeqCst)));
        let after = raw::sigprocmask(SIG_BLOCK, None)?;
        say("after", [SIGUSR1, SIGBUS].map(|signal| raw::contains(&after, signal)));
    }
    Ok(())
}

pub(crate) fn handler_on_its_stack() -> Outcome {
    let stack = raw::anonymous(0x20000)?;
    raw::use_signal_stack(stack, 0x20000)?;
    let on_it = || (stack..stack + 0x20000).contains(&STACK.load(Ordering::SeqCst));
    set(with_information(), libc::SA_SIGINFO | libc::SA_ONSTACK, &[])?;
    raw::load(lost_page()?);
    say("on it", (handled(), on_it()));
    set(with_information(), libc::SA_SIGINFO, &[])?;
    raw::load(lost_page()?);
    say("not on it", (handled(), on_it()));
    Ok(())
}

pub(crate) fn reset_hand() -> Outcome {
    set(with_information(), libc::SA_SIGINFO | libc::SA_RESETHAND, &[])?;
    raw::load(lost_page()?);
    say("once", handled());
    say("reset", raw::sigaction(SIGBUS, None).map(|action| action.sa_sigaction == SIG_DFL));
    say("twice", raw::in_child(|| raw::load(lost_page().unwrap_or(0)).cast_signed()));
    Ok(())
}

pub(crate) fn masks() -> Outcome {
    let shown = |set: &libc::sigset_t| {
        [SIGBUS, SIGUSR1, libc::SIGTERM].map(|signal| raw::contains(set, signal))
    };
    type Change = fn(i32, Option<&[i32]>) -> raw::Answer<libc::sigset_t>;
    let ways: [(&str, Change); 2] =
        [("sigprocmask", raw::sigprocmask), ("pthread_sigmask", raw::pthread_sigmask)];
    for (way, change) in ways {
        let change = |how, set: Option<&[i32]>| change(how, set).map(|before| shown(&before));
        say(way, change(SIG_BLOCK, Some(&[SIGBUS])));
        say("blocked", change(SIG_BLOCK, None));
        say("and another", change(SIG_BLOCK, Some(&[SIGUSR1])));
        say("not this one", change(SIG_UNBLOCK, Some(&[SIGBUS, libc::SIGTERM])));
        say("set", change(SIG_SETMASK, Some(&[SIGBUS, libc::SIGTERM])));
        say("again", change(SIG_SETMASK, Some(&[SIGUSR1])));
        say("all", change(SIG_SETMASK, Some(&(1..32).collect::<Vec<_>>())));
        say("none", change(SIG_SETMASK, Some(&[])));
        say("at last", change(SIG_SETMASK, None));
        say("bad", change(77, Some(&[SIGBUS])));
    }
    Ok(())
}

/// What a thread sends itself while it blocks it waits until it does not.
fn pending_in_this_thread() -> Outcome {
    let is_pending = || raw::sigpending().map(|set| raw::contains(&set, SIGBUS));
    set(with_information(), libc::SA_SIGINFO, &[])?;
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    raw::raise(SIGBUS);
    say("raised", handled().0);
    say("pending", is_pending());
    raw::pthread_sigmask(SIG_UNBLOCK, Some(&[SIGBUS]))?;
    say("unblocked", handled());
    say("pending", is_pending());
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    raw::raise(SIGBUS);
    set(SIG_IGN, 0, &[])?;
    say("dropped when ignored", is_pending());
    set(with_information(), libc::SA_SIGINFO, &[])?;
    raw::pthread_sigmask(SIG_UNBLOCK, Some(&[SIGBUS]))?;
    say("not handled", handled().0);
    Ok(())
}

/// The same, and what is sent to the process.
pub(crate) fn pending() -> Outcome {
    pending_in_this_thread()?;
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    raw::kill_self(SIGBUS)?;
    say("sent", handled().0);
    say("pending", raw::sigpending().map(|set| raw::contains(&set, SIGBUS)));
    raw::pthread_sigmask(SIG_SETMASK, Some(&[]))?;
    say("unblocked", handled());
    Ok(())
}

/// What a thread sends itself beside another one that blocks it as well. What is sent to a process of
/// several threads is pending a moment later with the library than without.
pub(crate) fn pending_in_a_thread() -> Outcome {
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    std::thread::spawn(pending_in_this_thread).join().unwrap_or(Err(0))?;
    say("here", raw::sigpending().map(|set| raw::contains(&set, SIGBUS)));
    Ok(())
}

pub(crate) fn waited_for_in_a_thread() -> Outcome {
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    std::thread::spawn(waited_for).join().unwrap_or(Err(0))
}

/// SIGBUS that is fetched instead of handled.
pub(crate) fn waited_for() -> Outcome {
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    raw::raise(SIGBUS);
    say("fetched", raw::await_signal(&[SIGBUS, SIGUSR1]));
    raw::kill_self(SIGBUS)?;
    say("fetched", raw::await_signal(&[SIGBUS, SIGUSR1]));
    say("none left", raw::sigpending().map(|set| raw::contains(&set, SIGBUS)));
    Ok(())
}

/// A descriptor that tells of signals instead of a handler, as QEMU's main loop has one.
pub(crate) fn by_descriptor() -> Outcome {
    set(with_information(), libc::SA_SIGINFO, &[])?;
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS, SIGUSR1]))?;
    let fd = raw::signalfd(&[SIGBUS, SIGUSR1])?;
    for signal in [SIGBUS, SIGUSR1, SIGBUS] {
        raw::raise(signal);
        say("told", raw::read_signal(fd));
    }
    raw::kill_self(SIGBUS)?;
    say("told", raw::read_signal(fd));
    say("handled", handled().0);
    Ok(())
}

/// A thread starts with the mask of the one that made it.
pub(crate) fn new_threads() -> Outcome {
    raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
    let inherited = || raw::pthread_sigmask(SIG_BLOCK, None).map(|set| raw::contains(&set, SIGBUS));
    say("here", inherited());
    say("there", std::thread::spawn(inherited).join().unwrap_or(Err(0)));
    raw::pthread_sigmask(SIG_UNBLOCK, Some(&[SIGBUS]))?;
    say("there", std::thread::spawn(inherited).join().unwrap_or(Err(0)));
    Ok(())
}

pub(crate) fn dies() -> Outcome {
    // Rust's own handler, which looks for stacks that overflow.
    say("with a handler that gives up", raw::in_child(die));
    set(SIG_DFL, 0, &[])?;
    say("by default", raw::in_child(die));
    let died = raw::in_child(|| std::thread::spawn(die).join().unwrap_or(1));
    say("in a thread", died);
    say("read", die());
    Ok(())
}

fn die() -> i32 {
    raw::load(lost_page().unwrap_or(0)).cast_signed()
}

/// A fault that is blocked ends the process, whatever handler there is.
pub(crate) fn dies_blocked() -> Outcome {
    set(with_information(), libc::SA_SIGINFO, &[])?;
    let blocked = || {
        let _ = raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]));
        die()
    };
    say("blocked", raw::in_child(blocked));
    say("in a thread", raw::in_child(move || std::thread::spawn(blocked).join().unwrap_or(1)));
    say("by the thread before it", {
        raw::pthread_sigmask(SIG_BLOCK, Some(&[SIGBUS]))?;
        raw::in_child(|| std::thread::spawn(die).join().unwrap_or(1))
    });
    say("handled", handled());
    Ok(())
}

pub(crate) fn dies_ignored() -> Outcome {
    set(SIG_IGN, 0, &[])?;
    raw::raise(SIGBUS);
    say("ignored", handled());
    say("but not a fault", raw::in_child(die));
    Ok(())
}

pub(crate) fn dies_raised() -> Outcome {
    set(SIG_DFL, 0, &[])?;
    say("raised", raw::in_child(|| raw::raise(SIGBUS)));
    say("sent", raw::in_child(|| raw::kill_self(SIGBUS).unwrap_or(0)));
    Ok(())
}

/// QEMU's handler ends the process by the signal that it was given.
pub(crate) fn dies_reraised() -> Outcome {
    let reraise = raw::reraising_handler as *const () as usize;
    set(reraise, libc::SA_SIGINFO, &[])?;
    say("a fault", raw::in_child(die));
    say("in a thread", raw::in_child(|| std::thread::spawn(die).join().unwrap_or(1)));
    say("raised", raw::in_child(|| raw::raise(SIGBUS)));
    say("sent", raw::in_child(|| raw::kill_self(SIGBUS).unwrap_or(0)));
    Ok(())
}

pub(crate) fn other_signals() -> Outcome {
    let before = raw::sigaction(SIGUSR1, Some(&raw::action(plain(), 0, &[SIGBUS])))?;
    say("before", shown(&before));
    raw::raise(SIGUSR1);
    say("handled", (handled(), PLACE.load(Ordering::SeqCst), BLOCKED.load(Ordering::SeqCst)));
    say("after", raw::sigaction(SIGUSR1, None).map(|action| shown(&action)));
    say("by signal", raw::signal(SIGUSR1, SIG_IGN) == plain());
    say("a bad address", raw::in_child(|| raw::load(0x10).cast_signed()));
    Ok(())
}
