//! `generation dev` and `generation serve` as processes: start, end, certificates, and everything that must be refused with a
//! message that names its remedy.

use std::fs::Permissions;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use generation_node::gossip::{Change, Event, Fact, Gossip as _, Place};
use generation_server::gossip::{Settings, UdpGossip};
use generation_server::tls::identity::Role;
use generation_server::tls::issue::Authority;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Far longer than anything here takes, even on a busy machine.
const HANG: Duration = Duration::from_secs(30);
const BINARY: &str = env!("CARGO_BIN_EXE_generation");

fn generation(directory: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command
        .current_dir(directory)
        .env_remove("GENERATION_CONFIG")
        .env_remove("GENERATION_LOG");
    command
}

/// A server that runs until the test ends.
struct Server {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Server {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// The line it prints when it serves.
    fn ready(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| {
            let mut errors = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
            panic!("no ready line but `{line}`: {errors}")
        })
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end; the exit code and what it wrote to standard error.
    fn end(mut self) -> (i32, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < HANG, "the server does not stop");
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut errors = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (status.code().unwrap_or(-1), errors)
    }

    fn stop(self, signal: Signal) {
        self.signal(signal);
        let (code, errors) = self.end();
        assert_eq!(code, 0, "{errors}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn dev(directory: &Path, args: &[&str]) -> Server {
    Server::start(
        generation(directory)
            .args(["dev", "--json", "--memory", "16MiB"])
            .args(args),
    )
}

fn kv(directory: &Path, args: &[&str]) -> Output {
    generation(directory).arg("kv").args(args).output().unwrap()
}

fn free_port() -> String {
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string()
}

/// What the command prints to standard error when it refuses to start.
fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(output.stdout.is_empty());
    errors
}

#[test]
fn dev_serves_until_it_is_told_to_stop_and_starts_again_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    for (round, signal) in [Signal::TERM, Signal::INT, Signal::TERM].into_iter().enumerate() {
        let mut server = dev(directory.path(), &["--port", &port, "--cores", "2"]);
        let ready = server.ready();
        assert_eq!(ready["ready"], true);
        assert_eq!(ready["nodes"][0]["id"], 1);
        assert_eq!(ready["nodes"][0]["addr"], format!("127.0.0.1:{port}"));
        assert!(is_running(&ready["nodes"][0]["pid"]));
        let client = PathBuf::from(ready["client_config"].as_str().unwrap());
        generation_client::ClientConfig::load(&client).unwrap();

        // The default place is found without an option.
        let kept = kv(directory.path(), &["get", "greeting"]);
        let expected = if round == 0 { 3 } else { 0 };
        assert_eq!(kept.status.code(), Some(expected), "round {round}: {kept:?}");
        let put = kv(directory.path(), &["put", "greeting", "hello"]);
        assert_eq!(put.status.code(), Some(0), "{put:?}");
        let got = kv(
            directory.path(),
            &["get", "greeting", "--config", client.to_str().unwrap()],
        );
        assert_eq!(String::from_utf8(got.stdout).unwrap().trim_end(), "hello");
        let status = || -> Value {
            let mut command = generation(directory.path());
            let status = command.args(["status", "--json"]).output().unwrap();
            assert_eq!(status.status.code(), Some(0), "{status:?}");
            serde_json::from_slice(&status.stdout).unwrap()
        };
        // Each shard elects its leader when it starts, though it is alone.
        let deadline = Instant::now() + Duration::from_secs(20);
        let led = |status: &Value| {
            status["shards"]
                .as_array()
                .unwrap()
                .iter()
                .all(|shard| shard["leader"] == 1)
        };
        while !led(&status()) {
            assert!(Instant::now() < deadline, "not every shard has a leader");
        }
        let status = status();
        assert_eq!(
            (&status["cluster"], &status["durability"]),
            (&"dev".into(), &"sync".into())
        );
        assert_eq!(status["nodes"][0]["state"], "up");
        assert_eq!(status["nodes"][0]["records"], "1");
        assert_eq!(status["shards"].as_array().unwrap().len(), 16);
        assert_eq!(status["shards"][15]["leader"], 1);
        assert_eq!(status["shards"][15]["replicas"][0]["lag"], "0");
        let status = generation(directory.path()).arg("status").output().unwrap();
        assert!(String::from_utf8(status.stdout).unwrap().contains("1 entries"));
        server.stop(signal);
    }
    let status = generation(directory.path())
        .args(["status", "--timeout", "1s"])
        .output()
        .unwrap();
    assert_eq!(status.status.code(), Some(5), "nobody is there: {status:?}");
}

