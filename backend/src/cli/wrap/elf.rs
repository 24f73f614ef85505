//! As much of ELF as it takes to tell what a file is: System V ABI, chapters 4 and 5.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Header of a file, of 64 bits.
const HEADER_LENGTH: usize = 64;
const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADER_LENGTH: usize = 56;
const INTERPRETER: u32 = 3;
const SECTION_HEADER_LENGTH: usize = 64;
const DYNAMIC_SYMBOLS: u32 = 11;
const SYMBOL_LENGTH: usize = 24;

/// Longer tables are not read. The largest programs have some megabytes.
const LONGEST_TABLE: u64 = 256 << 20;
const LONGEST_PATH: u64 = 4096;

/// An ELF file for x86-64.
#[derive(Debug)]
pub(super) struct Elf {
    file: File,
    header: [u8; HEADER_LENGTH],
}

/// What a file is to the kernel.
#[derive(Debug)]
pub(super) enum Image {
    Elf(Elf),
    /// Its first line names an interpreter.
    Script,
    Other,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    #[error("not for x86-64")]
    OtherMachine,
    #[error("not a sound ELF file")]
    Unsound,
    #[error("{0}")]
    System(io::Error),
}

impl Image {
    /// Looks at a file's first bytes.
    pub(super) fn open(path: &Path) -> Result<Self, ElfError> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(Self::Other);
        }
        let mut header = [0; HEADER_LENGTH];
        let length = read_up_to(&file, &mut header)?;
        if header.starts_with(b"#!") {
            return Ok(Self::Script);
        }
        if !header.starts_with(MAGIC) {
            return Ok(Self::Other);
        }
        let elf = Elf { file, header };
        let is_ours = header[4] == CLASS_64
            && header[5] == LITTLE_ENDIAN
            && u16_at(&header, 18) == MACHINE_X86_64;
        match (length, is_ours) {
            (HEADER_LENGTH, true) => Ok(Self::Elf(elf)),
            (HEADER_LENGTH, false) => Err(ElfError::OtherMachine),
            _ => Err(ElfError::Unsound),
        }
    }
}

impl Elf {
    /// The loader that the kernel gives the program to; `None` if it starts by itself.
    pub(super) fn interpreter(&self) -> Result<Option<String>, ElfError> {
        let headers = self.headers(32, 54, PROGRAM_HEADER_LENGTH)?;
        let found = headers
            .chunks_exact(PROGRAM_HEADER_LENGTH)
            .find(|header| u32_at(header, 0) == INTERPRETER);
        let Some(header) = found else { return Ok(None) };
        let path = self.table(u64_at(header, 8), u64_at(header, 32), LONGEST_PATH)?;
        Ok(Some(String::from_utf8_lossy(text(&path)).into_owned()))
    }

    /// Whether others can refer to a symbol that it defines.
    pub(super) fn exports(&self, symbol: &str) -> Result<bool, ElfError> {
        let sections = self.headers(40, 58, SECTION_HEADER_LENGTH)?;
        let section = |index: usize| sections.chunks_exact(SECTION_HEADER_LENGTH).nth(index);
        let contents =
            |section: &[u8]| self.table(u64_at(section, 24), u64_at(section, 32), LONGEST_TABLE);
        let symbols = sections
            .chunks_exact(SECTION_HEADER_LENGTH)
            .find(|section| u32_at(section, 4) == DYNAMIC_SYMBOLS);
        let Some(symbols) = symbols else { return Ok(false) };
        let names = section(u32_at(symbols, 40) as usize).ok_or(ElfError::Unsound)?;
        let (symbols, names) = (contents(symbols)?, contents(names)?);
        Ok(symbols.chunks_exact(SYMBOL_LENGTH).any(|found| {
            let is_defined = u16_at(found, 6) != 0;
            let name = names.get(u32_at(found, 0) as usize..).unwrap_or_default();
            is_defined && text(name) == symbol.as_bytes()
        }))
    }

