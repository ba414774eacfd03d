//! `generation kv`: entries read and written from a shell.
//!
//! Values go in and out as raw bytes; `--json` makes every result an object a line, binary-safe. The exit code says what became
//! of a request, see [`crate::cli::Exit`]. Routing, retries and the meaning of errors are the client's; nothing of them is here.

mod export;
mod import;
mod output;
mod progress;
mod records;
mod write;

use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::Subcommand;
use generation_client::{Client, Consistency, Meta, Scan, SessionToken, WriteReply};

use self::output::{Output, Row, Stop, escape};
use super::connection::{Connection, block_on, positive_duration};
use super::{Exit, Failure, Globals};

/// Options of `generation kv`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv put greeting 'hello, world'\n  \
    generation kv get greeting\n  \
    generation kv put token s3cret --ttl 30s --if-absent\n  \
    generation kv incr visits\n  \
    generation kv keys --prefix user: --limit 10\n  \
    generation kv import data.ndjson && generation kv export backup.ndjson\n\n\
    `-` as a value reads standard input. With --json each key is one object on a line, and bytes\n\
    that are not UTF-8 are in base64 (key_b64, value_b64). More: generation kv COMMAND --help")]
pub struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: KvCommand,
}

#[derive(Debug, Subcommand)]
enum KvCommand {
    /// Print the value of a key; exit code 3 when there is none.
    Get(Get),
    /// Store a value; the former time to live is dropped.
    Put(Put),
    /// Remove a key; exit code 3 when there is none.
    Delete(Delete),
    /// Add to a decimal number and print the sum; a missing key counts as 0.
    Incr(Incr),
    /// Change the time to live of a key; exit code 3 when there is none.
    Touch(Touch),
    /// Print the values of several keys.
    Mget(Mget),
    /// List keys.
    Keys(Keys),
    /// List keys and values.
    Entries(Entries),
    /// Store the entries of a file (NDJSON or CSV).
    Import(import::Args),
    /// Write the entries into a file (NDJSON or CSV).
    Export(export::Args),
}

/// Options of commands on keys.
#[derive(Debug, clap::Args)]
struct KeyOptions {
    /// Keys are given in base64, for bytes that a shell cannot pass.
    #[arg(long)]
    key_b64: bool,
}

impl KeyOptions {
    fn key(&self, argument: &OsString) -> Result<Vec<u8>, Failure> {
        let bytes = argument.clone().into_vec();
        if self.key_b64 {
            BASE64_STANDARD
                .decode(&bytes)
                .map_err(|error| Failure::usage(format!("the key is not base64: {error}")))
        } else {
            Ok(bytes)
        }
    }
}

/// Options of writes.
#[derive(Debug, clap::Args)]
pub(crate) struct WriteOptions {
    /// Send a write again where its reply is lost; the cluster executes it once all the same. Costs a session for each shard.
    #[arg(long)]
    exactly_once: bool,
}

impl WriteOptions {
    /// The client as whoever writes uses it.
    pub(crate) fn of(&self, client: Client) -> Client {
        if self.exactly_once {
            client.exactly_once()
        } else {
            client
        }
    }
}

/// Options of reads.
#[derive(Debug, clap::Args)]
pub(crate) struct ReadOptions {
    /// How fresh: linearizable (the default), session (at least what --session-token has seen) or stale:500ms.
    #[arg(long, value_name = "LEVEL")]
    consistency: Option<Consistency>,
    /// Read at least what this token has seen; --json prints one with each result.
    #[arg(long, value_name = "TOKEN")]
    session_token: Option<SessionToken>,
}

impl ReadOptions {
    pub(crate) fn consistency(&self) -> Result<Consistency, Failure> {
        match (&self.consistency, &self.session_token) {
            (None, None) => Ok(Consistency::Linearizable),
            (None | Some(Consistency::ReadYourWrites), Some(token)) => Ok(Consistency::Session(token.clone())),
            (Some(Consistency::ReadYourWrites), None) => Err(Failure::usage(
                "--consistency session needs --session-token; --json prints a token with each result",
            )),
            (Some(level), None) => Ok(level.clone()),
            (Some(_), Some(_)) => Err(Failure::usage("--session-token goes with --consistency session only")),
        }
    }
}

/// Which keys a listing is of.
#[derive(Debug, clap::Args)]
pub(crate) struct Prefix {
    /// Only keys that begin with this.
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    prefix: OsString,
}