#[test]
fn a_second_dev_on_the_same_directory_names_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = dev(directory.path(), &["--port", "0"]);
    server.ready();
    let certificate = directory.path().join(".generation/certs/node-1.pem");
    let before = std::fs::read(&certificate).unwrap();
    let message = refused(generation(directory.path()).args(["dev", "--port", "0"]));
    assert!(message.contains(&server.child.id().to_string()), "{message}");
    assert_eq!(
        std::fs::read(&certificate).unwrap(),
        before,
        "the first one's certificates were touched"
    );
    // A crash leaves no lock behind.
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let mut again = dev(directory.path(), &["--port", "0"]);
    again.ready();
    again.stop(Signal::TERM);
}

/// Whether the process with this id runs.
fn is_running(pid: &Value) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state stands behind the name, which is in brackets.
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < HANG, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_node_of_dev_is_started_again_on_request_and_clients_still_know_it() {
    let directory = tempfile::tempdir().unwrap();
    let restart = |id: &str| {
        let output = generation(directory.path())
            .args(["dev", "restart-node", id, "--json"])
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, _, errors) = restart("1");
    assert_eq!(code, Some(5), "{errors}");
    assert!(errors.contains("start one"), "{errors}");
    let mut server = dev(directory.path(), &["--port", "0"]);
    let ready = server.ready();
    let first = &ready["nodes"][0];
    let authority = std::fs::read(directory.path().join(".generation/certs/ca.pem")).unwrap();
    let (code, answer, errors) = restart("1");
    assert_eq!(code, Some(0), "{errors}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&answer["id"], &answer["addr"]), (&first["id"], &first["addr"]));
    assert_ne!(answer["pid"], first["pid"]);
    assert!(is_running(&answer["pid"]) && !is_running(&first["pid"]));
    let put = kv(directory.path(), &["put", "greeting", "hello"]);
    assert_eq!(put.status.code(), Some(0), "{put:?}");
    let (code, _, errors) = restart("2");
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("there is no node 2"), "{errors}");
    server.stop(Signal::TERM);
    let mut again = dev(directory.path(), &["--port", "0"]);
    again.ready();
    let kept = std::fs::read(directory.path().join(".generation/certs/ca.pem")).unwrap();
    assert_eq!(kept, authority, "clients trust the same authority as before");
    again.stop(Signal::TERM);
}

#[test]
fn nodes_of_dev_die_with_it_and_it_ends_with_its_last_node() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = dev(directory.path(), &["--port", "0"]);
    let node = server.ready()["nodes"][0]["pid"].clone();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    wait_until("the end of the node", || !is_running(&node));
    let mut server = dev(directory.path(), &["--port", "0"]);
    let node = server.ready()["nodes"][0]["pid"].as_i64().unwrap();
    let pid = Pid::from_raw(i32::try_from(node).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let (code, errors) = server.end();
    assert_eq!(code, 1, "{errors}");
    assert!(errors.contains("node 1 has ended"), "{errors}");
}

#[test]
fn dev_refuses_what_cannot_work_and_what_its_directory_was_not_made_with() {
    let directory = tempfile::tempdir().unwrap();
    for nodes in ["0", "101", "x"] {
        let message = refused(generation(directory.path()).args(["dev", "--nodes", nodes]));
        assert!(message.contains("take 1 to 100"), "{message}");
    }
    assert!(!directory.path().join(".generation").exists());
    let mut server = dev(directory.path(), &["--port", "0", "--shards", "4"]);
    server.ready();
    server.stop(Signal::TERM);
    for (options, wanted) in [
        (&["--nodes", "3"][..], "--nodes 1, not 3"),
        (&["--shards", "8"], "--shards 4, not 8"),
        (
            &["--shards", "4", "--durability", "memory"],
            "--durability sync, not memory",
        ),
    ] {
        let message = refused(generation(directory.path()).args(["dev", "--port", "0"]).args(options));
        assert!(message.contains(wanted) && message.contains("--data"), "{message}");
    }
}

