//! What the simulated disk promises and what it takes away: whatever was synced is there after any crash, whatever was not may
//! be, in any part; and each fault that can be asked for does what it says.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use generation_node::env::Env;
use generation_node::env::disk::{BLOCK_BYTES, Disk, File, Open};
use generation_sim::{Dice, DiskImage, Kill, Sim, SimDisk, SimEnv, Weather};

const SECTOR_BYTES: usize = 512;

/// Runs a task on a machine of its own and gives its result.
fn on_disk<T: 'static, F: Future<Output = T> + 'static>(
    sim: &mut Sim,
    node: usize,
    task: impl FnOnce(SimDisk) -> F,
) -> T {
    let result = Rc::new(RefCell::new(None));
    let (disk, slot) = (sim.env(node, 0).disk(), Rc::clone(&result));
    let task = task(disk);
    sim.spawn(node, async move {
        let value = task.await;
        *slot.borrow_mut() = Some(value);
    });
    sim.until(|_| result.borrow_mut().take())
}

fn machine(seed: u64) -> (Sim, usize) {
    let mut sim = Sim::new(seed, Weather::default());
    let node = sim.bare_node(1);
    (sim, node)
}

fn block(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK_BYTES]
}

/// What a file may hold after a crash: for each sector, what it may be.
#[derive(Debug, Default)]
struct Model {
    files: BTreeMap<String, ModelFile>,
}

#[derive(Debug, Default)]
struct ModelFile {
    /// What each sector may be, the synced state first; every sector not named is zeros.
    sectors: BTreeMap<u64, Vec<Vec<u8>>>,
    /// Whether its name is certainly there.
    named: bool,
    /// Length that is certain.
    len: u64,
}

impl ModelFile {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (number, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
            let versions = self
                .sectors
                .entry(offset / SECTOR_BYTES as u64 + number as u64)
                .or_insert_with(|| vec![vec![0; SECTOR_BYTES]]);
            versions.push(sector.to_vec());
        }
    }
}

/// Creates, writes and syncs at random until it is killed, telling the model what it knows.
async fn churn(env: SimEnv, model: Rc<RefCell<Model>>, mut dice: Dice) {
    let disk = env.disk();
    let mut files = Vec::new();
    loop {
        match dice.below(10) {
            0 if files.len() < 4 => {
                let path = format!("f{}", files.len());
                let file = disk.open(&path, Open::CreateNew).await.unwrap();
                model.borrow_mut().files.insert(path.clone(), ModelFile::default());
                files.push((path, file));
            }
            1 => {
                let before: Vec<_> = model.borrow().files.keys().cloned().collect();
                disk.sync_directory("").await.unwrap();
                for path in before {
                    model.borrow_mut().files.get_mut(&path).unwrap().named = true;
                }
            }
            2..7 if !files.is_empty() => {
                let (path, file) = &files[dice.below(files.len() as u64) as usize];
                let offset = dice.below(6) * BLOCK_BYTES as u64;
                let mut bytes = vec![0; BLOCK_BYTES * (1 + dice.below(3) as usize)];
                dice.fill(&mut bytes);
                // From now on any part may be there.
                model.borrow_mut().files.get_mut(path).unwrap().write(offset, &bytes);
                file.write_at(offset, &bytes).await.unwrap();
            }
            7..9 if !files.is_empty() => {
                let (path, file) = &files[dice.below(files.len() as u64) as usize];
                let len = file.len().await.unwrap();
                file.sync_data().await.unwrap();
                let mut model = model.borrow_mut();
                let of_model = model.files.get_mut(path).unwrap();
                of_model.len = len;
                for versions in of_model.sectors.values_mut() {
                    versions.drain(..versions.len() - 1);
                }
            }
            _ => {
                let pause = Duration::from_micros(dice.below(300));
                env.sleep_until(env.now() + pause).await;
            }
        }
    }
}

fn compare(image: &DiskImage, model: &Model) -> (u64, u64) {
    let (mut lost, mut torn) = (0, 0);
    let found: BTreeSet<_> = image.paths().into_iter().collect();
    for (path, file) in &model.files {
        let Some(bytes) = image.read(&format!("core-0/{path}")) else {
            assert!(!file.named, "the synced name {path} is gone");
            lost += 1;
            continue;
        };
        assert!(bytes.len() as u64 >= file.len, "{path} is cut");
        let mut newest = BTreeSet::new();
        for (number, versions) in &file.sectors {
            let start = *number as usize * SECTOR_BYTES;
            let sector = match bytes.get(start..start + SECTOR_BYTES) {
                Some(sector) => sector.to_vec(),
                None => vec![0; SECTOR_BYTES],
            };
            assert!(
                versions.contains(&sector),
                "{path} has something at sector {number} that was never written there"
            );
            if versions.len() > 1 {
                newest.insert(versions.last() == Some(&sector));
            }
        }
        torn += u64::from(newest.len() == 2);
    }
    assert!(found.len() <= model.files.len(), "{found:?}");
    (lost, torn)
}

