use std::fmt::Display;
use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, SeekFrom, flock, ioctl_blkpbszget, seek};
use rustix::io::Errno;

use super::engine::Witness;
use crate::config::{ConfigError, Parameters};
use crate::devices::virtio::rate_limit::Limits;

/// The length of a disk's serial number in bytes (5.2.6).
pub(super) const SERIAL: usize = 20;

/// How long an image may stay locked after the death of the process that served it: the kernel keeps the
/// file until the last write that it had begun is done, and so must whoever comes next.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// What the operator chose.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) image: Image,
    pub(super) read_only: bool,
    /// Padded with NUL.
    pub(super) serial: [u8; SERIAL],
    pub(super) queues: u16,
    /// A power of two.
    pub(super) queue_size: u16,
    /// Whether the cache starts as one that acknowledges writes before they are durable.
    pub(super) writeback: bool,
    pub(super) discard: bool,
    pub(super) limits: Limits,
    pub(super) aio: Aio,
}

/// How the image is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aio {
    IoUring,
    Sync,
}

/// The file or block device that holds the disk's data, locked.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: Arc<File>,
    pub(super) path: String,
    /// For an image that is written to, asked after the death of a process only. The kernel tells each of those who opened a
    /// file once that something could not be written, and a process may die of or right after that.
    pub(super) witness: Option<Witness>,
    is_device: bool,
    /// The size of a logical block of the disk in bytes.
    pub(super) block_size: u32,
}

/// Enough for a queue for each vCPU of a large machine.
const QUEUES: RangeInclusive<u64> = 1..=64;
/// A request has a header, data and a status.
const QUEUE_SIZES: RangeInclusive<u64> = 4..=1024;
/// What nearly every file system has for a block, in bytes.
const FILE_BLOCK: u32 = 4096;

impl Options {
    /// Takes the parameters and opens the image.
    ///
    /// # Errors
    /// [`ConfigError`] that names the parameter and the reason.
    pub(super) fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let switch = [("on", true), ("off", false)];
        let path = parameters.take_string("path").ok_or(ConfigError::Missing("path"))?;
        let read_only = choice(parameters, "readonly", false, &switch)?;
        let serial = serial(parameters)?;
        let block_sizes = [("512", 512), ("4096", 4096)];
        let block_size = choice(parameters, "logical-block-size", 512, &block_sizes)?;
        let queues = number(parameters, "queues", 1, QUEUES)?;
        let queue_size = number(parameters, "queue-size", 256, QUEUE_SIZES)?;
        if !queue_size.is_power_of_two() {
            let reason = format!("{queue_size} is no power of two");
            return Err(ConfigError::invalid("queue-size", reason));
        }
        let modes = [("writeback", true), ("writethrough", false)];
        let writeback = choice(parameters, "cache", true, &modes)?;
        let discard = choice(parameters, "discard", true, &switch)?;
        let kinds = [("io_uring", Aio::IoUring), ("sync", Aio::Sync)];
        let aio = choice(parameters, "aio", Aio::IoUring, &kinds)?;
        let limits = Limits::from_parameters(parameters)?;
        // Last: a lock that is taken for nothing could disturb the one who holds the image.
        let image = Image::open(path, read_only, block_size)?;
        Ok(Self { image, read_only, serial, queues, queue_size, writeback, discard, limits, aio })
    }
}

/// Takes one of a few values.
fn choice<T: Copy>(
    parameters: &mut Parameters,
    key: &'static str,
    default: T,
    values: &[(&str, T)],
) -> Result<T, ConfigError> {
    let Some(text) = parameters.take_string(key) else { return Ok(default) };
    let found = values.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        ConfigError::invalid(key, format!("'{text}' is not {}", names.join(" or ")))
    })
}

fn number(
    parameters: &mut Parameters,
    key: &'static str,
    default: u16,
    range: RangeInclusive<u64>,
) -> Result<u16, ConfigError> {
    let Some(number) = parameters.take_number(key)? else { return Ok(default) };
    u16::try_from(number).ok().filter(|_| range.contains(&number)).ok_or_else(|| {
        let reason = format!("{number} is not from {} to {}", range.start(), range.end());
        ConfigError::invalid(key, reason)
    })
}

