//! The file formats of `import`: NDJSON and CSV, read record by record into batches.
//!
//! Memory is bounded whatever the input holds: a record longer than [`MAX_RECORD_LEN`] is skipped (NDJSON) or ends the reading
//! (CSV, where only an unbalanced quote can make one), and nothing of the file is kept but the batch being filled. Record
//! numbers are line numbers, from 1, as editors count them; a CSV record that spans lines has the number of its first.
//!
//! Nothing here knows a server: what a record means for one is `import`'s business.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{self, BufRead, Read};
use std::rc::Rc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use csv::ByteRecord;
use generation_node::MAX_VALUE_BYTES;
use generation_proto::limits::MAX_KEY_LEN;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// Longest record read, in bytes: the largest key and value with every byte written as a six-byte escape.
pub(crate) const MAX_RECORD_LEN: usize = 6 * (MAX_KEY_LEN + MAX_VALUE_BYTES) + 4096;

/// How a file holds entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// One JSON object a line.
    Ndjson,
    /// Comma-separated values with a header.
    Csv,
}

impl Format {
    /// The format a file's name promises: `.csv` is CSV, anything else NDJSON.
    pub(crate) fn of_path(path: &std::path::Path) -> Self {
        match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("csv") => Self::Csv,
            _ => Self::Ndjson,
        }
    }
}

/// One entry of a batch. Key and value share the batch's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) line: u64,
    pub(crate) key: Bytes,
    pub(crate) value: Bytes,
    pub(crate) ttl_ms: Option<u64>,
}

/// Entries read but not yet handed over; their bytes lie one after the other in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: BytesMut,
    entries: Vec<Span>,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    line: u64,
    key_len: usize,
    value_len: usize,
    ttl_ms: Option<u64>,
}

impl Batch {
    /// A batch that holds `entries` entries of `len_bytes` together without growing.
    pub(crate) fn with_capacity(entries: usize, len_bytes: usize) -> Self {
        Self {
            bytes: BytesMut::with_capacity(len_bytes),
            entries: Vec::with_capacity(entries),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the keys and values.
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The key of the entry pushed last.
    pub(crate) fn last_key(&self) -> Option<&[u8]> {
        let last = self.entries.last()?;
        let start = self.bytes.len() - last.value_len - last.key_len;
        Some(&self.bytes[start..start + last.key_len])
    }

    /// Takes the entry pushed last out again, as a batch of its own.
    pub(crate) fn split_last(&mut self) -> Option<Self> {
        let last = self.entries.pop()?;
        let start = self.bytes.len() - last.value_len - last.key_len;
        Some(Self {
            bytes: self.bytes.split_off(start),
            entries: vec![last],
        })
    }

    fn push(&mut self, line: u64, key: &[u8], value: &[u8], ttl_ms: Option<u64>) {
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
        self.entries.push(Span {
            line,
            key_len: key.len(),
            value_len: value.len(),
            ttl_ms,
        });
    }

    /// The entries, each a view of the one buffer.
    pub(crate) fn into_entries(self) -> impl Iterator<Item = Entry> {
        let mut bytes = self.bytes.freeze();
        self.entries.into_iter().map(move |span| Entry {
            line: span.line,
            key: bytes.split_to(span.key_len),
            value: bytes.split_to(span.value_len),
            ttl_ms: span.ttl_ms,
        })
    }
}

/// What reading a record came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It was appended to the batch.
    Pushed,
    /// It cannot be stored; reading goes on after it.
    Bad(BadLine),
    /// The end of the input.
    End,
}

/// A record that cannot be stored.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadLine {
    /// Its line.
    pub(crate) line: u64,
    /// Why, for a person.
    pub(crate) reason: String,
}

/// Reads records of either format.
pub(crate) enum Reader<R> {
    Ndjson(NdjsonReader<R>),
    Csv(Box<CsvReader<R>>),
}

impl<R: BufRead> Reader<R> {
    /// A reader that leaves out the records before line `first_line`.
    ///
    /// # Errors
    /// Those of `input`; `InvalidData` for a CSV header that cannot be understood.
    pub(crate) fn new(format: Format, input: R, first_line: u64) -> io::Result<Self> {
        Ok(match format {
            Format::Ndjson => Self::Ndjson(NdjsonReader::new(input, first_line)),
            Format::Csv => Self::Csv(Box::new(CsvReader::new(input, first_line)?)),
        })
    }

