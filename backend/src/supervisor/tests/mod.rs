mod worker;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;

use self::worker::{SCRIPT, ask};
use super::*;
use crate::state::FdKey;

/// What a worker may take to answer, for tests in which one does not.
const SHORT: Duration = Duration::from_millis(200);
/// For tests in which all do, however busy the machine is.
const LONG: Duration = Duration::from_secs(60);

/// A supervisor of fake workers in a thread.
struct Supervised {
    directory: TempDir,
    stop: UnixStream,
    upgrade: UnixStream,
    thread: JoinHandle<(Supervisor, Result<End, StartError>)>,
}

/// `groups` has a function for each item. The workers begin as `script` says.
fn supervisor(
    groups: &[Option<&str>],
    script: &'static str,
    watchdog: Duration,
) -> (Supervisor, UnixStream, UnixStream) {
    let setups = groups.iter().enumerate().map(|(index, group)| Setup {
        name: format!("function{index}"),
        group: group.map(str::to_owned),
        holding: Holding::fresh().unwrap(),
    });
    let start = move |_: &[u16]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--ignored", "--nocapture"]);
        command.arg("supervisor::tests::worker::program");
        command.env(SCRIPT, script).stdout(std::process::Stdio::null());
        command
    };
    let (stop, stop_reader) = UnixStream::pair().unwrap();
    let (upgrade, upgrade_reader) = UnixStream::pair().unwrap();
    let signals = Signals {
        stop: stop_reader.into(),
        reload: UnixStream::pair().unwrap().0.into(),
        upgrade: upgrade_reader.into(),
    };
    let mut supervisor =
        Supervisor::new(setups.collect(), Box::new(start), signals, Some(watchdog)).unwrap();
    supervisor.parting_time = watchdog.min(supervisor.parting_time);
    (supervisor, stop, upgrade)
}

impl Supervised {
    fn start(groups: &[Option<&str>], script: &'static str, watchdog: Duration) -> Self {
        Self::run(supervisor(groups, script, watchdog))
    }

    fn run((mut supervisor, stop, upgrade): (Supervisor, UnixStream, UnixStream)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        supervisor.start().unwrap();
        for function in 0..supervisor.functions.len() {
            let path = directory.path().join(function.to_string());
            supervisor.listen(function, SocketPath::claim(&path).unwrap());
        }
        let thread = std::thread::spawn(move || {
            let end = supervisor.run().map_err(|_| StartError::Failed);
            (supervisor, end)
        });
        Self { directory, stop, upgrade, thread }
    }

    fn client(&self, function: usize) -> Client {
        let path = self.directory.path().join(function.to_string());
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Client(BufReader::new(stream))
    }

    /// Waits for the end, and checks that nothing is left of any worker.
    fn ends(self, end: End) -> Supervisor {
        let (supervisor, ended) = self.thread.join().unwrap();
        assert_eq!(ended, Ok(end));
        assert_childless();
        supervisor
    }

    fn stop(mut self) -> Supervisor {
        self.stop.write_all(b"x").unwrap();
        self.ends(End::Stopped)
    }
}

/// Neither a process nor a zombie. Each test has a process of its own.
fn assert_childless() {
    let children = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children"));
        tasks.filter_map(|task| of(task.ok()?).ok()).collect::<String>()
    };
    if std::env::var_os("NEXTEST").is_some() {
        assert_eq!(children(), "");
    }
}

/// What a worker tells of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Status {
    process: i32,
    incarnation: usize,
    state: usize,
    previous_end: String,
    keys: String,
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn send(&mut self, byte: u8) {
        self.0.get_mut().write_all(&[byte]).unwrap();
    }

    fn ask(&mut self, byte: u8) -> Status {
        self.send(byte);
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let mut parts = line.trim_end().splitn(5, ' ');
        let mut next = || parts.next().unwrap().to_owned();
        let (process, incarnation) = (next().parse().unwrap(), next().parse().unwrap());
        let (state, previous_end, keys) = (next().parse().unwrap(), next(), next());
        Status { process, incarnation, state, previous_end, keys }
    }

    fn expect_closed(&mut self) {
        let mut line = String::new();
        assert_eq!(self.0.read_line(&mut line).unwrap(), 0);
    }
}

#[test]
fn a_client_does_not_notice_the_end_of_its_worker() {
    let supervised = Supervised::start(&[None], "-", LONG);
    let mut client = supervised.client(0);
    let first = client.ask(ask::WRITE);
    assert_eq!((first.incarnation, first.state, &*first.keys), (0, 1, "[]"));
    for incarnation in 1..4 {
        client.send(ask::DIE);
        let next = client.ask(ask::WRITE);
        assert_eq!((next.incarnation, next.state), (incarnation, incarnation + 1));
        assert_ne!(next.process, first.process);
    }
    supervised.stop();
    client.expect_closed();
}

