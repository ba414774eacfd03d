//! The harness against servers that misbehave: it must show what it saw, and keep what it measured.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use generation_bench::BenchError;
use generation_bench::engine::{Mode, RunContext, RunSettings, run};
use generation_bench::peers::Certificates;
use generation_bench::report::{FORMAT, Report};
use generation_bench::result::RunResult;
use generation_bench::schedule::Arrival;
use generation_bench::system::Environment;
use generation_bench::target::etcd::EtcdConnector;
use generation_bench::target::generation::GenerationConnector;
use generation_bench::target::memcached::MemcachedConnector;
use generation_bench::target::resp::RespConnector;
use generation_bench::target::tls::TlsFiles;
use generation_bench::target::{Completion, Connector, Outcome, Request, Target, TargetError, Token};
use generation_bench::workload::WorkloadSpec;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A GET of a 16-byte key as the harness writes it.
const GET_LEN: usize = "*2\r\n$3\r\nGET\r\n$16\r\n0123456789abcdef\r\n".len();

/// Serves misses on one connection after the other; `before` may delay a reply, or end the connection with `false`.
fn fake_redis(mut before: impl FnMut(u64) -> bool + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut served = 0;
        for stream in listener.incoming() {
            serve(&mut stream.unwrap(), &mut served, &mut before);
        }
    });
    addr
}

fn serve(stream: &mut TcpStream, served: &mut u64, before: &mut impl FnMut(u64) -> bool) {
    let (mut buffer, mut held) = ([0; 4_096], 0);
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 {
            return;
        }
        held += read;
        while held >= GET_LEN {
            held -= GET_LEN;
            *served += 1;
            if !before(*served) || stream.write_all(b"$-1\r\n").is_err() {
                return;
            }
        }
    }
}

fn connector(addr: SocketAddr) -> RespConnector {
    RespConnector {
        addr: addr.to_string(),
        tls: None,
        cluster: false,
    }
}

fn settings(mode: Mode, duration: Duration) -> RunSettings {
    RunSettings {
        mode,
        connections: 1,
        warmup: Duration::ZERO,
        duration,
        spin: false,
        ..RunSettings::default()
    }
}

fn measure(connector: &dyn Connector, settings: &RunSettings) -> Result<RunResult, BenchError> {
    let spec = WorkloadSpec {
        keys: 1_000,
        ..WorkloadSpec::default()
    };
    let stop = AtomicBool::new(false);
    run(connector, &spec, settings, RunContext::plain(&stop, &mut |_| {}))
}

const STALL: Duration = Duration::from_millis(500);

/// A server that answers at once, but for one pause of [`STALL`] half a second after its first request.
fn stalling() -> SocketAddr {
    let mut first = None;
    let mut stalled = false;
    fake_redis(move |_| {
        let first = *first.get_or_insert_with(Instant::now);
        if !stalled && first.elapsed() > Duration::from_millis(500) {
            stalled = true;
            std::thread::sleep(STALL);
        }
        true
    })
}

#[test]
fn an_open_loop_shows_the_stall_that_a_closed_loop_hides() {
    let duration = Duration::from_millis(1_500);
    let open = Mode::Open {
        rate_per_s: 500.0,
        arrival: Arrival::Constant,
    };
    let open = measure(&connector(stalling()), &settings(open, duration)).unwrap();
    let closed = Mode::Closed {
        depth: 1,
        window: false,
    };
    let closed = measure(&connector(stalling()), &settings(closed, duration)).unwrap();
    let (open, closed) = (&open.classes[0], &closed.classes[0]);
    let stall_us = STALL.as_secs_f64() * 1e6;
    // A third of the arrivals fell into the stall and waited for half of it on average.
    assert!(open.latency.count > 700, "{}", open.latency.count);
    assert!(
        open.latency.p90_us > stall_us / 4.0,
        "open loop, p90 {}",
        open.latency.p90_us
    );
    assert!(
        open.latency.max_us >= stall_us * 0.9,
        "open loop, max {}",
        open.latency.max_us
    );
    // One operation in a closed loop met it; the others were not even sent.
    assert!(
        closed.latency.p90_us < stall_us / 4.0,
        "closed loop, p90 {}",
        closed.latency.p90_us
    );
    assert!(
        closed.latency.max_us >= stall_us * 0.9,
        "closed loop, max {}",
        closed.latency.max_us
    );
}

/// Answers at once, but takes its time to encode: a client that is too slow for its schedule.
struct SlowToSend {
    pending: Vec<Completion>,
}

struct SlowConnector;

impl Connector for SlowConnector {
    fn name(&self) -> String {
        "slow".to_owned()
    }