    /// Reads one record into `batch`. Blank lines are passed over.
    pub(crate) fn read(&mut self, batch: &mut Batch) -> io::Result<Step> {
        match self {
            Self::Ndjson(reader) => reader.read(batch),
            Self::Csv(reader) => reader.read(batch),
        }
    }

    /// The line the next record starts at or after.
    pub(crate) fn next_line(&self) -> u64 {
        match self {
            Self::Ndjson(reader) => reader.line + 1,
            Self::Csv(reader) => reader.window.borrow_mut().line_at(reader.csv.position().byte()),
        }
    }
}

/// Keys and values that no node takes are bad lines. A node may have a lower limit, which the client keeps for each entry.
fn check(key: &[u8], value: &[u8], ttl_ms: Option<u64>) -> Result<(), String> {
    match (key.len(), value.len(), ttl_ms) {
        (0, ..) => Err(format!("the key is empty; keys have 1 to {MAX_KEY_LEN} bytes")),
        (len, ..) if len > MAX_KEY_LEN => Err(format!("the key has {len} bytes, more than the limit of {MAX_KEY_LEN}")),
        (_, len, _) if len > MAX_VALUE_BYTES => Err(format!(
            "the value has {len} bytes, more than the limit of {MAX_VALUE_BYTES}"
        )),
        (.., Some(0)) => Err("ttl_ms is 0; a time to live is at least 1 ms".to_owned()),
        _ => Ok(()),
    }
}

/// Reads one JSON object a line.
pub(crate) struct NdjsonReader<R> {
    input: R,
    buffer: Vec<u8>,
    /// Lines read so far.
    line: u64,
    first_line: u64,
}

/// A line as it is written. The last group is what `kv entries --json` and `kv get --json` print beside, so that their output
/// can be read back; an unknown field is an error, because a misspelt `ttl_ms` must not pass as an entry that lives for ever.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(borrow)]
    key: Option<Text<'a>>,
    #[serde(borrow)]
    key_b64: Option<Text<'a>>,
    #[serde(borrow)]
    value: Option<&'a RawValue>,
    #[serde(borrow)]
    value_b64: Option<Text<'a>>,
    ttl_ms: Option<u64>,
    found: Option<bool>,
    #[serde(rename = "version")]
    _version: Option<IgnoredAny>,
    #[serde(rename = "shard")]
    _shard: Option<IgnoredAny>,
    #[serde(rename = "index")]
    _index: Option<IgnoredAny>,
    #[serde(rename = "consistency")]
    _consistency: Option<IgnoredAny>,
    #[serde(rename = "session_token")]
    _session_token: Option<IgnoredAny>,
}

/// A string that is borrowed from the line unless it holds escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<R: BufRead> NdjsonReader<R> {
    fn new(input: R, first_line: u64) -> Self {
        Self {
            input,
            buffer: Vec::new(),
            line: 0,
            first_line,
        }
    }

    fn read(&mut self, batch: &mut Batch) -> io::Result<Step> {
        loop {
            self.buffer.clear();
            let read = self
                .input
                .by_ref()
                .take(MAX_RECORD_LEN as u64)
                .read_until(b'\n', &mut self.buffer)?;
            if read == 0 {
                return Ok(Step::End);
            }
            self.line += 1;
            let too_long = read == MAX_RECORD_LEN && self.buffer.last() != Some(&b'\n');
            if too_long {
                self.input.skip_until(b'\n')?;
                self.buffer = Vec::new();
            }
            if self.line < self.first_line {
                continue;
            }
            let mut text = &self.buffer[..];
            if self.line == 1 {
                text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
            }
            let line = self.line;
            let parsed = if too_long {
                Err(format!("the line is longer than {MAX_RECORD_LEN} bytes"))
            } else if text.trim_ascii().is_empty() {
                continue;
            } else {
                parse_line(text, line, batch)
            };
            return Ok(match parsed {
                Ok(()) => Step::Pushed,
                Err(reason) => Step::Bad(BadLine { line, reason }),
            });
        }
    }
}

