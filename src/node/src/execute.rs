//! Executing what a turn asks of one shard: writes as one log entry, reads as one batched lookup, pages; and answering, of a shard with
//! a group, what earlier turns have asked.

use std::time::Duration;

use generation_engine::batch::Operation;
use generation_engine::machine::Reply;
use generation_engine::{Cursor, EntryRef, Outcome, Shard, Version};
use generation_proto::limits::FRAME_OVERHEAD;
use generation_proto::reply::{Page, PageEntry, ReplyTemplate};
use generation_proto::request::Scan;
use generation_proto::{Consistency, ReplyOptions, Status};

use crate::dispatch::{Batch, Member, Reader, Turn};
use crate::env::disk::Disk;
use crate::group::{self, Group, Read, Readiness, Refused, Token, What};
use crate::raft::proposer::{Answer, Write};
use crate::raft::replica::{ReadError, SnapshotError};
use crate::replica::Replica;
use crate::replies::{Origin, Replies};
use crate::streams::Streams;
use generation_engine::mutants::{Mutant, active};

/// How long a client waits before it asks again who leads a shard, where nobody does.
const LEADERLESS_RETRY: Duration = Duration::from_millis(50);

/// How fresh what is read may be called.
#[derive(Debug, Clone, Copy)]
enum Freshness {
    /// Every reader gets the newest.
    Newest,
    /// Readers get what they asked for, of at most this age in milliseconds.
    AsAsked(u32),
}

impl<D: Disk> Turn<'_, '_, D> {
    /// Executes what the turn asks of one shard.
    pub(crate) fn execute(&mut self, shard: u16) {
        let mut batch = std::mem::take(&mut self.batches[usize::from(shard)]);
        let place = &mut self.dispatch.members[usize::from(shard)];
        let mut member = std::mem::replace(place, Member::Elsewhere);
        match &mut member {
            Member::Elsewhere => {}
            Member::Alone(replica) => self.execute_alone(shard, replica, &mut batch),
            Member::Group(group) => self.execute_in_group(shard, group, &mut batch),
        }
        batch.keys.clear();
        batch.hashes.clear();
        batch.readers.clear();
        batch.write_hashes.clear();
        self.dispatch.members[usize::from(shard)] = member;
        self.batches[usize::from(shard)] = batch;
    }

    fn execute_alone(&mut self, shard: u16, replica: &mut Replica<Origin>, batch: &mut Batch<'_>) {
        if !batch.writes.is_empty() {
            self.dispatch.stats.writes += batch.writes.len() as u64;
            replica.propose(self.moment.now_ms, &mut batch.writes, &batch.write_hashes);
            replica.drain(|state, origin, reply| self.applied(shard, state.applied_index(), origin, reply));
        }
        if !batch.in_sessions.is_empty() {
            self.dispatch.stats.writes += batch.in_sessions.len() as u64;
            replica.propose_in_sessions(self.moment.now_ms, &mut batch.in_sessions);
            replica.drain(|state, origin, reply| self.applied(shard, state.applied_index(), origin, reply));
        }
        if !batch.keys.is_empty() {
            self.read(
                shard,
                replica.shard_mut(),
                (&batch.keys, Some(&batch.hashes)),
                &batch.readers,
                Freshness::Newest,
            );
            if !self.dispatch.late.is_empty() {
                self.read_expired(shard, replica, batch);
            }
        }
        for (reader, values, scan) in batch.pages.drain(..) {
            if self.read_page(shard, replica.shard(), &reader, values, &scan) {
                replica.propose_expiry(self.moment.now_ms, &[]);
            }
        }
    }