    fn connect(&self, _: usize) -> Result<Box<dyn Target>, TargetError> {
        Ok(Box::new(SlowToSend { pending: Vec::new() }))
    }
}

impl Target for SlowToSend {
    fn connections(&self) -> usize {
        1
    }

    fn submit(&mut self, connection: usize, token: Token, _: &Request<'_>) -> Result<(), TargetError> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(50) {
            std::hint::spin_loop();
        }
        self.pending.push(Completion {
            token,
            connection,
            outcome: Outcome::Hit { version: 0 },
        });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        Ok(())
    }

    fn poll(&mut self, _: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        completions.append(&mut self.pending);
        Ok(())
    }
}

#[test]
fn a_generator_that_falls_behind_marks_the_run_invalid() {
    let mode = Mode::Open {
        rate_per_s: 200_000.0,
        arrival: Arrival::Poisson,
    };
    let result = measure(&SlowConnector, &settings(mode, Duration::from_millis(300))).unwrap();
    assert!(!result.valid);
    assert!(result.invalid[0].contains("fell behind"), "{:?}", result.invalid);
    assert!(result.lateness.late_share() > 0.5, "{:?}", result.lateness);
    let text = generation_bench::report::table::run(&result);
    assert!(text.contains("*** INVALID RUN"), "{text}");
    // The latency is the intended one, so it shows the backlog too.
    assert!(
        result.classes[0].latency.p50_us > 10_000.0,
        "{}",
        result.classes[0].latency.p50_us
    );
    assert!(result.classes[0].service.p50_us < result.classes[0].latency.p50_us);
}

#[test]
fn a_generator_that_keeps_up_is_valid() {
    let addr = fake_redis(|_| true);
    let mode = Mode::Open {
        rate_per_s: 200.0,
        arrival: Arrival::Constant,
    };
    let generous = generation_bench::schedule::LatenessLimit {
        late_after_ns: 1_000_000_000,
        max_share: 0.01,
    };
    let settings = RunSettings {
        lateness: generous,
        ..settings(mode, Duration::from_millis(500))
    };
    let result = measure(&connector(addr), &settings).unwrap();
    assert!(result.valid, "{:?} {:?}", result.invalid, result.error);
    assert_eq!((result.completed, result.misses, result.unfinished), (100, 100, 0));
}

#[test]
fn nobody_listening_is_named_with_its_address() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mode = Mode::Closed {
        depth: 1,
        window: false,
    };
    let error = measure(&connector(addr), &settings(mode, Duration::from_secs(1))).unwrap_err();
    assert!(
        matches!(error, BenchError::Target(TargetError::Unreachable { .. })),
        "{error}"
    );
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
    let nowhere = RespConnector {
        addr: "no port here".to_owned(),
        tls: None,
        cluster: false,
    };
    let error = measure(&nowhere, &settings(mode, Duration::from_secs(1))).unwrap_err();
    assert!(
        matches!(error, BenchError::Target(TargetError::Resolve { .. })),
        "{error}"
    );
}

#[test]
fn nobody_listening_on_udp_is_noticed_before_quic_gives_up() {
    let directory = tempfile::tempdir().unwrap();
    Certificates::make(directory.path()).unwrap();
    let addr = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = directory.path().join("client.toml");
    let text = format!(
        "cluster = \"dev\"\nseeds = [\"{addr}\"]\nca = \"ca.pem\"\ncertificate = \"server.pem\"\nkey = \"server.key\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let Err(error) = GenerationConnector { config }.connect(1) else {
        panic!("nobody listens, and yet it connected");
    };
    assert!(
        matches!(error, TargetError::Unreachable { .. }) && error.to_string().contains("nobody listens"),
        "{error}"
    );
}

#[test]
fn a_server_that_never_answers_a_plaintext_request_may_want_tls() {
    let addr = fake_redis(|_| false);
    let mode = Mode::Closed { depth: 1, window: true };
    let result = measure(&connector(addr), &settings(mode, Duration::from_hours(1))).unwrap();
    let error = result.error.expect("an error");
    assert!(error.contains("does this port want TLS (--ca)?"), "{error}");
}

