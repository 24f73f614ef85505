//! Reads and writes the BARs of a function without a pause, while Memory Space Enable is toggled by
//! another processor of this guest or by somebody outside.
//!
//! What a read may give is the function's own value or, as nobody answers, all ones. Zero is what a
//! VMM gives that has nothing at the address, so it is counted apart from other wrong values.

use std::io::{self, BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Result;
use crate::edu::{self, register};
use crate::mmio::Mapping;
use crate::pci::{Function, command};

/// How often a bystander hears of the toggles.
const TOGGLES_AT_ONCE: u64 = 20;

/// What was written to where 8 bytes can be written. No byte is zero, and none is all ones.
const PATTERN: u64 = 0x1122_3344_5566_7788;
const LIVENESS: u32 = 0x5a5a_1234;

/// Works on the function of a `kind` (`edu` or `ivshmem`; `untouched` is an `edu` whose BAR nobody uses meanwhile, for
/// what toggles do by themselves). `toggles` is how often the guest switches memory decode
/// off and on, or `until-told`: then somebody else does, and a line on standard input is the end.
pub(crate) fn run(kind: &str, toggles: &str) -> Result<()> {
    let function = match kind {
        "edu" | "untouched" => Function::find(edu::ID.0, edu::ID.1)?,
        _ => Function::find(0x1af4, 0x1110)?,
    };
    function.set_attribute("enable", "1")?;
    function.set_command(command::MEMORY_SPACE | command::BUS_MASTER, true)?;
    let target = Target::of(kind, &function)?;
    target.prepare();

    let enabled = target.first();
    let mut disabled = None;
    if toggles != "until-told" {
        function.set_command(command::MEMORY_SPACE, false)?;
        disabled = Some(target.first());
        function.set_command(command::MEMORY_SPACE, true)?;
    }
    let again = target.first();
    say(&format!(
        "BEGIN enabled {enabled:#x} disabled {} again {again:#x}",
        disabled.map_or("untried".to_owned(), |value| format!("{value:#x}"))
    ))?;

    let began = Instant::now();
    let stop = AtomicBool::new(false);
    // The mapping stays in this thread.
    let (toggled, seen) = thread::scope(|scope| {
        let toggler = scope.spawn(|| {
            stay_on(2);
            let toggled = match toggles.parse() {
                Ok(count) => toggle(&function, count).map_err(|error| error.to_string()),
                Err(_) => until_told().map(|()| 0),
            };
            stop.store(true, Ordering::Relaxed);
            toggled
        });
        stay_on(1);
        let seen = target.hammer(&stop);
        (toggler.join(), seen)
    });
    let toggled = toggled.map_err(|_| "the processor that toggles gave up")??;
    let seconds = began.elapsed().as_secs_f64();
    say(&format!(
        "RESULT toggles {} live {} ones {} zero {} other {} seconds {seconds:.1} last {:#x} first-wrong {}",
        toggled,
        seen.live,
        seen.ones,
        seen.zero,
        seen.other,
        target.first(),
        seen.first_wrong.as_deref().unwrap_or("none")
    ))
}

/// Keeps a thread on a processor of its own, if there is one.
fn stay_on(processor: usize) {
    let mut only = CpuSet::new();
    only.set(processor);
    let _ = sched_setaffinity(None, &only);
}

/// A line for the host, at once.
fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn toggle(function: &Function, count: u64) -> Result<u64> {
    let on = function.read_u16(crate::pci::COMMAND)?;
    for done in 1..=count {
        function.write_u16(crate::pci::COMMAND, on & !command::MEMORY_SPACE)?;
        function.write_u16(crate::pci::COMMAND, on)?;
        if done.is_multiple_of(TOGGLES_AT_ONCE) {
            say(&format!("TOGGLED {done}"))?;
        }
    }
    Ok(count)
}

fn until_told() -> std::result::Result<(), String> {
    let mut line = String::new();
    match io::stdin().lock().read_line(&mut line) {
        Ok(0) => Err("nobody is there to say when to end".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// What reads gave.
#[derive(Debug, Default)]
struct Seen {
    live: u64,
    ones: u64,
    zero: u64,
    other: u64,
    first_wrong: Option<String>,
}

impl Seen {
    fn count(&mut self, register: usize, value: u64, live: u64, ones: u64) {
        if value == live {
            self.live += 1;
            return;
        } else if value == ones {
            self.ones += 1;
            return;
        } else if value == 0 {
            self.zero += 1;
        } else {
            self.other += 1;
        }
        self.first_wrong.get_or_insert_with(|| format!("{value:#x}@{register:#x}"));
    }
}

/// What is read and written.
#[derive(Debug)]
enum Target {
    Registers(Mapping),
    Memory(Mapping),
    Untouched(Mapping),
}

impl Target {
    fn of(kind: &str, function: &Function) -> Result<Self> {
        Ok(match kind {
            "edu" => Self::Registers(function.map_bar(0)?),
            "untouched" => Self::Untouched(function.map_bar(0)?),
            "ivshmem" => Self::Memory(function.map_bar(2)?),
            _ => return Err(format!("no function `{kind}` to hammer").into()),
        })
    }

    /// From here on every read has one right value.
    fn prepare(&self) {
        match self {
            Self::Registers(bar) | Self::Untouched(bar) => {
                bar.write(register::LIVENESS, LIVENESS);
                bar.write(register::DMA_SOURCE, PATTERN);
                bar.write(register::DMA_DESTINATION, !PATTERN);
            }
            Self::Memory(bar) => bar.write(0, PATTERN),
        }
    }

    fn first(&self) -> u32 {
        match self {
            Self::Registers(bar) | Self::Untouched(bar) => bar.read(register::IDENTIFICATION),
            Self::Memory(bar) => bar.read(0),
        }
    }

    fn hammer(&self, stop: &AtomicBool) -> Seen {
        let mut seen = Seen::default();
        while !stop.load(Ordering::Relaxed) {
            match self {
                Self::Registers(bar) => hammer_registers(bar, &mut seen),
                Self::Memory(bar) => hammer_memory(bar, &mut seen),
                Self::Untouched(_) => std::hint::spin_loop(),
            }
        }
        seen
    }
}

/// Reads are of 8 bytes. Where a memory slot appears while KVM emulates an access, it copies from the slot, fewer than 8
/// bytes one by one; real functions answer those, QEMU's edu doesn't, and that would be a zero of the lab's own.
fn hammer_registers(bar: &Mapping, seen: &mut Seen) {
    for (register, value) in
        [(register::DMA_SOURCE, PATTERN), (register::DMA_DESTINATION, !PATTERN)]
    {
        bar.write(register::LIVENESS, LIVENESS);
        bar.write(register, value);
        seen.count(register, bar.read(register), value, u64::MAX);
    }
}

fn hammer_memory(bar: &Mapping, seen: &mut Seen) {
    let [one, two, three, four, .., last] = PATTERN.to_le_bytes();
    bar.write(0, PATTERN);
    seen.count(0, bar.read(0), PATTERN, u64::MAX);
    let value: u32 = bar.read(0);
    let half = u32::from_le_bytes([one, two, three, four]);
    seen.count(0, value.into(), half.into(), u32::MAX.into());
    let value: u8 = bar.read(7);
    seen.count(7, value.into(), last.into(), u8::MAX.into());
}
