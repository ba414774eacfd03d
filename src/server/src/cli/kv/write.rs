//! The file formats of `export`, written so that `import` reads the same set back.

use std::io::{self, Write};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::output::put_bytes;
use super::records::Format;

/// Header of an exported CSV. Bytes that are not UTF-8 go to the `_b64` column, the other of the two is empty then.
const CSV_HEADER: [&str; 5] = ["key", "key_b64", "value", "value_b64", "ttl_ms"];

/// Writes entries in one of the formats.
pub(crate) enum Writer<W: Write> {
    Ndjson(W),
    Csv(Box<csv::Writer<W>>),
}

struct Line<'a> {
    key: &'a [u8],
    value: &'a [u8],
    ttl_ms: Option<u64>,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        put_bytes(&mut map, "key", "key_b64", self.key)?;
        put_bytes(&mut map, "value", "value_b64", self.value)?;
        if let Some(ttl_ms) = self.ttl_ms {
            map.serialize_entry("ttl_ms", &ttl_ms)?;
        }
        map.end()
    }
}

impl<W: Write> Writer<W> {
    /// A writer onto `out`, with the header where the format has one and `goes_on` does not say it is there already.
    pub(crate) fn new(format: Format, out: W, goes_on: bool) -> io::Result<Self> {
        Ok(match format {
            Format::Ndjson => Self::Ndjson(out),
            Format::Csv => {
                let mut csv = csv::Writer::from_writer(out);
                if !goes_on {
                    csv.write_record(CSV_HEADER).map_err(io::Error::from)?;
                }
                Self::Csv(Box::new(csv))
            }
        })
    }

    /// Writes one entry.
    pub(crate) fn write(&mut self, key: &[u8], value: &[u8], ttl_ms: Option<u64>) -> io::Result<()> {
        match self {
            Self::Ndjson(out) => {
                serde_json::to_writer(&mut *out, &Line { key, value, ttl_ms })?;
                out.write_all(b"\n")
            }
            Self::Csv(csv) => {
                let (key, key_b64) = cells(key);
                let (value, value_b64) = cells(value);
                let ttl_ms = ttl_ms.map(|ttl_ms| ttl_ms.to_string()).unwrap_or_default();
                csv.write_record([key, key_b64.as_bytes(), value, value_b64.as_bytes(), ttl_ms.as_bytes()])
                    .map_err(io::Error::from)
            }
        }
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Ndjson(out) => out.flush(),
            Self::Csv(csv) => csv.flush(),
        }
    }
}

/// The plain and the base64 cell of some bytes; one of them is empty.
fn cells(bytes: &[u8]) -> (&[u8], String) {
    if std::str::from_utf8(bytes).is_ok() {
        (bytes, String::new())
    } else {
        (&[], BASE64_STANDARD.encode(bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::records::{Batch, Reader, Step};
    use super::*;

    type Entry = (Vec<u8>, Vec<u8>, Option<u64>);

    fn write_all(format: Format, entries: &[Entry]) -> Vec<u8> {
        let mut text = Vec::new();
        let mut writer = Writer::new(format, &mut text, false).unwrap();
        for (key, value, ttl_ms) in entries {
            writer.write(key, value, *ttl_ms).unwrap();
        }
        writer.flush().unwrap();
        drop(writer);
        text
    }

    fn read_all(format: Format, text: &[u8]) -> Vec<Entry> {
        let mut reader = Reader::new(format, text, 1).unwrap();
        let mut batch = Batch::default();
        loop {
            match reader.read(&mut batch).unwrap() {
                Step::Pushed => {}
                Step::Bad(line) => panic!("{line:?}"),
                Step::End => break,
            }
        }
        batch
            .into_entries()
            .map(|entry| (entry.key.to_vec(), entry.value.to_vec(), entry.ttl_ms))
            .collect()
    }

    #[test]
    fn ndjson_and_csv_look_as_documented() {
        let entries: [Entry; 3] = [
            (b"a".to_vec(), b"1".to_vec(), None),
            (b"q".to_vec(), b"x,\"y\"\n".to_vec(), Some(30_000)),
            (b"\xff".to_vec(), b"\0\xff".to_vec(), None),
        ];
        assert_eq!(
            String::from_utf8(write_all(Format::Ndjson, &entries)).unwrap(),
            "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"q\",\"value\":\"x,\\\"y\\\"\\n\",\"ttl_ms\":30000}\n{\"key_b64\":\"/w==\",\"value_b64\":\"AP8=\"}\n"
        );
        assert_eq!(
            String::from_utf8(write_all(Format::Csv, &entries)).unwrap(),
            "key,key_b64,value,value_b64,ttl_ms\na,,1,,\nq,,\"x,\"\"y\"\"\n\",,30000\n,/w==,,AP8=,\n"
        );
    }

    fn bytes(min_len: usize) -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), min_len..24),
            prop::collection::vec(prop::sample::select(b"\",\n\r\\ a\xef\xbb\xbf\0".to_vec()), min_len..24),
            ".{1,12}".prop_map(String::into_bytes),
        ]
    }

    proptest! {
        #[test]
        fn what_is_exported_is_imported(
            entries in prop::collection::vec((bytes(1), bytes(0), prop::option::of(1..=u64::MAX)), 0..20)
        ) {
            for format in [Format::Ndjson, Format::Csv] {
                prop_assert_eq!(read_all(format, &write_all(format, &entries)), entries.clone());
            }
        }
    }
}
