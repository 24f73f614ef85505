//! `barkeep wrap`: a program as it was shipped, with the library in it.

use std::ffi::OsStr;
use std::fs::{self, Permissions, set_permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use barkeep_tests::{binary, skip};
use rustix::process::geteuid;
use tempfile::TempDir;

const LIBRARY: &str = "libbarkeep_preload.so";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// `barkeep wrap` of a program's own, with nothing of the test's environment that matters to it.
pub(crate) fn wrap(barkeep: &Path) -> Command {
    let mut command = Command::new(barkeep);
    command.arg("wrap").stdin(Stdio::null());
    for variable in ["LD_PRELOAD", "BARKEEP_PRELOAD", "BARKEEP_PRELOAD_QUIET"] {
        command.env_remove(variable);
    }
    command
}

/// `barkeep wrap` with the library under test.
pub(crate) fn wrap_with_library() -> Command {
    let mut command = wrap(&binary::barkeep());
    command.arg("--library").arg(binary::preload());
    command
}

fn wrapped(arguments: &[&str]) -> Output {
    wrap_with_library().args(arguments).output().expect("barkeep starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Checks that nothing was executed: one line with all of `words`, and this status.
fn assert_refused(output: &Output, status: i32, words: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert_eq!(stdout(output), "", "{stderr}");
    assert!(stderr.starts_with("barkeep: ") && stderr.matches('\n').count() == 1, "{stderr:?}");
    for word in words {
        assert!(stderr.contains(word), "{stderr:?} says {word:?}");
    }
}

fn executable(path: &Path, contents: &[u8]) {
    fs::write(path, contents).expect("a file");
    set_permissions(path, Permissions::from_mode(0o755)).expect("our file");
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn the_program_has_the_library_and_says_how_it_ends() {
    let output =
        wrapped(&["--", "sh", "-c", "cat /proc/self/maps; echo \"$0 $*\"; exit 7", "a", "b"]);
    assert_eq!(output.status.code(), Some(7));
    let stdout = stdout(&output);
    assert!(stdout.contains(LIBRARY) && stdout.ends_with("\na b\n"), "{stdout}");
    let stderr = stderr(&output);
    assert_eq!(stderr.matches('\n').count(), 1, "no VM, so no word from the library: {stderr}");
    for word in ["barkeep: preloading ", LIBRARY, " into /", "/sh: ", "Unsupported Requests"] {
        assert!(stderr.contains(word), "{stderr:?} says {word:?}");
    }
}

#[test]
fn a_quiet_one_adds_no_word() {
    let output = wrapped(&["--quiet", "sh", "-c", "echo $BARKEEP_PRELOAD_QUIET; exit 3"]);
    assert_eq!((output.status.code(), &*stdout(&output), &*stderr(&output)), (Some(3), "1\n", ""));
    let output = wrapped(&["sh", "-c", "echo -$BARKEEP_PRELOAD_QUIET-"]);
    assert_eq!(stdout(&output), "--\n");
}

#[test]
fn words_behind_the_program_are_its_own() {
    for dashes in [&["--"][..], &[]] {
        let command = ["cat", "/proc/self/cmdline"];
        let output = wrapped(&[dashes, &command].concat());
        assert_eq!(stdout(&output), "cat\0/proc/self/cmdline\0", "its name, too");
        let echo = ["echo", "--quiet", "--log", "x", "--library", "y", "--", "-h"];
        let output = wrapped(&[dashes, &echo].concat());
        assert_eq!(stdout(&output), "--quiet --log x --library y -- -h\n");
    }
}

#[test]
fn the_library_comes_before_what_is_preloaded_anyway() {
    let library = binary::preload().display().to_string();
    let maps = fs::read_to_string("/proc/self/maps").expect("our own");
    let libc = maps
        .lines()
        .find_map(|line| line.split_whitespace().nth(5).filter(|path| path.contains("/libc.so")));
    let libc = libc.expect("the test is linked to a C library");
    for (before, after) in [
        ("", library.clone()),
        (libc, format!("{library}:{libc}")),
        (&*format!("{libc}:{library}"), format!("{library}:{libc}")),
        (&*format!(" {libc} "), format!("{library}:{libc}")),
    ] {
        let mut command = wrap_with_library();
        let output = command.args(["sh", "-c", "echo $LD_PRELOAD"]).env("LD_PRELOAD", before);
        assert_eq!(
            stdout(&output.output().expect("barkeep starts")).trim_end(),
            after,
            "{before:?}"
        );
    }
}

#[test]
fn of_two_builds_one_is_at_work() {
    let directory = directory();
    let copy = directory.path().join(LIBRARY);
    fs::copy(binary::preload(), &copy).expect("a file can be copied");
    let mut command = wrap_with_library();
    command.args(["sh", "-c", "cat /proc/self/maps; ls -l /proc/self/fd"]);
    let output = command.env("LD_PRELOAD", &copy).output().expect("barkeep starts");
    let stdout = stdout(&output);
    assert!(stdout.contains(&copy.display().to_string()), "both are loaded: {stdout}");
    assert_eq!(stdout.matches("-> /memfd:barkeep-wrap").count(), 1, "{stdout}");
}

/// The kernel's answer to a file that grows beyond this limit is a signal.
#[test]
fn a_program_that_may_make_no_files_runs_without_a_page() {
    let words = "ulimit -f 0; exec cat /proc/self/maps | grep -c libbarkeep";
    let output = wrapped(&["sh", "-c", words]);
    assert!(output.status.success() && stdout(&output) != "0\n", "{}", stderr(&output));
    assert!(
        stderr(&output).contains("barkeep: no page for barkeep ctl wrap-status"),
        "{}",
        stderr(&output)
    );
    let quiet = wrapped(&["--quiet", "sh", "-c", words]);
    assert_eq!((quiet.status.code(), &*stderr(&quiet)), (Some(0), ""));
}

#[test]
fn scripts_and_the_loader_itself_hand_the_library_on() {
    let directory = directory();
    let script = directory.path().join("emulator");
    executable(&script, b"#!/bin/sh\nexec cat \"$@\"\n");
    let output = wrapped(&[script.to_str().expect("UTF-8"), "/proc/self/maps"]);
    assert!(stdout(&output).contains(LIBRARY), "{}", stderr(&output));
    assert!(stderr(&output).contains("(a script: "), "{}", stderr(&output));
    let output = wrapped(&[LOADER, "/bin/cat", "/proc/self/maps"]);
    assert!(stdout(&output).contains(LIBRARY), "{}", stderr(&output));
    assert!(stderr(&output).contains("(the dynamic loader: "), "{}", stderr(&output));
}

#[test]
fn the_library_is_found_where_it_is_installed() {
    let directory = directory();
    let root = directory.path().canonicalize().expect("our own");
    let barkeep = root.join("bin/barkeep");
    fs::create_dir_all(root.join("bin")).expect("a directory");
    link(&binary::barkeep(), &barkeep);
    let run =
        || wrap(&barkeep).args(["sh", "-c", "echo $LD_PRELOAD"]).output().expect("barkeep starts");
    let bin = root.join("bin").display().to_string();
    assert_refused(&run(), 125, &[LIBRARY, &bin, "--library"]);
    // The last one found is the first one that is looked for.
    for place in ["lib", "lib/barkeep", "bin"] {
        let library = root.join(place).join(LIBRARY);
        fs::create_dir_all(root.join(place)).expect("a directory");
        link(&binary::preload(), &library);
        assert_eq!(stdout(&run()), format!("{}\n", library.display()));
    }
    let mut named = wrap(&barkeep);
    named
        .args(["sh", "-c", "echo $LD_PRELOAD"])
        .env("BARKEEP_PRELOAD", root.join("lib").join(LIBRARY));
    let named = stdout(&named.output().expect("barkeep starts"));
    assert_eq!(named, format!("{}/lib/{LIBRARY}\n", root.display()));
}

fn link(from: &Path, to: &Path) {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).expect("a file can be copied");
    }
}

#[test]
fn a_library_by_a_relative_path_is_preloaded_by_its_absolute_one() {
    let library = binary::preload();
    let mut command = wrap(&binary::barkeep());
    command.current_dir(library.parent().expect("a folder")).args(["--library", LIBRARY]);
    let output = command.args(["sh", "-c", "echo $LD_PRELOAD"]).output().expect("barkeep starts");
    assert_eq!(stdout(&output), format!("{}\n", library.display()));
}

#[test]
fn what_is_not_the_library_is_not_preloaded() {
    let directory = directory();
    let file = |name: &str, contents: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, contents).expect("a file");
        path
    };
    let genuine = fs::read(binary::preload()).expect("the library");
    for (path, reason) in [
        (directory.path().join("missing"), "No such file"),
        (directory.path().to_owned(), "not the library"),
        (file("text", b"no library"), "not the library"),
        (file("empty", b""), "not the library"),
        (file("half.so", &genuine[..genuine.len() / 2]), "not a sound ELF file"),
        (file("head.so", &genuine[..40]), "not a sound ELF file"),
        (file("a b.so", &genuine), "a colon or a space"),
        (file("a:b.so", &genuine), "a colon or a space"),
        (binary::barkeep(), "not the library"),
    ] {
        let mut command = wrap(&binary::barkeep());
        let output = command.arg("--library").arg(&path).args(["echo", "executed"]).output();
        let name = path.display().to_string();
        assert_refused(&output.expect("barkeep starts"), 125, &[&name, reason]);
    }
}

