//! The environment of a core on real sockets and executors: steering, waiting, stopping.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use generation_node::env::disk::{BLOCK_BYTES, Disk as _, File as _, Open};
use generation_node::env::{Env, Transmit};
use generation_server::env::GlommioEnv;
use generation_server::executors::Executors;
use generation_server::net::port::{self, Port, PortError};
use tempfile::TempDir;

/// Far longer than anything here takes, even on a busy machine: what lasts this long has failed.
const HANG: Duration = Duration::from_secs(20);
const BUFFER_BYTES: usize = 1 << 20;

fn open(cores: u16) -> Port {
    port::open(SocketAddr::from(([127, 0, 0, 1], 0)), cores, BUFFER_BYTES).unwrap()
}

/// Echoes every datagram with the core's index in front, until asked to stop.
async fn echo(env: GlommioEnv) {
    let mut datagrams = Vec::new();
    while !env.stopping() {
        env.receive(64, &mut datagrams);
        let idle = datagrams.is_empty();
        for datagram in datagrams.drain(..) {
            let mut answer = vec![env.core() as u8];
            answer.extend_from_slice(&datagram.payload);
            let transmit = Transmit {
                remote: datagram.remote,
                local_ip: datagram.local_ip,
                ecn: 0,
                segment_size: None,
            };
            env.transmit(&transmit, &answer);
        }
        if idle {
            env.park(None).await;
        }
        env.yield_now().await;
    }
}

/// A directory for cores that keep nothing in it.
fn scratch() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn client(server: SocketAddr) -> UdpSocket {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(server).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    client
}

/// Sends one datagram and returns what came back.
fn ask(client: &UdpSocket, payload: &[u8]) -> Vec<u8> {
    client.send(payload).unwrap();
    let mut answer = [0; 2048];
    let length = client
        .recv(&mut answer)
        .expect("an answer: the core sleeps although a datagram is there");
    answer[..length].to_vec()
}

#[test]
fn datagrams_go_to_the_core_their_connection_id_names() {
    let cores = 3;
    let port = open(cores);
    assert!(port.steered);
    let address = port.address;
    let executors = Executors::start(port, None, scratch().path(), echo, |_| ()).unwrap();
    for id in 0..=255_u8 {
        // A new socket each time: by the hash of the addresses they would be scattered.
        let client = client(address);
        let long = [0xc0, 0, 0, 0, 1, 8, id, 1, 2, 3, 4, 5, 6, 7];
        let short = [0x40, id, 1, 2, 3, 4, 5, 6, 7];
        for packet in [&long[..], &short[..]] {
            let answer = ask(&client, packet);
            assert_eq!(u16::from(answer[0]), u16::from(id) % cores);
            assert_eq!(&answer[1..], packet);
        }
    }
    executors.shared().stop();
    executors.join().unwrap();
}

#[test]
fn a_datagram_without_a_connection_id_still_reaches_some_core() {
    let port = open(2);
    let address = port.address;
    let executors = Executors::start(port, None, scratch().path(), echo, |_| ()).unwrap();
    let client = client(address);
    for packet in [
        &[0x40][..],
        &[0xc0, 0, 0, 0, 1, 0, 0],
        &[0xc0, 0],
        &[0xc0, 0, 0, 0, 1, 8],
    ] {
        assert_eq!(&ask(&client, packet)[1..], packet);
    }
    executors.shared().stop();
    executors.join().unwrap();
}

#[test]
fn a_port_in_use_is_refused_with_its_remedy() {
    let held = UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = port::open(held.local_addr().unwrap(), 1, BUFFER_BYTES).unwrap_err();
    assert!(matches!(error, PortError::InUse { .. }), "{error}");
    // A port of ours is not shared with a second node either.
    let port = open(2);
    assert!(matches!(
        port::open(port.address, 2, BUFFER_BYTES),
        Err(PortError::InUse { .. })
    ));
    let address = port.address;
    drop(port);
    port::open(address, 2, BUFFER_BYTES).expect("the port is free at once");
    let elsewhere = port::open(SocketAddr::from(([192, 0, 2, 1], 0)), 1, BUFFER_BYTES).unwrap_err();
    assert!(matches!(elsewhere, PortError::NotLocal(_)), "{elsewhere}");
}