fn parse_line(text: &[u8], line: u64, batch: &mut Batch) -> Result<(), String> {
    let parsed: Line<'_> = serde_json::from_slice(text).map_err(|error| json_reason(&error))?;
    if parsed.found == Some(false) {
        return Err("\"found\" is false: there is no entry to store".to_owned());
    }
    let key = match (&parsed.key, &parsed.key_b64) {
        (Some(key), None) => Cow::Borrowed(key.0.as_bytes()),
        (None, Some(encoded)) => Cow::Owned(decode_base64(encoded.0.as_bytes(), "key_b64")?),
        (None, None) => return Err("\"key\" (or \"key_b64\") is missing".to_owned()),
        (Some(_), Some(_)) => return Err("both \"key\" and \"key_b64\" are given".to_owned()),
    };
    let text;
    let value = match (parsed.value.map(RawValue::get), &parsed.value_b64) {
        (Some(raw), None) if raw.starts_with('"') => {
            text = serde_json::from_str::<Text<'_>>(raw).map_err(|error| json_reason(&error))?;
            Cow::Borrowed(text.0.as_bytes())
        }
        // Any other JSON is stored as it is written.
        (Some(raw), None) => Cow::Borrowed(raw.as_bytes()),
        (None, Some(encoded)) => Cow::Owned(decode_base64(encoded.0.as_bytes(), "value_b64")?),
        (None, None) => return Err("\"value\" (or \"value_b64\") is missing".to_owned()),
        (Some(_), Some(_)) => return Err("both \"value\" and \"value_b64\" are given".to_owned()),
    };
    check(&key, &value, parsed.ttl_ms)?;
    batch.push(line, &key, &value, parsed.ttl_ms);
    Ok(())
}

/// The message without serde's "at line 1": the line is known better here.
fn json_reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.split_once(" at line ") {
        Some((reason, _)) if error.column() > 0 => format!("{reason} (column {})", error.column()),
        Some((reason, _)) => reason.to_owned(),
        None => text,
    }
}

fn decode_base64(text: &[u8], field: &str) -> Result<Vec<u8>, String> {
    BASE64_STANDARD
        .decode(text)
        .map_err(|error| format!("{field} is not base64: {error}"))
}

/// Reads comma-separated values. The header names the columns, in any order: `key` or `key_b64` or both, `value` or `value_b64`
/// or both, and optionally `ttl_ms`. Where both spellings of a column exist, the base64 cell counts when the other is empty.
pub(crate) struct CsvReader<R> {
    csv: csv::Reader<Metered<R>>,
    record: ByteRecord,
    columns: Columns,
    window: Rc<RefCell<Window>>,
    first_line: u64,
}

/// What was read from the input since the last record: it tells line numbers (the parser's own are one off after `\r\n`), and
/// its length is bounded, so that an unbalanced quote cannot swallow a file into memory.
#[derive(Debug)]
struct Window {
    bytes: Vec<u8>,
    /// How much of `bytes` lies behind.
    at: usize,
    /// Where in the input `at` is.
    offset: u64,
    /// The line `at` is in, from 1.
    line: u64,
}

impl Window {
    fn ahead(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Goes on to `offset` and past the line ends there; the line that begins.
    fn line_at(&mut self, offset: u64) -> u64 {
        let ahead = &self.bytes[self.at..];
        let before =
            usize::try_from(offset.saturating_sub(self.offset)).map_or(ahead.len(), |len| len.min(ahead.len()));
        let ends = ahead[before..]
            .iter()
            .take_while(|&&byte| byte == b'\n' || byte == b'\r')
            .count();
        let passed = before + ends;
        self.line += (ahead[..passed].split(|&byte| byte == b'\n').count() - 1) as u64;
        self.at += passed;
        self.offset += passed as u64;
        self.line
    }
}

/// Keeps what is read in a window.
struct Metered<R> {
    input: R,
    window: Rc<RefCell<Window>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut window = self.window.borrow_mut();
        if window.ahead() > MAX_RECORD_LEN {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a record is longer than {MAX_RECORD_LEN} bytes: is a quote left open?"),
            ));
        }
        let read = self.input.read(buffer)?;
        window.push(&buffer[..read]);
        Ok(read)
    }
}

