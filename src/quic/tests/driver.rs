//! Two drivers talking: streams, flow control, loss, limits, closing.

#![allow(clippy::disallowed_methods, reason = "a test's clock has to begin somewhere")]

mod common;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use common::{Authority, Dice, Net, address, config, pair, target};
use generation_quic::{CloseReason, Driver, Event, Limits, Read, StreamError, cid};

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

#[test]
fn a_stream_carries_bytes_both_ways_and_both_know_each_other() {
    let (mut net, server, client) = pair(1, Limits::default(), Limits::default());
    assert_eq!(net.nodes[0].driver.peer_certificates(server).len(), 1);
    assert_eq!(net.nodes[1].driver.peer_certificates(client).len(), 1);
    assert_eq!(net.nodes[0].driver.alpn(server).as_deref(), Some(common::ALPN));
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.nodes[1]
        .driver
        .write(
            client,
            stream,
            &mut [Bytes::from_static(b"hello "), Bytes::from_static(b"there")],
        )
        .unwrap();
    let (key, opened) = net.opened(0);
    assert_eq!((key, opened), (server, stream));
    assert_eq!(net.read(0, server, stream, 11), b"hello there");
    net.nodes[0].driver.write_slice(server, stream, b"and back").unwrap();
    net.nodes[0].driver.finish(server, stream).unwrap();
    assert_eq!(net.read(1, client, stream, usize::MAX), b"and back");
    net.event(0, |_, event| {
        matches!(event, Event::Finished(id) if *id == stream).then_some(())
    });
}

#[test]
fn a_megabyte_survives_loss_and_reordering_and_repeats_exactly() {
    let run = |seed| {
        let (mut net, server, client) = pair(seed, Limits::default(), Limits::default());
        net.loss_per_mille = 50;
        net.jitter = Duration::from_millis(3);
        let stream = net.nodes[1].driver.open(client).unwrap();
        let data = pattern(1 << 20);
        let start = net.now;
        let mut written = 0;
        let mut received = Vec::new();
        net.until(|net| {
            written += net.nodes[1]
                .driver
                .write_slice(client, stream, &data[written..])
                .unwrap()
                .bytes;
            match net.nodes[0]
                .driver
                .read(server, stream, usize::MAX, |chunk| received.extend_from_slice(&chunk))
            {
                Ok(_) | Err(StreamError::Closed) => {}
                Err(error) => panic!("{error}"),
            }
            (received.len() == data.len()).then_some(())
        });
        assert!(received == data, "the bytes differ");
        (net.now - start, net.sent)
    };
    assert_eq!(run(7), run(7), "the same seed, the same run");
    assert_ne!(run(7), run(8));
}

#[test]
fn a_peer_that_never_reads_bounds_what_is_kept_for_it() {
    let limits = Limits {
        send_window_bytes: 64 << 10,
        ..Limits::default()
    };
    let patient = Limits {
        keep_alive: Some(Duration::from_millis(100)),
        ..Limits::default()
    };
    let (mut net, server, client) = pair(2, limits, patient);
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.nodes[1].driver.write_slice(client, stream, b"x").unwrap();
    net.opened(0);
    let data = vec![0; 8 << 20];
    let mut written = 0;
    // Until a simulated second has passed in which nothing more was taken.
    let mut last = net.now;
    net.until(|net| {
        let taken = net.nodes[0]
            .driver
            .write_slice(server, stream, &data[written..])
            .unwrap()
            .bytes;
        written += taken;
        if taken > 0 {
            last = net.now;
        }
        (net.now - last > Duration::from_secs(1)).then_some(())
    });
    // All the receiver's window, and then the sender's own window of what is not acknowledged.
    assert!(written <= (1 << 20) + (64 << 10), "{written} bytes were taken");
    // The peer reads at last, and the writer is told.
    net.read(1, client, stream, 512 << 10);
    net.event(0, |_, event| {
        matches!(event, Event::Writable(id) if *id == stream).then_some(())
    });
}

#[test]
fn reading_stops_at_the_limit_of_the_call() {
    let (mut net, server, client) = pair(3, Limits::default(), Limits::default());
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.write(1, client, stream, &pattern(10_000));
    net.opened(0);
    // Let all of it arrive.
    let mut got = 0;
    net.until(|net| {
        let read = net.nodes[0]
            .driver
            .read(server, stream, 100, |chunk| got += chunk.len())
            .unwrap();
        (read == Read::Limit).then_some(())
    });
    assert!(got <= 100, "{got} bytes at once");
}

