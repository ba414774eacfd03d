//! What a client says when it cannot connect, and whom it refuses to talk to.

use std::time::Duration;

use generation_client::{Client, ConnectError, Credential};
use generation_proto::Status;
use rcgen::date_time_ymd;

use crate::fake::{Authority, CLUSTER, FakeNode, map_of};

/// Connects with any certificate.
async fn connect_with(authority: &Authority, node: &FakeNode, issued: crate::fake::Issued) -> ConnectError {
    authority
        .builder(&[node])
        .certificate(Credential::der(issued.certificate))
        .key(Credential::der(issued.key))
        .connect()
        .await
        .unwrap_err()
}

#[tokio::test]
async fn a_client_of_another_authority_is_told_so() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let error = connect_with(&authority, &node, Authority::new().issue(CLUSTER, "client/x")).await;
    assert!(matches!(error, ConnectError::ClientCertificate { .. }), "{error}");
    assert!(
        error.to_string().contains("not signed by the cluster's authority"),
        "{error}"
    );
}

#[tokio::test]
async fn a_client_whose_certificate_expired_is_told_so() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let expired = authority.issue_with(CLUSTER, "client/x", |params| {
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    let error = connect_with(&authority, &node, expired).await;
    assert!(error.to_string().contains("has expired"), "{error}");
}

#[tokio::test]
async fn a_client_without_certificate_does_not_start() {
    let error = Client::builder()
        .cluster(CLUSTER)
        .seed("127.0.0.1:1")
        .ca(Credential::der(Authority::new().certificate))
        .connect()
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ConnectError::Config(why) if why.contains("generation certs client")),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_missing_or_unreadable_is_named() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let cases = [
        (Client::builder(), "cluster"),
        (Client::builder().cluster(CLUSTER), "seeds"),
        (Client::builder().cluster(CLUSTER).seed("x:1"), "`ca`"),
        (authority.builder(&[&node]).ca("/nowhere/ca.pem"), "/nowhere/ca.pem"),
        (
            authority.builder(&[&node]).certificate(Credential::pem("no pem")),
            "no certificate",
        ),
        (
            authority.builder(&[&node]).key(Credential::pem("no pem")),
            "private key",
        ),
        (authority.builder(&[]).seeds(["no port"]), "no port"),
    ];
    for (builder, what) in cases {
        let error = builder.connect().await.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[tokio::test]
async fn nodes_that_are_not_this_clusters_are_refused() {
    let authority = Authority::new();
    let expired = authority.issue_with(CLUSTER, "node/1", |params| params.not_after = date_time_ymd(2020, 1, 1));
    for (certificate, what) in [
        (authority.issue("other", "node/1"), "cluster `other`, not `test`"),
        (authority.issue(CLUSTER, "client/1"), "not of a node"),
        (Authority::new().issue(CLUSTER, "node/1"), "not signed by the authority"),
        (expired, "has expired"),
    ] {
        let node = FakeNode::start_as(&authority, 1, 1, certificate);
        let error = authority.builder(&[&node]).connect().await.unwrap_err();
        assert!(matches!(error, ConnectError::ServerCertificate { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[tokio::test]
async fn a_node_that_is_not_the_one_the_map_names_is_refused() {
    let authority = Authority::new();
    let first = FakeNode::start(&authority, 1, 1);
    let second = FakeNode::start(&authority, 2, 1);
    // The map says that node 3 is where node 2 is.
    first.set_map(map_of(2, &[(1, first.addr, 1), (3, second.addr, 1)], 3, 1));
    let client = authority
        .builder(&[&first])
        .timeout(Duration::from_millis(500))
        .connect()
        .await
        .unwrap();
    let error = client.ping_node(3).await.unwrap_err();
    assert_eq!(error.code(), "server_certificate");
    assert!(error.to_string().contains("node 2, and node 3 should be"), "{error}");
}

#[tokio::test]
async fn another_version_is_named() {
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    node.refuse_hello(Status::UnsupportedVersion);
    let error = authority.builder(&[&node]).connect().await.unwrap_err();
    assert!(matches!(error, ConnectError::Version { .. }), "{error}");
}

#[tokio::test]
async fn silence_is_not_waited_for_forever() {
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let authority = Authority::new();
    let error = authority
        .builder(&[])
        .seed(silent.local_addr().unwrap().to_string())
        .connect_timeout(Duration::from_millis(200))
        .connect()
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::NoAnswer { .. }), "{error}");
}

#[tokio::test]
async fn one_seed_that_answers_is_enough_and_all_are_named_if_none_does() {
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let authority = Authority::new();
    let node = FakeNode::start(&authority, 1, 1);
    let builder = authority
        .builder(&[])
        .seed(silent.local_addr().unwrap().to_string())
        .connect_timeout(Duration::from_millis(500));
    let client = builder.clone().seed(node.addr.to_string()).connect().await.unwrap();
    client.ping().await.unwrap();
    let error = builder.seed("no port").connect().await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::NoSeed(errors) if errors.len() == 2),
        "{error}"
    );
}