#[test]
fn parking_ends_at_the_deadline_and_never_before() {
    for with_task in [false, true] {
        let executors = Executors::start(
            open(1),
            None,
            scratch().path(),
            move |env: GlommioEnv| async move {
                if with_task {
                    let sleeper = env.clone();
                    env.spawn(async move { sleeper.sleep_until(Instant::now() + HANG).await });
                }
                for wait in [Duration::ZERO, Duration::from_micros(300), Duration::from_millis(30)] {
                    let deadline = Instant::now() + wait;
                    while Instant::now() < deadline {
                        env.park(Some(deadline)).await;
                    }
                    env.sleep_until(deadline + wait).await;
                    assert!(Instant::now() >= deadline + wait);
                }
            },
            |_| (),
        )
        .unwrap();
        executors.join().unwrap();
    }
}

#[test]
fn tasks_go_on_while_the_core_is_parked() {
    let executors = Executors::start(
        open(1),
        None,
        scratch().path(),
        |env: GlommioEnv| async move {
            let done = std::rc::Rc::new(std::cell::Cell::new(0));
            for task in 1..=10_u64 {
                let (inner, done) = (env.clone(), done.clone());
                env.spawn(async move {
                    inner.sleep_until(Instant::now() + Duration::from_millis(task)).await;
                    inner.yield_now().await;
                    done.set(done.get() + 1);
                });
            }
            let start = Instant::now();
            while done.get() < 10 {
                assert!(start.elapsed() < HANG);
                env.park(Some(start + HANG)).await;
            }
        },
        |_| (),
    )
    .unwrap();
    executors.join().unwrap();
}

#[test]
fn a_busy_core_still_serves_its_timers() {
    let executors = Executors::start(
        open(1),
        None,
        scratch().path(),
        |env: GlommioEnv| async move {
            let done = std::rc::Rc::new(std::cell::Cell::new(false));
            let (inner, set) = (env.clone(), done.clone());
            env.spawn(async move {
                for _ in 0..10 {
                    inner.sleep_until(Instant::now() + Duration::from_millis(1)).await;
                }
                set.set(true);
            });
            // Never parks, so only yielding lets the reactor in.
            let start = Instant::now();
            while !done.get() {
                assert!(start.elapsed() < HANG, "a busy core starves its timers");
                env.yield_now().await;
            }
        },
        |_| (),
    )
    .unwrap();
    executors.join().unwrap();
}

#[test]
fn a_request_to_stop_wakes_every_core() {
    for with_task in [false, true] {
        let executors = Executors::start(
            open(3),
            None,
            scratch().path(),
            move |env: GlommioEnv| async move {
                if with_task {
                    let sleeper = env.clone();
                    env.spawn(async move { sleeper.sleep_until(Instant::now() + HANG).await });
                }
                echo(env).await;
            },
            |_| (),
        )
        .unwrap();
        let shared = executors.shared();
        let start = Instant::now();
        shared.stop();
        executors.join().unwrap();
        assert!(start.elapsed() < HANG / 2);
    }
}