impl Prefix {
    fn bytes(&self) -> &[u8] {
        self.prefix.as_bytes()
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv get greeting\n  \
    generation kv get photo > photo.jpg               # the bytes as they are\n  \
    generation kv get greeting --json\n  \
    generation kv get greeting --consistency stale:500ms\n  \
    generation kv get greeting || echo absent         # exit code 3")]
struct Get {
    key: OsString,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    read: ReadOptions,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv put greeting 'hello, world'\n  \
    generation kv put photo - < photo.jpg             # `-` reads standard input\n  \
    generation kv put session:7 alice --ttl 30m\n  \
    generation kv put lock me --if-absent             # exit code 4 when it exists\n  \
    generation kv put config new --if-version 65536   # compare and swap; get --json and put print versions")]
struct Put {
    key: OsString,
    /// The value; `-` reads it from standard input.
    #[arg(allow_hyphen_values = true)]
    value: OsString,
    /// Time until the entry expires, such as 30s or 1h 30m.
    #[arg(long, value_name = "DURATION", value_parser = positive_duration)]
    ttl: Option<Duration>,
    /// Store only if the key does not exist.
    #[arg(long, conflicts_with = "if_version")]
    if_absent: bool,
    /// Store only if the entry has this version (0: only if it does not exist).
    #[arg(long, value_name = "VERSION")]
    if_version: Option<u64>,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    write: WriteOptions,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv delete greeting\n  \
    generation kv delete config --if-version 65536    # exit code 4 when it changed meanwhile")]
struct Delete {
    key: OsString,
    /// Remove only if the entry has this version.
    #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(u64).range(1..))]
    if_version: Option<u64>,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    write: WriteOptions,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv incr visits             # prints the sum\n  \
    generation kv incr stock -3\n  \
    generation kv incr visits --exactly-once   # a lost reply does not count twice\n\n\
    The value is an ASCII decimal 64-bit signed number; its time to live stays as it is.")]
struct Incr {
    key: OsString,
    /// What to add.
    #[arg(default_value_t = 1, allow_negative_numbers = true)]
    delta: i64,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    write: WriteOptions,
}

#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("change").required(true),
    after_help = "Examples:\n  \
    generation kv touch session:7 --ttl 30m\n  \
    generation kv touch session:7 --persist"
)]
struct Touch {
    key: OsString,
    /// Time until the entry expires, from now.
    #[arg(long, value_name = "DURATION", value_parser = positive_duration, group = "change")]
    ttl: Option<Duration>,
    /// Let the entry live for ever.
    #[arg(long, group = "change")]
    persist: bool,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    write: WriteOptions,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv mget user:1 user:2\n  \
    generation kv mget user:1 user:2 --json | jq .value\n\n\
    Prints key, tab, value, with control characters and backslashes escaped; --json is for\n\
    programs. Keys that do not exist are named on standard error, and the exit code is 0.")]
struct Mget {
    #[arg(required = true, value_name = "KEY")]
    wanted: Vec<OsString>,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    read: ReadOptions,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv keys --prefix user: --limit 10\n  \
    generation kv keys --null | xargs -0 -n1 generation kv get\n\n\
    Keys come in no particular order, each as its raw bytes (escaped on a terminal). One that is\n\
    there from the beginning to the end of the listing is listed at least once.")]
struct Keys {
    #[command(flatten)]
    prefix: Prefix,
    /// Most keys to print.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// End each key with a zero byte, not with a newline.
    #[arg(long, short = '0')]
    null: bool,
    #[command(flatten)]
    read: ReadOptions,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation kv entries --prefix user: --limit 10\n  \
    generation kv entries --json > entries.ndjson     # `kv import` reads it\n\n\
    Prints key, tab, value, with control characters and backslashes escaped; --json is for\n\
    programs, `kv export` for files.")]
struct Entries {
    #[command(flatten)]
    prefix: Prefix,
    /// Most entries to print.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    #[command(flatten)]
    read: ReadOptions,
}

/// Runs `generation kv`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    let connection = &args.connection;
    match &args.command {
        KvCommand::Import(args) => return block_on(import::run(args, connection, globals)),
        KvCommand::Export(args) => return block_on(export::run(args, connection, globals)),
        _ => {}
    }
    let mut out = Output::new();
    let result = block_on(async { Ok(execute(&args.command, connection, globals.json, &mut out).await) })?;
    let flushed = out.flush();
    match result.and_then(|exit| flushed.map(|()| exit)) {
        Ok(exit) => Ok(exit),
        Err(Stop::Closed) => Ok(Exit::Ok),
        Err(Stop::Failure(failure)) => Err(failure),
    }
}

async fn execute(command: &KvCommand, connection: &Connection, json: bool, out: &mut Output) -> Result<Exit, Stop> {
    // Arguments are looked at before the cluster is asked for anything.
    match command {
        KvCommand::Get(args) => {
            let (key, consistency) = (args.keys.key(&args.key)?, args.read.consistency()?);
            let client = connection.connect().await?;
            let exit = get(&client, &key, consistency, json, out).await;
            client.close().await;
            exit
        }
        KvCommand::Mget(args) => {
            let keys = args
                .wanted
                .iter()
                .map(|key| args.keys.key(key))
                .collect::<Result<Vec<_>, _>>()?;
            let consistency = args.read.consistency()?;
            let client = connection.connect().await?;
            let exit = mget(&client, keys, consistency, json, out).await;
            client.close().await;
            exit
        }
        KvCommand::Put(args) => {
            let (key, value) = (args.keys.key(&args.key)?, value(&args.value)?);
            let client = args.write.of(connection.connect().await?);
            let mut request = client.put(&key, value);
            if let Some(ttl) = args.ttl {
                request = request.ttl(ttl);
            }
            if args.if_absent {
                request = request.if_absent();
            }
            if let Some(version) = args.if_version {
                request = request.if_version(version);
            }
            let reply = request.await;
            client.close().await;
            written(&key, &reply?, None, args.ttl, json, out)
        }
        KvCommand::Delete(args) => {
            let key = args.keys.key(&args.key)?;
            let client = args.write.of(connection.connect().await?);
            let mut request = client.delete(&key);
            if let Some(version) = args.if_version {
                request = request.if_version(version);
            }
            let reply = request.await;
            client.close().await;
            written(&key, &reply?, None, None, json, out)
        }
        KvCommand::Incr(args) => {
            let key = args.keys.key(&args.key)?;
            let client = args.write.of(connection.connect().await?);
            let reply = client.incr(&key, args.delta).await;
            client.close().await;
            let reply = reply?;
            let sum = reply.counter.to_string();
            written(&key, &reply, Some(&sum), reply.ttl(), json, out)
        }
        KvCommand::Touch(args) => {
            let key = args.keys.key(&args.key)?;
            let client = args.write.of(connection.connect().await?);
            let mut request = client.touch(&key);
            if let Some(ttl) = args.ttl {
                request = request.ttl(ttl);
            }
            let reply = request.await;
            client.close().await;
            written(&key, &reply?, None, args.ttl, json, out)
        }
        KvCommand::Keys(args) => {
            let consistency = args.read.consistency()?;
            let client = connection.connect().await?;
            let scan = client.keys().prefix(args.prefix.bytes()).consistency(consistency);
            let end = if args.null { b'\0' } else { b'\n' };
            let listed = list(&scan, false, args.limit, json, out, |key, _, out| {
                if out.is_terminal {
                    out.raw(escape(key).as_bytes())?;
                } else {
                    out.raw(key)?;
                }
                out.raw(&[end])
            })
            .await;
            client.close().await;
            listed
        }
        KvCommand::Entries(args) => {
            let consistency = args.read.consistency()?;
            let client = connection.connect().await?;
            let scan = client.entries().prefix(args.prefix.bytes()).consistency(consistency);
            let listed = list(&scan, true, args.limit, json, out, |key, value, out| {
                out.line(&format!("{}\t{}", escape(key), escape(value)))
            })
            .await;
            client.close().await;
            listed
        }
        KvCommand::Import(_) | KvCommand::Export(_) => unreachable!("invariant: both are run by their own modules"),
    }
}

/// The value of a `put`: the argument, or standard input.
fn value(argument: &OsString) -> Result<Vec<u8>, Failure> {
    if argument != "-" {
        return Ok(argument.clone().into_vec());
    }
    let limit = generation_proto::limits::MAX_VALUE_LEN;
    let mut value = Vec::new();
    std::io::stdin()
        .lock()
        .take(limit as u64 + 1)
        .read_to_end(&mut value)
        .map_err(|error| Failure::usage(format!("standard input: {error}")))?;
    if value.len() > limit {
        return Err(
            Failure::new(Exit::Rejected, format!("the value is longer than {limit} bytes"))
                .with_code("value_too_large"),
        );
    }
    Ok(value)
}

async fn get(
    client: &Client,
    key: &[u8],
    consistency: Consistency,
    json: bool,
    out: &mut Output,
) -> Result<Exit, Stop> {
    let reply = client.get(key).consistency(consistency).await?;
    let value = reply.value().map(|value| &value[..]);
    if json {
        out.json(&Row {
            key,
            found: reply.is_found(),
            value,
            ttl: reply.ttl(),
            version: reply.version(),
            meta: &reply.meta,
        })?;
    } else if let Some(value) = value {
        out.raw(value)?;
        if out.is_terminal && !value.ends_with(b"\n") {
            out.raw(b"\n")?;
        }
    } else {
        not_found(key);
    }
    Ok(if reply.is_found() { Exit::Ok } else { Exit::NotFound })
}

async fn mget(
    client: &Client,
    keys: Vec<Vec<u8>>,
    consistency: Consistency,
    json: bool,
    out: &mut Output,
) -> Result<Exit, Stop> {
    let replies = client.multi_get(&keys).consistency(consistency).await;
    let mut failed: Option<generation_client::Error> = None;
    for (key, reply) in keys.iter().zip(replies) {
        let reply = match reply {
            Ok(reply) => reply,
            // The others are printed all the same.
            Err(error) => {
                failed.get_or_insert(error);
                continue;
            }
        };
        let value = reply.value().map(|value| &value[..]);
        if json {
            out.json(&Row {
                key,
                found: reply.is_found(),
                value,
                ttl: reply.ttl(),
                version: reply.version(),
                meta: &reply.meta,
            })?;
        } else if let Some(value) = value {
            out.line(&format!("{}\t{}", escape(key), escape(value)))?;
        } else {
            not_found(key);
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(Exit::Ok),
    }
}

/// Prints the reply to a write. `value`: what the entry holds now, where the reply says so.
fn written(
    key: &[u8],
    reply: &WriteReply,
    value: Option<&str>,
    ttl: Option<Duration>,
    json: bool,
    out: &mut Output,
) -> Result<Exit, Stop> {
    if json {
        out.json(&Row {
            key,
            found: reply.found,
            value: value.map(str::as_bytes),
            ttl: ttl.filter(|_| reply.found),
            version: reply.version(),
            meta: &reply.meta,
        })?;
    } else if !reply.found {
        not_found(key);
    } else if let Some(value) = value {
        out.line(value)?;
    } else {
        out.line(&format!("version {}", reply.version()))?;
    }
    Ok(if reply.found { Exit::Ok } else { Exit::NotFound })
}

/// Says that a key does not exist. In JSON `found` says it.
fn not_found(key: &[u8]) {
    Failure::new(Exit::NotFound, format!("not found: {}", escape(key))).report(false);
}

/// Prints what a scan lists, up to a limit.
async fn list(
    scan: &Scan,
    with_values: bool,
    limit: Option<u64>,
    json: bool,
    out: &mut Output,
    print: impl Fn(&[u8], &[u8], &mut Output) -> Result<(), Stop>,
) -> Result<Exit, Stop> {
    let mut left = limit.unwrap_or(u64::MAX);
    let page_entries = u32::try_from(left.clamp(1, 2048)).expect("invariant: clamped to 2048");
    let scan = scan.clone().page_size(page_entries);
    let mut cursor = Some(scan.first());
    while let Some(at) = cursor
        && left > 0
    {
        let page = scan.page(at).await?;
        for entry in &page.entries {
            if left == 0 {
                break;
            }
            left -= 1;
            if json {
                let ttl = entry
                    .expires_at_ms
                    .map(|at| Duration::from_millis(at.saturating_sub(page.meta.server_time_ms)));
                let meta = Meta {
                    version: entry.version,
                    ..page.meta
                };
                out.json(&Row {
                    key: &entry.key,
                    found: true,
                    value: with_values.then_some(&entry.value[..]),
                    ttl,
                    version: entry.version,
                    meta: &meta,
                })?;
            } else {
                print(&entry.key, &entry.value, out)?;
            }
        }
        cursor = page.next;
    }
    Ok(Exit::Ok)
}