#[test]
fn a_server_that_dies_leaves_what_was_measured() {
    let addr = fake_redis(|served| served < 5_000);
    let mode = Mode::Closed {
        depth: 16,
        window: true,
    };
    let result = measure(&connector(addr), &settings(mode, Duration::from_hours(1))).unwrap();
    assert!(!result.valid);
    let error = result.error.as_ref().expect("an error");
    assert!(
        error.contains("lost redis") && error.contains(&addr.to_string()),
        "{error}"
    );
    // The last replies may go down with the connection.
    assert!((4_900..=4_999).contains(&result.completed), "{}", result.completed);
    assert!(result.failures["connection_lost"] >= 1, "{:?}", result.failures);
    assert!(result.classes[0].latency.count > result.completed);
    let text = generation_bench::report::table::run(&result);
    assert!(text.contains("ENDED EARLY"), "{text}");
    // And it can be written and read back.
    let completed = result.completed;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.json");
    let report = Report::Runs {
        format: FORMAT,
        environment: Box::new(Environment::capture()),
        runs: vec![result],
    };
    report.write(&path).unwrap();
    let Report::Runs { runs, .. } = Report::read(&path).unwrap() else {
        panic!("another kind of report")
    };
    assert_eq!(runs[0].completed, completed);
    assert!(runs[0].latency().len() > completed);
}

#[test]
fn a_stop_ends_the_run_and_keeps_its_figures() {
    let stop = Arc::new(AtomicBool::new(false));
    let pull = Arc::clone(&stop);
    let addr = fake_redis(move |served| {
        if served == 1_000 {
            pull.store(true, Ordering::Relaxed);
        }
        true
    });
    let spec = WorkloadSpec {
        keys: 1_000,
        ..WorkloadSpec::default()
    };
    let settings = settings(
        Mode::Closed {
            depth: 1,
            window: false,
        },
        Duration::from_mins(10),
    );
    let result = run(
        &connector(addr),
        &spec,
        &settings,
        RunContext::plain(&stop, &mut |_| {}),
    )
    .unwrap();
    assert!(result.interrupted && result.error.is_none());
    assert_eq!((result.failed(), result.unfinished), (0, 0));
    assert!(result.completed >= 999, "{}", result.completed);
}

#[test]
fn a_server_that_speaks_something_else_is_told_apart() {
    let addr = fake_redis(|_| true);
    let target = MemcachedConnector {
        addr: addr.to_string(),
        tls: None,
    };
    // The reply to the first whole batch of bytes is RESP.
    let mode = Mode::Closed {
        depth: 64,
        window: false,
    };
    let result = measure(&target, &settings(mode, Duration::from_mins(1))).unwrap();
    assert!(
        result
            .error
            .as_ref()
            .is_some_and(|error| error.contains("does not speak its protocol")),
        "{result:?}"
    );
}

#[test]
fn a_wrong_certificate_is_named_as_such() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ours = Certificates::make(ours.path()).map(|made| (ours, made)).unwrap();
    let theirs = Certificates::make(theirs.path()).map(|made| (theirs, made)).unwrap();
    let addr = tls_server(&theirs.1);
    let target = |ca| RespConnector {
        addr: addr.to_string(),
        tls: Some(TlsFiles {
            ca,
            identity: None,
            server_name: None,
        }),
        cluster: false,
    };
    let mode = Mode::Closed {
        depth: 1,
        window: false,
    };
    let error = measure(&target(ours.1.ca.clone()), &settings(mode, Duration::from_secs(1))).unwrap_err();
    assert!(matches!(error, BenchError::Target(TargetError::Tls { .. })), "{error}");
    assert!(error.to_string().contains("not signed by the authority"), "{error}");
    let missing = measure(
        &target("/nonexistent/ca.pem".into()),
        &settings(mode, Duration::from_secs(1)),
    )
    .unwrap_err();
    assert!(
        matches!(missing, BenchError::Target(TargetError::Certificate { .. })),
        "{missing}"
    );
    // The right authority gets through the handshake and measures.
    let closed = RunSettings {
        operations: Some(100),
        ..settings(mode, Duration::from_mins(1))
    };
    let result = measure(&target(theirs.1.ca.clone()), &closed).unwrap();
    assert_eq!((result.completed, result.error), (100, None));
}

/// Serves misses over TLS, one connection at a time.
fn tls_server(certificates: &Certificates) -> SocketAddr {
    let chain = CertificateDer::pem_file_iter(&certificates.certificate)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_file(&certificates.key).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(session, stream.unwrap());
            let (mut buffer, mut held) = ([0; 4_096], 0);
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                held += read;
                while held >= GET_LEN {
                    held -= GET_LEN;
                    if stream.write_all(b"$-1\r\n").is_err() {
                        held = 0;
                    }
                }
            }
        }
    });
    addr
}

/// Answers every call of an etcd client with an entry, and closes the connection after `calls` of them.
fn fake_etcd(calls: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let stream = listener.accept().unwrap().0;
            stream.set_nonblocking(true).unwrap();
            let stream = tokio::net::TcpStream::from_std(stream).unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            for _ in 0..calls {
                let Some(Ok((request, mut respond))) = connection.accept().await else {
                    return;
                };
                // A status tells which member leads; a range brings kvs { mod_revision: 9 }.
                let message: &[u8] = if request.uri().path().ends_with("/Range") {
                    b"\0\0\0\0\x04\x12\x02\x18\x09"
                } else {
                    b"\0\0\0\0\0"
                };
                let mut body = respond.send_response(http::Response::new(()), false).unwrap();
                body.send_data(bytes::Bytes::from_static(message), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                body.send_trailers(trailers).unwrap();
            }
        });
    });
    addr
}

