use super::WireError;
use super::limits::MAX_DATA_XFER_SIZE;

/// Which pages of a range are dirty: bit `n` of the array of 64-bit words is page `n` of the range,
/// counted from its first address in units of the page size that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageBitmap<'a> {
    bytes: &'a [u8],
}

/// A [`PageBitmap`] to be filled in. It starts out clean.
#[derive(Debug, PartialEq, Eq)]
pub struct PageBitmapMut<'a> {
    bytes: &'a mut [u8],
}

const WORD: usize = size_of::<u64>();

impl<'a> PageBitmap<'a> {
    /// The largest bitmap that goes into one message, in bytes: `max_bitmap_size`.
    pub const MAX_SIZE: u32 = MAX_DATA_XFER_SIZE;

    /// The size of the bitmap of `size` bytes at `address`, in bytes: whole 64-bit words.
    ///
    /// # Errors
    /// [`WireError::Range`] for a range that is empty or wraps, [`WireError::PageSize`],
    /// [`WireError::Transfer`] for a bitmap above [`MAX_SIZE`](Self::MAX_SIZE): the range is to be
    /// asked for in parts.
    pub fn size_for(address: u64, size: u64, page_size: u64) -> Result<u32, WireError> {
        check_range(address, size)?;
        check_page_size(page_size)?;
        let bytes = size.div_ceil(page_size).div_ceil(64).saturating_mul(WORD as u64);
        match u32::try_from(bytes) {
            Ok(bytes) if bytes <= Self::MAX_SIZE => Ok(bytes),
            _ => Err(WireError::Transfer(bytes)),
        }
    }

    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The bitmap as it travels.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Whether this page is dirty. Pages behind the range are not.
    #[must_use]
    pub fn contains(&self, page: usize) -> bool {
        self.bytes.get(byte_of(page)).is_some_and(|byte| byte & bit_of(page) != 0)
    }

    /// The dirty pages, in order.
    pub fn pages(&self) -> impl Iterator<Item = usize> + use<'a> {
        let bitmap = *self;
        (0..self.bytes.len() * 8).filter(move |page| bitmap.contains(*page))
    }
}

impl<'a> PageBitmapMut<'a> {
    pub(super) fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes }
    }

    /// Marks a page dirty. A page behind the end of the bitmap is ignored.
    pub fn set(&mut self, page: usize) {
        if let Some(byte) = self.bytes.get_mut(byte_of(page)) {
            *byte |= bit_of(page);
        }
    }

    /// The bitmap as it travels.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.bytes
    }
}

/// In which byte of the words, as they lie in memory, the page's bit is.
fn byte_of(page: usize) -> usize {
    let byte = page / 8;
    if cfg!(target_endian = "big") { byte / WORD * WORD + (WORD - 1 - byte % WORD) } else { byte }
}

fn bit_of(page: usize) -> u8 {
    1 << (page % 8)
}

pub(super) fn check_page_size(page_size: u64) -> Result<(), WireError> {
    if page_size.is_power_of_two() { Ok(()) } else { Err(WireError::PageSize(page_size)) }
}

/// A range must hold something and not wrap. It may end with the last address.
pub(super) fn check_range(address: u64, size: u64) -> Result<(), WireError> {
    match size.checked_sub(1).and_then(|last| address.checked_add(last)) {
        Some(_) => Ok(()),
        None => Err(WireError::Range { address, size }),
    }
}