#[test]
fn more_streams_than_allowed_wait_their_turn() {
    let (mut net, server, client) = pair(
        4,
        Limits {
            streams: 2,
            ..Limits::default()
        },
        Limits::default(),
    );
    let driver = &mut net.nodes[1].driver;
    let first = driver.open(client).unwrap();
    driver.open(client).unwrap();
    assert!(driver.open(client).is_none());
    driver.write_slice(client, first, b"x").unwrap();
    driver.finish(client, first).unwrap();
    net.opened(0);
    assert_eq!(net.read(0, server, first, usize::MAX), b"x");
    net.nodes[0].driver.finish(server, first).unwrap();
    net.event(1, |_, event| matches!(event, Event::Available).then_some(()));
    assert!(net.nodes[1].driver.open(client).is_some());
}

#[test]
fn resets_and_stops_reach_the_other_side() {
    let (mut net, server, client) = pair(5, Limits::default(), Limits::default());
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.nodes[1].driver.write_slice(client, stream, b"x").unwrap();
    net.opened(0);
    net.nodes[0].driver.stop(server, stream, 5);
    let code = net.event(1, |_, event| match event {
        Event::Stopped(id, code) if *id == stream => Some(*code),
        _ => None,
    });
    assert_eq!(code, 5);
    assert_eq!(
        net.nodes[1].driver.write_slice(client, stream, b"y"),
        Err(StreamError::Peer(5))
    );
    net.nodes[0].driver.reset(server, stream, 6);
    net.until(|net| match net.nodes[1].driver.read(client, stream, 1, |_| ()) {
        Err(StreamError::Peer(6)) => Some(()),
        Ok(Read::Blocked) => None,
        other => panic!("{other:?}"),
    });
}

