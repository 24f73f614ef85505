//! DMA_MAP and DMA_UNMAP.

use barkeep_tests::peer::message::{Payload, command::*};
use barkeep_tests::peer::requests::{dma_map, dma_unmap};
use rustix::io::Errno;

use crate::table::{Bytes, Exchange, Fd, Row, msg, refused, row};

const PAGE: u64 = 4096;
const TOP: u64 = 0u64.wrapping_sub(PAGE);
const READ: u32 = 1;
const WRITE: u32 = 2;
const BOTH: u32 = READ | WRITE;
const ALL: u32 = 2;

fn map(address: u64, size: u64) -> Bytes {
    msg(DMA_MAP, dma_map(BOTH, 0, address, size)).with([Fd::Memory(1 << 16)])
}

fn map_of(flags: u32, offset: u64, size: u64, fd: Fd) -> Bytes {
    msg(DMA_MAP, dma_map(flags, offset, 0, size)).with([fd])
}

fn unmap(address: u64, size: u64) -> Bytes {
    msg(DMA_UNMAP, dma_unmap(0, address, size))
}

fn map_argsz(argsz: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(BOTH).u64(0).u64(0).u64(PAGE).done()
}

fn unmap_argsz(argsz: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(ALL).u64(0).u64(0).done()
}

/// A refused mapping, and then nothing that could be unmapped.
fn changes_nothing(name: &str, attempt: Exchange) -> Row {
    row(name, [attempt, msg(DMA_UNMAP, dma_unmap(0, 0, 1 << 20)).fails(Errno::NOENT)])
}

pub(crate) fn map_rows() -> Vec<Row> {
    let mut rows: Vec<Row> = refused(
        DMA_MAP,
        Errno::INVAL,
        [
            ("DMA_MAP: argsz 0", map_argsz(0)),
            ("DMA_MAP: argsz 31", map_argsz(31)),
            ("DMA_MAP: 31 bytes", dma_map(BOTH, 0, 0, PAGE)[..31].to_vec()),
            ("DMA_MAP: 33 bytes", [dma_map(BOTH, 0, 0, PAGE), vec![0]].concat()),
            ("DMA_MAP: 64 bytes", [dma_map(BOTH, 0, 0, PAGE), vec![0; 32]].concat()),
            ("DMA_MAP: flag bit 2", dma_map(0b111, 0, 0, PAGE)),
            ("DMA_MAP: flag bit 3", dma_map(0b1000, 0, 0, PAGE)),
            ("DMA_MAP: flag bit 31", dma_map(BOTH | 1 << 31, 0, 0, PAGE)),
            ("DMA_MAP: all flags", dma_map(u32::MAX, 0, 0, PAGE)),
            ("DMA_MAP: address 1", dma_map(BOTH, 0, 1, PAGE)),
            ("DMA_MAP: address 4095", dma_map(BOTH, 0, PAGE - 1, PAGE)),
            ("DMA_MAP: address 2^64 - 1", dma_map(BOTH, 0, u64::MAX, PAGE)),
            ("DMA_MAP: size 0", dma_map(BOTH, 0, 0, 0)),
            ("DMA_MAP: size 0 at the top", dma_map(BOTH, 0, TOP, 0)),
            ("DMA_MAP: size 1", dma_map(BOTH, 0, 0, 1)),
            ("DMA_MAP: size 4095", dma_map(BOTH, 0, 0, PAGE - 1)),
            ("DMA_MAP: size 4097", dma_map(BOTH, 0, 0, PAGE + 1)),
            ("DMA_MAP: size 2^64 - 1", dma_map(BOTH, 0, 0, u64::MAX)),
            ("DMA_MAP: wraps by a page", dma_map(BOTH, 0, TOP, 2 * PAGE)),
            ("DMA_MAP: wraps by everything", dma_map(BOTH, 0, 2 * PAGE, TOP)),
        ],
    )
    .collect();
    rows.extend(overlaps());
    rows.extend(files());
    rows.push(row(
        "DMA_MAP: ends where the address space does",
        [map(TOP, PAGE).succeeds(), unmap(TOP, PAGE).succeeds()],
    ));
    rows.push(row(
        "DMA_MAP: overlaps at the end of the address space",
        [map(TOP, PAGE).succeeds(), map(TOP - PAGE, 2 * PAGE).fails(Errno::EXIST)],
    ));
    rows
}

