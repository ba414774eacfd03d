//! `kv import`: a file's entries written in batches, several of them on their way at a time.
//!
//! A thread reads and parses; this one sends. Between them lie a few batches at most, so memory is bounded whatever the file's
//! size. A key that is on its way is never sent a second time before its reply is in, so the last line of a key wins as if the
//! file were written line by line.
//!
//! What is acknowledged is known by line: everything before `resume_from` was stored or reported. Nothing is written beside the
//! input; a failed import prints the option that goes on from there.
//!
//! A line whose reply is lost, because a leader died, is in doubt; the import reports it by number and goes on, and what it says to go on
//! from is the first of those. Only when nothing at all is acknowledged any more does it stop.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use generation_client::{Client, Error, Item, Rejected, WriteReply};
use serde::Serialize;
use tokio::sync::mpsc;

use super::WriteOptions;
use super::output::{Output, Stop, escape};
use super::progress::{Progress, per_second};
use super::records::{BadLine, Batch, Format, Reader, Step};
use crate::cli::connection::Connection;
use crate::cli::{Exit, Failure, Globals, State};

/// Most entries of a batch.
const BATCH_ENTRIES: usize = 2048;
/// Bytes of keys and values after which a batch is sent.
const BATCH_BYTES: usize = 256 << 10;
/// Batches on their way at a time. Each is held until it is acknowledged.
const WINDOW: usize = 8;
/// Batches in a row of which no line was stored, because of what was in doubt, after which an import stops: more than can be on their way
/// when a leader dies.
const FRUITLESS: usize = 2 * WINDOW;
/// Batches that wait between the reading thread and the sending one.
const QUEUE: usize = 4;
/// Bad lines that are printed one by one unless all are asked for.
const REPORTED: u64 = 100;

/// Options of `kv import`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = IMPORT_HELP)]
pub(crate) struct Args {
    /// File to read; `-` is standard input.
    file: PathBuf,
    /// Format [default: csv for a file named *.csv, else ndjson].
    #[arg(long)]
    format: Option<Format>,
    /// Time to live of entries whose line gives none.
    #[arg(long, value_name = "DURATION", value_parser = crate::cli::connection::positive_duration)]
    ttl: Option<Duration>,
    /// Leave keys that exist as they are.
    #[arg(long)]
    if_absent: bool,
    /// Start at this line, as a failed import says.
    #[arg(long, value_name = "LINE", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    resume_from: u64,
    /// Print every bad line, not the first 100 only.
    #[arg(long)]
    all_bad_lines: bool,
    #[command(flatten)]
    write: WriteOptions,
}

