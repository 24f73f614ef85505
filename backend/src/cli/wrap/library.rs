use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::elf::{ElfError, Image};

const NAME: &str = "libbarkeep_preload.so";
/// Where it is looked for, from the folder of this program.
const FOLDERS: [&str; 3] = ["", "../lib/barkeep", "../lib"];
/// What no other library exports.
const MARKER: &str = "barkeep_preload_marker";

/// Why nothing can be preloaded.
#[derive(Debug, thiserror::Error)]
pub(super) enum LibraryError {
    #[error("{NAME} is not in {folder}; --library names it", folder = .0.display())]
    Missing(PathBuf),
    #[error("{path}: {1}", path = .0.display())]
    Unreadable(PathBuf, io::Error),
    #[error("{path}: {1}", path = .0.display())]
    Unsound(PathBuf, ElfError),
    #[error("{path}: not the library of barkeep", path = .0.display())]
    Other(PathBuf),
    #[error("{path}: a path with a colon or a space can't be preloaded", path = .0.display())]
    Separator(PathBuf),
}

/// The library's absolute path: the one that is named, else the first that is found.
pub(super) fn find(named: Option<&Path>) -> Result<PathBuf, LibraryError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => beside_this_program()?,
    };
    let unreadable = |failure| LibraryError::Unreadable(path.clone(), failure);
    // The program may have another working directory by the time it loads it.
    let absolute = std::path::absolute(&path).map_err(unreadable)?;
    if absolute.as_os_str().as_bytes().iter().any(|byte| matches!(byte, b' ' | b':')) {
        return Err(LibraryError::Separator(path));
    }
    let exported = match Image::open(&absolute) {
        Ok(Image::Elf(elf)) => elf.exports(MARKER),
        Ok(Image::Script | Image::Other) => Ok(false),
        Err(error) => Err(error),
    };
    match exported {
        Ok(true) => Ok(absolute),
        Ok(false) => Err(LibraryError::Other(path)),
        Err(error) => Err(LibraryError::Unsound(path, error)),
    }
}

fn beside_this_program() -> Result<PathBuf, LibraryError> {
    let program = std::env::current_exe()
        .map_err(|failure| LibraryError::Unreadable("/proc/self/exe".into(), failure))?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let places = FOLDERS.map(|place| folder.join(place).join(NAME));
    let found = places.into_iter().find(|place| place.exists());
    // Without the dots, which would puzzle whoever reads it in /proc/PID/maps.
    found
        .map(|place| place.canonicalize().unwrap_or(place))
        .ok_or_else(|| LibraryError::Missing(folder.to_owned()))
}