fn overlaps() -> Vec<Row> {
    let window = || map(4 * PAGE, 4 * PAGE).succeeds();
    let exists = [
        ("itself", 4, 4),
        ("its first page", 4, 1),
        ("its last page", 7, 1),
        ("a page inside", 5, 1),
        ("its start", 3, 2),
        ("its end", 7, 2),
        ("all of it and more", 3, 6),
    ];
    let mut rows: Vec<Row> = exists
        .into_iter()
        .map(|(name, first, pages)| {
            row(
                format!("DMA_MAP: overlaps {name}"),
                [
                    window(),
                    map(first * PAGE, pages * PAGE).fails(Errno::EXIST),
                    unmap(4 * PAGE, 4 * PAGE).succeeds(),
                ],
            )
        })
        .collect();
    rows.push(row(
        "DMA_MAP: neighbours on both sides",
        [
            window(),
            map(3 * PAGE, PAGE).succeeds(),
            map(8 * PAGE, PAGE).succeeds(),
            unmap(3 * PAGE, 6 * PAGE).succeeds(),
        ],
    ));
    rows.push(row(
        "DMA_MAP: overlaps a window without memory",
        [
            msg(DMA_MAP, dma_map(BOTH, 0, 0, 1 << 62)).succeeds(),
            map(1 << 40, PAGE).fails(Errno::EXIST),
        ],
    ));
    rows
}

fn files() -> Vec<Row> {
    let memory = Fd::Memory(1 << 16);
    let invalid = [
        ("an unaligned offset", map_of(BOTH, 1, PAGE, memory)),
        ("an offset where the file ends", map_of(BOTH, 1 << 16, PAGE, memory)),
        ("an offset of 2^63", map_of(BOTH, 1 << 63, PAGE, memory)),
        ("an offset that overflows", map_of(BOTH, TOP, 2 * PAGE, memory)),
        ("a window that ends behind the file", map_of(BOTH, 1 << 15, 1 << 16, memory)),
        ("a file of half a page", map_of(BOTH, 0, PAGE, Fd::Memory(2048))),
        ("a file without a byte", map_of(BOTH, 0, PAGE, Fd::Memory(0))),
        ("2^63 bytes of a page", map_of(BOTH, 0, 1 << 63, Fd::Memory(PAGE))),
        ("all but a page of the address space", map_of(BOTH, 0, TOP, Fd::Memory(PAGE))),
        ("a socket", map_of(BOTH, 0, PAGE, Fd::Socket)),
        ("a pipe", map_of(BOTH, 0, PAGE, Fd::Pipe)),
        ("an eventfd", map_of(BOTH, 0, PAGE, Fd::Eventfd)),
        ("an epoll instance", map_of(BOTH, 0, PAGE, Fd::Epoll)),
        ("a directory", map_of(BOTH, 0, PAGE, Fd::Directory)),
        ("/dev/null", map_of(BOTH, 0, PAGE, Fd::DevNull)),
        ("two descriptors", map(0, PAGE).with([memory; 2])),
        ("descriptors of two kinds", map(0, PAGE).with([memory, Fd::Eventfd])),
    ];
    let other = [
        ("a mere place", map_of(BOTH, 0, PAGE, Fd::PathOnly), Errno::BADF),
        (
            "a window to write over a file to read",
            map_of(BOTH, 0, PAGE, Fd::ReadOnly),
            Errno::ACCESS,
        ),
        (
            "a window to read over a file to write",
            map_of(READ, 0, PAGE, Fd::WriteOnly),
            Errno::ACCESS,
        ),
        (
            "a window to write over a seal",
            map_of(BOTH, 0, PAGE, Fd::SealedAgainstWrites),
            Errno::PERM,
        ),
    ];
    let invalid = invalid.map(|(name, bytes)| (name, bytes, Errno::INVAL));
    let refused = invalid.into_iter().chain(other).map(|(name, bytes, errno)| {
        changes_nothing(&format!("DMA_MAP: {name}"), bytes.fails(errno))
    });
    let accepted = [
        ("a window to read over a file to read", map_of(READ, 0, PAGE, Fd::ReadOnly)),
        ("a window to read over a seal", map_of(READ, 0, PAGE, Fd::SealedAgainstWrites)),
        ("a window for nothing", map_of(0, 0, PAGE, memory)),
        ("a sealed file to its last page", map_of(BOTH, 15 * PAGE, PAGE, Fd::Sealed(1 << 16))),
        ("8 TiB without a page", map_of(BOTH, 0, 1 << 43, Fd::Memory(1 << 43))),
        ("2^63 bytes without memory", msg(DMA_MAP, dma_map(BOTH, 0, 0, 1 << 63))),
    ];
    let accepted = accepted.map(|(name, bytes)| {
        row(
            format!("DMA_MAP: {name}"),
            [bytes.succeeds(), msg(DMA_UNMAP, dma_unmap(ALL, 0, 0)).succeeds()],
        )
    });
    refused.chain(accepted).collect()
}

