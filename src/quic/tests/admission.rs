//! Who gets in: certificates, floods of handshakes, limits.

#![allow(clippy::disallowed_methods, reason = "a test's clock has to begin somewhere")]

mod common;

use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::{Authority, Net, address, config, pair, target};
use generation_quic::{ClientCrypto, CloseReason, ConnectError, Driver, Event, Limits};

/// What the server says to a client with this TLS configuration.
fn verdict(authority: &Authority, crypto: ClientCrypto) -> Result<(), CloseReason> {
    let server = Driver::new(config(0, 1, 1, Some(authority.server()), Limits::default()));
    let client = Driver::new(config(0, 1, 2, None, Limits::default()));
    let mut net = Net::new(1, vec![server, client]);
    let now = net.now;
    net.nodes[1].driver.connect(now, &target(0, None, crypto)).unwrap();
    // The client believes itself connected before the server has seen its certificate; the server's view counts.
    let verdict = net.event(0, |_, event| match event {
        Event::Connected => Some(Ok(())),
        Event::Closed(reason) => Some(Err(reason.clone())),
        _ => None,
    });
    if verdict.is_err() {
        let told = net.event(1, |_, event| match event {
            Event::Closed(reason) => Some(reason.clone()),
            _ => None,
        });
        assert!(matches!(told, CloseReason::PeerTransport(_)), "{told:?}");
        assert_eq!(net.nodes[0].driver.stats().connected, 0);
    }
    verdict
}

#[test]
fn a_client_with_a_certificate_of_ours_gets_in() {
    let authority = Authority::new();
    assert_eq!(
        verdict(&authority, authority.client(Some(authority.issue(false)))),
        Ok(())
    );
}

#[test]
fn a_client_without_certificate_is_turned_away() {
    let authority = Authority::new();
    let reason = verdict(&authority, authority.client(None)).unwrap_err();
    assert!(reason.to_string().contains("certificate"), "{reason}");
}

#[test]
fn a_client_of_another_authority_is_turned_away() {
    let authority = Authority::new();
    let reason = verdict(&authority, authority.client(Some(Authority::new().issue(false)))).unwrap_err();
    assert!(reason.to_string().contains("certificate"), "{reason}");
}

#[test]
fn an_expired_client_is_turned_away() {
    let authority = Authority::new();
    let reason = verdict(&authority, authority.client(Some(authority.issue(true)))).unwrap_err();
    assert!(reason.to_string().to_lowercase().contains("expired"), "{reason}");
}

#[test]
fn a_server_of_another_authority_is_not_trusted() {
    let server = Driver::new(config(0, 1, 1, Some(Authority::new().server()), Limits::default()));
    let client = Driver::new(config(0, 1, 2, None, Limits::default()));
    let mut net = Net::new(1, vec![server, client]);
    let authority = Authority::new();
    let now = net.now;
    net.nodes[1]
        .driver
        .connect(now, &target(0, None, authority.client(Some(authority.issue(false)))))
        .unwrap();
    let reason = net.event(1, |_, event| match event {
        Event::Closed(reason) => Some(reason.clone()),
        _ => None,
    });
    assert!(matches!(reason, CloseReason::Transport(_)), "{reason:?}");
}

/// First packets of `count` clients that will never be heard of again.
fn initials(authority: &Authority, count: usize) -> Vec<Vec<u8>> {
    let now = Instant::now();
    let mut client = Driver::new(config(
        0,
        1,
        2,
        None,
        Limits {
            connections: count,
            ..Limits::default()
        },
    ));
    let crypto = authority.client(None);
    (0..count)
        .map(|_| {
            client.connect(now, &target(0, None, crypto.clone())).unwrap();
            let mut buffer = Vec::new();
            client.poll_transmit(now, &mut buffer).unwrap();
            buffer
        })
        .collect()
}