    fn execute_in_group(&mut self, shard: u16, group: &mut Group<D>, batch: &mut Batch<'_>) {
        let now = self.moment.now;
        if !batch.writes.is_empty() || !batch.in_sessions.is_empty() {
            self.propose(shard, group, batch);
        }
        let alone = group.replica().filter(|replica| replica.alone().is_some());
        if let Some(replica) = alone {
            if !batch.keys.is_empty() {
                replica.machine().with(|machine| {
                    let state = machine.shard_mut();
                    self.read(shard, state, (&batch.keys, None), &batch.readers, Freshness::Newest);
                });
                if !self.dispatch.late.is_empty() {
                    let hashes = |keys: &[&[u8]], late: &[(usize, Version)]| {
                        replica.machine().with(|machine| {
                            let hash =
                                |&(place, version): &(usize, Version)| (machine.shard().hash(keys[place]), version);
                            late.iter().map(hash).collect::<Vec<_>>()
                        })
                    };
                    let expired = hashes(&batch.keys, &self.dispatch.late);
                    let late = self.dispatch.late.drain(..);
                    let tokens = late.map(|(place, _)| Token::Expired(batch.readers[place].origin));
                    let wake = group.wake();
                    let (proposer, now_ms) = (&mut group.proposer, self.moment.now_ms);
                    proposer.propose_expiry(&replica, now, now_ms, tokens.zip(expired), &wake);
                }
            }
            for (reader, values, scan) in batch.pages.drain(..) {
                let late = replica
                    .machine()
                    .with(|machine| self.read_page(shard, machine.shard(), &reader, values, &scan));
                if late {
                    self.expire_what_is_due(group);
                }
            }
        } else {
            for (key, reader) in batch.keys.iter().zip(&batch.readers) {
                let payload = &self.incoming[reader.incoming as usize].frame.payload;
                batch.lax.push(Read {
                    origin: reader.origin,
                    what: What::Entry(payload.slice_ref(key)),
                    consistency: Consistency::Linearizable,
                    deadline: self.incoming[reader.incoming as usize].deadline,
                });
            }
            for (reader, values, scan) in batch.pages.drain(..) {
                let payload = &self.incoming[reader.incoming as usize].frame.payload;
                batch.lax.push(Read {
                    origin: reader.origin,
                    what: What::Page {
                        values,
                        limit: scan.limit,
                        cursor: scan.cursor,
                        prefix: payload.slice_ref(scan.prefix),
                    },
                    consistency: Consistency::Linearizable,
                    deadline: self.incoming[reader.incoming as usize].deadline,
                });
            }
        }
        let (mut ready, mut oldest_ms) = (Vec::new(), 0);
        for read in batch.lax.drain(..) {
            match group.read_now(now, read) {
                Readiness::Now(read, age_ms) => {
                    ready.push(read);
                    oldest_ms = age_ms.max(oldest_ms);
                }
                Readiness::Never(origin, refused) => self.refuse(shard, origin, refused),
                Readiness::Later => {}
            }
        }
        if !ready.is_empty() {
            self.serve(shard, group, ready, Freshness::AsAsked(oldest_ms));
        }
        group.confirm(now);
        self.settle(shard, group);
    }

    /// Proposes the writes of a turn.
    fn propose(&mut self, shard: u16, group: &mut Group<D>, batch: &mut Batch<'_>) {
        let replica = match group.may_propose(self.moment.now) {
            Ok(replica) => replica,
            Err(refused) => {
                let plain = batch.writes.drain(..).map(|(origin, _)| origin);
                for origin in plain.chain(batch.in_sessions.drain(..).map(|(origin, _)| origin)) {
                    self.refuse(shard, origin, refused);
                }
                return;
            }
        };
        self.dispatch.stats.writes += (batch.writes.len() + batch.in_sessions.len()) as u64;
        let plain = batch.writes.drain(..);
        let plain = plain.map(|(origin, command)| (origin, Operation::from(command)));
        let writes = plain.chain(batch.in_sessions.drain(..));
        let writes = writes.map(|(origin, operation)| Write {
            token: Token::Write(origin),
            operation,
        });
        let configuration = group.configuration(&replica).map(|configuration| Write {
            token: Token::Configured,
            operation: Operation::Configure(configuration),
        });
        let mut writes: Vec<Write<'_, Token>> = configuration.into_iter().chain(writes).collect();
        let wake = group.wake();
        let (now, now_ms) = (self.moment.now, self.moment.now_ms);
        group.proposer.propose(&replica, now, now_ms, &mut writes, &wake);
    }