pub(crate) fn unmap_rows() -> Vec<Row> {
    let mut rows: Vec<Row> = refused(
        DMA_UNMAP,
        Errno::INVAL,
        [
            ("DMA_UNMAP: argsz 0", unmap_argsz(0)),
            ("DMA_UNMAP: argsz 23", unmap_argsz(23)),
            ("DMA_UNMAP: 23 bytes", dma_unmap(ALL, 0, 0)[..23].to_vec()),
            ("DMA_UNMAP: 25 bytes", [dma_unmap(ALL, 0, 0), vec![0]].concat()),
            ("DMA_UNMAP: flag bit 2", dma_unmap(1 << 2, 0, PAGE)),
            ("DMA_UNMAP: flag bit 31", dma_unmap(1 << 31, 0, PAGE)),
            ("DMA_UNMAP: all flags", dma_unmap(u32::MAX, 0, 0)),
            ("DMA_UNMAP: ALL with an address", dma_unmap(ALL, PAGE, 0)),
            ("DMA_UNMAP: ALL with a size", dma_unmap(ALL, 0, PAGE)),
            ("DMA_UNMAP: ALL with a bitmap", dma_unmap(0b11, 0, 0)),
            ("DMA_UNMAP: a bitmap without its fields", dma_unmap(0b01, 0, PAGE)),
            ("DMA_UNMAP: wraps", dma_unmap(0, TOP, 2 * PAGE)),
            ("DMA_UNMAP: wraps by everything", dma_unmap(0, PAGE, u64::MAX)),
            ("DMA_UNMAP: a bitmap of pages of 0 bytes", with_bitmap(0, 8)),
            ("DMA_UNMAP: a bitmap of pages of 3 bytes", with_bitmap(3, 8)),
            ("DMA_UNMAP: a bitmap of pages of 2^63 bytes", with_bitmap(1 << 63, 8)),
            ("DMA_UNMAP: a bitmap of 0 bytes", with_bitmap(PAGE, 0)),
            ("DMA_UNMAP: a bitmap of 2^64 - 1 bytes", with_bitmap(PAGE, u64::MAX)),
        ],
    )
    .collect();
    rows.extend(refused(
        DMA_UNMAP,
        Errno::NOENT,
        [
            ("DMA_UNMAP: nothing", dma_unmap(0, 0, PAGE)),
            ("DMA_UNMAP: size 0", dma_unmap(0, 0, 0)),
            ("DMA_UNMAP: everything there could be, of nothing", dma_unmap(0, 0, u64::MAX)),
            ("DMA_UNMAP: a byte of nothing", dma_unmap(0, 1, 1)),
        ],
    ));
    let window = || map(4 * PAGE, 4 * PAGE).succeeds();
    let bisecting = [
        ("its first page", 4 * PAGE, PAGE),
        ("its last page", 7 * PAGE, PAGE),
        ("a page inside", 5 * PAGE, PAGE),
        ("all but a byte", 4 * PAGE, 4 * PAGE - 1),
        ("all but the first byte", 4 * PAGE + 1, 4 * PAGE),
        ("from before into it", 0, 5 * PAGE),
        ("from inside to the end of everything", 5 * PAGE, 0u64.wrapping_sub(5 * PAGE)),
    ];
    rows.extend(bisecting.map(|(name, address, size)| {
        row(
            format!("DMA_UNMAP: splits a window: {name}"),
            [
                window(),
                unmap(address, size).fails(Errno::INVAL),
                unmap(4 * PAGE, 4 * PAGE).succeeds(),
            ],
        )
    }));
    rows.extend([
        row(
            "DMA_UNMAP: twice",
            [
                window(),
                unmap(4 * PAGE, 4 * PAGE).succeeds(),
                unmap(4 * PAGE, 4 * PAGE).fails(Errno::NOENT),
            ],
        ),
        row("DMA_UNMAP: ALL of nothing", [msg(DMA_UNMAP, dma_unmap(ALL, 0, 0)).succeeds()]),
        row(
            "DMA_UNMAP: ALL, and nothing is left",
            [
                window(),
                msg(DMA_UNMAP, dma_unmap(ALL, 0, 0)).succeeds(),
                unmap(0, 1 << 32).fails(Errno::NOENT),
            ],
        ),
        row(
            "DMA_UNMAP: two windows and the holes around them",
            [window(), map(16 * PAGE, PAGE).succeeds(), unmap(0, 1 << 32).succeeds()],
        ),
        row(
            "DMA_UNMAP: with the window's descriptor",
            [window(), unmap(4 * PAGE, 4 * PAGE).with([Fd::Memory(PAGE)]).succeeds()],
        ),
        row(
            "DMA_UNMAP: one window whole and half of the next",
            [
                window(),
                map(8 * PAGE, 2 * PAGE).succeeds(),
                unmap(4 * PAGE, 5 * PAGE).fails(Errno::INVAL),
                unmap(4 * PAGE, 6 * PAGE).succeeds(),
            ],
        ),
    ]);
    rows
}

/// DMA_UNMAP of a page with the fields of a bitmap behind it (`struct vfio_bitmap`, without its
/// pointer), and no window.
fn with_bitmap(page_size: u64, size: u64) -> Vec<u8> {
    Payload::new().u32(40).u32(1).u64(0).u64(PAGE).u64(page_size).u64(size).done()
}
