use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::prctl::get_no_new_privs;
use rustix::fs::{Access, StatVfsMountFlags, access, getxattr, statvfs};
use rustix::process::{getegid, geteuid, getgid, getuid};

use super::elf::{Elf, ElfError, Image};

/// Where programs are if PATH does not say, after confstr(3).
const DEFAULT_PATH: &str = "/bin:/usr/bin";
const SET_USER: u32 = 0o4000;
/// Group execution as well: without it, the bit means something else.
const SET_GROUP: u32 = 0o2010;
/// What every glibc's dynamic loader exports.
const LOADER: &str = "_rtld_global";

/// A program that can be executed with a library preloaded, as far as one can see.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Its interpreter is the dynamic loader.
    Dynamic,
    /// It is the dynamic loader, which loads the program that is its argument.
    Loader,
    /// Whatever it executes inherits the environment.
    Script,
    /// Not for us to see, or for another program of the kernel's choice.
    Unknown,
}

/// Why a program can't be executed with the library.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    #[error("not found")]
    NotFound,
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("a directory")]
    Directory,
    #[error("statically linked: nothing can be preloaded into it")]
    Static,
    #[error("the library needs glibc, and this program has another loader: {0}")]
    OtherLoader(String),
    #[error(
        "it runs with more rights than its caller, so the loader preloads nothing: start it as its owner"
    )]
    Privileged,
    #[error(
        "this process has other effective IDs than real ones, so the loader preloads nothing: start it as one \
         user and group"
    )]
    MixedCaller,
    #[error("{0}")]
    Elf(#[from] ElfError),
}

impl Program {
    /// Finds it as execvp(3) does.
    pub(super) fn find(name: &OsStr) -> Result<Self, ProgramError> {
        if name.is_empty() {
            return Err(ProgramError::NotFound);
        }
        if name.as_bytes().contains(&b'/') {
            return Self::check(Path::new(name));
        }
        let folders = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        let mut refused = ProgramError::NotFound;
        for folder in std::env::split_paths(&folders) {
            // An empty one is the working directory.
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
            match Self::check(&folder.join(name)) {
                Err(ProgramError::NotFound) => {}
                Err(error @ (ProgramError::System(_) | ProgramError::Directory)) => refused = error,
                found => return found,
            }
        }
        Err(refused)
    }

    fn check(path: &Path) -> Result<Self, ProgramError> {
        let metadata = path.metadata().map_err(missing)?;
        if metadata.is_dir() {
            return Err(ProgramError::Directory);
        }
        access(path, Access::EXEC_OK).map_err(io::Error::from)?;
        let kind = match Image::open(path) {
            Ok(Image::Elf(elf)) => {
                check_rights(path, Some(&metadata))?;
                kind(&elf)?
            }
            Ok(Image::Script) => {
                check_rights(path, None)?;
                Kind::Script
            }
            // What is executable need not be readable.
            Ok(Image::Other) | Err(ElfError::System(_)) => {
                check_rights(path, None)?;
                Kind::Unknown
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Self { path: path.to_owned(), kind })
    }
}

fn kind(elf: &Elf) -> Result<Kind, ProgramError> {
    match elf.interpreter()? {
        Some(loader) if loader.contains("ld-linux") => Ok(Kind::Dynamic),
        Some(loader) => Err(ProgramError::OtherLoader(loader)),
        None if elf.exports(LOADER)? => Ok(Kind::Loader),
        None => Err(ProgramError::Static),
    }
}

/// Whether the kernel would have the loader ignore the environment: a process whose effective identity is not
/// its real one, or with capabilities of its file. Scripts have the identity of their caller.
fn check_rights(path: &Path, binary: Option<&Metadata>) -> Result<(), ProgramError> {
    let (real_user, real_group) = (getuid().as_raw(), getgid().as_raw());
    let (mut user, mut group) = (geteuid().as_raw(), getegid().as_raw());
    let mut refused = ProgramError::MixedCaller;
    if let Some(binary) = binary.filter(|_| heeds_set_id(path)) {
        if binary.mode() & SET_USER != 0 {
            (user, refused) = (binary.uid(), ProgramError::Privileged);
        }
        if binary.mode() & SET_GROUP == SET_GROUP {
            (group, refused) = (binary.gid(), ProgramError::Privileged);
        }
    }
    if (user, group) != (real_user, real_group) {
        return Err(refused);
    }
    // Where no new privileges are allowed they are not gained either, but the kernel tells the loader as if.
    let gains = |path| getxattr(path, "security.capability", &mut [0_u8; 64]).is_ok();
    if binary.is_some() && real_user != 0 && !is_on_nosuid(path) && gains(path) {
        return Err(ProgramError::Privileged);
    }
    Ok(())
}

/// Whether the kernel heeds set-user-ID and set-group-ID here.
fn heeds_set_id(path: &Path) -> bool {
    !get_no_new_privs().unwrap_or(false) && !is_on_nosuid(path)
}

fn is_on_nosuid(path: &Path) -> bool {
    statvfs(path).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::NOSUID))
}

fn missing(failure: io::Error) -> ProgramError {
    match failure.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ProgramError::NotFound,
        _ => ProgramError::System(failure),
    }
}