    /// Commits that shard time is the clock's: entries were met whose time is over.
    fn expire_what_is_due(&mut self, group: &mut Group<D>) {
        let Some(replica) = group.replica().filter(group::Replica::leads) else {
            return;
        };
        let wake = group.wake();
        let (now, now_ms) = (self.moment.now, self.moment.now_ms);
        let nothing = std::iter::empty();
        group.proposer.propose_expiry(&replica, now, now_ms, nothing, &wake);
    }

    /// Answers what earlier turns have asked, of every shard of which there is news.
    pub(crate) fn news(&mut self) {
        let Some(news) = &self.dispatch.news else { return };
        let mut shards = std::mem::take(&mut self.dispatch.newsworthy);
        news.take(&mut shards);
        for (shard, group) in (0..)
            .zip(&self.dispatch.members)
            .filter_map(|(shard, member)| Some((shard, member.group()?)))
        {
            if !group.unserved.is_empty() && !shards.contains(&shard) {
                shards.push(shard);
            }
        }
        for shard in shards.drain(..) {
            let place = &mut self.dispatch.members[usize::from(shard)];
            let mut member = std::mem::replace(place, Member::Elsewhere);
            if let Member::Group(group) = &mut member {
                self.hear(shard, group);
            }
            self.dispatch.members[usize::from(shard)] = member;
        }
        self.dispatch.newsworthy = shards;
    }

    fn hear(&mut self, shard: u16, group: &mut Group<D>) {
        let now = self.moment.now;
        let unserved = std::mem::take(&mut group.unserved);
        if !unserved.is_empty() {
            // They were confirmed after they had come, which holds for any later state too.
            self.serve(shard, group, unserved, Freshness::AsAsked(0));
        }
        match group.confirmed() {
            None => {}
            Some(group::Outcome::Fresh(at, reads)) => {
                let age = now.saturating_duration_since(at).as_millis() as u32 + 1;
                self.serve(shard, group, reads, Freshness::AsAsked(age));
            }
            Some(group::Outcome::Failed(error, reads)) => {
                for read in reads {
                    self.not_confirmed(shard, group, &read, error);
                }
            }
        }
        let (mut served, mut late) = (Vec::new(), Vec::new());
        group.caught_up(now, &mut served, &mut late);
        if !served.is_empty() {
            self.serve(shard, group, served, Freshness::AsAsked(0));
        }
        for read in late {
            self.too_stale(shard, read.origin, None);
        }
        for (origin, taken) in group.snapshots_taken() {
            self.snapshot_taken(shard, origin, taken);
        }
        group.confirm(now);
        self.settle(shard, group);
    }

    /// Has a snapshot taken of the replica here.
    pub(crate) fn take_snapshot(&mut self, shard: u16, origin: Origin) {
        let busy = match &mut self.dispatch.members[usize::from(shard)] {
            Member::Group(group) => group.take_snapshot(origin).err(),
            Member::Alone(_) | Member::Elsewhere => {
                let message = "this node keeps nothing on a disk and has no snapshots: they are taken of shards that are replicated, \
                               or whose durability is sync";
                return self.say(shard, origin, Status::InvalidArgument, message);
            }
        };
        if let Some(message) = busy {
            self.dispatch.stats.requests_busy += 1;
            self.say(shard, origin, Status::Busy, message);
        }
    }

    fn snapshot_taken(&mut self, shard: u16, origin: Origin, taken: Result<u64, SnapshotError>) {
        match taken {
            Ok(index) => {
                let mut meta = self.replies.meta(Status::Ok);
                (meta.shard, meta.index) = (shard, index);
                let options = ReplyOptions::default();
                self.replies.reply(self.streams, origin, &meta, &options, &[]);
            }
            Err(error @ SnapshotError::NotWritten(_)) => {
                self.say(shard, origin, Status::DiskFailed, &error.to_string());
            }
            // Another comes in its place, or the node is restarted.
            Err(error @ SnapshotError::Stopped) => self.say(shard, origin, Status::Busy, &error.to_string()),
        }
    }

