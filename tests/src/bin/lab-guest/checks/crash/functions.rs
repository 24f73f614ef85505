//! Networks, entropy, consoles, registers and shared memory, each used while its worker is killed.

use std::env;
use std::io::Write;

use super::super::direct::{self, IVSHMEM_ID};
use super::super::virtio::{console, net, rng};
use super::super::{shared_memory, uio};
use super::kernel;
use super::kills::Kills;
use crate::edu::{self, Edu, register};
use crate::pci::Function;
use crate::pci::command::{BUS_MASTER, MEMORY_SPACE};
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

pub(super) fn run_all(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    kernel::look_for_hung_tasks();
    if env::var("lab_without").is_ok_and(|what| what == "net") {
        for name in ["net-connection", "net-ping"] {
            report.skip(name, "the host has no network for it")?;
        }
    } else {
        report.check("net-connection", || {
            net::set_up()?;
            let mut kills = Kills::begin("net")?;
            net::exchange(nonce, || kills.go_on())
        })?;
        report.check("net-ping", net::ping)?;
    }
    report.check("rng-reads", || {
        rng::current()?;
        let rounds = Kills::begin("rng")?.during(|_| rng::reads().map(|_| ()))?;
        Ok(format!("{rounds} rounds"))
    })?;
    let edu = Registers::take()?;
    report.check("edu-registers", || {
        let rounds = Kills::begin("edu")?.during(|round| {
            keeps(&edu.driver, round)?;
            use_registers(&edu)
        })?;
        Ok(format!("{rounds} rounds"))
    })?;
    report.check("edu-interrupts", || interrupts(&edu))?;
    report.check("memory-kept", || memory(nonce))?;
    report.check("console-exchange", || {
        Kills::begin("console")?.wait()?;
        // Whoever was connected before is not any more.
        Requests::open()?.ask_and_await("connect-console")?;
        console::exchange()
    })?;
    report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
    Ok(())
}

/// The edu function, ready for use.
#[derive(Debug)]
pub(super) struct Registers {
    pub(super) function: Function,
    pub(super) driver: Edu,
}

impl Registers {
    pub(super) fn take() -> Result<Self> {
        let function = Function::find(edu::ID.0, edu::ID.1)?;
        function.set_attribute("enable", "1")?;
        function.set_command(MEMORY_SPACE | BUS_MASTER, true)?;
        let driver = Edu { bar: function.map_bar(0)? };
        Ok(Self { function, driver })
    }
}

/// Registers hold their values, the function computes and moves data.
pub(super) fn use_registers(edu: &Registers) -> Result<()> {
    direct::registers(&edu.driver)?;
    let factorial = edu.driver.factorial(10)?;
    ensure!(factorial == 3_628_800, "10! is {factorial}");
    direct::dma(&edu.driver)?;
    Ok(())
}

/// Many accesses, each of which has an effect that the next one sees.
fn keeps(edu: &Edu, round: u32) -> Result<()> {
    const ACCESSES: u32 = 2000;
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    for access in 0..ACCESSES {
        let value = round << 16 | access;
        let read = edu.liveness_of(value);
        ensure!(read == !value, "access {access}: liveness of {value:#x} reads {read:#x}");
        let bit = 1 << (access % 32);
        edu.write(register::INTERRUPT_RAISE, bit);
        let raised = edu.read(register::INTERRUPT_STATUS);
        ensure!(raised == bit, "access {access}: {raised:#x} is raised, not {bit:#x}");
        edu.write(register::INTERRUPT_ACKNOWLEDGE, bit);
        let raised = edu.read(register::INTERRUPT_STATUS);
        ensure!(raised == 0, "access {access}: {raised:#x} is left after the acknowledgement");
    }
    Ok(())
}

/// INTx through uio_pci_generic: none is lost.
fn interrupts(edu: &Registers) -> Result<String> {
    let mut driver = uio::Uio::bind(&edu.function)?;
    let rounds = Kills::begin("edu")?.during(|_| {
        uio::check(&mut driver, &edu.driver)?;
        uio::check_level(&mut driver, &edu.driver)?;
        uio::check_disable(&mut driver, &edu.driver)?;
        Ok(())
    })?;
    Ok(format!("{rounds} rounds"))
}

/// The host's half of the memory stays as it was, the guest's as the guest writes it.
fn memory(nonce: &str) -> Result<String> {
    let function = Function::find(IVSHMEM_ID.0, IVSHMEM_ID.1)?;
    function.set_attribute("enable", "1")?;
    function.set_command(MEMORY_SPACE, true)?;
    let memory = function.map_bar(2)?;
    let half = shared_memory::guest_half(&memory);
    let (host, guest) = (shared_memory::host_line(nonce), shared_memory::guest_line(nonce));
    let rounds = Kills::begin("ivshmem")?.during(|_| {
        shared_memory::compare(&memory, 0, half, &host)?;
        shared_memory::fill(&memory, half, &guest);
        // A mapping of its own, which QEMU or the kernel may have to make anew.
        let again = function.map_bar(2)?;
        shared_memory::compare(&again, 0, half, &host)?;
        let mut line = guest.bytes().cycle();
        for offset in (half..again.len()).step_by(8) {
            let expected = shared_memory::next_word(&mut line);
            let read: u64 = again.read(offset);
            ensure!(read == expected, "offset {offset:#x} reads {read:#x}, not {expected:#x}");
        }
        Ok(())
    })?;
    Ok(format!("{rounds} rounds"))
}
