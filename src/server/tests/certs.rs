//! `generation certs` as a process: what it writes, with which permissions, and what it refuses.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use generation_server::gossip::keys::KeyRing;
use generation_server::tls::identity::{Identity, Role};

fn certs(directory: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_generation"))
        .current_dir(directory)
        .arg("certs")
        .args(args)
        .output()
        .unwrap()
}

fn ok(directory: &Path, args: &[&str]) -> String {
    let output = certs(directory, args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn refused(directory: &Path, args: &[&str]) -> String {
    let output = certs(directory, args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

fn identity(path: &Path) -> Identity {
    let text = std::fs::read(path).unwrap();
    Identity::from_certificate(&x509_parser::pem::parse_x509_pem(&text).unwrap().1.contents).unwrap()
}

#[test]
fn a_cluster_of_certificates_takes_one_command_each() {
    let directory = tempfile::tempdir().unwrap();
    ok(directory.path(), &["ca", "--cluster", "prod"]);
    ok(
        directory.path(),
        &["node", "1", "--host", "127.0.0.1", "--host", "localhost"],
    );
    ok(directory.path(), &["client", "web"]);
    let line = ok(directory.path(), &["admin", "ops", "--json"]);
    let object: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(object["identity"], "generation://prod/admin/ops");

    let out = directory.path().join("certs");
    for (stem, role) in [
        ("node-1", Role::Node(1)),
        ("client-web", Role::Client("web".into())),
        ("admin-ops", Role::Admin("ops".into())),
    ] {
        assert_eq!(
            identity(&out.join(format!("{stem}.pem"))),
            Identity {
                cluster: "prod".into(),
                role
            }
        );
        let mode = std::fs::metadata(out.join(format!("{stem}.key")))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{stem}.key");
    }
    assert_eq!(
        std::fs::metadata(out.join("ca.key")).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let left = std::fs::read_dir(&out).unwrap().count();
    assert_eq!(left, 8, "no temporary file is left");
}

#[test]
fn nothing_is_replaced_without_force() {
    let directory = tempfile::tempdir().unwrap();
    ok(directory.path(), &["ca"]);
    let key = directory.path().join("certs/ca.key");
    let before = std::fs::read(&key).unwrap();
    assert!(refused(directory.path(), &["ca"]).contains("--force"));
    assert_eq!(std::fs::read(&key).unwrap(), before);
    // Half a pair counts as one.
    std::fs::remove_file(&key).unwrap();
    assert!(refused(directory.path(), &["ca"]).contains("ca.pem"));
    assert!(!key.exists());
    ok(directory.path(), &["ca", "--force"]);
    assert_ne!(std::fs::read(&key).unwrap(), before);
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn mistakes_are_named_with_their_remedy() {
    let directory = tempfile::tempdir().unwrap();
    assert!(refused(directory.path(), &["node", "1"]).contains("generation certs ca"));
    ok(directory.path(), &["ca"]);
    assert!(refused(directory.path(), &["node", "0"]).contains("from 1"));
    assert!(refused(directory.path(), &["client", "a/b"]).contains("a/b"));
    assert!(refused(directory.path(), &["node", "1", "--host", "a b"]).contains("a b"));
    assert!(refused(directory.path(), &["ca", "--cluster", "a b", "--force"]).contains("a b"));
    std::fs::write(directory.path().join("certs/ca.pem"), "nonsense").unwrap();
    assert!(refused(directory.path(), &["node", "1"]).contains("ca.pem"));
    let line = refused(directory.path(), &["node", "1", "--json"]);
    let object: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(object["error"]["code"], "usage");
    assert_eq!(object["error"]["state"], "not_sent");
}

#[test]
fn gossip_keys_are_added_behind_those_there_are() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("certs/gossip.keys");
    let ids = || KeyRing::load(&path).unwrap().ids();
    let line = ok(directory.path(), &["gossip-key", "--json"]);
    let object: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(object["id"], 1);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(ids(), [1]);
    assert!(refused(directory.path(), &["gossip-key"]).contains("--force"));
    let first = std::fs::read_to_string(&path).unwrap();
    ok(directory.path(), &["gossip-key", "--add"]);
    assert_eq!(ids(), [1, 2]);
    assert!(std::fs::read_to_string(&path).unwrap().starts_with(&first));
    for _ in 2..16 {
        ok(directory.path(), &["gossip-key", "--add"]);
    }
    assert!(refused(directory.path(), &["gossip-key", "--add"]).contains("more than 16"));
    ok(directory.path(), &["gossip-key", "--force"]);
    assert_eq!(ids(), [1]);
    std::fs::remove_file(&path).unwrap();
    assert!(refused(directory.path(), &["gossip-key", "--add"]).contains("no such file"));
}