    fn not_confirmed(&mut self, shard: u16, group: &mut Group<D>, read: &Read, error: ReadError) {
        let now = self.moment.now;
        let replica = group.replica();
        if matches!(read.consistency, Consistency::Stale { .. }) {
            let applied = replica.and_then(|replica| replica.machine().applied());
            let age = group.age(now, applied.map_or(0, |applied| applied.index));
            return self.too_stale(shard, read.origin, age);
        }
        let refused = match (error, replica) {
            (_, Some(replica)) if replica.has_ended() => group.not_leading(now, &replica),
            (ReadError::NotLeader(_), Some(replica)) => group.not_leading(now, &replica),
            (ReadError::NotLeader(_), None) => Refused::Leaderless,
            (ReadError::NoQuorum | ReadError::Stopped, _) => Refused::NoQuorum,
        };
        self.refuse(shard, read.origin, refused);
    }

    /// Answers everything whose entry of the log has come to an end.
    fn settle(&mut self, shard: u16, group: &mut Group<D>) {
        let Some(replica) = group.replica() else { return };
        let mut answers = Vec::new();
        let (wake, now, now_ms) = (group.wake(), self.moment.now, self.moment.now_ms);
        group.proposer.drain(&replica, now, now_ms, &wake, |token, answer| {
            answers.push((token, answer));
        });
        group.leave_when_quiet(&replica);
        for (token, answer) in answers {
            self.settled(shard, group, token, answer);
        }
    }

    fn settled(&mut self, shard: u16, group: &mut Group<D>, token: Token, answer: Answer) {
        let (origin, is_write) = match token {
            Token::Configured => {
                if let Answer::NotProposed(_) | Answer::NoQuorum = answer {
                    group.not_configured();
                }
                return;
            }
            Token::Write(origin) => (origin, true),
            Token::Expired(origin) => (origin, false),
        };
        let now = self.moment.now;
        match answer {
            Answer::Applied { index, .. } if !is_write => {
                let mut meta = self.replies.meta(Status::NotFound);
                meta.shard = shard;
                meta.index = index;
                self.replies
                    .reply(self.streams, origin, &meta, &ReplyOptions::default(), &[]);
            }
            Answer::Applied { index, reply } => self.applied(shard, index, origin, reply),
            Answer::NotProposed(_) => {
                let replica = group.replica();
                let refused = match replica {
                    // It is the leader and took nothing: its queue is full.
                    Some(replica) if replica.leads() => Refused::Busy,
                    Some(replica) => group.not_leading(now, &replica),
                    None => Refused::Leaderless,
                };
                self.refuse(shard, origin, refused);
            }
            // The protocol's limits are checked when a request is decoded and are not above those of a log entry.
            Answer::Refused(error) => self.say(shard, origin, Status::ValueTooLarge, &error.to_string()),
            Answer::InDoubt if is_write && !active(Mutant::DoubtRefused) => {
                let message = "the write was proposed, and what became of it is not known";
                self.say(shard, origin, Status::InDoubt, message);
            }
            // A read can be repeated, whether the expiry it waited for was committed or not.
            Answer::InDoubt | Answer::NoQuorum => self.refuse(shard, origin, Refused::NoQuorum),
        }
    }

    /// Answers a write, or what opens or ends a session, with what came of it when it was applied.
    fn applied(&mut self, shard: u16, index: u64, origin: Origin, reply: Reply) {
        let (status, message) = match reply {
            Reply::Outcome(outcome) => {
                return write_reply(self.replies, self.streams, shard, index, origin, outcome);
            }
            Reply::SessionOpened | Reply::SessionEnded => {
                let mut meta = self.replies.meta(Status::Ok);
                (meta.shard, meta.index) = (shard, index);
                let options = ReplyOptions::default();
                return self.replies.reply(self.streams, origin, &meta, &options, &[]);
            }
            Reply::SessionExpired => (Status::SessionExpired, "the session is unknown or has expired"),
            Reply::Acknowledged => (
                Status::InvalidArgument,
                "the session's client has said that it has seen the reply to this number",
            ),
            Reply::Busy => {
                self.dispatch.stats.requests_busy += 1;
                let message = "the shard's table of sessions is full: close sessions, or wait until idle ones expire";
                return self.replies.refuse(self.streams, origin, Status::Busy, message);
            }
            Reply::Configured | Reply::PolicyFixed | Reply::ReplicaId(_) => {
                (Status::Internal, "an answer to another question")
            }
        };
        self.say(shard, origin, status, message);
    }

