//! DMA through the guest's IOMMU while its mappings change.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::edu::{Edu, register};
use crate::memory::{DmaPage, PAGE_SIZE};
use crate::pci::Function;
use crate::pci::command::BUS_MASTER;
use crate::vfio::Device;
use crate::{Result, ensure};

/// Bus addresses within the 28 bits that the function drives, unlike any physical address in use.
const SOURCE: u64 = 0x0a00_0000;
const TARGET: u64 = 0x0b00_0000;
const MOVING: u64 = 0x0c00_0000;
const CHURNED: u64 = 0x0d00_0000;
const NEVER_MAPPED: u64 = 0x0e00_0000;

const LEN: u64 = PAGE_SIZE as u64;

/// DMA where nothing was ever mapped neither writes nor reads memory.
pub(crate) fn check_unmapped(device: &Device, edu: &Edu) -> Result<String> {
    const KNOWN: u8 = 0x21;
    let page = DmaPage::filled_with(KNOWN)?;
    device.map_dma(&page, SOURCE)?;
    edu.dma_from_ram(SOURCE, LEN)?;
    edu.dma_to_ram(NEVER_MAPPED, LEN)?;
    edu.dma_from_ram(NEVER_MAPPED, LEN)?;
    // What is in the function's buffer now is its own business, but no memory of the guest's.
    edu.dma_to_ram(SOURCE, LEN)?;
    let contents = page.contents();
    let strangers = contents.iter().find(|&&byte| ![KNOWN, 0, 0xff].contains(&byte));
    ensure!(strangers.is_none(), "{strangers:x?} was read where nothing is mapped");

    page.store(&[KNOWN; PAGE_SIZE]);
    edu.dma_from_ram(SOURCE, LEN)?;
    page.store(&[0; PAGE_SIZE]);
    edu.dma_to_ram(SOURCE, LEN)?;
    device.unmap_dma(SOURCE)?;
    ensure!(page.contents() == [KNOWN; PAGE_SIZE], "DMA does not work again");
    Ok("no data, works again after".into())
}

/// Memory mapped for reads is not written.
pub(crate) fn check_read_only(device: &Device, edu: &Edu) -> Result<String> {
    let page = DmaPage::filled_with(0x31)?;
    let target = DmaPage::filled_with(0)?;
    device.map_dma_for_reads(&page, SOURCE)?;
    device.map_dma(&target, TARGET)?;
    edu.dma_from_ram(SOURCE, LEN)?;
    page.store(&[0x32; PAGE_SIZE]);
    edu.dma_to_ram(SOURCE, LEN)?;
    edu.dma_to_ram(TARGET, LEN)?;
    device.unmap_dma(SOURCE)?;
    device.unmap_dma(TARGET)?;
    ensure!(target.contents() == [0x31; PAGE_SIZE], "it was not read");
    ensure!(page.contents() == [0x32; PAGE_SIZE], "it was written");
    Ok("read, not written".into())
}

/// One bus address means another page after each mapping.
pub(crate) fn check_remap(device: &Device, edu: &Edu, rounds: u32) -> Result<String> {
    let source = DmaPage::filled_with(0)?;
    device.map_dma(&source, SOURCE)?;
    for round in 0..rounds {
        let tag = tag_of(round);
        source.store(&[tag; PAGE_SIZE]);
        let (before, after) = (DmaPage::filled_with(!tag)?, DmaPage::filled_with(!tag)?);
        device.map_dma(&before, MOVING)?;
        device.unmap_dma(MOVING)?;
        device.map_dma(&after, MOVING)?;
        edu.dma_from_ram(SOURCE, LEN)?;
        edu.dma_to_ram(MOVING, LEN)?;
        device.unmap_dma(MOVING)?;
        ensure!(after.contents() == [tag; PAGE_SIZE], "round {round}: it did not arrive");
        ensure!(before.contents() == [!tag; PAGE_SIZE], "round {round}: the old page was written");
    }
    device.unmap_dma(SOURCE)?;
    Ok(format!("{rounds} rounds"))
}

/// One unmap takes several mappings away, and none beside them.
pub(crate) fn check_unmap_many(device: &Device, edu: &Edu) -> Result<String> {
    const PAGES: usize = 8;
    let pages: Vec<_> = (0..PAGES).map(|_| DmaPage::filled_with(0x41)).collect::<Result<_>>()?;
    for (page, iova) in pages.iter().zip((CHURNED..).step_by(PAGE_SIZE)) {
        device.map_dma(page, iova)?;
    }
    edu.dma_from_ram(CHURNED, LEN)?;
    let (first, last) = (CHURNED, CHURNED + LEN * (PAGES as u64 - 1));
    device.unmap_dma_range(first + LEN, PAGE_SIZE * (PAGES - 2))?;
    for (page, iova) in pages.iter().zip((CHURNED..).step_by(PAGE_SIZE)) {
        page.store(&[0x42; PAGE_SIZE]);
        edu.dma_to_ram(iova, LEN)?;
    }
    device.unmap_dma(first)?;
    device.unmap_dma(last)?;
    for (index, page) in pages.iter().enumerate() {
        let is_mapped = index == 0 || index == PAGES - 1;
        let expected = if is_mapped { 0x41 } else { 0x42 };
        ensure!(page.contents() == [expected; PAGE_SIZE], "page {index} is wrong");
    }
    Ok(format!("{} of {PAGES} pages", PAGES - 2))
}

