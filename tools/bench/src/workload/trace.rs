//! Access traces from files, decompressed and mapped to dense key numbers.
//!
//! Formats: one identifier a line; libCacheSim's `oracleGeneral` (24-byte little-endian records: time u32,
//! object u64, size u32, next access i64); ARC's `.lis` (first block, number of blocks, two ignored
//! fields); big-endian `u32` per access; text of time, identifier and size. A name ending in `.gz`,
//! `.zst` or `.xz` is decompressed on the way.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How a trace file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum TraceFormat {
    /// One identifier (any text) a line.
    Lines,
    /// libCacheSim's binary `oracleGeneral`.
    OracleGeneral,
    /// ARC's `.lis`: first block, count, two ignored fields.
    Lis,
    /// One big-endian 32-bit identifier per access.
    U32be,
    /// Text: time, identifier, size in bytes.
    Sized,
}

impl TraceFormat {
    /// The format a file's name suggests.
    pub fn of(path: &Path) -> Result<Self, TraceError> {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().to_lowercase())
            .unwrap_or_default();
        let name = [".gz", ".zst", ".xz"]
            .iter()
            .find_map(|end| name.strip_suffix(end))
            .unwrap_or(&name);
        let format = if name.contains("oraclegeneral") {
            Self::OracleGeneral
        } else if Path::new(name).extension().is_some_and(|end| end == "lis") {
            Self::Lis
        } else if Path::new(name)
            .extension()
            .is_some_and(|end| end == "txt" || end == "trace")
        {
            Self::Lines
        } else {
            return Err(TraceError::UnknownFormat { path: path.to_owned() });
        };
        Ok(format)
    }
}

/// A trace that cannot be replayed. Nothing was sent.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The name does not tell the format.
    #[error("cannot tell the format of {path}: pass --trace-format lines|oraclegeneral|lis|u32be|sized")]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read or decompressed.
    #[error("cannot read the trace {path}: {message}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// A record does not have the format's shape.
    #[error("{path}: {at}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line or byte offset.
        at: String,
        /// What was expected.
        message: String,
    },
    /// No access in it.
    #[error("the trace {path} has no accesses")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// More accesses than are kept in memory.
    #[error("the trace {path} has more than {MAX_ACCESSES} accesses: cut it")]
    TooLong {
        /// The file.
        path: PathBuf,
    },
}

/// Most accesses kept in memory (8 bytes each).
const MAX_ACCESSES: usize = 500_000_000;

/// One access: a dense key number and, where the trace has it, the object's size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Key number, below [`Trace::distinct`].
    pub key: u64,
    /// Size of the object in bytes.
    pub size: Option<u32>,
}

/// A whole trace in memory.
#[derive(Debug)]
pub struct Trace {
    accesses: Vec<u32>,
    /// Size by key number; empty when the format has none.
    sizes: Vec<u32>,
    distinct: u32,
}

struct Builder<'p> {
    path: &'p Path,
    trace: Trace,
    ids: HashMap<Vec<u8>, u32>,
}

impl Builder<'_> {
    fn push(&mut self, id: &[u8], size: Option<u32>) -> Result<(), TraceError> {
        if self.trace.accesses.len() >= MAX_ACCESSES {
            return Err(TraceError::TooLong {
                path: self.path.to_owned(),
            });
        }
        let key = if let Some(key) = self.ids.get(id) {
            *key
        } else {
            let key = self.trace.distinct;
            self.ids.insert(id.to_owned(), key);
            self.trace.distinct += 1;
            if let Some(size) = size {
                self.trace.sizes.push(size.min(super::sizes::MAX_VALUE_BYTES));
            }
            key
        };
        self.trace.accesses.push(key);
        Ok(())
    }

    fn malformed(&self, at: String, message: &str) -> TraceError {
        TraceError::Malformed {
            path: self.path.to_owned(),
            at,
            message: message.to_owned(),
        }
    }
}

