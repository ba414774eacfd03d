//! `kv export`: all entries, or those of a prefix, into a file that `kv import` reads back.
//!
//! Pages are written as they come, and the next one travels meanwhile, so memory is bounded by two pages. A file appears under
//! its name when it is complete, never before: until then it is `FILE.partial`, cut at a page's end, from which a failed export
//! goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use generation_client::{Cursor, Scan, ScanPage};
use indicatif::HumanCount;
use serde::Serialize;

use super::output::{Output, Stop, escape};
use super::progress::{Progress, per_second};
use super::records::Format;
use super::write::Writer;
use super::{Prefix, ReadOptions};
use crate::cli::connection::Connection;
use crate::cli::{Exit, Failure, Globals};

/// Entries a page is asked for.
const PAGE_ENTRIES: u32 = 2048;

/// Options of `kv export`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPORT_HELP)]
pub(crate) struct Args {
    /// File to write; `-` is standard output.
    file: PathBuf,
    #[command(flatten)]
    prefix: Prefix,
    /// Format [default: csv for a file named *.csv, else ndjson].
    #[arg(long)]
    format: Option<Format>,
    /// Go on where a failed export stopped, as it says.
    #[arg(long, value_name = "CURSOR")]
    resume_from: Option<Cursor>,
    #[command(flatten)]
    read: ReadOptions,
}

const EXPORT_HELP: &str = "\
Every entry that is there from the beginning to the end of the export is written at least once, in no
particular order; what comes or goes meanwhile may be written or not. The time to live that is left is
written as ttl_ms. An existing file is replaced when the export is complete, not before.

Examples:
  generation kv export all.ndjson
  generation kv export users.csv --prefix user:
  generation kv export - | gzip > dump.ndjson.gz";

/// How an export went.
#[derive(Debug, Default, Serialize)]
struct Summary {
    exported: u64,
    /// Bytes of keys and values.
    bytes: u64,
    elapsed_ms: u64,
    per_second: u64,
    /// Where to go on; `None` when everything was written.
    resume_from: Option<String>,
}

/// Where entries go.
enum Target {
    Stdout,
    /// Written under its name at once: a device, a pipe.
    Direct,
    /// Written beside, renamed at the end.
    Renamed {
        partial: PathBuf,
        file: File,
    },
}

/// Runs `kv export`.
pub(crate) async fn run(args: &Args, connection: &Connection, globals: &Globals) -> Result<Exit, Failure> {
    let consistency = args.read.consistency()?;
    let (target, file) = open(&args.file, args.resume_from.is_some())?;
    let client = connection.connect().await?;
    let scan = client
        .entries()
        .prefix(args.prefix.bytes())
        .page_size(PAGE_ENTRIES)
        .consistency(consistency);
    let scan = match args.resume_from {
        Some(cursor) => scan.resume(cursor),
        None => scan,
    };
    let start = Instant::now();
    let mut summary = Summary::default();
    let format = args.format.unwrap_or_else(|| Format::of_path(&args.file));
    let partial = match &target {
        Target::Renamed { file, .. } => Some(file),
        Target::Stdout | Target::Direct => None,
    };
    let mut complete_len = len_of(partial);
    let result = copy(&scan, format, file, args.resume_from.is_some(), &mut summary, || {
        complete_len = len_of(partial);
    })
    .await;
    if let (Err(_), Some(file)) = (&result, partial) {
        // A page that was cut by a full disk must not stay; if that fails too, the failure to report is the first.
        let _ = file.set_len(complete_len);
    }
    summary.elapsed_ms = start.elapsed().as_millis() as u64;
    summary.per_second = per_second(summary.exported, start.elapsed());
    client.close().await;
    match result {
        Ok(()) => {
            if let Target::Renamed { partial, .. } = &target {
                std::fs::rename(partial, &args.file).map_err(|error| file_failure(&args.file, &error))?;
            }
            report(&summary, matches!(target, Target::Stdout), globals)?;
            Ok(Exit::Ok)
        }
        Err(Stop::Closed) => Ok(Exit::Ok),
        Err(Stop::Failure(mut failure)) => {
            if let Some(cursor) = &summary.resume_from {
                let kept = match &target {
                    Target::Renamed { partial, .. } => {
                        format!(" are in {}", escape(partial.as_os_str().as_encoded_bytes()))
                    }
                    Target::Stdout | Target::Direct => " were written".to_owned(),
                };
                let again = format!(
                    "\n{} entries{kept}. Go on with the same options and --resume-from {cursor}",
                    summary.exported
                );
                failure.message.push_str(&again);
            }
            Err(failure)
        }
    }
}

