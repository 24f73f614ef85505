//! A backend that goes away, and who learns of it.

use super::*;

#[test]
fn an_attendant_learns_at_once_that_an_idle_backend_has_gone() {
    let script = serve("idle-gone", |server| server.answer_version(&plain()));
    let client = Client::connect(&script.path, NEVER).unwrap();
    assert_eq!(client.attendant().attend(), Attended::Ended);
    assert!(client.is_dead());
    assert!(matches!(read(&client), Err(ClientError::Gone)));
    script.thread.join().unwrap();
}

#[test]
fn all_threads_that_wait_learn_of_it() {
    for attended in [false, true] {
        let script = serve("busy-gone", |server| {
            server.answer_version(&plain());
            (0..3).for_each(|_| drop(server.request().unwrap()));
        });
        let client = Client::connect(&script.path, NEVER).unwrap();
        std::thread::scope(|scope| {
            if attended {
                scope.spawn(|| assert_eq!(client.attendant().attend(), Attended::Ended));
            }
            for _ in 0..3 {
                scope.spawn(|| assert!(matches!(read(&client), Err(ClientError::Lost))));
            }
        });
        assert!(client.is_dead());
        script.thread.join().unwrap();
    }
}

#[test]
fn an_attendant_learns_of_a_session_that_a_missed_deadline_has_ended() {
    let script = serve("missed", |server| {
        server.answer_version(&plain());
        server.drain();
    });
    let client = Client::connect(&script.path, Duration::from_millis(50)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(client.attendant().attend(), Attended::Ended));
        assert!(matches!(read(&client), Err(ClientError::Deadline(_))));
    });
    script.thread.join().unwrap();
}

#[test]
fn an_attendant_can_be_stopped_and_looks_for_a_while_only_if_told_so() {
    let script = serve("stopped", |server| {
        server.answer_version(&plain());
        server.drain();
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    let attendant = client.attendant();
    assert_eq!(attendant.attend_within(Duration::ZERO), Attended::TimedOut);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(client.attendant().attend(), Attended::Stopped));
        attendant.stop();
    });
    assert!(!client.is_dead());
    drop(client);
    assert_eq!(attendant.attend_within(Duration::ZERO), Attended::Ended, "the client is gone");
    script.thread.join().unwrap();
}