/// An ELF file's header for a machine, and one program header if there is an interpreter.
fn elf(class: u8, machine: u16, interpreter: Option<&str>) -> Vec<u8> {
    let mut file = vec![0; 64];
    file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1, 1]);
    file[16] = 2;
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    if let Some(interpreter) = interpreter {
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        let mut header = vec![0; 56];
        header[0] = 3;
        header[8] = 64 + 56;
        header[32] = u8::try_from(interpreter.len() + 1).expect("short");
        file.extend(header);
        file.extend(interpreter.as_bytes());
        file.push(0);
    }
    file
}

#[test]
fn a_program_that_cannot_have_the_library_is_not_executed() {
    const X86_64: u16 = 62;
    let directory = directory();
    let program = |name: &str, contents: &[u8]| {
        let path = directory.path().join(name);
        executable(&path, contents);
        path
    };
    let plain = directory.path().join("plain");
    fs::write(&plain, "#!/bin/sh\n").expect("a file");
    for (path, status, reason) in [
        (directory.path().join("missing"), 127, "not found"),
        (plain.join("below"), 127, "not found"),
        (PathBuf::from(""), 127, "not found"),
        (PathBuf::from("barkeep-no-such-program"), 127, "not found"),
        (directory.path().to_owned(), 126, "a directory"),
        (plain, 126, "Permission denied"),
        (program("static", &elf(2, X86_64, None)), 126, "statically linked"),
        (program("arm", &elf(2, 183, None)), 126, "not for x86-64"),
        (program("i386", &elf(1, 3, None)), 126, "not for x86-64"),
        (program("musl", &elf(2, X86_64, Some("/lib/ld-musl-x86_64.so.1"))), 126, "ld-musl"),
        (
            program("cut", &elf(2, X86_64, Some("/lib64/ld-linux-x86-64.so.2"))[..100]),
            126,
            "not a sound",
        ),
    ] {
        let output = wrap_with_library().arg("--").arg(&path).output().expect("barkeep starts");
        assert_refused(&output, status, &[&path.display().to_string(), reason]);
    }
}