/// What was still mapped when the driver left is out of reach for the next.
pub(crate) fn check_close(device: Device, function: &Function) -> Result<String> {
    let left_behind = DmaPage::filled_with(0x51)?;
    device.map_dma(&left_behind, MOVING)?;
    drop(device);

    let device = Device::open(function)?;
    let edu = Edu { bar: device.map_bar(0)? };
    device.set_command(BUS_MASTER, true)?;
    let page = DmaPage::filled_with(0x52)?;
    device.map_dma(&page, SOURCE)?;
    edu.dma_from_ram(SOURCE, LEN)?;
    edu.dma_to_ram(MOVING, LEN)?;
    device.unmap_dma(SOURCE)?;
    ensure!(left_behind.contents() == [0x51; PAGE_SIZE], "it was written");
    Ok("no write".into())
}

/// Mappings that come and go do not disturb DMA through others.
pub(crate) fn check_churn(device: &Device, edu: &Edu, rounds: u32) -> Result<String> {
    let (source, target) = (DmaPage::filled_with(0)?, DmaPage::filled_with(0)?);
    device.map_dma(&source, SOURCE)?;
    device.map_dma(&target, TARGET)?;
    let done = &AtomicBool::new(false);
    let (transferred, cycles) = thread::scope(|scope| {
        let churning = scope.spawn(move || churn(device, done));
        let transferred = (0..rounds).try_for_each(|round| -> Result<()> {
            let tag = tag_of(round);
            source.store(&[tag; PAGE_SIZE]);
            edu.dma_from_ram(SOURCE, LEN)?;
            edu.dma_to_ram(TARGET, LEN)?;
            let seen = target.contents();
            let stranger = seen.iter().position(|&byte| byte != tag);
            ensure!(
                stranger.is_none(),
                "round {round}: bytes from {stranger:?} on are {:02x?}, not {tag:#x}",
                stranger.map(|at| seen[at])
            );
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        (transferred, churning.join().expect("a thread of a check does not panic"))
    });
    device.unmap_dma(SOURCE)?;
    device.unmap_dma(TARGET)?;
    transferred?;
    let cycles = cycles?;
    ensure!(cycles > 0, "no mapping came and went meanwhile");
    Ok(format!("{rounds} rounds, {cycles} mappings came and went"))
}

/// Maps and unmaps until it is told that it is done. An error crosses the thread as its text.
fn churn(device: &Device, done: &AtomicBool) -> std::result::Result<u64, String> {
    let run = || -> Result<u64> {
        let pages = [DmaPage::filled_with(1)?, DmaPage::filled_with(2)?, DmaPage::filled_with(3)?];
        let mut cycles = 0;
        while !done.load(Ordering::Relaxed) {
            for (page, iova) in pages.iter().zip((CHURNED..).step_by(PAGE_SIZE)) {
                device.map_dma(page, iova)?;
            }
            for (_, iova) in pages.iter().zip((CHURNED..).step_by(PAGE_SIZE)) {
                device.unmap_dma(iova)?;
            }
            cycles += pages.len() as u64;
        }
        Ok(cycles)
    };
    run().map_err(|error| error.to_string())
}

/// A page is mapped and taken away while the function writes to it all the time: once the unmap has
/// returned, nothing writes to it any more.
pub(crate) fn check_race(device: &Device, edu: &Edu, rounds: u32) -> Result<String> {
    const WRITTEN: u8 = 0x55;
    let source = DmaPage::filled_with(WRITTEN)?;
    device.map_dma(&source, SOURCE)?;
    edu.dma_from_ram(SOURCE, LEN)?;
    device.unmap_dma(SOURCE)?;
    let done = &AtomicBool::new(false);
    let (transfers, hits) = thread::scope(|scope| {
        let racing = scope.spawn(move || {
            let hits = race(device, rounds, WRITTEN).map_err(|error| error.to_string());
            done.store(true, Ordering::Relaxed);
            hits
        });
        let mut transfers = 0_u64;
        let written = loop {
            if done.load(Ordering::Relaxed) {
                break Ok(transfers);
            }
            transfers += 1;
            if let Err(error) = edu.dma_to_ram(MOVING, LEN) {
                break Err(error);
            }
        };
        (written, racing.join().expect("a thread of a check does not panic"))
    });
    // A transfer that the other side stopped waiting for must not be found by the next check.
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    let (transfers, hits) = (transfers?, hits?);
    ensure!(hits > 0, "none of {transfers} transfers reached the page while it was mapped");
    Ok(format!("{rounds} rounds, {transfers} transfers, {hits} rounds were written to"))
}

fn race(device: &Device, rounds: u32, written: u8) -> Result<u32> {
    /// QEMU's own function takes 100 ms for a transfer.
    const LONG_ENOUGH: Duration = Duration::from_millis(500);
    let page = DmaPage::filled_with(0)?;
    let mut hits = 0;
    for round in 0..rounds {
        let tag = tag_of(round);
        page.store(&[tag; PAGE_SIZE]);
        device.map_dma(&page, MOVING)?;
        let start = Instant::now();
        while page.contents()[PAGE_SIZE - 1] != written && start.elapsed() < LONG_ENOUGH {}
        device.unmap_dma(MOVING)?;
        let seen = page.contents();
        let stranger = seen.iter().find(|&&byte| byte != tag && byte != written);
        ensure!(stranger.is_none(), "round {round}: {stranger:x?} was written");
        hits += u32::from(seen.contains(&written));

        page.store(&[!tag; PAGE_SIZE]);
        for _ in 0..8 {
            let untouched = page.contents() == [!tag; PAGE_SIZE];
            ensure!(untouched, "round {round}: memory was written after the unmap");
        }
    }
    Ok(hits)
}

/// A byte that tells rounds apart and is none of the other values in use.
fn tag_of(round: u32) -> u8 {
    let [low, ..] = round.to_le_bytes();
    0x80 | (low & 0x3f)
}