#[test]
fn whatever_was_synced_survives_a_power_cut_and_the_rest_may_not() {
    let (mut lost, mut torn, mut synced) = (0, 0, 0);
    for seed in 0..150 {
        let (mut sim, node) = machine(seed);
        let model = Rc::new(RefCell::new(Model::default()));
        let env = sim.env(node, 0);
        sim.spawn(node, churn(env, Rc::clone(&model), Dice::new(seed)));
        let mut dice = Dice::new(seed + 1_000);
        sim.run_for(Duration::from_micros(500 + dice.below(20_000)));
        sim.kill(node, Kill::Power);
        let model = model.borrow();
        let (names, parts) = compare(&sim.disk_image(node), &model);
        lost += names;
        torn += parts;
        synced += model.files.values().filter(|file| file.named && file.len > 0).count();
    }
    assert!(
        lost > 10 && torn > 20 && synced > 100,
        "{lost} names lost, {torn} files torn, {synced} synced"
    );
}

#[test]
fn a_process_that_is_killed_leaves_what_it_had_written() {
    let (mut sim, node) = machine(1);
    let end = on_disk(&mut sim, node, |disk| async move {
        let file = disk.open("f", Open::CreateNew).await?;
        file.write_at(0, &block(7)).await?;
        io::Result::Ok(())
    });
    end.unwrap();
    sim.kill(node, Kill::Process);
    sim.start(node);
    let bytes = on_disk(&mut sim, node, |disk| async move {
        disk.open("f", Open::Read).await?.read_at(0, 9_999).await
    });
    assert_eq!(bytes.unwrap(), block(7));
}

#[test]
fn names_that_were_not_synced_are_undone_in_some_crashes() {
    // Before: `old` with ones, `gone` synced. Then: `new` takes the place of `old`, `gone` is removed, nothing synced.
    let mut outcomes = BTreeSet::new();
    for seed in 0..60 {
        let (mut sim, node) = machine(seed);
        let end = on_disk(&mut sim, node, |disk| async move {
            for (path, byte) in [("old", 1), ("gone", 2), ("new", 3)] {
                let file = disk.open(path, Open::CreateNew).await?;
                file.write_at(0, &block(byte)).await?;
                file.sync_data().await?;
            }
            disk.sync_directory("").await?;
            disk.rename("new", "old").await?;
            disk.remove("gone").await?;
            let mut names = disk.list("").await?;
            names.sort();
            assert_eq!(names, ["old"]);
            io::Result::Ok(())
        });
        end.unwrap();
        sim.kill(node, Kill::Power);
        let image = sim.disk_image(node);
        let old = image.read("core-0/old").unwrap()[0];
        // A rename is whole or did not happen.
        assert_eq!(image.read("core-0/new").is_some(), old == 1);
        outcomes.insert((old, image.read("core-0/gone").is_some()));
    }
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
}

#[test]
fn writes_under_way_complete_in_any_order() {
    let mut orders = BTreeSet::new();
    for seed in 0..20 {
        let (mut sim, node) = machine(seed);
        let env = sim.env(node, 0);
        let order = Rc::new(RefCell::new(Vec::new()));
        let file = Rc::new(on_disk(&mut sim, node, |disk| async move {
            disk.open("f", Open::CreateNew).await.unwrap()
        }));
        for number in 0..3_u64 {
            let (file, order) = (Rc::clone(&file), Rc::clone(&order));
            env.spawn(async move {
                file.write_at(number * BLOCK_BYTES as u64, &block(1)).await.unwrap();
                order.borrow_mut().push(number);
            });
        }
        sim.until(|_| (order.borrow().len() == 3).then_some(()));
        orders.insert(order.take());
    }
    assert!(orders.len() > 2, "{orders:?}");
}

#[test]
fn a_sync_that_failed_lies_from_then_on() {
    let (mut kept, mut lost) = (0, 0);
    for seed in 0..60 {
        let (mut sim, node) = machine(seed);
        sim.fail_syncs(node, 1);
        let (first, second) = on_disk(&mut sim, node, |disk| async move {
            let file = disk.open("f", Open::CreateNew).await.unwrap();
            disk.sync_directory("").await.unwrap();
            file.write_at(0, &block(5)).await.unwrap();
            (file.sync_data().await, file.sync_data().await)
        });
        assert!(first.is_err());
        second.unwrap();
        sim.kill(node, Kill::Power);
        match sim.disk_image(node).read("core-0/f").unwrap().first() {
            Some(5) => kept += 1,
            _ => lost += 1,
        }
    }
    assert!(kept > 10 && lost > 10, "{kept} {lost}");
}

