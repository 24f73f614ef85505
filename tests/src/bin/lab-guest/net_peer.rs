//! The ends of a TCP transfer between guest and host. Each makes the same bytes from the same seed, so
//! every byte that arrives is compared, and whoever received says what it got.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use crate::pattern::{Pattern, hash};
use crate::{Result, ensure};

/// Where the host's end listens.
pub(crate) const PORT: u16 = 7000;
const CHUNK: usize = 64 << 10;
/// What a request starts with for an exchange; 0 and 1 are the directions of a transfer.
const BOTH_WAYS: u8 = 2;

/// Where the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToHost,
    FromHost,
}

/// The host's end: serves one transfer after the other, until it is killed.
///
/// # Errors
/// It can't listen.
pub(crate) fn serve(address: &str) -> Result<()> {
    let listener = TcpListener::bind((address, PORT))?;
    loop {
        let (connection, _) = listener.accept()?;
        // The guest's end sees what went wrong, and says so.
        let _ = answer(&connection);
    }
}

/// The guest's end of one transfer of `len` bytes.
///
/// # Errors
/// The connection failed, or what arrived is not what was sent.
pub(crate) fn transfer(
    mut connection: &TcpStream,
    direction: Direction,
    seed: u64,
    len: usize,
) -> Result<String> {
    let mut request = vec![u8::from(direction == Direction::FromHost)];
    request.extend(seed.to_le_bytes());
    request.extend(u64::try_from(len)?.to_le_bytes());
    connection.write_all(&request)?;
    let sum = match direction {
        Direction::ToHost => send(connection, seed, len)?,
        Direction::FromHost => receive(connection, seed, len)?,
    };
    let mut theirs = [0; 8];
    connection.read_exact(&mut theirs).map_err(|error| format!("the peer's sum: {error}"))?;
    let theirs = u64::from_le_bytes(theirs);
    ensure!(theirs == sum, "the peer's sum is {theirs:#x}, ours {sum:#x}");
    Ok(format!("{len} bytes, sum {sum:#x}"))
}

/// The guest's end of an exchange on one connection: what is sent comes back, until `go_on` says that it
/// is enough.
///
/// # Errors
/// The connection failed, or what came back is not what was sent.
pub(crate) fn exchange(
    mut connection: &TcpStream,
    seed: u64,
    mut go_on: impl FnMut() -> Result<bool>,
) -> Result<String> {
    let mut request = [0; 17];
    request[0] = BOTH_WAYS;
    connection.write_all(&request)?;
    let mut pattern = Pattern::new(seed);
    let (mut sent, mut received) = ([0; CHUNK], [0; CHUNK]);
    let mut bytes = 0;
    while go_on()? {
        pattern.fill(&mut sent);
        connection
            .write_all(&sent)
            .and_then(|()| connection.read_exact(&mut received))
            .map_err(|error| format!("after {bytes} bytes: {error}"))?;
        ensure!(received == sent, "damaged after {bytes} bytes");
        bytes += CHUNK;
    }
    Ok(format!("{bytes} bytes there and back"))
}

fn answer(mut connection: &TcpStream) -> Result<()> {
    let mut request = [0; 17];
    connection.read_exact(&mut request)?;
    let [from_host, rest @ ..] = request;
    if from_host == BOTH_WAYS {
        return echo(connection);
    }
    let (mut seed, mut len) = ([0; 8], [0; 8]);
    seed.copy_from_slice(&rest[..8]);
    len.copy_from_slice(&rest[8..]);
    let (seed, len) = (u64::from_le_bytes(seed), usize::try_from(u64::from_le_bytes(len))?);
    let sum =
        if from_host == 0 { receive(connection, seed, len)? } else { send(connection, seed, len)? };
    Ok(connection.write_all(&sum.to_le_bytes())?)
}

fn echo(mut connection: &TcpStream) -> Result<()> {
    let mut chunk = [0; CHUNK];
    loop {
        connection.read_exact(&mut chunk)?;
        connection.write_all(&chunk)?;
    }
}

fn send(mut connection: &TcpStream, seed: u64, len: usize) -> Result<u64> {
    let mut pattern = Pattern::new(seed);
    let mut chunk = [0; CHUNK];
    let mut sum = 0;
    for sent in (0..len).step_by(CHUNK) {
        let chunk = &mut chunk[..CHUNK.min(len - sent)];
        pattern.fill(chunk);
        sum = hash_on(sum, chunk);
        connection.write_all(chunk).map_err(|error| format!("after {sent} bytes: {error}"))?;
    }
    Ok(sum)
}

fn receive(mut connection: &TcpStream, seed: u64, len: usize) -> Result<u64> {
    let mut pattern = Pattern::new(seed);
    let (mut chunk, mut expected) = ([0; CHUNK], [0; CHUNK]);
    let mut sum = 0;
    for received in (0..len).step_by(CHUNK) {
        let len = CHUNK.min(len - received);
        connection
            .read_exact(&mut chunk[..len])
            .map_err(|error| format!("after {received} bytes: {error}"))?;
        pattern.fill(&mut expected[..len]);
        ensure!(chunk[..len] == expected[..len], "damaged after {received} bytes");
        sum = hash_on(sum, &chunk[..len]);
    }
    Ok(sum)
}

fn hash_on(sum: u64, chunk: &[u8]) -> u64 {
    sum.rotate_left(1) ^ hash(chunk)
}
