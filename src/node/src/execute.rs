//! Executing what a turn asks of one shard: writes as one log entry, reads as one batched lookup, pages.

use generation_engine::{Cursor, EntryRef, Outcome, Shard, Version};
use generation_proto::limits::FRAME_OVERHEAD;
use generation_proto::reply::{Page, PageEntry};
use generation_proto::request::Scan;
use generation_proto::{ReplyOptions, Status};

use crate::dispatch::{Batch, Reader, Turn};
use crate::replica::Replica;
use crate::replies::{Origin, Replies};
use crate::streams::Streams;

impl Turn<'_, '_> {
    /// Executes what the turn asks of one shard.
    pub(crate) fn execute(&mut self, shard: u16) {
        let mut batch = std::mem::take(&mut self.batches[usize::from(shard)]);
        let Some(mut replica) = self.dispatch.replicas[usize::from(shard)].take() else {
            return;
        };
        if !batch.writes.is_empty() {
            self.dispatch.stats.writes += batch.writes.len() as u64;
            replica.propose(self.moment.now_ms, &mut batch.writes);
            replica.drain(|state, origin, outcome| {
                write_reply(self.replies, self.streams, shard, state, origin, outcome);
            });
        }
        if !batch.keys.is_empty() {
            self.read(shard, &mut replica, &batch);
        }
        for (reader, values, scan) in batch.pages.drain(..) {
            self.read_page(shard, &mut replica, &reader, values, &scan);
        }
        batch.keys.clear();
        batch.hashes.clear();
        batch.readers.clear();
        self.dispatch.replicas[usize::from(shard)] = Some(replica);
        self.batches[usize::from(shard)] = batch;
    }

    fn read(&mut self, shard: u16, replica: &mut Replica<Origin>, batch: &Batch<'_>) {
        let mut meta = self.replies.meta(Status::Ok);
        meta.shard = shard;
        meta.index = replica.shard().applied_index();
        let now_ms = self.moment.now_ms;
        let (replies, streams, late, put_off, reads) = (
            &mut *self.replies,
            &mut *self.streams,
            &mut self.dispatch.late,
            &mut self.dispatch.put_off,
            &mut self.dispatch.stats.reads,
        );
        let each = |place: usize, entry: Option<EntryRef<'_>>| {
            let reader = &batch.readers[place];
            let done = match entry {
                Some(entry) if entry.expires_at_ms != 0 && entry.expires_at_ms <= now_ms => {
                    late.push((place, entry.version));
                    return;
                }
                Some(entry) => {
                    meta.status = Status::Ok.code();
                    meta.version = entry.version.get();
                    let options = ReplyOptions {
                        expires_at_ms: (entry.expires_at_ms != 0).then_some(entry.expires_at_ms),
                        age_ms: reader.stale.then_some(0),
                        ..ReplyOptions::default()
                    };
                    replies.reply_read(streams, reader.origin, &meta, &options, entry.value)
                }
                None => {
                    meta.status = Status::NotFound.code();
                    meta.version = 0;
                    replies.reply_read(streams, reader.origin, &meta, &ReplyOptions::default(), &[])
                }
            };
            if done {
                *reads += 1;
            } else {
                put_off.push(reader.incoming);
            }
        };
        replica.shard_mut().get_batch_hashed(&batch.keys, &batch.hashes, each);
        if !self.dispatch.late.is_empty() {
            self.read_expired(shard, replica, batch);
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

    fn read_page(&mut self, shard: u16, replica: &mut Replica<Origin>, reader: &Reader, values: bool, scan: &Scan<'_>) {
        let limits = &self.dispatch.node_limits;
        // What a page holds beyond its budget of bytes, by its last entry, must still fit a frame.
        let most = self.dispatch.limits.max_frame_len() - FRAME_OVERHEAD / 2;
        let page = &mut self.dispatch.page;
        page.clear();
        page.resize(Page::LEN, 0);
        let now_ms = self.moment.now_ms;
        let (mut count, mut late) = (0, false);
        let mut resume = None;
        let state = replica.shard();
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
        if late {
            replica.propose_expiry(now_ms, &[]);
        }
        let next = resume.or(next);
        let head = Page {
            next: next.map_or(0, Cursor::get),
            count,
            done: next.is_none(),
        };
        page[..Page::LEN].copy_from_slice(&head.to_bytes());
        let mut meta = self.replies.meta(Status::Ok);
        meta.shard = shard;
        meta.index = replica.shard().applied_index();
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
    }
}

fn write_reply(
    replies: &mut Replies,
    streams: &mut Streams,
    shard: u16,
    state: &Shard,
    origin: Origin,
    outcome: Outcome,
) {
    let mut meta = replies.meta(Status::Ok);
    meta.shard = shard;
    meta.index = state.applied_index();
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
