//! What `kv` prints: one JSON object a key, or text for people and pipes.

use std::io::{self, IsTerminal as _, StdoutLock, Write};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use generation_client::Meta;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use crate::cli::{Exit, Failure};

/// A key with what a reply said of it. Numbers that can pass 2^53 are written as strings, since many JSON readers hold numbers
/// as doubles.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) found: bool,
    pub(crate) value: Option<&'a [u8]>,
    pub(crate) ttl: Option<Duration>,
    pub(crate) version: u64,
    pub(crate) meta: &'a Meta,
}

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        put_bytes(&mut map, "key", "key_b64", self.key)?;
        map.serialize_entry("found", &self.found)?;
        if let Some(value) = self.value {
            put_bytes(&mut map, "value", "value_b64", value)?;
        }
        map.serialize_entry("version", &self.version.to_string())?;
        map.serialize_entry("ttl_ms", &self.ttl.map(millis))?;
        map.serialize_entry("shard", &self.meta.shard)?;
        map.serialize_entry("index", &self.meta.index.to_string())?;
        map.serialize_entry("consistency", self.meta.consistency())?;
        map.serialize_entry("session_token", &self.meta.token().to_string())?;
        map.end()
    }
}

/// Whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Writes bytes as text under `plain` where they are UTF-8, in base64 under `encoded` where not.
pub(crate) fn put_bytes<M: serde::ser::SerializeMap>(
    map: &mut M,
    plain: &'static str,
    encoded: &'static str,
    bytes: &[u8],
) -> Result<(), M::Error> {
    match std::str::from_utf8(bytes) {
        Ok(text) => map.serialize_entry(plain, text),
        Err(_) => map.serialize_entry(encoded, &BASE64_STANDARD.encode(bytes)),
    }
}

/// Standard output, buffered. A reader that has gone away (`| head`) ends the command quietly.
pub(crate) struct Output {
    out: io::BufWriter<StdoutLock<'static>>,
    pub(crate) is_terminal: bool,
}

impl Output {
    pub(crate) fn new() -> Self {
        let stdout = io::stdout();
        Self {
            is_terminal: stdout.is_terminal(),
            out: io::BufWriter::with_capacity(64 << 10, stdout.lock()),
        }
    }

    /// Writes one line of JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Stop> {
        serde_json::to_writer(&mut self.out, value).map_err(io::Error::from)?;
        Ok(self.out.write_all(b"\n")?)
    }

    /// Writes bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        Ok(self.out.write_all(bytes)?)
    }

    /// Writes a line of text.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Stop> {
        self.raw(text.as_bytes())?;
        self.raw(b"\n")
    }

    pub(crate) fn flush(&mut self) -> Result<(), Stop> {
        Ok(self.out.flush()?)
    }
}

/// Why printing ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The reader has gone away: no failure.
    Closed,
    /// Anything else.
    Failure(Failure),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Failure(Failure::new(Exit::Rejected, format!("standard output: {error}"))),
        }
    }
}

impl<E: Into<Failure>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failure(error.into())
    }
}

/// Bytes on one line, unambiguously: UTF-8 as it is; tab, newline, return and backslash as `\t \n \r \\`; control characters and
/// bytes that are not UTF-8 as `\xNN`, so that no value can move a terminal's cursor or forge a line.
pub(crate) fn escape(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\t' => text.push_str("\\t"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\\' => text.push_str("\\\\"),
                control if control.is_control() => {
                    let mut buffer = [0; 4];
                    for byte in control.encode_utf8(&mut buffer).bytes() {
                        // Writing to a string cannot fail.
                        let _ = write!(text, "\\x{byte:02x}");
                    }
                }
                other => text.push(other),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_documented_object() {
        let meta = Meta {
            version: 1 << 60,
            index: 9,
            shard: 3,
            shard_epoch: 1,
            ..Meta::default()
        };
        let row = Row {
            key: "ä\n".as_bytes(),
            found: true,
            value: Some(b"\xff\0"),
            ttl: Some(Duration::from_millis(1500)),
            version: meta.version,
            meta: &meta,
        };
        assert_eq!(
            serde_json::to_string(&row).unwrap(),
            r#"{"key":"ä\n","found":true,"value_b64":"/wA=","version":"1152921504606846976","ttl_ms":1500,"shard":3,"index":"9","consistency":"linearizable","session_token":"3.1.9"}"#
        );
        let absent = Row {
            key: b"\xff",
            found: false,
            value: None,
            ttl: None,
            version: 0,
            meta: &meta,
        };
        let text = serde_json::to_string(&absent).unwrap();
        assert!(
            text.starts_with(r#"{"key_b64":"/w==","found":false,"version":"0","ttl_ms":null"#),
            "{text}"
        );
    }

    #[test]
    fn escaped_text_keeps_to_its_line_and_column() {
        assert_eq!(escape("naïve 東京".as_bytes()), "naïve 東京");
        assert_eq!(escape(b"a\tb\nc\\d\r\x1b[2J\xff\xc3"), r"a\tb\nc\\d\r\x1b[2J\xff\xc3");
        assert_eq!(escape("\u{9b}31m".as_bytes()), r"\xc2\x9b31m");
    }
}
