//! Four functions of one backend in one guest: two `edu`, two `ivshmem`, each by its own.

use std::env;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use super::direct::IVSHMEM_ID;
use super::shared_memory;
use crate::edu::{self, Edu, register};
use crate::memory::{DmaPage, PAGE_SIZE};
use crate::mmio::Mapping;
use crate::pci::Function;
use crate::pci::command::{BUS_MASTER, MEMORY_SPACE};
use crate::report::Report;
use crate::vfio::{Device, Enabled, Interrupt};
use crate::{Result, ensure};

const SOURCE: u64 = 0x0800_0000;
const TARGET: u64 = 0x0900_0000;
/// How much shared memory each process has for itself.
const SHARE: usize = 64 << 10;

/// Runs every check of this kind of guest.
///
/// # Errors
/// There is nothing to check: a function is missing or vfio does not give it out.
pub(crate) fn run(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    let edus = pair(edu::ID)?;
    let ivshmems = pair(IVSHMEM_ID)?;
    for ivshmem in &ivshmems {
        ivshmem.set_attribute("enable", "1")?;
        ivshmem.set_command(MEMORY_SPACE, true)?;
    }
    report.check("many-memories", || {
        let [first, second] = &ivshmems;
        compare(&first.map_bar(2)?, nonce)?;
        compare(&second.map_bar(2)?, &format!("second {nonce}"))
    })?;
    {
        let devices = [open(&edus[0])?, open(&edus[1])?];
        let drivers = [driver(&devices[0])?, driver(&devices[1])?];
        report.check("many-registers", || registers(&drivers))?;
        report.check("many-msi", || interrupts(&devices, &drivers, Interrupt::Msi))?;
        report.check("many-intx", || interrupts(&devices, &drivers, Interrupt::Intx))?;
    }
    report.check("many-at-once", || at_once(rounds))?;
    Ok(())
}

/// One of the processes of `many-at-once`: uses the function at `index` for a number of rounds.
///
/// # Errors
/// The function does not do what it should.
pub(crate) fn work(kind: &str, index: usize, part: usize, rounds: u32) -> Result<()> {
    match kind {
        "edu" => {
            let [first, second] = pair(edu::ID)?;
            work_on_edu(if index == 0 { &first } else { &second }, index, rounds)
        }
        "ivshmem" => {
            let [first, second] = pair(IVSHMEM_ID)?;
            let function = if index == 0 { &first } else { &second };
            work_on_memory(&function.map_bar(2)?, index, part, rounds)
        }
        _ => Err(format!("no kind of function '{kind}'").into()),
    }
}

fn pair(id: (u64, u64)) -> Result<[Function; 2]> {
    let found = Function::find_all(id.0, id.1)?;
    let count = found.len();
    found.try_into().map_err(|_| format!("{count} functions {:04x}:{:04x}", id.0, id.1).into())
}

fn open(function: &Function) -> Result<Device> {
    let device = Device::open(function)?;
    device.set_command(BUS_MASTER, true)?;
    Ok(device)
}

fn driver(device: &Device) -> Result<Edu> {
    Ok(Edu { bar: device.map_bar(0)? })
}

fn compare(memory: &Mapping, nonce: &str) -> Result<String> {
    // What the host wrote; the other half belongs to other guests.
    let half = shared_memory::guest_half(memory);
    shared_memory::compare(memory, 0, half, &shared_memory::host_line(nonce))
}

fn registers(edus: &[Edu; 2]) -> Result<String> {
    for (value, edu) in [0x0101_0101, 0x0202_0202].into_iter().zip(edus) {
        edu.write(register::LIVENESS, value);
    }
    for (value, edu) in [0x0101_0101, 0x0202_0202].into_iter().zip(edus) {
        let read = edu.read(register::LIVENESS);
        ensure!(read == !value, "liveness of {value:#x} reads {read:#x}");
    }
    let (first, second) = (edus[0].factorial(5)?, edus[1].factorial(6)?);
    ensure!((first, second) == (120, 720), "5! is {first}, 6! is {second}");
    Ok("each has its own".into())
}