#[test]
fn a_notice_from_another_thread_ends_the_park_under_way_or_the_next_one() {
    const NOTICES: u64 = 2_000;
    let put_down = Arc::new(AtomicU64::new(0));
    let found = Arc::new(AtomicU64::new(0));
    let (to_find, report) = (Arc::clone(&put_down), Arc::clone(&found));
    let executors = Executors::start(
        open(1),
        None,
        scratch().path(),
        move |env: GlommioEnv| {
            let (to_find, report) = (Arc::clone(&to_find), Arc::clone(&report));
            async move {
                while !env.stopping() {
                    report.store(to_find.load(Ordering::Acquire), Ordering::Release);
                    env.park(None).await;
                }
            }
        },
        |_| (),
    )
    .unwrap();
    let shared = executors.shared();
    for number in 1..=NOTICES {
        put_down.store(number, Ordering::Release);
        shared.notify(0);
        let start = Instant::now();
        while found.load(Ordering::Acquire) < number {
            assert!(start.elapsed() < HANG, "notice {number} woke nobody");
            std::hint::spin_loop();
            // Sometimes before the core sleeps, sometimes after.
            if number % 3 == 0 {
                std::thread::yield_now();
            }
        }
    }
    shared.stop();
    executors.join().unwrap();
}

/// Runs a future on a core with a directory of its own, and gives back what it returns.
fn on_a_core<T, F>(work: impl Fn(GlommioEnv) -> F + Clone + Send + 'static) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
{
    // Not in /tmp, which may be a file system that does not know O_DIRECT.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let executors = Executors::start(open(1), None, directory.path(), work, |_| ()).unwrap();
    executors.join().unwrap().remove(0)
}

#[test]
fn files_are_written_in_blocks_read_anywhere_and_renamed() {
    on_a_core(async |env: GlommioEnv| {
        let disk = env.disk();
        disk.create_directory("a/b").await.unwrap();
        let file = disk.open("a/b/file", Open::CreateNew).await.unwrap();
        let again = disk.open("a/b/file", Open::CreateNew).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AlreadyExists);
        file.allocate(64 << 10).await.unwrap();
        assert_eq!(file.len().await.unwrap(), 64 << 10);
        let bytes: Vec<u8> = (0..3 * BLOCK_BYTES).map(|place| (place % 251) as u8).collect();
        file.write_at(BLOCK_BYTES as u64, &bytes).await.unwrap();
        file.sync_data().await.unwrap();
        for (offset, len) in [(0, 10), (4_090, 20), (5_000, 9_000), (4_096, 12_288), (16_380, 8)] {
            let read = file.read_at(offset, len).await.unwrap();
            let expected = (offset as usize..offset as usize + len).map(|place| {
                place
                    .checked_sub(BLOCK_BYTES)
                    .and_then(|place| bytes.get(place))
                    .map_or(0, |byte| *byte)
            });
            assert_eq!(read, expected.collect::<Vec<u8>>(), "{len} bytes at {offset}");
        }
        assert_eq!(file.read_at((64 << 10) - 3, 10).await.unwrap(), [0; 3]);
        assert!(file.read_at(1 << 20, 10).await.unwrap().is_empty());
        let half = file.write_at(0, &bytes[..100]).await.unwrap_err();
        assert_eq!(half.kind(), ErrorKind::InvalidInput);
        file.close().await.unwrap();
        disk.rename("a/b/file", "a/b/other").await.unwrap();
        disk.sync_directory("a/b").await.unwrap();
        assert_eq!(disk.list("a/b").await.unwrap(), ["other"]);
        let gone = disk.open("a/b/file", Open::Read).await.unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
        let outside = disk.open("../file", Open::Read).await.unwrap_err();
        assert_eq!(outside.kind(), ErrorKind::InvalidInput);
        disk.remove("a/b/other").await.unwrap();
        assert!(disk.list("a/b").await.unwrap().is_empty());
    });
}