    fn say(&mut self, shard: u16, origin: Origin, status: Status, message: &str) {
        let mut meta = self.replies.meta(status);
        meta.shard = shard;
        let options = ReplyOptions::message(message);
        self.replies.reply(self.streams, origin, &meta, &options, &[]);
    }

    fn refuse(&mut self, shard: u16, origin: Origin, refused: Refused) {
        let (status, message) = match refused {
            Refused::Moved(moved) => {
                let mut meta = self.replies.meta(Status::Moved);
                meta.shard = shard;
                let message = if moved.leader == 0 {
                    "this node's replica of the shard has ended: another node leads it, or will soon"
                } else {
                    "another node leads the shard"
                };
                let options = ReplyOptions {
                    moved: Some(moved),
                    ..ReplyOptions::message(message)
                };
                return self.replies.reply(self.streams, origin, &meta, &options, &[]);
            }
            Refused::Leaderless => {
                self.dispatch.stats.requests_busy += 1;
                let mut meta = self.replies.meta(Status::Busy);
                meta.shard = shard;
                let options = ReplyOptions {
                    retry_after_ms: Some(LEADERLESS_RETRY.as_millis() as u32),
                    ..ReplyOptions::message("the shard is electing its leader")
                };
                return self.replies.reply(self.streams, origin, &meta, &options, &[]);
            }
            Refused::Busy => return self.busy(origin),
            Refused::TooStale => return self.too_stale(shard, origin, None),
            Refused::NoQuorum => (Status::NoQuorum, "no majority of the shard's replicas answers"),
            Refused::ReadOnly => (
                Status::ReadOnly,
                "the journal has no room until a snapshot has been taken, or the disk is full",
            ),
        };
        self.say(shard, origin, status, message);
    }

    /// Serves reads that may be served.
    fn serve(&mut self, shard: u16, group: &mut Group<D>, reads: Vec<Read>, freshness: Freshness) {
        let Some(replica) = group.replica() else {
            for read in reads {
                self.refuse(shard, read.origin, Refused::Leaderless);
            }
            return;
        };
        let mut reads: Vec<Read> = reads
            .into_iter()
            .filter(|read| {
                let late = self.is_late(read.deadline);
                if late {
                    self.late(read.origin);
                }
                !late
            })
            .collect();
        let put_off = std::mem::take(&mut self.dispatch.put_off);
        let mut expired = Vec::new();
        let mut page_is_late = false;
        replica.machine().with(|machine| {
            let state = machine.shard_mut();
            let (mut keys, mut readers): (Vec<&[u8]>, Vec<Reader>) = Default::default();
            for (place, read) in reads.iter().enumerate() {
                let reader = Reader {
                    origin: read.origin,
                    incoming: place as u32,
                    consistency: read.consistency.code(),
                };
                match &read.what {
                    What::Entry(key) => {
                        keys.push(key);
                        readers.push(reader);
                    }
                    What::Page {
                        values,
                        limit,
                        cursor,
                        prefix,
                    } => {
                        let scan = Scan {
                            shard,
                            limit: *limit,
                            cursor: *cursor,
                            prefix,
                        };
                        page_is_late |= self.read_page(shard, state, &reader, *values, &scan);
                    }
                }
            }
            self.read(shard, state, (&keys, None), &readers, freshness);
            for (place, version) in self.dispatch.late.drain(..) {
                expired.push((readers[place].origin, (state.hash(keys[place]), version)));
            }
        });
        let mut left = std::mem::replace(&mut self.dispatch.put_off, put_off);
        left.sort_unstable();
        for place in left.drain(..).rev() {
            let read = reads.swap_remove(place as usize);
            if let (What::Page { .. }, Origin::Stream { stream, .. }) = (&read.what, read.origin)
                && let Some(stream) = self.streams.get(stream)
            {
                // It stays, and so it goes on counting.
                stream.heavy += 1;
            }
            group.unserved.push(read);
        }
        if page_is_late {
            self.expire_what_is_due(group);
        }
        if expired.is_empty() {
            return;
        }
        if replica.leads() {
            let wake = group.wake();
            let expired = expired.into_iter().map(|(origin, what)| (Token::Expired(origin), what));
            let (now, now_ms) = (self.moment.now, self.moment.now_ms);
            group.proposer.propose_expiry(&replica, now, now_ms, expired, &wake);
        } else {
            // The leader's clock decides whether it is over.
            for (origin, _) in expired {
                let refused = group.not_leading(self.moment.now, &replica);
                self.refuse(shard, origin, refused);
            }
        }
    }

