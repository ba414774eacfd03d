//! A shard's state machine as openraft drives it, and as the rest of the core reads it.
//!
//! There is one state, shared on its core: openraft's worker applies the log to it, the reactor reads from it. Nothing else changes
//! it.
//!
//! # What holds
//! - Entries are applied in order, each whole; what its operations answered goes to whoever proposed it, after it was applied.
//! - **Snapshots are monotonic.** A snapshot that took long and is older than one installed meanwhile is thrown away; openraft is told of
//!   the newer one. One that was found damaged is replaced by one of the same state too.
//! - A snapshot that cannot be written, because the disk is full or fails, is tried again with a new file; openraft, for which any
//!   error of storage is the end, only sees that it takes long.
//!
//! Not here: the log, what operations mean, when snapshots are taken.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use generation_engine::batch::Batch;
use generation_engine::machine::{Head, Machine};
pub use generation_engine::session::SessionLimits;
use generation_engine::{Progress, ShardConfig, SnapshotHead};
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft_rt::{AsyncRuntime as _, Oneshot as _, OneshotSender as _};

use super::runtime::{Ambient, LocalOneshot, OneshotReceiver, OneshotSender, Runtime, yield_now};
use super::snapshot::{self, Image, SnapshotFile};
use super::types::{Entry, LeaderId, LogId, Payload, Place, ReplicaId, Replies, SnapshotMeta, StoredMembership, Types};
use crate::env::disk::Disk;
use crate::points;
use generation_engine::mutants::{Mutant, active};

/// How long to wait before a snapshot that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How often to look whether another snapshot has been finished.
const BUSY: Duration = Duration::from_millis(20);

type Snapshot<D> = openraft::storage::Snapshot<LeaderId, ReplicaId, Place, SnapshotFile<D>>;

/// What a state machine is made with.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// The cluster.
    pub cluster: u128,
    /// The shard.
    pub shard: u32,
    /// Its epoch.
    pub epoch: u32,
    /// The configuration it begins with.
    pub shard_config: ShardConfig,
    /// Limits of the session table it begins with.
    pub sessions: SessionLimits,
    /// Ids below are taken by its first replicas.
    pub next_replica_id: u64,
}

/// A shard's state. Clones are the same.
pub struct StateMachine<D: Disk>(Rc<Shared<D>>);

/// What the clones share.
pub(crate) struct Shared<D: Disk> {
    ambient: Rc<dyn Ambient>,
    disk: D,
    config: MachineConfig,
    /// Says whether room in the journal is wanted so urgently that a snapshot takes the core for itself.
    hurries: OnceCell<Hurry>,
    state: RefCell<State<D>>,
}

/// Whether a snapshot is to be taken as fast as can be.
type Hurry = Box<dyn Fn() -> bool>;

struct State<D: Disk> {
    machine: Machine,
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<SnapshotFile<D>>,
    /// Counts how often the machine was replaced.
    generation: u64,
    building: bool,
    /// What the image under way begins with.
    heads: Option<(SnapshotHead, Head, u128)>,
    /// Who waits until an index has been applied.
    waiting: BTreeMap<u64, Vec<OneshotSender<()>>>,
    entries: u64,
    /// Snapshots that were found damaged and have been replaced.
    damaged_snapshots: u64,
    /// Who waits until the next snapshot is durable, or one could not be written.
    snapshot_waiting: Vec<OneshotSender<Result<u64, String>>>,
    /// What was wrong with a snapshot that was to be loaded.
    damage: Option<String>,
}

impl<D: Disk> Clone for StateMachine<D> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: Disk> std::fmt::Debug for StateMachine<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateMachine")
            .field("shard", &self.0.config.shard)
            .finish_non_exhaustive()
    }
}