#[derive(Debug, Default)]
struct Columns {
    count: usize,
    key: Option<usize>,
    key_b64: Option<usize>,
    value: Option<usize>,
    value_b64: Option<usize>,
    ttl_ms: Option<usize>,
}

impl Columns {
    fn of(header: &ByteRecord) -> Result<Self, String> {
        const NAMES: &str =
            "the first line must name the columns: key or key_b64, value or value_b64, and optionally ttl_ms";
        let mut columns = Self {
            count: header.len(),
            ..Self::default()
        };
        for (at, name) in header.iter().enumerate() {
            let name = if at == 0 {
                name.strip_prefix(b"\xef\xbb\xbf").unwrap_or(name)
            } else {
                name
            };
            let column = match name.trim_ascii() {
                b"key" => &mut columns.key,
                b"key_b64" => &mut columns.key_b64,
                b"value" => &mut columns.value,
                b"value_b64" => &mut columns.value_b64,
                b"ttl_ms" => &mut columns.ttl_ms,
                other => return Err(format!("{NAMES}; \"{}\" is none of them", other.escape_ascii())),
            };
            if column.replace(at).is_some() {
                return Err(format!("the column \"{}\" is there twice", name.escape_ascii()));
            }
        }
        if columns.key.or(columns.key_b64).is_none() || columns.value.or(columns.value_b64).is_none() {
            return Err(NAMES.to_owned());
        }
        Ok(columns)
    }
}

impl<R: BufRead> CsvReader<R> {
    fn new(input: R, first_line: u64) -> io::Result<Self> {
        let window = Rc::new(RefCell::new(Window {
            bytes: Vec::new(),
            at: 0,
            offset: 0,
            line: 1,
        }));
        let mut csv = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .from_reader(Metered {
                input,
                window: Rc::clone(&window),
            });
        let mut record = ByteRecord::new();
        let columns = if csv.read_byte_record(&mut record).map_err(csv_error)? {
            Columns::of(&record).map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason))?
        } else {
            Columns::default()
        };
        Ok(Self {
            csv,
            record,
            columns,
            window,
            first_line,
        })
    }

    fn read(&mut self, batch: &mut Batch) -> io::Result<Step> {
        loop {
            if !self.csv.read_byte_record(&mut self.record).map_err(csv_error)? {
                return Ok(Step::End);
            }
            let start = self.record.position().map_or(0, csv::Position::byte);
            let line = self.window.borrow_mut().line_at(start);
            if line < self.first_line {
                continue;
            }
            return Ok(match self.push(line, batch) {
                Ok(()) => Step::Pushed,
                Err(reason) => Step::Bad(BadLine { line, reason }),
            });
        }
    }

    fn push(&self, line: u64, batch: &mut Batch) -> Result<(), String> {
        let (record, columns) = (&self.record, &self.columns);
        if record.len() != columns.count {
            return Err(format!("{} cells, but the header has {}", record.len(), columns.count));
        }
        let cell = |column: Option<usize>| column.and_then(|at| record.get(at)).filter(|cell| !cell.is_empty());
        let bytes = |plain: Option<usize>, encoded: Option<usize>, name: &str| match (cell(plain), cell(encoded)) {
            (Some(_), Some(_)) => Err(format!("both \"{name}\" and \"{name}_b64\" are filled in")),
            (Some(plain), None) => Ok(Cow::Borrowed(plain)),
            (None, Some(encoded)) => decode_base64(encoded, &format!("{name}_b64")).map(Cow::Owned),
            (None, None) => Ok(Cow::Borrowed(&[][..])),
        };
        let key = bytes(columns.key, columns.key_b64, "key")?;
        let value = bytes(columns.value, columns.value_b64, "value")?;
        let ttl_ms = match cell(columns.ttl_ms) {
            None => None,
            Some(text) => Some(
                std::str::from_utf8(text)
                    .ok()
                    .and_then(|text| text.trim().parse().ok())
                    .ok_or_else(|| format!("ttl_ms is \"{}\", not a number of milliseconds", text.escape_ascii()))?,
            ),
        };
        check(&key, &value, ttl_ms)?;
        batch.push(line, &key, &value, ttl_ms);
        Ok(())
    }
}