fn serial(parameters: &mut Parameters) -> Result<[u8; SERIAL], ConfigError> {
    let text = parameters.take_string("serial").unwrap_or_default();
    let mut serial = [0; SERIAL];
    let room = serial.get_mut(..text.len()).ok_or_else(|| {
        let reason = format!("{} bytes, longer than {SERIAL}", text.len());
        ConfigError::invalid("serial", reason)
    })?;
    if !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return Err(ConfigError::invalid("serial", "holds more than printable ASCII characters"));
    }
    room.copy_from_slice(text.as_bytes());
    Ok(serial)
}

impl Image {
    /// Opens and locks an image: alone, or with other readers.
    ///
    /// # Errors
    /// [`ConfigError`] for `path` when it can't be opened, is neither a file nor a block device, is
    /// in use, or has no size that a disk can have.
    fn open(path: String, read_only: bool, block_size: u32) -> Result<Self, ConfigError> {
        // Before it is opened, which would wait for the other end of a FIFO.
        let file_type = fs::metadata(&path).map_err(|error| invalid(&path, error))?.file_type();
        let is_device = is_device(file_type).map_err(|reason| invalid(&path, reason))?;
        let file = OpenOptions::new().read(true).write(!read_only).open(&path);
        let file = file.map_err(|error| invalid(&path, error))?;
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        lock_soon(&file, lock).map_err(|errno| match errno {
            Errno::WOULDBLOCK => invalid(&path, "in use: another process has locked it"),
            errno => invalid(&path, format!("can't be locked: {errno}")),
        })?;
        let witness = if read_only { None } else { Some(File::open(&path).map(Arc::new)) };
        let witness = witness.transpose().map_err(|error| invalid(&path, error))?;
        let image = Self { file: Arc::new(file), path, witness, is_device, block_size };
        image.size().map_err(|reason| ConfigError::invalid("path", reason))?;
        Ok(image)
    }

    /// Its size in bytes, as it is now: a multiple of the logical block's, and not 0.
    ///
    /// # Errors
    /// When it is not, or can't be told, in one line.
    pub(super) fn size(&self) -> Result<u64, String> {
        // fstat() tells nothing of a block device.
        let size = seek(&self.file, SeekFrom::End(0));
        let size = size.map_err(|errno| format!("{}: {errno}", self.path))?;
        if size == 0 {
            return Err(format!("{}: is empty", self.path));
        }
        if !size.is_multiple_of(self.block_size.into()) {
            let Self { path, block_size, .. } = self;
            return Err(format!("{path}: {size} bytes, no multiple of {block_size}"));
        }
        Ok(size)
    }

    /// Whether the witness is of this file.
    pub(super) fn is_opened_by_witness(&self) -> io::Result<bool> {
        let Some(witness) = &self.witness else { return Ok(true) };
        let (ours, theirs) = (self.file.metadata()?, witness.metadata()?);
        Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
    }

    /// The size of the blocks that can be written without reading first, in bytes: a power of two,
    /// not below that of a logical block.
    pub(super) fn physical_block_size(&self) -> u32 {
        let told = if self.is_device { ioctl_blkpbszget(&self.file).ok() } else { None };
        let size = told.filter(|size| size.is_power_of_two() && *size <= 1 << 20);
        size.unwrap_or(FILE_BLOCK).max(self.block_size)
    }
}

fn is_device(file_type: FileType) -> Result<bool, &'static str> {
    if file_type.is_dir() {
        return Err("is a directory");
    }
    if !file_type.is_file() && !file_type.is_block_device() {
        return Err("neither a file nor a block device");
    }
    Ok(file_type.is_block_device())
}

fn invalid(path: &str, reason: impl Display) -> ConfigError {
    ConfigError::invalid("path", format!("{path}: {reason}"))
}

/// Locks the image, and waits for [`LOCK_PATIENCE`] if somebody else has it.
fn lock_soon(file: &File, lock: FlockOperation) -> Result<(), Errno> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(file, lock) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
            result => return result,
        }
    }
}
