//! Disks that are full, and disks that fail, under real processes: file systems of their own, which these tests mount.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use generation_client::{Client, Error, NotSent};
use serde_json::Value;

use crate::directories::with_small_journal;
use crate::load::{Load, assert_all_there, block_on, connect};
use crate::processes::{Cluster, Serving, wait_until};

/// A mounted file system; unmounted with this value.
struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Runs `mount`. `None`, with the reason printed, where this process may not mount.
    fn new(at: &Path, arguments: &[&str]) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mount = Command::new("mount").args(arguments).arg(at).output();
        match mount {
            Ok(output) if output.status.success() => Some(Self { at: at.to_owned() }),
            Ok(output) => {
                let reason = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(
                    reason.contains("permi") || reason.contains("superuser") || reason.contains("loop device"),
                    "mount fails for another reason than that it is not allowed: {reason}"
                );
                println!("skipped, because file systems cannot be mounted here: {reason}");
                None
            }
            Err(error) => {
                println!("skipped, because there is no `mount`: {error}");
                None
            }
        }
    }

    /// An ext4 in a file of that many bytes, which need not all be there.
    fn ext4(image: &Path, len_bytes: u64, at: &Path) -> Option<Self> {
        File::create(image).unwrap().set_len(len_bytes).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1"])
            .arg(image)
            .output();
        match made {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => {
                println!("skipped, because there is no `mkfs.ext4`: {error}");
                return None;
            }
        }
        let mounted = Self::new(at, &["-o", "loop,errors=continue", &image.to_string_lossy()])?;
        fs::remove_dir(at.join("lost+found")).unwrap();
        Some(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process that dies may still have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.at).output();
    }
}

/// Takes all the room there is left in a directory.
fn fill(directory: &Path) -> PathBuf {
    let path = directory.join("filler");
    let mut file = File::create(&path).unwrap();
    for len in [1 << 20, 4 << 10] {
        let block = vec![1; len];
        loop {
            match file.write_all(&block) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    path
}

async fn put(client: &Client, key: usize, value: usize) -> Result<(), Error> {
    let mut bytes = vec![b'.'; 60_000];
    let text = value.to_string();
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    client.put(format!("key-{key}"), bytes).await.map(drop)
}

async fn read(client: &Client, key: usize) -> Option<usize> {
    let found = client.get(format!("key-{key}")).await.unwrap();
    let text: Vec<u8> = found
        .value()?
        .iter()
        .copied()
        .take_while(|byte| *byte != b'.')
        .collect();
    Some(String::from_utf8(text).unwrap().parse().unwrap())
}

#[test]
fn a_full_disk_refuses_writes_serves_reads_and_takes_writes_again_when_there_is_room() {
    const KEYS: usize = 64;
    let mut cluster = Cluster::start(&["--shards", "1"]);
    cluster.stop();
    let directory = cluster.data().join("small");
    let image = cluster.data().join("image");
    let Some(_mounted) = Mounted::ext4(&image, 64 << 20, &directory) else {
        return;
    };
    with_small_journal(&cluster, "small", "32MiB");
    let serving = Serving::start(&cluster);
    let mut acknowledged = [None; KEYS];
    let mut number = 0;
    // Writes until one is refused, or so many were acknowledged.
    let mut write = |most: usize| {
        block_on(async {
            let client = connect(&cluster.config()).await;
            let mut refused = None;
            for _ in 0..most {
                number += 1;
                let key = number % KEYS;
                match put(&client, key, number).await {
                    Ok(()) => acknowledged[key] = Some(number),
                    Err(error) => {
                        refused = Some(error);
                        break;
                    }
                }
            }
            for (key, expected) in acknowledged.iter().enumerate() {
                assert_eq!(read(&client, key).await, *expected, "key {key}");
            }
            client.close().await;
            refused
        })
    };
    assert_eq!(write(KEYS), None);
    let filler = fill(&directory);
    let refused = write(2_000).expect("there is no room for so much");
    assert!(matches!(refused, Error::NotSent(NotSent::ReadOnly { .. })), "{refused}");
    // No snapshot can be written either, and whoever asks for one learns it.
    let mut now = cluster.command();
    let output = now
        .args(["snapshot", "now", "--json", "--config"])
        .arg(cluster.config())
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(5), "{errors}");
    assert!(
        errors.contains("disk_failed") && errors.contains("No space left"),
        "{errors}"
    );
    fs::remove_file(filler).unwrap();
    wait_until("writes", || write(1).is_none());
    assert_eq!(write(200), None);
    serving.stop();
    // Nothing of what was acknowledged was on a disk that had no room for it.
    let serving = Serving::start(&cluster);
    assert_eq!(write(1), None);
    serving.stop();
}

/// The disk under the file system takes no more, so writes that the file system had promised room for fail.
#[test]
fn a_node_whose_disk_fails_leads_nothing_says_so_and_comes_back_with_the_disk() {
    let mut cluster = Cluster::start(&["--nodes", "3", "--shards", "4"]);
    cluster.wait_until_alike(3);
    cluster.stop();
    let node = cluster.node(3);
    fs::remove_dir_all(&node).unwrap();
    let memory = cluster.data().join("memory");
    let Some(_memory) = Mounted::new(&memory, &["-t", "tmpfs", "-o", "size=48m", "tmpfs"]) else {
        return;
    };
    let Some(_disk) = Mounted::ext4(&memory.join("image"), 1 << 30, &node) else {
        return;
    };
    cluster.start_again();
    let load = Load::start(cluster.config(), "failing");
    load.wait_for_more(300);
    cluster.wait_until_founders_lead(3);
    let filler = fill(&memory);
    let about = |status: &Value| status["nodes"][2]["warnings"].to_string();
    wait_until("the node to say that its journal has failed", || {
        about(&cluster.status()).contains("journal has failed")
    });
    wait_until("the others to lead everything", || {
        let status = cluster.status();
        let shards = status["shards"].as_array().unwrap();
        shards.iter().all(|shard| shard["leader"] == 1 || shard["leader"] == 2)
    });
    load.wait_for_more(300);
    fs::remove_file(filler).unwrap();
    cluster.kill(&[3]);
    cluster.restart_well(3);
    load.wait_for_more(300);
    let keys = load.finish();
    cluster.wait_until_alike(3);
    cluster.wait_until_founders_lead(3);
    assert_all_there(&cluster.config(), &keys);
    cluster.stop();
}