#[test]
fn a_close_carries_its_code_and_words_and_ends_the_connection() {
    let (mut net, server, client) = pair(6, Limits::default(), Limits::default());
    let now = net.now;
    net.nodes[0].driver.close(now, server, 42, "go away");
    assert_eq!(
        net.nodes[0].driver.open(server),
        None,
        "a closed connection does nothing"
    );
    let reason = net.event(1, |key, event| match event {
        Event::Closed(reason) if key == client => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(
        reason,
        CloseReason::Application {
            code: 42,
            reason: Bytes::from_static(b"go away")
        }
    );
    net.until(|net| {
        net.nodes
            .iter()
            .all(|node| node.driver.connections() == 0)
            .then_some(())
    });
    assert_eq!(
        net.nodes[1].driver.write_slice(client, quinn_stream(), b"x"),
        Err(StreamError::ConnectionClosed)
    );
}

fn quinn_stream() -> generation_quic::StreamId {
    quinn_proto::StreamId::new(quinn_proto::Side::Client, quinn_proto::Dir::Bi, 0)
}

#[test]
fn silence_ends_a_connection_and_frees_its_slot() {
    let limits = Limits {
        idle_timeout: Duration::from_secs(2),
        ..Limits::default()
    };
    let (mut net, server, client) = pair(7, limits.clone(), limits);
    net.loss_per_mille = 1000;
    let reason = net.event(0, |key, event| match event {
        Event::Closed(reason) if key == server => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(reason, CloseReason::TimedOut);
    net.event(1, |key, event| {
        matches!(event, Event::Closed(_) if key == client).then_some(())
    });
    net.until(|net| {
        net.nodes
            .iter()
            .all(|node| node.driver.connections() == 0)
            .then_some(())
    });
    // A new connection in the same slot has another key.
    let now = net.now;
    net.loss_per_mille = 0;
    let authority = Authority::new();
    let again = net.nodes[1]
        .driver
        .connect(now, &target(0, None, authority.client(None)))
        .unwrap();
    assert_eq!(again.slot(), client.slot());
    assert_ne!(again, client);
}

#[test]
fn a_turn_with_much_to_send_is_one_train() {
    let jumbo = Limits {
        probed_udp_payload: 16_384,
        ..Limits::default()
    };
    let (mut net, server, client) = pair(8, jumbo.clone(), jumbo);
    // Let path probing come to rest.
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.nodes[1].driver.write_slice(client, stream, b"x").unwrap();
    net.opened(0);
    net.until(|net| (net.nodes[0].driver.mtu(server)? > 16_000).then_some(()));
    let now = net.now;
    let mut buffer = Vec::new();
    while net.nodes[0].driver.poll_transmit(now, &mut buffer).is_some() {}
    for _ in 0..64 {
        net.nodes[0].driver.write_slice(server, stream, &[7; 1_000]).unwrap();
    }
    let transmit = net.nodes[0].driver.poll_transmit(now, &mut buffer).unwrap();
    assert!(transmit.segment_size.is_some_and(|size| size > 16_000), "{transmit:?}");
    assert!(
        buffer.len() >= 48_000 && buffer.len() <= 65_507,
        "{} bytes",
        buffer.len()
    );
}

#[test]
fn within_a_machine_packets_are_large_from_the_start() {
    let authority = Authority::new();
    let here = std::net::SocketAddr::from(([127, 0, 0, 1], 7400));
    let mut server = Driver::new(config(0, 1, 1, Some(authority.server()), Limits::default()));
    let mut client = Driver::new(config(0, 1, 2, None, Limits::default()));
    let now = std::time::Instant::now();
    let target = generation_quic::ConnectTarget {
        remote: here,
        ..target(0, None, authority.client(Some(authority.issue(false))))
    };
    let key = client.connect(now, &target).unwrap();
    let mut buffer = Vec::new();
    let mut largest = 0;
    for _ in 0..10 {
        for (from, to) in [(true, false), (false, true)] {
            let (sender, receiver) = if from {
                (&mut client, &mut server)
            } else {
                (&mut server, &mut client)
            };
            assert_ne!(from, to);
            while let Some(transmit) = sender.poll_transmit(now, &mut buffer) {
                for datagram in buffer.chunks(transmit.segment_size.unwrap_or(buffer.len())) {
                    largest = largest.max(datagram.len());
                    receiver
                        .handle_datagram(now, here, None, 0, BytesMut::from(datagram))
                        .unwrap();
                }
                while receiver.poll_event().is_some() {}
            }
        }
    }
    assert_eq!(client.mtu(key), Some(16_384));
    assert!(largest < 4_000, "no probe was sent, {largest} bytes");
}

#[test]
fn without_path_probing_packets_stay_small() {
    let authority = Authority::new();
    let mut server = config(0, 1, 1, Some(authority.server()), Limits::default());
    server.mtu_discovery = false;
    let client = Driver::new(config(0, 1, 2, None, Limits::default()));
    let mut net = Net::new(9, vec![Driver::new(server), client]);
    let now = net.now;
    let crypto = authority.client(Some(authority.issue(false)));
    net.nodes[1].driver.connect(now, &target(0, None, crypto)).unwrap();
    let client = net.connected(1);
    let server = net.connected(0);
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.write(1, client, stream, &pattern(100_000));
    net.opened(0);
    net.read(0, server, stream, 100_000);
    assert_eq!(net.nodes[0].driver.mtu(server), Some(1200));
}

#[test]
fn datagrams_of_another_core_are_given_back() {
    let authority = Authority::new();
    let mut cores: Vec<_> = (0..2)
        .map(|core| Driver::new(config(core, 2, 1, Some(authority.server()), Limits::default())))
        .collect();
    let mut client = Driver::new(config(0, 1, 3, None, Limits::default()));
    let now = std::time::Instant::now();
    let crypto = authority.client(Some(authority.issue(false)));
    client.connect(now, &target(0, Some(1), crypto)).unwrap();
    let mut buffer = Vec::new();
    client.poll_transmit(now, &mut buffer).unwrap();
    let given_back = cores[0]
        .handle_datagram(now, address(1), None, 0, BytesMut::from(&buffer[..]))
        .unwrap_err();
    assert_eq!(given_back.core, 1);
    assert_eq!(&given_back.payload[..], &buffer[..]);
    assert_eq!(cores[0].connections(), 0);
    cores[1]
        .handle_datagram(now, address(1), None, 0, given_back.payload)
        .unwrap();
    assert_eq!(cores[1].connections(), 1);
    // From then on the client speaks to an id of core 1's making.
    let answer = cores[1].poll_transmit(now, &mut buffer).unwrap();
    assert_eq!(answer.remote, address(1));
    client
        .handle_datagram(now, address(0), None, 0, BytesMut::from(&buffer[..]))
        .unwrap();
    client.poll_transmit(now, &mut buffer).unwrap();
    assert_eq!(usize::from(buffer[5]), cid::LEN);
    assert_eq!(generation_quic::steer::core_of(&buffer, 2), Some(1));
}

#[test]
fn noise_is_survived() {
    let patient = Limits {
        keep_alive: Some(Duration::from_millis(100)),
        ..Limits::default()
    };
    let (mut net, server, client) = pair(11, Limits::default(), patient);
    let mut dice = Dice(99);
    for round in 0..5_000_u32 {
        let len = (dice.next() % 1400) as usize;
        let mut noise: Vec<u8> = (0..len).map(|_| dice.next() as u8).collect();
        if round % 3 == 0 && len > 6 {
            noise[0] = 0xc3;
            noise[1..5].copy_from_slice(&1_u32.to_be_bytes());
            noise[5] = 8;
        }
        net.inject(0, address(round as usize % 3), &noise);
        if round % 100 == 0 {
            net.step();
        }
    }
    let stream = net.nodes[1].driver.open(client).unwrap();
    net.nodes[1].driver.write_slice(client, stream, b"still here").unwrap();
    net.opened(0);
    assert_eq!(net.read(0, server, stream, 10), b"still here");
}