impl<D: Disk> StateMachine<D> {
    /// The state before the first entry. openraft puts the newest snapshot of the disk and the log in.
    pub async fn open(ambient: Rc<dyn Ambient>, disk: D, config: MachineConfig) -> io::Result<Self> {
        let snapshot = snapshot::find(&disk, config.cluster, config.shard).await?;
        let state = State {
            machine: Machine::new(config.shard_config, config.sessions, config.next_replica_id),
            applied: None,
            membership: StoredMembership::default(),
            snapshot,
            generation: 0,
            building: false,
            heads: None,
            waiting: BTreeMap::new(),
            entries: 0,
            damaged_snapshots: 0,
            snapshot_waiting: Vec::new(),
            damage: None,
        };
        Ok(Self(Rc::new(Shared {
            ambient,
            disk,
            config,
            hurries: OnceCell::new(),
            state: RefCell::new(state),
        })))
    }

    /// Works with the state. Applying commands here would make this replica differ from the others.
    ///
    /// # Panics
    /// If `work` calls back into this state machine.
    pub fn with<T>(&self, work: impl FnOnce(&mut Machine) -> T) -> T {
        work(&mut self.0.state.borrow_mut().machine)
    }

    /// Has snapshots taken as fast as can be whenever this holds; otherwise, and until this is called, they leave most of the core to
    /// others. Once a state machine.
    pub(crate) fn hurry_when(&self, hurries: impl Fn() -> bool + 'static) {
        // The first stays.
        let _ = self.0.hurries.set(Box::new(hurries));
    }

    /// The last entry applied.
    pub fn applied(&self) -> Option<LogId> {
        self.0.state.borrow().applied
    }

    /// Entries applied since the start.
    pub fn entries(&self) -> u64 {
        self.0.state.borrow().entries
    }

    /// The last entry in the newest snapshot.
    pub(crate) fn snapshot_id(&self) -> Option<LogId> {
        self.0.state.borrow().snapshot.as_ref()?.meta.last_log_id
    }

    /// Index of the last entry in the newest snapshot.
    pub fn snapshot_index(&self) -> Option<u64> {
        self.0.state.borrow().snapshot.as_ref()?.index()
    }

    /// Whether the newest snapshot was found damaged when it was read, so that another has to be taken.
    pub fn needs_snapshot(&self) -> bool {
        let state = self.0.state.borrow();
        state.snapshot.as_ref().is_some_and(|snapshot| !snapshot.is_sound())
    }

    /// Snapshots that were found damaged since the start.
    pub fn damaged_snapshots(&self) -> u64 {
        self.0.state.borrow().damaged_snapshots + u64::from(self.needs_snapshot())
    }

    /// What is wrong with a snapshot that was to be loaded, if its checksums do not hold or it cannot be read.
    pub(crate) fn damage(&self) -> Option<String> {
        self.0.state.borrow().damage.clone()
    }

    /// Whether a snapshot is being taken.
    pub fn is_building(&self) -> bool {
        self.0.state.borrow().building
    }

    /// Gives the last entry in the next snapshot when that is durable, or why an attempt to write it has failed. It does not have one
    /// taken.
    pub(crate) fn next_snapshot(&self) -> OneshotReceiver<Result<u64, String>> {
        let (sender, receiver) = LocalOneshot::channel();
        self.0.state.borrow_mut().snapshot_waiting.push(sender);
        receiver
    }

    /// What this was made with.
    pub fn config(&self) -> &MachineConfig {
        &self.0.config
    }

    pub(crate) fn disk(&self) -> &D {
        &self.0.disk
    }

    /// Completes when the entry at `index` has been applied, or is lost with the replica.
    pub fn reached(&self, index: u64) -> OneshotReceiver<()> {
        let (sender, receiver) = LocalOneshot::channel();
        let mut state = self.0.state.borrow_mut();
        if state.applied.is_some_and(|applied| applied.index >= index) {
            let _ = sender.send(());
        } else {
            state.waiting.entry(index).or_default().push(sender);
        }
        receiver
    }

