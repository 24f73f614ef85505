//! The ends of an exchange on a console: the guest prompts, the host answers a line, and the guest
//! says what the line's hash is.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::pattern::{Pattern, hash};
use crate::{Result, ensure};

/// Lines of an exchange.
pub(crate) const LINES: usize = 40;
/// Longer than a buffer of the guest's terminal.
const LONGEST: u64 = 6000;
const PROMPT: &[u8] = b"lab login: ";
/// How long the host's end waits for the guest to boot and for each word.
const PATIENCE: Duration = Duration::from_secs(90);

/// The guest's end. How many bytes arrived.
///
/// # Errors
/// The port fails or its other end is silent.
pub(crate) fn ask<P>(port: &P) -> Result<usize>
where
    for<'a> &'a P: Read + Write,
{
    let mut port = port;
    let mut bytes = 0;
    for index in 0..LINES {
        port.write_all(PROMPT)?;
        let line = read_line(&mut port).map_err(|error| format!("line {index}: {error}"))?;
        bytes += line.len();
        port.write_all(format!("{:016x}\n", hash(&line)).as_bytes())?;
    }
    Ok(bytes)
}

/// The host's end: connects to the console's socket as soon as it can.
///
/// # Errors
/// The guest does not prompt, or says something else than what was sent.
pub(crate) fn answer(socket: &str) -> Result<()> {
    let mut connection = connect(socket)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut random = Pattern::new(u64::from(std::process::id()));
    for index in 0..LINES {
        read_prompt(&mut connection).map_err(|error| format!("prompt {index}: {error}"))?;
        let len = usize::try_from(1 + random.below(LONGEST))?;
        let mut line: Vec<u8> = Vec::with_capacity(len + 1);
        // Every character but the one that ends a line.
        line.extend((0..len).map(|_| match random.next().to_le_bytes()[3] {
            b'\n' => b' ',
            byte => byte,
        }));
        let expected = format!("{:016x}", hash(&line));
        line.push(b'\n');
        connection.write_all(&line)?;
        let echo = read_line(&mut connection).map_err(|error| format!("echo {index}: {error}"))?;
        let echo = String::from_utf8_lossy(&echo);
        ensure!(echo == expected, "line {index} of {len} bytes came back as '{echo}'");
    }
    Ok(())
}

fn connect(socket: &str) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(connection) => return Ok(connection),
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(format!("{socket}: {error}").into()),
        }
    }
}

/// Whatever else is said before the prompt is not for us.
fn read_prompt(from: &mut impl Read) -> Result<()> {
    let mut seen = Vec::new();
    while !seen.ends_with(PROMPT) {
        seen.push(read_byte(from)?);
    }
    Ok(())
}

fn read_line(from: &mut impl Read) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match read_byte(from)? {
            b'\n' => return Ok(line),
            byte => line.push(byte),
        }
    }
}

fn read_byte(from: &mut impl Read) -> Result<u8> {
    let mut byte = [0];
    ensure!(from.read(&mut byte)? == 1, "nothing more was said");
    Ok(byte[0])
}