/// 10,000 first packets within a second that never complete: a bounded number of handshakes is kept, everybody else is asked to
/// prove the address, and a client that does gets in meanwhile.
#[test]
fn a_flood_of_handshakes_is_answered_with_retry_and_honest_clients_get_in() {
    let authority = Authority::new();
    let limits = Limits {
        retry_above: 32,
        ..Limits::default()
    };
    let server = Driver::new(config(0, 1, 1, Some(authority.server()), limits));
    let client = Driver::new(config(0, 1, 7, None, Limits::default()));
    let mut net = Net::new(1, vec![server, client]);
    net.nodes[0].driver.set_unix_ms(1_800_000_000_000);
    let flood = initials(&authority, 500);
    let mut buffer = Vec::new();
    let mut sent_bytes = 0;
    let mut received_bytes = 0;
    for round in 0..10_000 {
        // A spoofed address each, and another destination id than the last time this packet was used (the flood's own packets
        // are built once, to keep the test fast; a repeated one belongs to the attempt it began).
        let now = net.now + Duration::from_micros(100) * round;
        let from = std::net::SocketAddr::from(([192, 168, (round >> 8) as u8, round as u8], 4_000));
        let packet = &flood[round as usize % flood.len()];
        received_bytes += packet.len();
        net.nodes[0]
            .driver
            .handle_datagram(now, from, None, 0, BytesMut::from(&packet[..]))
            .unwrap();
        while net.nodes[0].driver.poll_event().is_some() {}
        while net.nodes[0].driver.poll_transmit(now, &mut buffer).is_some() {
            sent_bytes += buffer.len();
        }
    }
    net.now += Duration::from_secs(1);
    let stats = net.nodes[0].driver.stats();
    assert!(
        net.nodes[0].driver.connections() <= 32,
        "{} half-open connections",
        net.nodes[0].driver.connections()
    );
    assert!(stats.retried > 400, "{stats:?}");
    assert!(
        sent_bytes < 3 * received_bytes,
        "amplified {received_bytes} bytes to {sent_bytes}"
    );
    let now = net.now;
    let crypto = authority.client(Some(authority.issue(false)));
    net.nodes[1].driver.connect(now, &target(0, None, crypto)).unwrap();
    net.connected(1);
    net.event(0, |_, event| matches!(event, Event::Connected).then_some(()));
    assert!(
        net.nodes[0].driver.stats().retried > stats.retried,
        "the honest client proved its address"
    );
    // The half-open ones are given up and their memory with them.
    net.until(|net| (net.nodes[0].driver.connections() == 1).then_some(()));
    assert!(net.nodes[0].driver.stats().handshake_timeouts > 0);
}

#[test]
fn handshakes_that_hang_are_given_up() {
    let authority = Authority::new();
    let limits = Limits {
        handshake_timeout: Duration::from_secs(1),
        ..Limits::default()
    };
    let server = Driver::new(config(0, 1, 1, Some(authority.server()), limits));
    let mut net = Net::new(1, vec![server]);
    let start = net.now;
    net.inject(0, address(5), &initials(&authority, 1)[0]);
    let reason = net.event(0, |_, event| match event {
        Event::Closed(reason) => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(reason, CloseReason::HandshakeTimeout);
    assert!(net.now - start >= Duration::from_secs(1));
    net.until(|net| (net.nodes[0].driver.connections() == 0).then_some(()));
}

#[test]
fn a_full_server_refuses_with_an_answer() {
    let authority = Authority::new();
    let server = Driver::new(config(
        0,
        1,
        1,
        Some(authority.server()),
        Limits {
            connections: 1,
            ..Limits::default()
        },
    ));
    let client = Driver::new(config(
        0,
        1,
        2,
        None,
        Limits {
            connections: 2,
            ..Limits::default()
        },
    ));
    let mut net = Net::new(1, vec![server, client]);
    let now = net.now;
    let crypto = authority.client(Some(authority.issue(false)));
    net.nodes[1]
        .driver
        .connect(now, &target(0, None, crypto.clone()))
        .unwrap();
    net.connected(0);
    let second = net.nodes[1]
        .driver
        .connect(now, &target(0, None, crypto.clone()))
        .unwrap();
    let reason = net.event(1, |key, event| match event {
        Event::Closed(reason) if key == second => Some(reason.clone()),
        _ => None,
    });
    assert!(matches!(reason, CloseReason::PeerTransport(_)), "{reason:?}");
    assert_eq!(net.nodes[0].driver.stats().refused, 1);
    // The client's own limit counts too, closed connections until they are forgotten.
    let now = net.now;
    net.nodes[1].driver.connect(now, &target(0, None, crypto.clone())).ok();
    assert!(matches!(
        net.nodes[1].driver.connect(now, &target(0, None, crypto)),
        Err(ConnectError::TooManyConnections(_))
    ));
}

#[test]
fn a_driver_that_refuses_keeps_what_it_has() {
    let (mut net, server, client) = pair(5, Limits::default(), Limits::default());
    net.nodes[0].driver.refuse_new();
    let authority = Authority::new();
    let now = net.now;
    let second = net.nodes[1]
        .driver
        .connect(now, &target(0, None, authority.client(None)))
        .unwrap();
    net.event(1, |key, event| {
        matches!(event, Event::Closed(_) if key == second).then_some(())
    });
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.nodes[1].driver.write_slice(client, stream, b"x").unwrap();
    assert_eq!(net.opened(0), (server, stream));
}