impl Trace {
    /// Reads a whole trace.
    pub fn read(path: &Path, format: TraceFormat) -> Result<Self, TraceError> {
        let read_error = |error: &dyn std::fmt::Display| TraceError::Read {
            path: path.to_owned(),
            message: error.to_string(),
        };
        let file = File::open(path).map_err(|error| read_error(&error))?;
        let raw = BufReader::with_capacity(1 << 20, file);
        let mut decoded_xz = Vec::new();
        let mut source: Box<dyn BufRead> = match path.extension().and_then(|end| end.to_str()) {
            Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(raw))),
            Some("zst") => {
                let decoder = ruzstd::decoding::StreamingDecoder::new(raw).map_err(|error| read_error(&error))?;
                Box::new(BufReader::new(decoder))
            }
            Some("xz") => {
                let mut raw = raw;
                lzma_rs::xz_decompress(&mut raw, &mut decoded_xz).map_err(|error| read_error(&error))?;
                Box::new(&decoded_xz[..])
            }
            _ => Box::new(raw),
        };
        Self::parse(path, format, &mut source)
    }

    fn parse(path: &Path, format: TraceFormat, source: &mut dyn BufRead) -> Result<Self, TraceError> {
        let mut builder = Builder {
            path,
            trace: Self {
                accesses: Vec::new(),
                sizes: Vec::new(),
                distinct: 0,
            },
            ids: HashMap::new(),
        };
        match format {
            TraceFormat::OracleGeneral => binary::<24>(&mut builder, source, |record| {
                let (id, size) = (
                    record[4..12].to_vec(),
                    record[12..16].try_into().map(u32::from_le_bytes),
                );
                (id, size.ok())
            })?,
            TraceFormat::U32be => binary::<4>(&mut builder, source, |record| (record.to_vec(), None))?,
            TraceFormat::Lines | TraceFormat::Lis | TraceFormat::Sized => lines(&mut builder, format, source)?,
        }
        if builder.trace.accesses.is_empty() {
            return Err(TraceError::Empty { path: path.to_owned() });
        }
        builder.trace.accesses.shrink_to_fit();
        Ok(builder.trace)
    }

    /// Number of accesses; never zero.
    #[allow(clippy::len_without_is_empty, reason = "an empty trace is an error when it is read")]
    pub fn len(&self) -> usize {
        self.accesses.len()
    }

    /// Number of distinct keys.
    pub fn distinct(&self) -> u64 {
        u64::from(self.distinct)
    }

    /// The access at a position below [`Trace::len`].
    #[inline]
    pub fn access(&self, position: usize) -> Access {
        let key = self.accesses[position];
        Access {
            key: u64::from(key),
            size: self.sizes.get(key as usize).copied(),
        }
    }
}

fn binary<const RECORD: usize>(
    builder: &mut Builder<'_>,
    source: &mut dyn BufRead,
    decode: impl Fn(&[u8; RECORD]) -> (Vec<u8>, Option<u32>),
) -> Result<(), TraceError> {
    let mut offset = 0_u64;
    loop {
        let mut record = [0; RECORD];
        let mut filled = 0;
        while filled < RECORD {
            let read = source.read(&mut record[filled..]).map_err(|error| TraceError::Read {
                path: builder.path.to_owned(),
                message: error.to_string(),
            })?;
            if read == 0 {
                break;
            }
            filled += read;
        }
        if filled == 0 {
            return Ok(());
        }
        if filled < RECORD {
            return Err(builder.malformed(
                format!("byte {offset}"),
                &format!("the last record has {filled} bytes of {RECORD}: another format, or a torn file"),
            ));
        }
        let (id, size) = decode(&record);
        builder.push(&id, size)?;
        offset += RECORD as u64;
    }
}