#[test]
fn operations_that_nobody_waits_for_do_no_harm() {
    on_a_core(async |env: GlommioEnv| {
        let disk = env.disk();
        let file = disk.open("file", Open::CreateNew).await.unwrap();
        let bytes = vec![7; 16 * BLOCK_BYTES];
        for round in 0..300_u64 {
            // More than the ring holds, each polled once and dropped.
            let mut write = Box::pin(file.write_at((round % 16) * BLOCK_BYTES as u64, &bytes));
            poll_fn(|context| {
                let _ = write.as_mut().poll(context);
                Poll::Ready(())
            })
            .await;
        }
        file.sync_data().await.unwrap();
        // What was given up may or may not be there; what is written now is.
        file.write_at(0, &bytes).await.unwrap();
        assert_eq!(file.read_at(0, bytes.len()).await.unwrap(), bytes);
    });
}

#[test]
fn tasks_and_timers_go_on_while_a_core_is_parked() {
    on_a_core(async |env: GlommioEnv| {
        let begin = Instant::now();
        let count = Rc::new(Cell::new(0));
        for number in 0..10_u64 {
            let (env, count) = (env.clone(), Rc::clone(&count));
            env.clone().spawn(async move {
                env.sleep_until(begin + Duration::from_millis(5 * number)).await;
                count.set(count.get() + 1);
                if number == 9 {
                    env.wake();
                }
            });
        }
        while count.get() < 10 {
            // Ended by the last task's wake; without it, and without a deadline, this would be for ever.
            env.park(None).await;
        }
        assert!(begin.elapsed() >= Duration::from_millis(45));
        // A task that was spawned is not run within the call.
        let cell = Rc::new(RefCell::new(0));
        let held = cell.borrow_mut();
        let (task_env, task_cell) = (env.clone(), Rc::clone(&cell));
        env.spawn(async move {
            *task_cell.borrow_mut() = 1;
            task_env.wake();
        });
        drop(held);
        while *cell.borrow() == 0 {
            env.park(None).await;
        }
    });
}

#[test]
fn a_panic_on_one_core_stops_the_node_and_is_reported() {
    let (tell, ended) = mpsc::channel();
    let executors = Executors::start(
        open(2),
        None,
        scratch().path(),
        |env: GlommioEnv| async move {
            assert!(env.core() != 1, "core one gives up");
            echo(env).await;
        },
        move |core| {
            let _ = tell.send(core);
        },
    )
    .unwrap();
    ended.recv_timeout(HANG).unwrap();
    ended.recv_timeout(HANG).unwrap();
    let error = executors.join().unwrap_err().to_string();
    assert!(error.contains("core 1") && error.contains("gives up"), "{error}");
}

/// glommio sleeps on a runnable task when its preemption timer fires between two steps of its executor, as happens on a machine
/// short of processors. With that timer at 5 µs, 22 answers of 3,000 came only with the next completion of anything.
#[test]
fn a_core_does_not_sleep_on_a_runnable_task_under_contention() {
    const ROUNDS: u64 = 500;
    let port = open(1);
    let address = port.address;
    let stop = Arc::new(AtomicBool::new(false));
    let spinners: Vec<_> = (0..4)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                pin_to_first_cpu();
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    let executors = Executors::start(
        port,
        Some(&[0]),
        scratch().path(),
        |env: GlommioEnv| async move {
            // Each park meets a task that can run, or will in a moment.
            let sleeper = env.clone();
            env.spawn(async move {
                while !sleeper.stopping() {
                    sleeper.sleep_until(Instant::now() + Duration::from_millis(1)).await;
                }
            });
            echo(env).await;
        },
        |_| (),
    )
    .unwrap();
    let client = client(address);
    let mut late = 0;
    for round in 0..ROUNDS {
        let start = Instant::now();
        ask(&client, &round.to_le_bytes());
        late += u32::from(start.elapsed() > Duration::from_secs(2));
    }
    stop.store(true, Ordering::Relaxed);
    for spinner in spinners {
        spinner.join().unwrap();
    }
    executors.shared().stop();
    executors.join().unwrap();
    assert_eq!(late, 0, "the core slept on a runnable task");
}

fn pin_to_first_cpu() {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(0);
    rustix::thread::sched_setaffinity(None, &cpus).unwrap();
}