fn csv_error(error: csv::Error) -> io::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        kind => io::Error::new(io::ErrorKind::InvalidData, format!("{kind:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything a text holds: entries as (line, key, value, ttl), bad lines as (line, reason).
    fn read_all(format: Format, text: &[u8], first_line: u64) -> (Vec<Entry>, Vec<(u64, String)>) {
        let mut reader = Reader::new(format, text, first_line).unwrap();
        let (mut batch, mut bad) = (Batch::default(), Vec::new());
        loop {
            match reader.read(&mut batch).unwrap() {
                Step::Pushed => {}
                Step::Bad(line) => bad.push((line.line, line.reason)),
                Step::End => return (batch.into_entries().collect(), bad),
            }
        }
    }

    fn entry(line: u64, key: &[u8], value: &[u8], ttl_ms: Option<u64>) -> Entry {
        Entry {
            line,
            key: Bytes::copy_from_slice(key),
            value: Bytes::copy_from_slice(value),
            ttl_ms,
        }
    }

    #[test]
    fn ndjson_is_read_with_its_variants() {
        let text = concat!(
            "\u{feff}{\"key\":\"a\",\"value\":\"1\"}\n",
            "\n",
            "{\"key\":\"b\\n\\u00e4\",\"value\":\"x\\\"y\",\"ttl_ms\":1500}\r\n",
            "{\"key_b64\":\"/wA=\",\"value_b64\":\"\"}\n",
            "{\"key\":\"json\",\"value\":{ \"n\": 1.50 }}\n",
            "{\"key\":\"n\",\"value\":-7,\"ttl_ms\":null}\n",
            "{\"key\":\"e\",\"found\":true,\"value\":\"\",\"version\":\"65536\",\"ttl_ms\":null,\"shard\":0,",
            "\"index\":\"1\",\"consistency\":\"linearizable\",\"session_token\":\"0.1.1\"}"
        );
        let (entries, bad) = read_all(Format::Ndjson, text.as_bytes(), 1);
        assert_eq!(bad, []);
        assert_eq!(
            entries,
            [
                entry(1, b"a", b"1", None),
                entry(3, "b\nä".as_bytes(), b"x\"y", Some(1500)),
                entry(4, b"\xff\0", b"", None),
                entry(5, b"json", b"{ \"n\": 1.50 }", None),
                entry(6, b"n", b"-7", None),
                entry(7, b"e", b"", None),
            ]
        );
    }

    #[test]
    fn bad_ndjson_lines_are_numbered_and_passed_over() {
        let long_key = "k".repeat(MAX_KEY_LEN + 1);
        let text = format!(
            "nonsense\n{{\"key\":\"a\"}}\n{{\"value\":\"a\"}}\n{{\"key\":\"\",\"value\":\"\"}}\n{{\"key\":\"a\",\"value\":\"\",\"ttl\":5}}\n\
             {{\"key\":\"a\",\"value\":\"\",\"ttl_ms\":0}}\n{{\"key\":\"a\",\"key_b64\":\"YQ==\",\"value\":\"\"}}\n\
             {{\"key\":\"a\",\"value_b64\":\"!\"}}\n{{\"key\":\"{long_key}\",\"value\":\"\"}}\n{{\"key\":\"a\",\"value\":null}}\n\
             {{\"key\":\"\\ud800\",\"value\":\"\"}}\n{{\"key\":\"a\",\"found\":false}}\n{{\"key\":\"good\",\"value\":\"\"}}\n{{\"key\":\"cut"
        );
        let (entries, bad) = read_all(Format::Ndjson, text.as_bytes(), 1);
        assert_eq!(entries, [entry(13, b"good", b"", None)]);
        let lines: Vec<_> = bad.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14]);
        for (at, part) in [
            (0, "expected"),
            (1, "\"value\""),
            (2, "\"key\""),
            (3, "empty"),
            (4, "unknown field `ttl`"),
            (5, "ttl_ms is 0"),
            (6, "both"),
            (7, "base64"),
            (8, "65536 bytes"),
            (9, "missing"),
            (11, "found"),
        ] {
            assert!(bad[at].1.contains(part), "{:?}", bad[at]);
        }
    }

    #[test]
    fn an_endless_line_is_skipped_and_not_kept() {
        let mut text = vec![b'x'; MAX_RECORD_LEN + 10];
        text.extend_from_slice(b"\n{\"key\":\"a\",\"value\":\"b\"}\n");
        let (entries, bad) = read_all(Format::Ndjson, &text, 1);
        assert_eq!(entries, [entry(2, b"a", b"b", None)]);
        assert!(bad[0].1.contains("longer than"), "{bad:?}");
    }

    #[test]
    fn reading_resumes_at_a_line() {
        let text = b"{\"key\":\"a\",\"value\":\"1\"}\nbroken\n{\"key\":\"c\",\"value\":\"3\"}\n";
        let (entries, bad) = read_all(Format::Ndjson, text, 3);
        assert_eq!((entries, bad), (vec![entry(3, b"c", b"3", None)], vec![]));
        for end in ["\n", "\r\n"] {
            let text = ["key,value", "a,1", "", "\"b", "b\",2", "c,3", ""].join(end);
            let (entries, bad) = read_all(Format::Csv, text.as_bytes(), 6);
            assert_eq!((entries, bad), (vec![entry(6, b"c", b"3", None)], vec![]));
        }
    }

    #[test]
    fn csv_is_read_by_its_header() {
        let text = b"\xef\xbb\xbfttl_ms,value,value_b64,key,key_b64\r\n,1,,a,\r\n250,\"x, \"\"y\"\"\nz\",,b,\r\n,,/w==,,AAE=\r\n,,,e,\r\n";
        let (entries, bad) = read_all(Format::Csv, text, 1);
        assert_eq!(bad, []);
        assert_eq!(
            entries,
            [
                entry(2, b"a", b"1", None),
                entry(3, b"b", b"x, \"y\"\nz", Some(250)),
                entry(5, b"\0\x01", b"\xff", None),
                entry(6, b"e", b"", None),
            ]
        );
    }

    #[test]
    fn bad_csv_records_are_numbered_and_passed_over() {
        let text = b"key,value,ttl_ms\na,1\n,1,\nb,2,soon\nc,3,\nd,4,,\n";
        let (entries, bad) = read_all(Format::Csv, text, 1);
        assert_eq!(entries, [entry(5, b"c", b"3", None)]);
        let lines: Vec<_> = bad.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [2, 3, 4, 6], "{bad:?}");
    }

    #[test]
    fn a_csv_header_must_name_key_and_value() {
        for header in [
            "a,1\n",
            "key\n",
            "key,key,value\n",
            "key,value,comment\n",
            "value,ttl_ms\n",
        ] {
            let error = Reader::new(Format::Csv, header.as_bytes(), 1).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{header}");
        }
        assert_eq!(read_all(Format::Csv, b"", 1), (vec![], vec![]));
    }

    #[test]
    fn an_open_quote_does_not_swallow_the_file() {
        struct Endless;
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                buffer.fill(b'x');
                Ok(buffer.len())
            }
        }
        let input = io::BufReader::new(b"key,value\n\"".chain(Endless));
        let mut reader = Reader::new(Format::Csv, input, 1).unwrap();
        let error = reader.read(&mut Batch::default()).unwrap_err();
        assert!(error.to_string().contains("quote"), "{error}");
    }

    #[test]
    fn the_last_entry_can_be_taken_back() {
        let mut batch = Batch::default();
        assert!(batch.split_last().is_none());
        batch.push(1, b"a", b"1", None);
        batch.push(2, b"bb", b"", Some(3));
        assert_eq!(batch.last_key(), Some(&b"bb"[..]));
        let last = batch.split_last().unwrap();
        assert_eq!(last.into_entries().collect::<Vec<_>>(), [entry(2, b"bb", b"", Some(3))]);
        assert_eq!(
            (batch.len(), batch.len_bytes(), batch.last_key()),
            (1, 2, Some(&b"a"[..]))
        );
        assert!(!batch.is_empty());
    }
}
