//! A function that comes and goes while the guest runs. The host plugs it in and out when asked to.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use super::identity;
use crate::edu::{self, Edu, register};
use crate::memory::{DmaPage, PAGE_SIZE};
use crate::pci::Function;
use crate::pci::command::BUS_MASTER;
use crate::report::Report;
use crate::requests::Requests;
use crate::vfio::{Device, Interrupt};
use crate::{Result, ensure};

const BUFFER: u64 = 0x0800_0000;

/// How often each stage was passed, and what ended the rounds before their time.
#[derive(Default)]
struct Rounds {
    arrived: u32,
    worked: u32,
    left: u32,
}

/// Runs every check of this kind of guest.
///
/// # Errors
/// The report or the host can't be reached.
pub(crate) fn run(report: &mut Report<impl Write>, rounds: u32) -> Result<()> {
    let requests = &mut Requests::open()?;
    let mut passed = Rounds::default();
    let mut ended = Ok(());
    for round in 0..rounds {
        ended = passed.pass(requests, round).map_err(|error| format!("round {round}: {error}"));
        if ended.is_err() {
            break;
        }
    }
    let why = ended.err().unwrap_or_default();
    for (name, count) in [
        ("hotplug-arrives", passed.arrived),
        ("hotplug-works", passed.worked),
        ("hotplug-leaves", passed.left),
    ] {
        report.check(name, || {
            ensure!(count == rounds, "{count} of {rounds} rounds; {why}");
            Ok(format!("{rounds} rounds"))
        })?;
    }
    Ok(())
}

impl Rounds {
    fn pass(&mut self, requests: &mut Requests, round: u32) -> Result<()> {
        requests.ask("plug")?;
        wait_for("the function to appear", || found().pop())?;
        let function = Function::find(edu::ID.0, edu::ID.1)?;
        identity::check(&function, &identity::EDU)?;
        self.arrived += 1;

        work(&function, round)?;
        function.unbind()?;
        self.worked += 1;

        requests.ask("unplug")?;
        wait_for("the function to vanish", || (!function.is_present()).then_some(()))?;
        ensure!(found().is_empty(), "it is still there at another address");
        self.left += 1;
        Ok(())
    }
}

fn found() -> Vec<Function> {
    Function::find_all(edu::ID.0, edu::ID.1).unwrap_or_default()
}

/// The function is new each time, and all of it works. It is left in use: unplugging is its end.
fn work(function: &Function, round: u32) -> Result<()> {
    // It can be seen a little before drivers may have it.
    let device = wait_for("vfio-pci", || Device::open(function).ok())?;
    let edu = Edu { bar: device.map_bar(0)? };
    edu::expect_power_on(&edu)?;
    device.set_command(BUS_MASTER, true)?;
    let read = edu.liveness_of(round);
    ensure!(read == !round, "liveness of {round:#x} reads {read:#x}");

    let interrupt = if round.is_multiple_of(2) { Interrupt::Msi } else { Interrupt::Intx };
    let arrivals = device.enable(interrupt)?;
    edu.write(register::INTERRUPT_RAISE, 1);
    let count = arrivals.wait().map_err(|error| format!("{interrupt:?}: {error}"))?;
    ensure!(count == 1, "{count} interrupts for one");
    drop(arrivals);

    let [tag, ..] = (round | 0x80).to_le_bytes();
    let page = DmaPage::filled_with(tag)?;
    device.map_dma(&page, BUFFER)?;
    edu.dma_from_ram(BUFFER, PAGE_SIZE as u64)?;
    page.store(&[0; PAGE_SIZE]);
    edu.dma_to_ram(BUFFER, PAGE_SIZE as u64)?;
    ensure!(page.contents() == [tag; PAGE_SIZE], "DMA brought something else");
    Ok(())
}

fn wait_for<T>(what: &str, look: impl Fn() -> Option<T>) -> Result<T> {
    const BOUND: Duration = Duration::from_secs(20);
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(start.elapsed() < BOUND, "waited {BOUND:?} for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