#[test]
fn a_full_disk_refuses_and_removal_makes_room() {
    let (mut sim, node) = machine(1);
    sim.set_disk_weather(node, |weather| weather.capacity_bytes = 10 * BLOCK_BYTES as u64);
    on_disk(&mut sim, node, |disk| async move {
        let large = disk.open("large", Open::CreateNew).await.unwrap();
        large.allocate(9 * BLOCK_BYTES as u64).await.unwrap();
        assert_eq!(disk.available_bytes().unwrap(), BLOCK_BYTES as u64);
        let small = disk.open("small", Open::CreateNew).await.unwrap();
        let error = small.allocate(2 * BLOCK_BYTES as u64).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let error = small.write_at(BLOCK_BYTES as u64, &block(1)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        // What is allocated already can be written.
        large.write_at(8 * BLOCK_BYTES as u64, &block(1)).await.unwrap();
        large.close().await.unwrap();
        disk.remove("large").await.unwrap();
        small.allocate(2 * BLOCK_BYTES as u64).await.unwrap();
    });
}

#[test]
fn writes_fail_go_astray_and_bits_flip_where_asked() {
    let (mut sim, node) = machine(1);
    on_disk(&mut sim, node, |disk| async move {
        let file = disk.open("f", Open::CreateNew).await.unwrap();
        file.allocate(8 * BLOCK_BYTES as u64).await.unwrap();
        file.sync_data().await.unwrap();
        disk.sync_directory("").await.unwrap();
    });
    sim.set_disk_weather(node, |weather| weather.write_error_per_mille = 1_000);
    let write = |disk: SimDisk| async move { disk.open("f", Open::Write).await.unwrap().write_at(0, &block(9)).await };
    assert!(on_disk(&mut sim, node, write).is_err());
    sim.set_disk_weather(node, |weather| {
        weather.write_error_per_mille = 0;
        weather.misdirect_per_mille = 1_000;
    });
    let mut places = BTreeSet::new();
    for _ in 0..40 {
        on_disk(&mut sim, node, write).unwrap();
        let bytes = sim.disk_image(node).read("core-0/f").unwrap();
        places.extend(
            bytes
                .chunks(BLOCK_BYTES)
                .enumerate()
                .filter(|(_, block)| block[0] == 9)
                .map(|(place, _)| place),
        );
    }
    assert!(places.len() > 3, "{places:?}");
    let before = sim.disk_image(node);
    sim.set_disk_weather(node, |weather| weather.flips_per_crash = 3);
    sim.kill(node, Kill::Power);
    let settled = before.read("core-0/f").unwrap().len();
    assert_eq!(sim.disk_image(node).read("core-0/f").unwrap().len(), settled);
    let mut image = sim.disk_image(node);
    let original = image.read("core-0/f").unwrap();
    image.flip("core-0/f", 4_097, 3);
    let flipped = image.read("core-0/f").unwrap();
    let differing: Vec<_> = (0..original.len())
        .filter(|&place| original[place] != flipped[place])
        .collect();
    assert_eq!(differing, [4_097]);
    // The node finds what was put in.
    sim.replace_disk(node, image);
    sim.start(node);
    let read = |disk: SimDisk| async move {
        disk.open("f", Open::Read)
            .await
            .unwrap()
            .read_at(0, 99_999)
            .await
            .unwrap()
    };
    assert_eq!(on_disk(&mut sim, node, read), flipped);
}

#[test]
fn what_no_disk_does_is_refused() {
    let (mut sim, node) = machine(1);
    on_disk(&mut sim, node, |disk| async move {
        let kind = |error: io::Error| error.kind();
        assert_eq!(
            disk.open("f", Open::Read).await.map_err(kind).unwrap_err(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            disk.open("../f", Open::CreateNew).await.map_err(kind).unwrap_err(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(
            disk.open("a/f", Open::CreateNew).await.map_err(kind).unwrap_err(),
            io::ErrorKind::NotFound
        );
        disk.create_directory("a/b").await.unwrap();
        let file = disk.open("a/f", Open::CreateNew).await.unwrap();
        assert_eq!(
            disk.open("a/f", Open::CreateNew).await.map_err(kind).unwrap_err(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(
            file.write_at(100, &block(1)).await.unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let read_only = disk.open("a/f", Open::Read).await.unwrap();
        assert_eq!(
            read_only.write_at(0, &block(1)).await.unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
        let mut names = disk.list("a").await.unwrap();
        names.sort();
        assert_eq!(names, ["b", "f"]);
        assert_eq!(disk.list("nowhere").await.unwrap(), [""; 0]);
    });
}