    fn apply_one(&self, entry: &Entry, wants_replies: bool) -> io::Result<Replies> {
        let mut state = self.0.state.borrow_mut();
        let state = &mut *state;
        let index = entry.log_id.index;
        let mut replies = Vec::new();
        match &entry.payload {
            Payload::Normal(commands) => {
                let batch = Batch::parse(&commands.0).map_err(|error| {
                    let shard = self.0.config.shard;
                    let message = format!("log entry {index} of shard {shard} cannot be read: {error}");
                    io::Error::new(io::ErrorKind::InvalidData, message)
                })?;
                if active(Mutant::FollowersSkip) && !wants_replies && index.is_multiple_of(64) {
                    state.machine.skip(index);
                    return Ok(Replies { replies });
                }
                state.machine.apply(index, &batch, |_, reply| {
                    if wants_replies {
                        replies.push(reply);
                    }
                });
            }
            Payload::Blank => state.machine.skip(index),
            Payload::Membership(membership) => {
                state.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
                state.machine.skip(index);
            }
        }
        state.entries += 1;
        state.advance(entry.log_id);
        Ok(Replies { replies })
    }
}

impl<D: Disk> State<D> {
    fn advance(&mut self, applied: LogId) {
        self.applied = Some(applied);
        while let Some(first) = self.waiting.first_entry()
            && *first.key() <= applied.index
        {
            for sender in first.remove() {
                // Who waited may have given up.
                let _ = sender.send(());
            }
        }
    }

    fn tell_of_snapshot(&mut self, result: &Result<u64, String>) {
        for sender in self.snapshot_waiting.drain(..) {
            // Who waited may have given up.
            let _ = sender.send(result.clone());
        }
    }

    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
        }
    }
}

impl<D: Disk> Shared<D> {
    pub(crate) fn ambient(&self) -> &dyn Ambient {
        &*self.ambient
    }

    pub(crate) fn disk(&self) -> &D {
        &self.disk
    }

    pub(crate) fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Whether a snapshot under way is to be taken as fast as can be.
    pub(crate) fn hurries(&self) -> bool {
        self.hurries.get().is_some_and(|hurries| hurries())
    }

    /// Begins an image of the state as it is now. `None`: one that was given up has not been walked to its end yet; a part of that was
    /// done.
    fn begin(&self) -> Option<Image> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let entries = state.machine.shard_mut().snapshot_begin();
        let Ok(entries) = entries else {
            state.machine.shard_mut().snapshot_abandon();
            let _: Progress = state.machine.shard_mut().snapshot_slice(4096, |_| ());
            return None;
        };
        state.machine.sessions_mut().image_begin();
        state.heads = Some((entries, state.machine.head(), state.machine.state_hash()));
        Some(Image {
            meta: state.meta(),
            generation: state.generation,
        })
    }

    /// What an image begins with; `None` if the state was replaced since.
    pub(crate) fn heads(&self, image: &Image) -> Option<(SnapshotHead, Head, u128)> {
        let state = self.state.borrow();
        state.heads.filter(|_| state.generation == image.generation)
    }

    /// Takes a slice of an image; `None` if the state was replaced since.
    pub(crate) fn with_image<T>(&self, image: &Image, work: impl FnOnce(&mut Machine) -> T) -> Option<T> {
        let mut state = self.state.borrow_mut();
        (state.generation == image.generation).then(|| work(&mut state.machine))
    }

    /// Gives an image up.
    pub(crate) fn abandon(&self, image: &Image) {
        let abandoned = self.with_image(image, |machine| {
            machine.shard_mut().snapshot_abandon();
            machine.sessions_mut().image_abandon();
        });
        // Nothing to give up where the state was replaced.
        let _: Option<()> = abandoned;
    }

    /// Puts a durable snapshot in the place of an older one; a newer one stays, and is returned.
    async fn keep(&self, built: SnapshotFile<D>) -> SnapshotFile<D> {
        let (kept, old) = {
            let mut state = self.state.borrow_mut();
            match &state.snapshot {
                Some(current) if current.path == built.path => return built,
                Some(current)
                    if current.is_sound()
                        && current.index() >= built.index()
                        && !active(Mutant::SnapshotNotMonotonic) =>
                {
                    (current.clone(), Some(built))
                }
                _ => {
                    let old = state.snapshot.replace(built.clone());
                    state.damaged_snapshots += u64::from(old.as_ref().is_some_and(|old| !old.is_sound()));
                    (built, old)
                }
            }
        };
        if let Some(old) = old {
            // Whoever is about to read it finds no file, which is no damage.
            old.replaced();
            if let Err(error) = self.disk.remove(&old.path).await {
                // It only takes space, and the next start removes it.
                tracing::warn!(path = &*old.path, %error, "an old snapshot cannot be removed");
            }
        }
        kept
    }

    fn current(&self) -> Option<SnapshotFile<D>> {
        self.state.borrow().snapshot.clone()
    }
}