#[test]
fn an_etcd_that_goes_away_leaves_what_was_measured() {
    let addr = fake_etcd(2_000);
    let target = EtcdConnector {
        endpoints: vec![addr.to_string()],
        tls: None,
    };
    let mode = Mode::Closed {
        depth: 32,
        window: true,
    };
    let result = measure(&target, &settings(mode, Duration::from_mins(1))).unwrap();
    let error = result.error.as_ref().expect("an error");
    assert!(
        error.contains("lost etcd") && error.contains(&addr.to_string()),
        "{error}"
    );
    // One of the calls was the status at the beginning, and the last replies go down with the connection.
    assert!((1_500..=1_999).contains(&result.completed), "{}", result.completed);
    assert_eq!((result.hits, result.misses), (result.completed, 0));
}

#[test]
fn whoever_answers_http_but_is_no_etcd_is_told_apart() {
    let addr = fake_redis(|_| true);
    let target = EtcdConnector {
        endpoints: vec![addr.to_string()],
        tls: None,
    };
    let mode = Mode::Closed {
        depth: 1,
        window: false,
    };
    let error = measure(&target, &settings(mode, Duration::from_secs(1))).unwrap_err();
    assert!(error.to_string().contains("etcd"), "{error}");
}

#[test]
fn a_script_acts_during_the_run_and_its_notes_are_in_the_result() {
    let addr = fake_redis(|_| true);
    let mode = Mode::Open {
        rate_per_s: 500.0,
        arrival: Arrival::Constant,
    };
    let stop = AtomicBool::new(false);
    let mut progress = |_| {};
    let context = RunContext {
        script: Some(Box::new(|notes| {
            if notes.wait_until(0.1) {
                notes.note("half way");
            }
        })),
        keep_operations: true,
        ..RunContext::plain(&stop, &mut progress)
    };
    let spec = WorkloadSpec {
        keys: 1_000,
        ..WorkloadSpec::default()
    };
    let result = run(
        &connector(addr),
        &spec,
        &settings(mode, Duration::from_millis(200)),
        context,
    )
    .unwrap();
    assert_eq!(result.events.len(), 1);
    assert_eq!(result.events[0].text, "half way");
    assert!(result.events[0].at_s >= 0.1, "{:?}", result.events);
    assert_eq!(result.ended.len() as u64, result.completed);
    assert!(result.ended.iter().all(|operation| operation.failure.is_none()));
    // The page draws the event's line and its label.
    let report = Report::Runs {
        format: FORMAT,
        environment: Box::new(Environment::capture()),
        runs: vec![result],
    };
    let page = generation_bench::report::html::render(&report).unwrap();
    assert_eq!(page.matches("half way").count(), 2, "one label in each chart");
}

#[test]
fn two_threads_share_the_rate_and_their_histograms_are_merged() {
    struct Instant_;
    impl Connector for Instant_ {
        fn name(&self) -> String {
            "instant".to_owned()
        }
        fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
            Ok(Box::new(Echo {
                connections,
                pending: Vec::new(),
            }))
        }
    }
    struct Echo {
        connections: usize,
        pending: Vec<Completion>,
    }
    impl Target for Echo {
        fn connections(&self) -> usize {
            self.connections
        }
        fn submit(&mut self, connection: usize, token: Token, _: &Request<'_>) -> Result<(), TargetError> {
            assert!(connection < self.connections);
            self.pending.push(Completion {
                token,
                connection,
                outcome: Outcome::Hit { version: 0 },
            });
            Ok(())
        }
        fn flush(&mut self) -> Result<(), TargetError> {
            Ok(())
        }
        fn poll(&mut self, _: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
            completions.append(&mut self.pending);
            Ok(())
        }
    }
    let mode = Mode::Open {
        rate_per_s: 1_000.0,
        arrival: Arrival::Constant,
    };
    let settings = RunSettings {
        threads: 2,
        connections: 5,
        interval: Duration::from_millis(100),
        ..settings(mode, Duration::from_millis(500))
    };
    let result = measure(&Instant_, &settings).unwrap();
    assert!((480..=502).contains(&result.completed), "{}", result.completed);
    let in_intervals: u64 = result.intervals.iter().map(|interval| interval.latency.count).sum();
    assert_eq!(in_intervals, result.completed);
    assert_eq!(result.hit_ratio(), Some(1.0));
}