/// What the kernel refuses after all is reported behind the line that says what was tried.
#[test]
fn a_program_that_the_kernel_refuses_is_reported() {
    let directory = directory();
    let orphan = directory.path().join("orphan");
    executable(&orphan, b"#!/nonexistent/interpreter\n");
    let output = wrap_with_library().arg(&orphan).output().expect("barkeep starts");
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(127), ""));
    let stderr = stderr(&output);
    assert!(
        stderr.contains("orphan: No such file") && stderr.matches('\n').count() == 2,
        "{stderr}"
    );
}

/// Without a first line that names one, the interpreter is the shell, as env(1) has it.
#[test]
fn a_text_without_an_interpreter_is_the_shells() {
    let directory = directory();
    let text = directory.path().join("text");
    executable(&text, b"cat /proc/self/maps\n");
    let output = wrap_with_library().arg(&text).output().expect("barkeep starts");
    assert!(stdout(&output).contains(LIBRARY), "{}", stderr(&output));
}

#[test]
fn a_program_that_gets_more_rights_is_not_executed_without_the_library() {
    let directory = directory();
    let program = directory.path().join("program");
    fs::copy("/bin/cat", &program).expect("a program");
    if !geteuid().is_root() {
        return skip(&"only root makes a program of another user's");
    }
    let with = |user, group, mode| {
        chown(&program, Some(user), Some(group)).expect("our file");
        set_permissions(&program, Permissions::from_mode(mode)).expect("our file");
        wrap_with_library().arg(&program).arg("/proc/self/maps").output().expect("barkeep starts")
    };
    assert_refused(&with(1, 0, 0o4755), 126, &["more rights", "preloads nothing"]);
    assert_refused(&with(0, 1, 0o2755), 126, &["more rights", "preloads nothing"]);
    // Those that it has already, and a bit that means mandatory locks.
    for (user, group, mode) in [(0, 0, 0o6755), (1, 1, 0o755), (0, 1, 0o2745)] {
        let output = with(user, group, mode);
        assert!(stdout(&output).contains(LIBRARY), "{user} {group} {mode:o}: {}", stderr(&output));
    }
}