    /// A table of headers of this length. Where the file's header has the table's offset, and where the
    /// length of one and their number, is given.
    fn headers(&self, offset: usize, size: usize, length: usize) -> Result<Vec<u8>, ElfError> {
        let number = u16_at(&self.header, size + 2);
        if number != 0 && usize::from(u16_at(&self.header, size)) != length {
            return Err(ElfError::Unsound);
        }
        self.table(u64_at(&self.header, offset), u64::from(number) * length as u64, LONGEST_TABLE)
    }

    fn table(&self, offset: u64, length: u64, longest: u64) -> Result<Vec<u8>, ElfError> {
        let end = offset.checked_add(length).ok_or(ElfError::Unsound)?;
        if length > longest || end > self.file.metadata()?.len() {
            return Err(ElfError::Unsound);
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| ElfError::Unsound)?];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

impl From<io::Error> for ElfError {
    fn from(failure: io::Error) -> Self {
        Self::System(failure)
    }
}

fn read_up_to(file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], done as u64)? {
            0 => break,
            more => done += more,
        }
    }
    Ok(done)
}

/// A string up to its first 0.
fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// Bytes of a header, which has them: its length is a constant.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn ask(bytes: &[u8]) -> Result<(Option<String>, bool), ElfError> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(bytes)?;
        match Image::open(file.path())? {
            Image::Elf(elf) => Ok((elf.interpreter()?, elf.exports("a_symbol")?)),
            Image::Script | Image::Other => Ok((None, false)),
        }
    }

    /// A file with an interpreter, and a dynamic symbol in section 1 whose name is in section 2.
    fn sound() -> Vec<u8> {
        let mut file = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(18, &[62]);
        put(32, &[64]);
        put(40, &[0, 1]);
        put(54, &[56, 0, 1, 0, 64, 0, 3, 0]);
        put(64, &[3]);
        put(64 + 8, &[128]);
        put(64 + 32, &[10]);
        put(128, b"/lib/ld.so\0");
        let (symbols, names) = (256 + 64, 256 + 128);
        put(symbols + 4, &[11]);
        put(symbols + 24, &[144]);
        put(symbols + 32, &[48]);
        put(symbols + 40, &[2]);
        put(names + 24, &[200]);
        put(names + 32, &[20]);
        put(144 + 24, &[1, 0, 0, 0, 0, 0, 7]);
        put(200, b"\0a_symbol\0");
        file
    }

    #[test]
    fn interpreter_and_symbols_are_found() {
        let mut file = sound();
        assert_eq!(ask(&file).expect("sound"), (Some("/lib/ld.so".into()), true));
        file[144 + 24 + 6] = 0;
        assert_eq!(ask(&file).expect("sound"), (Some("/lib/ld.so".into()), false), "undefined");
        file[256 + 64 + 4] = 2;
        assert_eq!(ask(&file).expect("sound"), (Some("/lib/ld.so".into()), false), "no table");
        file[64] = 1;
        assert_eq!(ask(&file).expect("sound"), (None, false));
    }

    #[test]
    fn tables_outside_of_the_file_are_unsound() {
        for (at, bytes) in [
            (32, &[0xff; 8][..]),
            (40, &[0xff; 8]),
            (54, &[55]),
            (58, &[63]),
            (60, &[0xff; 2]),
            (64 + 8, &[0xff; 8]),
            (64 + 32, &[0, 2]),
            (256 + 64 + 32, &[0xff; 8]),
            (256 + 64 + 40, &[9]),
            (256 + 128 + 24, &[0xff; 8]),
        ] {
            let mut file = sound();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(matches!(ask(&file), Err(ElfError::Unsound)), "{at}");
        }
    }

    proptest! {
        #[test]
        fn no_file_is_more_than_an_error(
            changes in proptest::collection::vec((0..512_usize, any::<u8>()), 1..20),
            length in 0..=512_usize,
        ) {
            let mut file = sound();
            for (at, byte) in changes {
                file[at] = byte;
            }
            let _ = ask(&file[..length]);
        }
    }
}