/// What one function raises arrives from that function only.
fn interrupts(devices: &[Device; 2], edus: &[Edu; 2], interrupt: Interrupt) -> Result<String> {
    for edu in edus {
        edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    }
    let enabled = [devices[0].enable(interrupt)?, devices[1].enable(interrupt)?];
    for (raised, quiet) in [(0, 1), (1, 0), (1, 0), (0, 1)] {
        edus[raised].write(register::INTERRUPT_RAISE, 1);
        arrives(&enabled[raised], &edus[raised], interrupt)
            .map_err(|error| format!("function {raised}: {error}"))?;
        enabled[quiet].expect_none().map_err(|error| format!("function {quiet}: {error}"))?;
    }
    for edu in edus {
        edu.write(register::INTERRUPT_RAISE, 2);
    }
    for (enabled, edu) in enabled.iter().zip(edus) {
        arrives(enabled, edu, interrupt)?;
    }
    for enabled in &enabled {
        enabled.expect_none()?;
    }
    Ok("each gets its own".into())
}

fn arrives(enabled: &Enabled<'_>, edu: &Edu, interrupt: Interrupt) -> Result<()> {
    let count = enabled.wait()?;
    ensure!(count == 1, "{count} interrupts for one");
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    if interrupt == Interrupt::Intx {
        enabled.unmask()?;
    }
    Ok(())
}

/// Six processes, each with a function or a part of one.
fn at_once(rounds: u32) -> Result<String> {
    let workers = [
        ("edu", "0", "0"),
        ("edu", "1", "0"),
        ("ivshmem", "0", "0"),
        ("ivshmem", "0", "1"),
        ("ivshmem", "1", "0"),
        ("ivshmem", "1", "1"),
    ];
    let program = env::current_exe()?;
    let started = workers.map(|(kind, index, part)| -> Result<Child> {
        Ok(Command::new(&program)
            .args(["worker", kind, index, part, &rounds.to_string()])
            .stderr(Stdio::piped())
            .spawn()?)
    });
    // Every process is waited for before any is judged.
    let ended =
        started.map(|child| Ok::<_, Box<dyn std::error::Error>>(child?.wait_with_output()?));
    for ((kind, index, part), output) in workers.into_iter().zip(ended) {
        let output = output?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{kind} {index} part {part}: {}", said.trim());
    }
    Ok(format!("{} processes, {rounds} rounds each", workers.len()))
}

fn work_on_edu(function: &Function, index: usize, rounds: u32) -> Result<()> {
    let device = open(function)?;
    let edu = driver(&device)?;
    let (source, target) = (DmaPage::filled_with(0)?, DmaPage::filled_with(0)?);
    device.map_dma(&source, SOURCE)?;
    device.map_dma(&target, TARGET)?;
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    let arrivals = device.enable(Interrupt::Msi)?;
    for round in 0..rounds {
        let value = round << 1 | u32::try_from(index)?;
        let read = edu.liveness_of(value);
        ensure!(read == !value, "round {round}: liveness of {value:#x} reads {read:#x}");
        let factorial = edu.factorial(10)?;
        ensure!(factorial == 3_628_800, "round {round}: 10! is {factorial}");

        edu.write(register::INTERRUPT_RAISE, 1);
        let count = arrivals.wait().map_err(|error| format!("round {round}: {error}"))?;
        ensure!(count == 1, "round {round}: {count} interrupts for one");
        edu.write(register::INTERRUPT_ACKNOWLEDGE, 1);

        let [tag, ..] = value.to_le_bytes();
        source.store(&[tag; PAGE_SIZE]);
        edu.dma_from_ram(SOURCE, PAGE_SIZE as u64)?;
        edu.dma_to_ram(TARGET, PAGE_SIZE as u64)?;
        ensure!(target.contents() == [tag; PAGE_SIZE], "round {round}: the data is wrong");
    }
    arrivals.expect_none()
}

fn work_on_memory(memory: &Mapping, index: usize, part: usize, rounds: u32) -> Result<()> {
    let start = part * SHARE;
    for round in 0..rounds {
        let tag = (round as u64) << 32 | (index as u64) << 24 | (part as u64) << 16;
        for word in 0..SHARE / 8 {
            memory.write(start + word * 8, tag | word as u64);
        }
        for word in 0..SHARE / 8 {
            let read: u64 = memory.read(start + word * 8);
            let written = tag | word as u64;
            ensure!(read == written, "round {round}: {read:#x} at word {word}, not {written:#x}");
        }
    }
    Ok(())
}