/// `barkeep wrap` that a program of the system starts, which changes something before.
fn wrapped_by(starter: &[&str], arguments: &[&str]) -> Output {
    let plain = wrap_with_library();
    let mut command = Command::new(starter[0]);
    command.args(&starter[1..]).arg(plain.get_program()).args(plain.get_args()).args(arguments);
    for variable in plain.get_envs().map(|(variable, _)| variable) {
        command.env_remove(variable);
    }
    command.output().expect("a program of the system starts")
}

#[test]
fn a_program_that_gets_no_more_rights_here_has_the_library() {
    let directory = directory();
    if !geteuid().is_root() {
        return skip(&"only root makes a program of another user's");
    }
    let program = directory.path().join("program");
    fs::copy("/bin/cat", &program).expect("a program");
    chown(&program, Some(1), Some(1)).expect("our file");
    set_permissions(&program, Permissions::from_mode(0o6755)).expect("our file");
    let program = program.to_str().expect("UTF-8");
    let arguments = [program, "/proc/self/maps"];
    assert_refused(&wrapped_by(&["env"], &arguments), 126, &["more rights"]);
    let output = wrapped_by(&["setpriv", "--no-new-privs"], &arguments);
    assert!(stdout(&output).contains(LIBRARY), "no new privileges: {}", stderr(&output));
    let mount = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,nosuid \"$0\" && exec \"$@\"";
    let folder = directory.path().to_str().expect("UTF-8");
    let output = wrapped_by(&["unshare", "--mount", "sh", "-c", mount, folder], &arguments);
    assert!(stdout(&output).contains(LIBRARY), "nosuid: {}", stderr(&output));
}

/// The loader preloads nothing into whatever such a process executes.
#[test]
fn a_caller_of_two_identities_is_refused() {
    if !geteuid().is_root() {
        return skip(&"only root has another identity");
    }
    let directory = directory();
    let script = directory.path().join("script");
    executable(&script, b"#!/bin/cat\n");
    set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("ours");
    for identity in ["--ruid=1", "--rgid=1"] {
        for program in [Path::new("/bin/cat"), &script] {
            let program = program.to_str().expect("UTF-8");
            let starter = ["setpriv", "--clear-groups", identity];
            let output = wrapped_by(&starter, &[program, "/proc/self/maps"]);
            assert_refused(&output, 126, &[program, "other effective IDs", "preloads nothing"]);
        }
    }
}

#[test]
fn the_program_is_looked_for_as_a_shell_does() {
    let directory = directory();
    let folder = |name: &str| {
        let path = directory.path().join(name);
        fs::create_dir(&path).expect("a directory");
        path
    };
    let (plain, other, good) = (folder("plain"), folder("other"), folder("good"));
    fs::write(plain.join("program"), "#!/bin/sh\necho plain\n").expect("a file");
    fs::create_dir(other.join("program")).expect("a directory");
    executable(&good.join("program"), b"#!/bin/sh\necho good\n");
    let run = |folders: &[&Path]| {
        let path = std::env::join_paths(folders.iter().map(|folder| folder.as_os_str()))
            .expect("no colons");
        wrap_with_library().arg("program").env("PATH", path).output().expect("barkeep starts")
    };
    let nowhere = Path::new("/nonexistent");
    assert_eq!(stdout(&run(&[nowhere, &plain, &other, &good])), "good\n");
    assert_refused(&run(&[nowhere, &plain]), 126, &["program: Permission denied"]);
    assert_refused(&run(&[&other]), 126, &["program: a directory"]);
    assert_refused(&run(&[nowhere]), 127, &["program: not found"]);
    let mut here = wrap_with_library();
    here.arg("program").env("PATH", OsStr::new("/nonexistent:")).current_dir(&good);
    assert_eq!(stdout(&here.output().expect("barkeep starts")), "good\n");
    let mut unset = wrap_with_library();
    unset.args(["cat", "/proc/self/cmdline"]).env_remove("PATH");
    assert_eq!(stdout(&unset.output().expect("barkeep starts")), "cat\0/proc/self/cmdline\0");
}

#[test]
fn a_wrap_without_a_program_is_a_usage_error() {
    for arguments in [&[][..], &["--"], &["--quiet"]] {
        let output = wrapped(arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("<PROGRAM>"), "{}", stderr(&output));
    }
}