#[test]
fn a_node_in_memory_keeps_nothing_and_never_goes_back_to_an_old_epoch() {
    let directory = tempfile::tempdir().unwrap();
    let mut last = 0;
    for _ in 0..2 {
        let mut server = dev(directory.path(), &["--port", "0", "--durability", "memory"]);
        server.ready();
        let empty = kv(directory.path(), &["get", "greeting"]);
        assert_eq!(empty.status.code(), Some(3), "{empty:?}");
        let put = kv(directory.path(), &["put", "greeting", "hello"]);
        assert_eq!(put.status.code(), Some(0), "{put:?}");
        let status = generation(directory.path())
            .args(["status", "--json"])
            .output()
            .unwrap();
        let status: Value = serde_json::from_slice(&status.stdout).unwrap();
        assert_eq!(status["durability"], "memory");
        let epoch = status["epoch"].as_u64().unwrap();
        assert!(epoch > last, "{epoch} after {last}");
        last = epoch;
        server.stop(Signal::TERM);
    }
}

#[test]
fn dev_prints_what_to_try_next() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start(generation(directory.path()).args(["dev", "--port", "0"]));
    let mut first = String::new();
    server.output.read_line(&mut first).unwrap();
    assert!(first.contains("127.0.0.1:"), "{first}");
    server.signal(Signal::TERM);
    let mut rest = String::new();
    server.output.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("generation kv put"), "{rest}");
    let (code, errors) = server.end();
    assert_eq!(code, 0);
    assert_eq!(errors, "", "quiet when nothing is wrong");
}

/// A directory with certificates and a configuration for `serve`.
struct Deployment {
    directory: tempfile::TempDir,
    port: String,
}