#[test]
fn the_next_worker_holds_what_the_last_one_stored_until_its_end() {
    let supervised = Supervised::start(&[None], "-", LONG);
    let mut client = supervised.client(0);
    client.send(ask::STORE_AND_DIE);
    assert_eq!(client.ask(ask::STATUS).keys, "[1, 3]");
    let supervisor = supervised.stop();
    let keys: Vec<_> = supervisor.holdings().flat_map(|held| held.fds.keys()).collect();
    assert_eq!(format!("{keys:?}"), "[FdKey(1), FdKey(3)]");
}

#[test]
fn a_worker_gets_more_than_the_link_has_room_for_at_once() {
    let (mut supervisor, stop, upgrade) = supervisor(&[None], "-", LONG);
    if supervisor.share < 4000 {
        return crate::skip::skip("the limit of open files is low");
    }
    let holding = &mut supervisor.functions[0].holding;
    holding.fds = (0..4000).map(|key| (FdKey(key), Arc::clone(&holding.state))).collect();
    let supervised = Supervised::run((supervisor, stop, upgrade));
    let mut client = supervised.client(0);
    for incarnation in 0..2 {
        let status = client.ask(ask::STATUS);
        assert_eq!((status.incarnation, status.keys.split(", ").count()), (incarnation, 4000));
        client.send(ask::DIE);
    }
    supervised.stop();
}

#[test]
fn one_client_after_the_other_is_served() {
    let supervised = Supervised::start(&[None], "-", LONG);
    let mut first = supervised.client(0);
    let worker = first.ask(ask::STATUS).process;
    let mut second = supervised.client(0);
    second.send(ask::STATUS);
    // Were it served already, this would find its answer.
    second.0.get_ref().set_nonblocking(true).unwrap();
    let unserved = second.0.fill_buf().unwrap_err();
    assert_eq!(unserved.kind(), io::ErrorKind::WouldBlock);
    second.0.get_ref().set_nonblocking(false).unwrap();
    first.send(ask::LEAVE);
    first.expect_closed();
    let mut line = String::new();
    second.0.read_line(&mut line).unwrap();
    assert!(line.starts_with(&worker.to_string()), "{line}");
    drop(second);
    assert_eq!(supervised.client(0).ask(ask::STATUS).process, worker);
    supervised.stop();
}

#[test]
fn a_client_that_comes_while_there_is_no_worker_gets_the_next_one() {
    let supervised = Supervised::start(&[None], "--kkk-", LONG);
    let mut first = supervised.client(0);
    first.send(ask::DIE);
    first.ask(ask::STATUS);
    first.send(ask::LEAVE_AND_DIE);
    first.expect_closed();
    assert!(supervised.client(0).ask(ask::STATUS).incarnation >= 2);
    supervised.stop();
}

#[test]
fn functions_share_a_worker_only_in_a_group() {
    let supervised = Supervised::start(&[Some("a"), None, Some("b"), Some("a"), None], "-", LONG);
    let mut clients: Vec<_> = (0..5).map(|function| supervised.client(function)).collect();
    let workers: Vec<_> =
        clients.iter_mut().map(|client| client.ask(ask::STATUS).process).collect();
    assert_eq!(workers[0], workers[3]);
    let different: std::collections::BTreeSet<_> = workers.iter().collect();
    assert_eq!(different.len(), 4);
    clients[3].send(ask::DIE);
    let next = clients[3].ask(ask::STATUS);
    assert_eq!((next.incarnation, clients[0].ask(ask::STATUS).process), (1, next.process));
    assert_eq!(clients[1].ask(ask::STATUS).process, workers[1]);
    supervised.stop();
}

#[test]
fn a_worker_that_does_not_answer_is_replaced() {
    let supervised = Supervised::start(&[None], "-", SHORT);
    let mut client = supervised.client(0);
    client.send(ask::FREEZE);
    let next = client.ask(ask::STATUS);
    assert_eq!((next.incarnation, &*next.previous_end), (1, "ByItself"));
    supervised.stop();
}