fn open(path: &Path, resumes: bool) -> Result<(Target, Box<dyn Write>), Failure> {
    if path == Path::new("-") {
        return Ok((Target::Stdout, Box::new(io::stdout().lock())));
    }
    if path.is_dir() {
        return Err(Failure::usage(format!(
            "{} is a directory; name a file, or - for standard output",
            path.display()
        )));
    }
    // A device or a pipe cannot be renamed over.
    let direct = std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
    let mut name = path.as_os_str().to_owned();
    if !direct {
        name.push(".partial");
    }
    let path = PathBuf::from(name);
    let mut options = OpenOptions::new();
    options.write(true);
    match (direct, resumes) {
        (true, _) => &mut options,
        (false, false) => options.create(true).truncate(true),
        (false, true) => options.append(true),
    };
    let file = options.open(&path).map_err(|error| file_failure(&path, &error))?;
    if direct {
        return Ok((Target::Direct, Box::new(file)));
    }
    let writer = file.try_clone().map_err(|error| file_failure(&path, &error))?;
    Ok((Target::Renamed { partial: path, file }, Box::new(writer)))
}

fn file_failure(path: &Path, error: &io::Error) -> Failure {
    Failure::usage(format!("{}: {error}", path.display()))
}

/// Writes all pages. On failure the summary says where to go on, and everything before that has been written.
async fn copy(
    scan: &Scan,
    format: Format,
    file: Box<dyn Write>,
    resumes: bool,
    summary: &mut Summary,
    mut page_written: impl FnMut(),
) -> Result<(), Stop> {
    let mut writer = Writer::new(format, BufWriter::with_capacity(256 << 10, file), resumes)
        .map_err(|error| output_failed(&error))?;
    let mut progress = Progress::new(None);
    let mut cursor = Some(scan.first());
    let mut ahead = fetch(scan, scan.first());
    while let Some(at) = cursor {
        let page = match ahead.await {
            Ok(Ok(page)) => page,
            Ok(Err(error)) => {
                summary.resume_from = Some(at.to_string());
                return Err(error.into());
            }
            Err(error) => return Err(Failure::new(Exit::Rejected, format!("fetching a page failed: {error}")).into()),
        };
        cursor = page.next;
        // The next page is asked for before this one is written.
        ahead = fetch(scan, page.next.unwrap_or(at));
        if page.next.is_none() {
            ahead.abort();
        }
        tokio::task::yield_now().await;
        if let Err(stop) = write_page(&mut writer, &page, summary) {
            summary.resume_from = Some(at.to_string());
            return Err(stop);
        }
        page_written();
        progress.update(summary.bytes, summary.exported);
    }
    progress.finish();
    writer.flush().map_err(|error| output_failed(&error))
}

/// Length of a file whose pages are all written.
fn len_of(file: Option<&File>) -> u64 {
    file.and_then(|file| file.metadata().ok())
        .map_or(0, |metadata| metadata.len())
}

fn fetch(scan: &Scan, cursor: Cursor) -> tokio::task::JoinHandle<Result<ScanPage, generation_client::Error>> {
    let scan = scan.clone();
    tokio::spawn(async move { scan.page(cursor).await })
}

fn write_page<W: Write>(writer: &mut Writer<W>, page: &ScanPage, summary: &mut Summary) -> Result<(), Stop> {
    let (mut entries, mut bytes) = (0, 0);
    for entry in &page.entries {
        let ttl_ms = match entry.expires_at_ms {
            None => None,
            // What is over by the node's clock is gone, though nobody has removed it yet.
            Some(expires_at_ms) => match expires_at_ms.saturating_sub(page.meta.server_time_ms) {
                0 => continue,
                ttl_ms => Some(ttl_ms),
            },
        };
        writer
            .write(&entry.key, &entry.value, ttl_ms)
            .map_err(|error| output_failed(&error))?;
        entries += 1;
        bytes += (entry.key.len() + entry.value.len()) as u64;
    }
    // A file is cut at a page's end whatever happens next.
    writer.flush().map_err(|error| output_failed(&error))?;
    summary.exported += entries;
    summary.bytes += bytes;
    Ok(())
}

fn output_failed(error: &io::Error) -> Stop {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Stop::Closed,
        _ => Stop::Failure(Failure::new(Exit::Rejected, format!("writing failed: {error}"))),
    }
}

/// The summary goes to standard output unless the entries went there.
fn report(summary: &Summary, to_stderr: bool, globals: &Globals) -> Result<(), Failure> {
    let text = if globals.json {
        serde_json::to_string(summary).map_err(|error| Failure::new(Exit::Rejected, error.to_string()))?
    } else {
        format!(
            "exported {} entries ({}) in {:.2} s, {}/s",
            HumanCount(summary.exported),
            indicatif::HumanBytes(summary.bytes),
            summary.elapsed_ms as f64 / 1000.0,
            HumanCount(summary.per_second)
        )
    };
    if to_stderr {
        // In a pipe nobody asked for it.
        if io::stderr().is_terminal() {
            let _ = writeln!(io::stderr(), "{text}");
        }
        return Ok(());
    }
    let mut out = Output::new();
    match out.line(&text).and_then(|()| out.flush()) {
        Ok(()) | Err(Stop::Closed) => Ok(()),
        Err(Stop::Failure(failure)) => Err(failure),
    }
}