    /// Looks keys up, whose hashes may be known, and answers.
    fn read(
        &mut self,
        shard: u16,
        state: &mut Shard,
        (keys, hashes): (&[&[u8]], Option<&[u64]>),
        readers: &[Reader],
        freshness: Freshness,
    ) {
        let mut meta = self.replies.meta(Status::Ok);
        meta.shard = shard;
        meta.index = state.applied_index();
        let now_ms = self.moment.now_ms;
        let (replies, streams, late, put_off, reads) = (
            &mut *self.replies,
            &mut *self.streams,
            &mut self.dispatch.late,
            &mut self.dispatch.put_off,
            &mut self.dispatch.stats.reads,
        );
        let bounded = Consistency::Stale { max_age_ms: 0 }.code();
        let newest = matches!(freshness, Freshness::Newest);
        let mut template = ReplyTemplate::new(&meta);
        let each = |place: usize, entry: Option<EntryRef<'_>>| {
            let reader = &readers[place];
            let (status, version, expires_at_ms, value) = match entry {
                Some(entry) => (Status::Ok, entry.version, entry.expires_at_ms, entry.value),
                None => (Status::NotFound, Version::ABSENT, 0, &[][..]),
            };
            if expires_at_ms != 0 && expires_at_ms <= now_ms && !active(Mutant::ExpiredServed) {
                return late.push((place, version));
            }
            let done = match reader.origin {
                Origin::Stream { stream, id, opcode } if newest && reader.consistency == 0 && expires_at_ms == 0 => {
                    let what = (status, version.get());
                    replies.reply_plainly(streams, (stream, id, opcode), &mut template, what, value)
                }
                origin => {
                    let mut options = ReplyOptions::default();
                    if reader.consistency == bounded {
                        options.age_ms = Some(match freshness {
                            Freshness::Newest => 0,
                            Freshness::AsAsked(age_ms) => age_ms,
                        });
                    }
                    options.expires_at_ms = (expires_at_ms != 0).then_some(expires_at_ms);
                    let mut meta = meta;
                    if !newest {
                        meta.consistency = reader.consistency;
                    }
                    (meta.status, meta.version) = (status.code(), version.get());
                    replies.reply_read(streams, origin, &meta, &options, value)
                }
            };
            if done {
                *reads += 1;
            } else {
                put_off.push(reader.incoming);
            }
        };
        match hashes {
            Some(hashes) => state.get_batch_hashed(keys, hashes, each),
            None => state.get_batch(keys, each),
        }
    }

    /// Entries whose time has come by the clock and not by shard time: their expiry is committed before they are called absent,
    /// so that no replica serves them afterwards.
    fn read_expired(&mut self, shard: u16, replica: &mut Replica<Origin>, batch: &Batch<'_>) {
        let mut late = std::mem::take(&mut self.dispatch.late);
        let hash = |&(place, version): &(usize, Version)| (batch.hashes[place], version);
        let expired: Vec<_> = late.iter().map(hash).collect();
        replica.propose_expiry(self.moment.now_ms, &expired);
        let mut meta = self.replies.meta(Status::NotFound);
        meta.shard = shard;
        meta.index = replica.shard().applied_index();
        for (place, _) in late.drain(..) {
            self.replies.reply(
                self.streams,
                batch.readers[place].origin,
                &meta,
                &ReplyOptions::default(),
                &[],
            );
        }
        self.dispatch.late = late;
    }

    /// Says whether entries were met whose time has come by the clock and not by shard time.
    fn read_page(&mut self, shard: u16, state: &Shard, reader: &Reader, values: bool, scan: &Scan<'_>) -> bool {
        let limits = &self.dispatch.node_limits;
        // What a page holds beyond its budget of bytes, by its last entry, must still fit a frame.
        let most = self.dispatch.limits.max_frame_len() - FRAME_OVERHEAD / 2;
        let page = &mut self.dispatch.page;
        page.clear();
        page.resize(Page::LEN, 0);
        let now_ms = self.moment.now_ms;
        let (mut count, mut late) = (0, false);
        let mut resume = None;
        let next = state.scan(
            Cursor::from(scan.cursor),
            scan.prefix,
            scan.limit as usize,
            limits.page_bytes,
            limits.page_work,
            |key, entry| {
                if entry.expires_at_ms != 0 && entry.expires_at_ms <= now_ms {
                    late = true;
                    return;
                }
                let value = if values { entry.value } else { &[] };
                let found = PageEntry {
                    key,
                    value,
                    version: entry.version.get(),
                    expires_at_ms: entry.expires_at_ms,
                };
                if resume.is_some() || page.len() + PageEntry::OVERHEAD + key.len() + value.len() > most {
                    resume.get_or_insert_with(|| Cursor::from(state.hash(key)));
                } else {
                    found.encode(page);
                    count += 1;
                }
            },
        );
        let next = resume.or(next);
        let head = Page {
            next: next.map_or(0, Cursor::get),
            count,
            done: next.is_none(),
        };
        page[..Page::LEN].copy_from_slice(&head.to_bytes());
        let mut meta = self.replies.meta(Status::Ok);
        meta.shard = shard;
        meta.index = state.applied_index();
        self.dispatch.stats.reads += u64::from(count);
        let page = std::mem::take(&mut self.dispatch.page);
        if !self
            .replies
            .reply_read(self.streams, reader.origin, &meta, &ReplyOptions::default(), &page)
        {
            // Counted as heavy again when it comes back.
            if let Origin::Stream { stream, .. } = reader.origin
                && let Some(stream) = self.streams.get(stream)
            {
                stream.heavy = stream.heavy.saturating_sub(1);
            }
            self.dispatch.put_off.push(reader.incoming);
        }
        self.dispatch.page = page;
        late
    }
}

fn write_reply(replies: &mut Replies, streams: &mut Streams, shard: u16, index: u64, origin: Origin, outcome: Outcome) {
    let mut meta = replies.meta(Status::Ok);
    meta.shard = shard;
    meta.index = index;
    let counter;
    let mut body: &[u8] = &[];
    let status = match outcome {
        Outcome::Applied { version } => {
            meta.version = version.get();
            Status::Ok
        }
        Outcome::Counter { version, value } => {
            meta.version = version.get();
            counter = value.to_le_bytes();
            body = &counter;
            Status::Ok
        }
        Outcome::NotFound => Status::NotFound,
        Outcome::ConditionFailed { current } => {
            meta.version = current.get();
            Status::ConditionFailed
        }
        Outcome::NotANumber => Status::NotANumber,
        Outcome::Overflow => Status::Overflow,
        Outcome::OutOfMemory => Status::OutOfMemory,
        // The protocol's limits are checked when a request is decoded and are not above the engine's.
        Outcome::InvalidSize => Status::ValueTooLarge,
    };
    meta.status = status.code();
    replies.reply(streams, origin, &meta, &ReplyOptions::default(), body);
}