fn lines(builder: &mut Builder<'_>, format: TraceFormat, source: &mut dyn BufRead) -> Result<(), TraceError> {
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        let read = source.read_until(b'\n', &mut line).map_err(|error| TraceError::Read {
            path: builder.path.to_owned(),
            message: error.to_string(),
        })?;
        if read == 0 {
            break;
        }
        let text = line.trim_ascii();
        // Some published traces mark sections with a line of their own.
        if text.is_empty() || text == b"*" || text.starts_with(b"#") {
            continue;
        }
        let at = || format!("line {number}");
        if text.len() > 4_096 {
            return Err(builder.malformed(at(), "a line of more than 4096 bytes: not a text trace"));
        }
        let mut fields = text
            .split(|byte| byte.is_ascii_whitespace() || *byte == b',')
            .filter(|field| !field.is_empty());
        let mut integer = |what: &str| {
            let field = fields.next().unwrap_or_default();
            std::str::from_utf8(field)
                .ok()
                .and_then(|field| field.parse::<u64>().ok())
                .ok_or_else(|| builder.malformed(at(), &format!("expected {what}")))
        };
        match format {
            TraceFormat::Lis => {
                let first = integer("the first block as a number")?;
                let count = integer("the number of blocks")?;
                if count > 1 << 20 {
                    return Err(builder.malformed(at(), "more than 1048576 blocks in one access"));
                }
                for block in first..first.saturating_add(count) {
                    builder.push(&block.to_le_bytes(), None)?;
                }
            }
            TraceFormat::Sized => {
                integer("a time as a number")?;
                let id = integer("an identifier as a number")?;
                let size = integer("a size as a number")?;
                builder.push(&id.to_le_bytes(), Some(u32::try_from(size).unwrap_or(u32::MAX)))?;
            }
            _ => builder.push(text, None)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(format: TraceFormat, bytes: &[u8]) -> Result<Trace, TraceError> {
        Trace::parse(Path::new("t"), format, &mut &bytes[..])
    }

    fn keys(trace: &Trace) -> Vec<u64> {
        (0..trace.len()).map(|at| trace.access(at).key).collect()
    }

    #[test]
    fn lines_become_dense_numbers_and_markers_are_skipped() {
        let trace = parse(TraceFormat::Lines, b"7\n9\n*\n7\nabc\n\n").unwrap();
        assert_eq!(keys(&trace), [0, 1, 0, 2]);
        assert_eq!(trace.distinct(), 3);
        assert_eq!(trace.access(0).size, None);
    }

    #[test]
    fn lis_expands_runs_of_blocks() {
        let trace = parse(TraceFormat::Lis, b"10 3 0 0\n11 1 0 1\n").unwrap();
        assert_eq!(keys(&trace), [0, 1, 2, 1]);
    }

    #[test]
    fn oracle_general_and_big_endian_records() {
        let mut bytes = Vec::new();
        for (id, size) in [(5_u64, 100_u32), (6, 200), (5, 100)] {
            bytes.extend(1_u32.to_le_bytes());
            bytes.extend(id.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend((-1_i64).to_le_bytes());
        }
        let trace = parse(TraceFormat::OracleGeneral, &bytes).unwrap();
        assert_eq!(keys(&trace), [0, 1, 0]);
        assert_eq!(trace.access(1).size, Some(200));
        assert_eq!(
            keys(&parse(TraceFormat::U32be, &[0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1]).unwrap()),
            [0, 1, 0]
        );
    }

    #[test]
    fn malformed_traces_name_the_place() {
        let text = |result: Result<Trace, TraceError>| result.unwrap_err().to_string();
        assert!(text(parse(TraceFormat::Lis, b"1 1 0 0\nx 1 0 0\n")).contains("line 2"));
        assert!(text(parse(TraceFormat::Lis, b"1 18446744073709551615 0 0\n")).contains("line 1"));
        assert!(text(parse(TraceFormat::Sized, b"1 2\n")).contains("expected a size"));
        assert!(text(parse(TraceFormat::U32be, &[0; 6])).contains("byte 4"));
        assert!(text(parse(TraceFormat::Lines, b"\n\n")).contains("no accesses"));
        assert!(text(parse(TraceFormat::Lines, &[b'x'; 5_000])).contains("not a text trace"));
        assert!(matches!(
            TraceFormat::of(Path::new("a.bin")),
            Err(TraceError::UnknownFormat { .. })
        ));
    }

    #[test]
    fn a_torn_compressed_file_is_an_error_and_not_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        for end in ["gz", "zst", "xz"] {
            let path = dir.path().join(format!("t.trace.{end}"));
            std::fs::write(&path, [0x1f, 0x8b, 8, 0, 1, 2, 3]).unwrap();
            assert!(
                matches!(Trace::read(&path, TraceFormat::Lines), Err(TraceError::Read { .. })),
                "{end}"
            );
        }
    }
}