const IMPORT_HELP: &str = "\
NDJSON has one object a line:
  {\"key\":\"a\",\"value\":\"1\"}
  {\"key\":\"b\",\"value\":\"2\",\"ttl_ms\":60000}
  {\"key_b64\":\"/wA=\",\"value_b64\":\"AAEC\"}          bytes that are not UTF-8
  {\"key\":\"c\",\"value\":{\"any\":[\"JSON\"]}}           stored as it is written
CSV starts with a line that names its columns: key or key_b64, value or value_b64, optionally ttl_ms.

Lines that cannot be stored are reported by number and passed over; the exit code is 1 then. Lines whose reply
is lost, because a leader has died, are in doubt: they are reported too, and the exit code is 6. With
--exactly-once they are sent again instead, and executed once. An import that fails on the way says which line to go on from (--resume-from): every line before it was stored or reported.
Importing a line twice does no harm, unless something else wrote the key meanwhile.

Examples:
  generation kv import airports.ndjson
  generation kv import users.csv --ttl 24h
  generation kv import users.csv --exactly-once
  zcat dump.ndjson.gz | generation kv import - --if-absent
  generation kv import big.ndjson --resume-from 250001";

/// How an import went.
#[derive(Debug, Clone, Default, Serialize)]
struct Summary {
    /// Entries stored.
    imported: u64,
    /// Entries left alone because the key existed (`--if-absent`).
    kept: u64,
    /// Lines that could not be stored.
    bad_lines: u64,
    /// Lines that may have been stored or not.
    in_doubt: u64,
    /// Bytes of keys and values stored.
    bytes: u64,
    elapsed_ms: u64,
    per_second: u64,
    /// Line to go on from: the first that is not known to have been stored or reported as bad. `None` when there is none.
    resume_from: Option<u64>,
}

/// What the reading thread hands over.
enum Message {
    Batch { first_line: u64, batch: Batch },
    Bad(BadLine),
    Failed { line: u64, error: io::Error },
}

/// Runs `kv import`.
pub(crate) async fn run(args: &Args, connection: &Connection, globals: &Globals) -> Result<Exit, Failure> {
    let format = args.format.unwrap_or_else(|| Format::of_path(&args.file));
    let (input, len_bytes) = open(&args.file)?;
    let client = args.write.of(connection.connect().await?);
    let read_bytes = Arc::new(AtomicU64::new(0));
    let input = Counted {
        input,
        read_bytes: Arc::clone(&read_bytes),
    };
    let (sender, receiver) = mpsc::channel(QUEUE);
    let first_line = args.resume_from;
    let handed_over = Arc::new(AtomicU64::new(first_line));
    let at = Arc::clone(&handed_over);
    // Nobody waits for its end: after a failure it may sit in a read of standard input.
    tokio::task::spawn_blocking(move || read_batches(format, input, first_line, &sender, &at));

    let mut import = Import {
        client: &client,
        if_absent: args.if_absent,
        ttl: args.ttl,
        json: globals.json,
        report_all: args.all_bad_lines,
        progress: Progress::new(len_bytes),
        read_bytes,
        start: Instant::now(),
        hasher: RandomState::new(),
        on_their_way: HashSet::new(),
        unacknowledged: BTreeMap::new(),
        summary: Summary::default(),
        first_in_doubt: None,
        fruitless: 0,
        failure: None,
    };
    import.pump(receiver).await;
    let (summary, failure) = import.finish(handed_over.load(Ordering::Acquire));
    client.close().await;
    report(args, &summary, failure, globals)
}

/// Opens the input; its length where it has one.
fn open(path: &Path) -> Result<(Box<dyn BufRead + Send>, Option<u64>), Failure> {
    if path == Path::new("-") {
        return Ok((Box::new(BufReader::with_capacity(256 << 10, io::stdin())), None));
    }
    let failure = |error: io::Error| Failure::usage(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(failure)?;
    let metadata = file.metadata().map_err(failure)?;
    if metadata.is_dir() {
        return Err(Failure::usage(format!(
            "{} is a directory; name a file, or - for standard input",
            path.display()
        )));
    }
    let len_bytes = metadata.is_file().then_some(metadata.len());
    Ok((Box::new(BufReader::with_capacity(256 << 10, file)), len_bytes))
}

/// Counts the bytes consumed, for the progress bar.
struct Counted {
    input: Box<dyn BufRead + Send>,
    read_bytes: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl BufRead for Counted {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, len_bytes: usize) {
        self.read_bytes.fetch_add(len_bytes as u64, Ordering::Relaxed);
        self.input.consume(len_bytes);
    }
}

/// Reads the input to its end, or until nobody listens any more. `handed_over` follows: every line before it was sent on.
fn read_batches(
    format: Format,
    input: Counted,
    first_line: u64,
    sender: &mpsc::Sender<Message>,
    handed_over: &AtomicU64,
) {
    // Whether a message is heard does not matter: the receiver goes only when the import has failed already.
    let send = |message| sender.blocking_send(message).is_ok();
    let mut reader = match Reader::new(format, input, first_line) {
        Ok(reader) => reader,
        Err(error) => {
            send(Message::Failed { line: 1, error });
            return;
        }
    };
    let hasher = RandomState::new();
    let mut keys = HashSet::new();
    let empty = || Batch::with_capacity(BATCH_ENTRIES, BATCH_BYTES + (64 << 10));
    let mut batch = empty();
    let mut batch_line = first_line;
    loop {
        let line = reader.next_line().max(first_line);
        if batch.is_empty() {
            batch_line = line;
        }
        // What comes after this batch, when it is sent in this round.
        let (mut overflow, mut bad, mut end) = (None, None, None);
        match reader.read(&mut batch) {
            Ok(Step::Pushed) => {
                let key = batch.last_key().expect("invariant: a record was pushed");
                // The second of two equal keys (or, once in 2^64, of equal hashes) starts a batch of its own.
                if !keys.insert(hasher.hash_one(key)) {
                    overflow = batch.split_last();
                }
            }
            Ok(Step::Bad(line)) => bad = Some(Message::Bad(line)),
            Ok(Step::End) => end = Some(None),
            Err(error) => end = Some(Some(Message::Failed { line, error })),
        }
        let full = batch.len() >= BATCH_ENTRIES || batch.len_bytes() >= BATCH_BYTES;
        if !batch.is_empty() && (full || overflow.is_some() || end.is_some()) {
            let next_line = if overflow.is_some() { line } else { reader.next_line() };
            let batch = std::mem::replace(&mut batch, overflow.unwrap_or_else(empty));
            if !send(Message::Batch {
                first_line: batch_line,
                batch,
            }) {
                return;
            }
            handed_over.store(next_line, Ordering::Release);
            keys.clear();
            batch_line = line;
        }
        // The first of an overflow is a key of its batch too.
        if keys.is_empty()
            && let Some(key) = batch.last_key()
        {
            keys.insert(hasher.hash_one(key));
        }
        if bad.is_some_and(|bad| !send(bad)) {
            return;
        }
        if let Some(failed) = end {
            failed.map(send);
            return;
        }
    }
}

/// A batch as a request, and what it will be known by.
struct Outgoing {
    first_line: u64,
    items: Vec<Item>,
    /// Line and length in bytes of each item.
    lines: Vec<(u64, usize)>,
    /// Hashes of the keys.
    hashes: Vec<u64>,
}

/// A batch on its way, and what it came to.
struct Done {
    first_line: u64,
    lines: Vec<(u64, usize)>,
    hashes: Vec<u64>,
    results: Vec<Result<WriteReply, Error>>,
}

struct Import<'c> {
    client: &'c Client,
    if_absent: bool,
    ttl: Option<Duration>,
    json: bool,
    report_all: bool,
    progress: Progress,
    read_bytes: Arc<AtomicU64>,
    start: Instant,
    hasher: RandomState,
    /// Hashes of the keys that are on their way.
    on_their_way: HashSet<u64>,
    /// First lines of the batches that were handed over and not acknowledged, with how many start there.
    unacknowledged: BTreeMap<u64, u32>,
    summary: Summary,
    first_in_doubt: Option<u64>,
    /// Batches in a row of which nothing was stored.
    fruitless: usize,
    failure: Option<Failure>,
}

impl Import<'_> {
    /// Sends what comes until the input ends or something fails, then waits for what is on its way.
    async fn pump(&mut self, mut receiver: mpsc::Receiver<Message>) {
        let mut in_flight = FuturesUnordered::new();
        // A batch whose keys are on their way waits here for their replies.
        let mut held: Option<Outgoing> = None;
        let mut open = true;
        let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            if let Some(outgoing) = held.take()
                && self.failure.is_none()
            {
                let free = !outgoing.hashes.iter().any(|hash| self.on_their_way.contains(hash));
                if free && in_flight.len() < WINDOW {
                    self.on_their_way.extend(&outgoing.hashes);
                    in_flight.push(self.send(outgoing));
                } else {
                    held = Some(outgoing);
                }
            }
            if self.failure.is_some() {
                open = false;
            }
            if !open && in_flight.is_empty() && held.is_none() {
                break;
            }
            tokio::select! {
                biased;
                Some(done) = in_flight.next(), if !in_flight.is_empty() => self.acknowledge(done),
                interrupted = &mut interrupt, if self.failure.is_none() => {
                    let text = match interrupted {
                        Ok(()) => "interrupted".to_owned(),
                        Err(error) => format!("no signals: {error}"),
                    };
                    self.failure = Some(Failure::new(Exit::Rejected, text).with_code("interrupted"));
                }
                message = receiver.recv(), if open && held.is_none() => match message {
                    Some(Message::Batch { first_line, batch }) => held = Some(self.prepare(first_line, batch)),
                    Some(Message::Bad(bad)) => self.bad_line(bad.line, &bad.reason),
                    Some(Message::Failed { line, error }) => {
                        self.await_line(line);
                        self.failure = Some(Failure::usage(format!("reading failed at line {line}: {error}")));
                    }
                    None => open = false,
                },
            }
        }
        // What was handed over and not taken counts as open.
        receiver.close();
        while let Ok(message) = receiver.try_recv() {
            match message {
                Message::Batch { first_line, .. } => self.await_line(first_line),
                Message::Bad(bad) => self.await_line(bad.line),
                Message::Failed { line, .. } => self.await_line(line),
            }
        }
    }

    /// Counts a batch as handed over and makes a request of it.
    fn prepare(&mut self, first_line: u64, batch: Batch) -> Outgoing {
        self.await_line(first_line);
        let entries = batch.len();
        let mut outgoing = Outgoing {
            first_line,
            items: Vec::with_capacity(entries),
            lines: Vec::with_capacity(entries),
            hashes: Vec::with_capacity(entries),
        };
        for entry in batch.into_entries() {
            outgoing.lines.push((entry.line, entry.key.len() + entry.value.len()));
            outgoing.hashes.push(self.hasher.hash_one(&entry.key[..]));
            outgoing.items.push(Item {
                key: entry.key,
                value: entry.value,
                ttl: entry.ttl_ms.map(Duration::from_millis).or(self.ttl),
            });
        }
        outgoing
    }

    fn send(&self, outgoing: Outgoing) -> impl Future<Output = Done> + use<> {
        let (client, if_absent) = (self.client.clone(), self.if_absent);
        async move {
            let request = client.multi_put(outgoing.items);
            let request = if if_absent { request.if_absent() } else { request };
            Done {
                first_line: outgoing.first_line,
                lines: outgoing.lines,
                hashes: outgoing.hashes,
                results: request.send().await,
            }
        }
    }

    fn acknowledge(&mut self, done: Done) {
        for hash in &done.hashes {
            self.on_their_way.remove(hash);
        }
        let mut complete = true;
        let (mut stored, mut doubt) = (false, None);
        for ((line, bytes), result) in done.lines.into_iter().zip(done.results) {
            match result {
                Ok(_) => {
                    stored = true;
                    self.summary.imported += 1;
                    self.summary.bytes += bytes as u64;
                }
                Err(Error::Rejected(Rejected::ConditionFailed { .. })) if self.if_absent => {
                    stored = true;
                    self.summary.kept += 1;
                }
                Err(error @ Error::InDoubt(_)) => {
                    self.in_doubt(line, &error);
                    doubt = Some(error);
                }
                // The next line would fail as this one did: that is no matter of one line.
                Err(
                    error
                    @ (Error::Rejected(Rejected::OutOfMemory | Rejected::PermissionDenied(_)) | Error::NotSent(_)),
                ) => {
                    complete = false;
                    self.fail(error.into());
                }
                Err(error) => self.bad_line(line, &error.to_string()),
            }
        }
        match doubt {
            Some(error) if !stored => {
                self.fruitless += 1;
                if self.fruitless >= FRUITLESS {
                    self.fail(error.into());
                }
            }
            _ => self.fruitless = 0,
        }
        if complete && let Some(count) = self.unacknowledged.get_mut(&done.first_line) {
            *count -= 1;
            if *count == 0 {
                self.unacknowledged.remove(&done.first_line);
            }
        }
        self.progress.update(
            self.read_bytes.load(Ordering::Relaxed),
            self.summary.imported + self.summary.kept,
        );
    }

    /// Notes a failure; of several the one that leaves most open counts.
    fn fail(&mut self, failure: Failure) {
        let rank = |failure: &Failure| match failure.state {
            State::NotSent => 0,
            State::Rejected => 1,
            State::InDoubt => 2,
        };
        if self.failure.as_ref().is_none_or(|known| rank(known) < rank(&failure)) {
            self.failure = Some(failure);
        }
    }

    /// Everything from `line` is open until it is acknowledged.
    fn await_line(&mut self, line: u64) {
        *self.unacknowledged.entry(line).or_default() += 1;
    }

    fn bad_line(&mut self, line: u64, reason: &str) {
        self.summary.bad_lines += 1;
        let failure = Failure::new(Exit::Rejected, format!("line {line}: {reason}"))
            .with_code("bad_line")
            .with_state(State::Rejected);
        self.report_line(failure);
    }

    fn in_doubt(&mut self, line: u64, error: &Error) {
        self.summary.in_doubt += 1;
        self.first_in_doubt = self.first_in_doubt.map_or(Some(line), |first| Some(first.min(line)));
        let failure = Failure::new(Exit::InDoubt, format!("line {line}: {error}"))
            .with_code("line_in_doubt")
            .with_state(State::InDoubt);
        self.report_line(failure);
    }

    /// Reports a line that was counted, unless so many were that they are only counted.
    fn report_line(&self, failure: Failure) {
        let failure = match self.summary.bad_lines + self.summary.in_doubt {
            n if n <= REPORTED || self.report_all => failure,
            n if n == REPORTED + 1 => {
                let message = "more such lines follow; --all-bad-lines prints them".to_owned();
                Failure { message, ..failure }
            }
            _ => return,
        };
        self.progress.suspend(|| failure.report(self.json));
    }

    /// `handed_over`: every line before it was handed over.
    fn finish(mut self, handed_over: u64) -> (Summary, Option<Failure>) {
        self.progress.finish();
        let elapsed = self.start.elapsed();
        let summary = &mut self.summary;
        summary.elapsed_ms = elapsed.as_millis() as u64;
        summary.per_second = per_second(summary.imported + summary.kept, elapsed);
        if self.failure.is_some() {
            let open = self.unacknowledged.keys().next().copied();
            summary.resume_from = Some(open.unwrap_or(handed_over).min(handed_over));
        }
        if let Some(first) = self.first_in_doubt {
            // What is in doubt outweighs what stopped the import.
            self.failure = self.failure.take().map(|failure| Failure {
                exit: Exit::InDoubt,
                state: State::InDoubt,
                ..failure
            });
            summary.resume_from = Some(summary.resume_from.map_or(first, |line| line.min(first)));
        }
        (self.summary, self.failure)
    }
}

fn report(args: &Args, summary: &Summary, failure: Option<Failure>, globals: &Globals) -> Result<Exit, Failure> {
    let mut out = Output::new();
    let printed = if globals.json {
        out.json(summary)
    } else {
        out.line(&summary.to_string())
    };
    match printed.and_then(|()| out.flush()) {
        Ok(()) | Err(Stop::Closed) => {}
        Err(Stop::Failure(failure)) => return Err(failure),
    }
    let failure = failure.or_else(|| {
        let (count, bad) = (summary.in_doubt, summary.bad_lines);
        (count > 0).then(|| {
            let message =
                format!("{count} lines may have been stored or not, and {bad} bad lines were not; all others were");
            Failure::new(Exit::InDoubt, message)
                .with_code("lines_in_doubt")
                .with_state(State::InDoubt)
        })
    });
    match failure {
        Some(mut failure) => {
            // Where nothing was done there is nothing to go on from.
            if let Some(line) = summary.resume_from.filter(|&line| line > args.resume_from) {
                let doubt = match failure.state {
                    State::InDoubt => "; lines after it may have been stored or not, storing them again does no harm",
                    State::NotSent | State::Rejected => "",
                };
                let file = escape(args.file.as_os_str().as_encoded_bytes());
                // Writing to a string cannot fail.
                let _ = write!(
                    failure.message,
                    "\nEvery line before {line} was stored or reported{doubt}. \
                     Go on with: generation kv import {file} --resume-from {line}"
                );
            }
            Err(failure)
        }
        None if summary.bad_lines > 0 => Err(Failure::new(
            Exit::Rejected,
            format!("{} bad lines were not imported; all others were", summary.bad_lines),
        )
        .with_code("bad_lines")
        .with_state(State::Rejected)),
        None => Ok(Exit::Ok),
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use indicatif::{HumanBytes, HumanCount};
        write!(f, "imported {} entries", HumanCount(self.imported))?;
        if self.kept > 0 {
            write!(f, ", kept {}", HumanCount(self.kept))?;
        }
        write!(
            f,
            " ({}) in {:.2} s, {}/s",
            HumanBytes(self.bytes),
            self.elapsed_ms as f64 / 1000.0,
            HumanCount(self.per_second)
        )
    }
}
