//! A network interface: what it is, and what goes over it to the host's end and back.

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use super::disk::{function_of, run};
use crate::net_peer::{self, Direction};
use crate::pattern::hash;
use crate::report::Report;
use crate::{Result, ensure};

/// What the host gives the interface.
const MAC: &str = "52:54:00:ba:00:01";
/// Both ends (RFC 5737: for examples).
const HOST: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2/24";
/// virtio 1.2, 4.1.2.1.
const NETWORK_DEVICE: u64 = 0x1041;
const LEN: usize = 16 << 20;

/// Feature bits (virtio 1.2, 5.1.3).
const OFFLOADS: [(usize, &str); 5] =
    [(0, "CSUM"), (1, "GUEST_CSUM"), (7, "GUEST_TSO4"), (11, "HOST_TSO4"), (15, "MRG_RXBUF")];

/// Runs every check of an interface.
///
/// # Errors
/// The report can't be written.
pub(crate) fn run_all(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    // The host may not be permitted to make a network.
    if env::var("lab_without").is_ok_and(|what| what == "net") {
        for name in ["net-identity", "net-offloads", "net-ping", "net-to-host", "net-from-host"] {
            report.skip(name, "the host has no network for it")?;
        }
        return Ok(());
    }
    report.check("net-identity", identity)?;
    report.check("net-offloads", offloads)?;
    report.check("net-ping", || {
        set_up()?;
        ping()
    })?;
    let seed = hash(nonce.as_bytes());
    report.check("net-to-host", || transfer(Direction::ToHost, seed))?;
    report.check("net-from-host", || transfer(Direction::FromHost, seed))?;
    Ok(())
}

fn identity() -> Result<String> {
    let queues: usize = env::var("lab_pairs")?.parse()?;
    let interface = interface()?;
    let id = function_of(&interface.join("device"))?.hex_attribute("device")?;
    ensure!(id == NETWORK_DEVICE, "device id {id:#x}");
    let mtu = fs::read_to_string(interface.join("mtu"))?;
    ensure!(mtu.trim() == "1500", "its MTU is {}", mtu.trim());
    let receiving = fs::read_dir(interface.join("queues"))?
        .filter_map(std::result::Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("rx-"))
        .count();
    ensure!(receiving == queues, "{receiving} queues to receive from, not {queues}");
    Ok(format!("{MAC}, {receiving} pairs of queues"))
}

/// What the driver negotiated, a digit for each bit.
fn offloads() -> Result<String> {
    let features = fs::read_to_string(interface()?.join("device/features"))?;
    let missing: Vec<&str> = OFFLOADS
        .into_iter()
        .filter(|(bit, _)| features.as_bytes().get(*bit) != Some(&b'1'))
        .map(|(_, name)| name)
        .collect();
    ensure!(missing.is_empty(), "not negotiated: {}; features {features}", missing.join(" "));
    Ok(features)
}

/// Gives the interface its address.
pub(crate) fn set_up() -> Result<()> {
    let interface = interface()?;
    let name = interface.file_name().and_then(|name| name.to_str()).ok_or("no name")?;
    run(&["ip", "address", "add", GUEST, "dev", name])?;
    run(&["ip", "link", "set", name, "up"])?;
    Ok(())
}

/// The host's end answers every packet.
pub(crate) fn ping() -> Result<String> {
    let said = run(&["ping", "-c", "5", "-i", "0.1", "-W", "5", "-s", "1400", HOST])?;
    let summary = said.lines().find(|line| line.contains("packet loss")).unwrap_or_default();
    ensure!(summary.contains(" 0% packet loss"), "{summary}");
    Ok(summary.to_owned())
}

/// One connection carries bytes there and back for as long as `go_on` says.
pub(crate) fn exchange(nonce: &str, go_on: impl FnMut() -> Result<bool>) -> Result<String> {
    net_peer::exchange(&connect()?, hash(nonce.as_bytes()), go_on)
}

fn transfer(direction: Direction, seed: u64) -> Result<String> {
    net_peer::transfer(&connect()?, direction, seed, LEN)
}

fn connect() -> Result<TcpStream> {
    let address = format!("{HOST}:{}", net_peer::PORT);
    let connection = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(10))
        .map_err(|error| format!("{address}: {error}"))?;
    connection.set_read_timeout(Some(Duration::from_secs(20)))?;
    connection.set_write_timeout(Some(Duration::from_secs(20)))?;
    Ok(connection)
}

fn interface() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        if has_address(&path) {
            return Ok(path);
        }
    }
    Err(format!("no interface has the address {MAC}").into())
}

fn has_address(interface: &Path) -> bool {
    fs::read_to_string(interface.join("address")).is_ok_and(|address| address.trim() == MAC)
}
