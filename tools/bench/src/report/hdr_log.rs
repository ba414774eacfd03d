//! HDR histogram interval logs, as the tools of `HdrHistogram` read them (log format 1.3, V2 compressed).

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::BenchError;
use crate::result::RunResult;

/// Writes the intervals of a run; values are nanoseconds, and the column of maxima is in milliseconds.
pub fn write(path: &Path, result: &RunResult, unix_time_s: u64) -> Result<(), BenchError> {
    let failed = |error: &dyn std::fmt::Display| super::report_error(path, error);
    let file = std::fs::File::create(path).map_err(|error| failed(&error))?;
    let mut out = std::io::BufWriter::new(file);
    let mut serializer = V2DeflateSerializer::new();
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(unix_time_s);
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("[Logged with generation-bench; values in nanoseconds]")
        .with_start_time(start)
        .with_base_time(start)
        .with_max_value_divisor(1e6)
        .begin_log_with(&mut out, &mut serializer)
        .map_err(|error| failed(&error))?;
    // A tag may hold neither commas nor white space; a name with one goes without.
    let tag = Tag::new(&result.target);
    for interval in &result.intervals {
        let Some(histogram) = interval.latency.histogram() else {
            continue;
        };
        log.write_histogram(
            &histogram,
            Duration::try_from_secs_f64(interval.start_s).unwrap_or_default(),
            Duration::try_from_secs_f64(interval.length_s).unwrap_or_default(),
            tag,
        )
        .map_err(|error| failed(&format!("{error:?}")))?;
    }
    out.flush().map_err(|error| failed(&error))
}