fn as_snapshot<D: Disk>(file: SnapshotFile<D>) -> Snapshot<D> {
    openraft::storage::Snapshot {
        meta: file.meta.clone(),
        snapshot: file,
    }
}

/// Takes snapshots of a state machine, one at a time.
pub struct SnapshotBuilder<D: Disk>(Rc<Shared<D>>);

impl<D: Disk> std::fmt::Debug for SnapshotBuilder<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotBuilder").finish_non_exhaustive()
    }
}

impl<D: Disk> RaftSnapshotBuilder<Types> for SnapshotBuilder<D> {
    type SnapshotData = SnapshotFile<D>;

    async fn build_snapshot(&mut self) -> Result<Snapshot<D>, io::Error> {
        let shared = &self.0;
        // One at a time: who comes second waits and takes what there is then, if that is enough.
        let asked = shared.state.borrow().applied;
        while shared.state.borrow().building {
            Runtime::sleep(BUSY).await;
            let enough = |current: &SnapshotFile<D>| current.is_sound() && current.meta.last_log_id >= asked;
            if let Some(current) = shared.current().filter(enough) {
                return Ok(as_snapshot(current));
            }
        }
        shared.state.borrow_mut().building = true;
        let built = loop {
            let Some(image) = shared.begin() else {
                yield_now().await;
                continue;
            };
            match snapshot::write(shared, &image).await {
                Ok(Some(built)) => break shared.keep(built).await,
                Ok(None) => {
                    if let Some(newer) = shared.current() {
                        break newer;
                    }
                }
                Err(error) => {
                    tracing::error!(shard = shared.config.shard, %error, "a snapshot cannot be written; it is tried again");
                    shared.state.borrow_mut().tell_of_snapshot(&Err(error.to_string()));
                    Runtime::sleep(RETRY).await;
                }
            }
        };
        let mut state = shared.state.borrow_mut();
        state.building = false;
        state.tell_of_snapshot(&Ok(built.index().unwrap_or(0)));
        Ok(as_snapshot(built))
    }
}

impl<D: Disk> RaftStateMachine<Types> for StateMachine<D> {
    type SnapshotData = SnapshotFile<D>;
    type SnapshotBuilder = SnapshotBuilder<D>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let state = self.0.state.borrow();
        Ok((state.applied, state.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            D::point(points::ENTRY_COMMITTED);
            let replies = self.apply_one(&entry, responder.is_some())?;
            D::point(points::ENTRY_APPLIED);
            if let Some(responder) = responder {
                responder.send(replies);
                D::point(points::ENTRY_ANSWERED);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder<D> {
        SnapshotBuilder(Rc::clone(&self.0))
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotFile<D>) -> Result<(), io::Error> {
        let shared = &self.0;
        let newer = shared.state.borrow().applied < meta.last_log_id || active(Mutant::SnapshotInstalledLate);
        if newer || meta.last_log_id.is_none() {
            let loaded = snapshot::load(&shared.config, &snapshot).await;
            let loaded = loaded.inspect_err(|error| {
                if error.kind() == io::ErrorKind::InvalidData {
                    let damage = format!("{}: {error}", snapshot.path);
                    shared.state.borrow_mut().damage = Some(damage);
                }
            })?;
            D::point(points::SNAPSHOT_LOADED);
            let mut state = shared.state.borrow_mut();
            state.machine = loaded.machine;
            state.membership = loaded.meta.last_membership;
            state.generation += 1;
            state.heads = None;
            match loaded.meta.last_log_id {
                Some(applied) => state.advance(applied),
                None => state.applied = None,
            }
        }
        D::point(points::SNAPSHOT_INSTALLED);
        shared.keep(snapshot).await;
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<D>>, io::Error> {
        Ok(self.0.current().map(as_snapshot))
    }
}