#[test]
fn a_worker_is_told_who_has_ended_the_last_one() {
    let supervised = Supervised::start(&[None], "-", LONG);
    let mut client = supervised.client(0);
    assert_eq!(client.ask(ask::STATUS).previous_end, "Orderly");
    for (death, previous_end) in [
        (ask::DIE, "FromOutside"),
        (ask::ABORT, "ByItself"),
        (ask::TERMINATE, "FromOutside"),
        (ask::FAIL, "ByItself"),
        (ask::FINISH, "Orderly"),
    ] {
        client.send(death);
        assert_eq!(client.ask(ask::STATUS).previous_end, previous_end);
    }
    supervised.stop();
}

#[test]
fn a_worker_that_stores_for_a_function_of_others_is_replaced() {
    let supervised = Supervised::start(&[None, None], "-", LONG);
    let mut client = supervised.client(0);
    client.send(ask::INTRUDE);
    assert_eq!(client.ask(ask::STATUS).incarnation, 1);
    let supervisor = supervised.stop();
    assert!(supervisor.holdings().all(|holding| holding.fds.is_empty()));
}

/// Its client chose them.
#[test]
fn descriptors_that_cant_be_closed_stop_nobody_else() {
    let supervised = Supervised::start(&[None, None], "-", LONG);
    let mut clients = [supervised.client(0), supervised.client(1)];
    clients[0].ask(ask::LINGER);
    for client in clients.iter_mut().rev() {
        client.send(ask::DIE);
        assert_eq!(client.ask(ask::STATUS).incarnation, 1);
    }
    supervised.stop();
}

#[test]
fn a_worker_without_a_link_is_replaced() {
    let supervised = Supervised::start(&[None], "-", SHORT);
    let mut client = supervised.client(0);
    client.send(ask::HIDE);
    assert_eq!(client.ask(ask::STATUS).incarnation, 1);
    supervised.stop();
}

#[test]
fn workers_that_die_before_they_are_ready_are_tried_again() {
    let supervised = Supervised::start(&[None], "kk-kkk-", LONG);
    let mut client = supervised.client(0);
    assert_eq!(client.ask(ask::STATUS).incarnation, 2);
    client.send(ask::DIE);
    assert_eq!(client.ask(ask::STATUS).incarnation, 6);
    supervised.stop();
}

#[test]
fn a_worker_that_refuses_its_arguments_is_not_tried_again() {
    for (script, error) in
        [("2", StartError::Refused), ("1", StartError::Failed), ("k", StartError::Failed)]
    {
        let (mut supervisor, _stop, _upgrade) = supervisor(&[None, None], script, LONG);
        assert_eq!(supervisor.start(), Err(error), "{script}");
        assert_childless();
    }
}

#[test]
fn one_that_has_served_is_tried_again_whatever_it_says() {
    let supervised = Supervised::start(&[None], "-211-", LONG);
    let mut client = supervised.client(0);
    client.send(ask::DIE);
    assert_eq!(client.ask(ask::STATUS).incarnation, 4);
    supervised.stop();
}

#[test]
fn a_start_can_be_stopped() {
    let (mut supervisor, mut stop, _upgrade) = supervisor(&[None], "-", LONG);
    stop.write_all(b"x").unwrap();
    assert_eq!(supervisor.start(), Err(StartError::Stopped));
    assert_childless();
}

#[test]
fn an_end_waits_for_no_worker_for_ever() {
    let supervised = Supervised::start(&[None], "n", SHORT);
    supervised.client(0).ask(ask::STATUS);
    supervised.stop();
}

#[test]
fn an_upgrade_ends_all_workers_and_keeps_all_clients() {
    let mut supervised = Supervised::start(&[None, None], "-", LONG);
    let mut clients = [supervised.client(0), supervised.client(1)];
    let before = clients.each_mut().map(|client| client.ask(ask::STORE));
    // It has to wait for longer than this.
    let _next = supervised.client(0);
    supervised.upgrade.write_all(b"xx").unwrap();
    let Supervised { directory, stop, upgrade, thread } = supervised;
    let (mut supervisor, end) = thread.join().unwrap();
    assert_eq!(end, Ok(End::Drained));
    assert_childless();
    assert!(supervisor.holdings().all(|held| held.client.is_some() && held.fds.len() == 2));
    let thread = std::thread::spawn(move || {
        let end = supervisor.run().map_err(|_| StartError::Failed);
        (supervisor, end)
    });
    for (client, before) in clients.iter_mut().zip(before) {
        let after = client.ask(ask::STATUS);
        assert_ne!(after.process, before.process);
        assert_eq!((after.incarnation, &*after.keys), (1, "[1, 3]"));
        assert_eq!(after.previous_end, "Orderly");
    }
    Supervised { directory, stop, upgrade, thread }.stop();
}