impl Deployment {
    fn new() -> Self {
        let deployment = Self {
            directory: tempfile::tempdir().unwrap(),
            port: free_port(),
        };
        for args in [&["ca", "--cluster", "prod"][..], &["node", "1"], &["client", "web"]] {
            let output = generation(deployment.path()).arg("certs").args(args).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        deployment.configure("");
        deployment.client("client.toml", "certs", "certs/client-web");
        deployment
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn configure(&self, more: &str) {
        let text = format!(
            "listen = \"127.0.0.1:{}\"\ncores = 1\nshards = 4\ndata_dir = \"data\"\n{more}\n[log]\nfilter = \"info\"\n",
            self.port
        );
        std::fs::write(self.path().join("node.toml"), text).unwrap();
    }

    /// Writes a client configuration with the authority of one directory and the certificate of another.
    fn client(&self, name: &str, ca: &str, certificate: &str) {
        let text = format!(
            "cluster = \"prod\"\nseeds = [\"127.0.0.1:{}\"]\nca = \"{ca}/ca.pem\"\ncertificate = \"{certificate}.pem\"\n\
             key = \"{certificate}.key\"\n",
            self.port
        );
        std::fs::write(self.path().join(name), text).unwrap();
    }

    fn serve(&self) -> Command {
        let mut command = generation(self.path());
        command.args(["serve", "--config", "node.toml", "--json"]);
        command
    }

    fn start(&self) -> Server {
        let mut server = Server::start(&mut self.serve());
        server.ready();
        server
    }

    fn reaches(&self, client: &str) -> bool {
        let output = kv(self.path(), &["get", "x", "--config", client, "--timeout", "3s"]);
        match output.status.code() {
            Some(3) => true,
            code => {
                assert_ne!(code, Some(0), "{output:?}");
                false
            }
        }
    }
}

#[test]
fn serve_takes_clients_of_its_authority_only() {
    let deployment = Deployment::new();
    let server = deployment.start();
    assert!(deployment.reaches("client.toml"));

    // Another authority of the same name, as a stranger would make it.
    let stranger = ["ca", "--cluster", "prod", "--out", "stranger"];
    for args in [&stranger[..], &["client", "web", "--out", "stranger"]] {
        assert!(
            generation(deployment.path())
                .arg("certs")
                .args(args)
                .output()
                .unwrap()
                .status
                .success()
        );
    }
    deployment.client("stranger.toml", "certs", "stranger/client-web");
    assert!(!deployment.reaches("stranger.toml"));

    // The right authority, but expired.
    let read = |name: &str| std::fs::read_to_string(deployment.path().join("certs").join(name)).unwrap();
    let authority = Authority::from_pem(&read("ca.pem"), &read("ca.key")).unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_hours(48);
    let expired = authority
        .issue(Role::Client("old".into()), &[], Duration::from_hours(1), long_ago)
        .unwrap();
    std::fs::write(deployment.path().join("old.pem"), expired.certificate_pem).unwrap();
    std::fs::write(deployment.path().join("old.key"), expired.key_pem).unwrap();
    deployment.client("old.toml", "certs", "old");
    assert!(!deployment.reaches("old.toml"));

    assert!(deployment.reaches("client.toml"), "the others are served on");
    server.stop(Signal::TERM);
}

#[test]
fn certificates_are_exchanged_without_a_restart() {
    let deployment = Deployment::new();
    let server = deployment.start();
    assert!(deployment.reaches("client.toml"));
    let certs = |args: &[&str]| {
        let output = generation(deployment.path()).arg("certs").args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    certs(&["ca", "--cluster", "prod", "--out", "new"]);
    certs(&["node", "1", "--out", "new"]);
    certs(&["client", "web", "--out", "new"]);
    deployment.client("new.toml", "new", "new/client-web");
    assert!(!deployment.reaches("new.toml"));

    // A bad set is not taken.
    let at = |name: &str| deployment.path().join(name);
    std::fs::copy(at("new/node-1.pem"), at("certs/node-1.pem")).unwrap();
    server.signal(Signal::HUP);
    // The handler works on one signal after another, so the good set below is read after this one was refused.
    assert!(deployment.reaches("client.toml"));
    for name in ["ca.pem", "node-1.pem", "node-1.key"] {
        std::fs::copy(at("new").join(name), at("certs").join(name)).unwrap();
    }
    server.signal(Signal::HUP);
    let start = Instant::now();
    while !deployment.reaches("new.toml") {
        assert!(start.elapsed() < HANG, "the new certificates are not taken");
    }
    deployment.client("client.toml", "new", "certs/client-web");
    assert!(!deployment.reaches("client.toml"), "the old authority is still trusted");
    server.signal(Signal::TERM);
    let (code, errors) = server.end();
    assert_eq!(code, 0);
    assert!(
        errors.contains("stay in use") && errors.contains("reloaded"),
        "{errors}"
    );
}

#[test]
fn a_node_with_gossip_keys_tells_others_where_it_is() {
    let deployment = Deployment::new();
    let port = free_port();
    deployment.configure(&format!(
        "[gossip]\nkey_file = \"certs/gossip.keys\"\nlisten = \"127.0.0.1:{port}\"\ninterval = \"50ms\""
    ));
    let missing = refused(deployment.serve().arg("--check-config"));
    assert!(missing.contains("generation certs gossip-key"), "{missing}");
    let output = generation(deployment.path()).args(["certs", "gossip-key"]).output();
    assert!(output.unwrap().status.success());
    let keys = deployment.path().join("certs/gossip.keys");
    std::fs::set_permissions(&keys, Permissions::from_mode(0o644)).unwrap();
    let exposed = refused(deployment.serve().arg("--check-config"));
    assert!(exposed.contains("chmod 600"), "{exposed}");
    std::fs::set_permissions(&keys, Permissions::from_mode(0o600)).unwrap();
    let server = deployment.start();
    let other = UdpGossip::start(Settings {
        cluster: "prod".into(),
        node: 2,
        generation: 1,
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        interval: Duration::from_millis(50),
        key_file: keys,
        seeds: vec![format!("127.0.0.1:{port}")],
    })
    .unwrap();
    let place = Fact::Place(Place {
        addr: format!("127.0.0.1:{}", deployment.port).parse().unwrap(),
        zone: String::new(),
    });
    let mut heard = Vec::new();
    let start = Instant::now();
    while !heard
        .iter()
        .any(|event: &Event| event.node == 1 && event.change == Change::Told(place.clone()))
    {
        assert!(start.elapsed() < HANG, "{heard:?}");
        other.poll(&mut heard);
        std::thread::sleep(Duration::from_millis(5));
    }
    let first = heard.last().unwrap().generation;
    server.stop(Signal::TERM);
    // Started again, it is another start.
    let server = deployment.start();
    while !heard.iter().any(|event| event.generation > first) {
        assert!(start.elapsed() < HANG, "{heard:?}");
        other.poll(&mut heard);
        std::thread::sleep(Duration::from_millis(5));
    }
    server.stop(Signal::TERM);
}

#[test]
fn a_wrong_configuration_is_refused_by_file_and_line() {
    let deployment = Deployment::new();
    for (text, wanted) in [
        (
            "shard = 4\n",
            "node.toml:5: unknown key `shard`; did you mean `shards`?",
        ),
        ("pin = \"yes\"\n", "node.toml:5: "),
        ("[memory]\nbudget = \"much\"\n", "node.toml:6: "),
        ("[limits]\nmax_value = \"1GiB\"\n", "limits.max_value: "),
    ] {
        deployment.configure(text);
        let message = refused(&mut deployment.serve());
        assert!(message.contains(wanted), "{message}");
        let message = refused(deployment.serve().arg("--check-config"));
        assert!(message.contains(wanted), "{message}");
    }
    let message = refused(generation(deployment.path()).args(["serve", "--config", "nothing.toml"]));
    assert!(
        message.contains("nothing.toml") && message.contains("--print-default-config"),
        "{message}"
    );
    deployment.configure("");
    let checked = deployment.serve().arg("--check-config").output().unwrap();
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    assert!(
        !deployment.path().join("data").exists(),
        "a check leaves nothing behind"
    );
}

#[test]
fn the_default_configuration_is_printed_and_taken() {
    let deployment = Deployment::new();
    let printed = generation(deployment.path())
        .args(["serve", "--print-default-config"])
        .output()
        .unwrap();
    assert!(printed.status.success());
    std::fs::write(deployment.path().join("node.toml"), &printed.stdout).unwrap();
    let flags = [
        "--cores",
        "1",
        "--listen",
        "127.0.0.1:0",
        "--memory",
        "8MiB",
        "--data-dir",
        "elsewhere",
    ];
    let mut server = Server::start(deployment.serve().args(flags));
    let ready = server.ready();
    assert_ne!(ready["nodes"][0]["addr"], "127.0.0.1:7400", "flags win over the file");
    assert!(deployment.path().join("elsewhere").exists());
    server.stop(Signal::TERM);
}

#[test]
fn what_the_machine_lacks_is_named_with_its_remedy() {
    let deployment = Deployment::new();
    let held = UdpSocket::bind(format!("127.0.0.1:{}", deployment.port)).unwrap();
    let message = refused(&mut deployment.serve());
    assert!(
        message.contains(&deployment.port) && message.contains("in use"),
        "{message}"
    );
    drop(held);

    std::fs::write(deployment.path().join("file"), "").unwrap();
    let message = refused(deployment.serve().args(["--data-dir", "file/data"]));
    assert!(
        message.contains("file/data") && message.contains("must be able to write"),
        "{message}"
    );

    let message = refused(deployment.serve().args(["--cores", "250"]));
    assert!(
        message.contains("250 cores") && message.contains("lower `cores`"),
        "{message}"
    );

    let message = refused(deployment.serve().args(["--memory", "1000000GiB"]));
    assert!(message.contains("memory.budget"), "{message}");

    let message = refused(deployment.serve().args(["--log", "=="]));
    assert!(message.contains("log filter"), "{message}");

    std::fs::remove_file(deployment.path().join("certs/node-1.key")).unwrap();
    let message = refused(&mut deployment.serve());
    assert!(
        message.contains("node-1.key") && message.contains("generation certs"),
        "{message}"
    );
}

#[test]
fn too_little_locked_memory_is_named_with_its_remedy() {
    let deployment = Deployment::new();
    let script = format!("ulimit -l 64 && exec {BINARY} serve --config node.toml");
    let mut command = if rustix::process::geteuid().is_root() {
        // The limit does not bind who has the capability.
        let mut command = Command::new("setpriv");
        command.args([
            "--bounding-set",
            "-ipc_lock",
            "--inh-caps",
            "-ipc_lock",
            "sh",
            "-c",
            &script,
        ]);
        command
    } else {
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        command
    };
    let message = refused(command.current_dir(deployment.path()));
    assert!(
        message.contains("512.0 KiB") && message.contains("LimitMEMLOCK="),
        "{message}"
    );
}

/// Runs `serve` where `io_uring_setup` fails with `errno`, by a seccomp filter that the process inherits.
fn serve_without_io_uring(deployment: &Deployment, errno: i32) -> String {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let rules = std::iter::once((libc::SYS_io_uring_setup, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    // A filter binds its thread and what it starts, and cannot be taken off: so the thread ends with the test.
    std::thread::scope(|scope| {
        let refuse = scope.spawn(|| {
            seccompiler::apply_filter(&program).unwrap();
            refused(&mut deployment.serve())
        });
        refuse.join().unwrap()
    })
}

#[test]
fn a_kernel_without_io_uring_is_named_with_its_remedy() {
    let deployment = Deployment::new();
    let message = serve_without_io_uring(&deployment, libc::ENOSYS);
    assert!(
        message.contains("io_uring") && message.contains("Linux 5.8"),
        "{message}"
    );
    let message = serve_without_io_uring(&deployment, libc::EPERM);
    assert!(
        message.contains("kernel.io_uring_disabled") && message.contains("seccomp"),
        "{message}"
    );
    assert!(!deployment.path().join("data").exists());
}
