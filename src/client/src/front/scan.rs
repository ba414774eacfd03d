//! Listing keys and entries: shard by shard, page by page, and where to go on.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use generation_proto::limits::MAX_BATCH;
use generation_proto::reply::Page;
use generation_proto::{Operation, RequestOptions, request};

use super::client::Client;
use super::dispatch::To;
use super::ops::{common_options, read_options};
use crate::core::consistency::Consistency;
use crate::core::error::{Error, Rejected};
use crate::core::reply::{Meta, ScanEntry};
use crate::core::session::SessionToken;

/// Entries a page is asked for, unless set otherwise.
const DEFAULT_PAGE_ENTRIES: u32 = 1000;

/// Where a scan goes on. As text (`SHARD.POSITION`) it survives the process; a position is good on every replica, so a scan outlives the
/// nodes that it began with too.
///
/// ```
/// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
/// # fake::example(async |client| {
/// use futures_util::TryStreamExt;
/// use generation_client::Cursor;
///
/// client.multi_put([("a", "1"), ("b", "2"), ("c", "3")]).await;
/// let mut keys = client.keys().page_size(1).stream();
/// let first = keys.try_next().await?.unwrap();
/// // Kept in a file, say, for the day the program is started again.
/// let kept = keys.cursor().unwrap().to_string();
///
/// let cursor: Cursor = kept.parse()?;
/// let rest: Vec<_> = client.keys().resume(cursor).stream().try_collect().await?;
/// assert!(rest.len() == 2 && rest.iter().all(|entry| entry.key != first.key));
/// # Ok(())
/// # });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Cursor {
    shard: u16,
    position: u64,
}

impl Cursor {
    /// The beginning of the cluster's first shard.
    pub const START: Self = Self { shard: 0, position: 0 };

    /// The shard the scan is in.
    pub const fn shard(&self) -> u16 {
        self.shard
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.shard, self.position)
    }
}

/// A text is not a cursor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a cursor: expected SHARD.POSITION, as a scan gives it")]
pub struct ParseCursorError(String);

impl FromStr for Cursor {
    type Err = ParseCursorError;

    fn from_str(text: &str) -> Result<Self, ParseCursorError> {
        let error = || ParseCursorError(text.to_owned());
        let (shard, position) = text.split_once('.').ok_or_else(error)?;
        Ok(Self {
            shard: shard.parse().map_err(|_| error())?,
            position: position.parse().map_err(|_| error())?,
        })
    }
}

/// A page of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanPage {
    /// What is in it; it may be empty without being the last, since a node bounds its work too.
    pub entries: Vec<ScanEntry>,
    /// Where to go on; `None`: this was the last page.
    pub next: Option<Cursor>,
    /// Who answered, at which index; the node's clock tells what is left of a time to live.
    pub meta: Meta,
}

/// A listing of keys or entries; see [`Client::keys`] and [`Client::entries`].
///
/// What is there from the beginning of a scan to its end is listed at least once, in no particular order; what comes or goes
/// meanwhile may be listed or not.
#[must_use = "a scan does nothing until pages are asked for"]
#[derive(Debug, Clone)]
pub struct Scan {
    client: Client,
    with_values: bool,
    prefix: Vec<u8>,
    only: Option<u16>,
    from: Option<Cursor>,
    page_entries: u32,
    consistency: Option<Consistency>,
    timeout: Option<Duration>,
}

impl Scan {
    pub(super) const fn keys(client: Client) -> Self {
        Self {
            client,
            with_values: false,
            prefix: Vec::new(),
            only: None,
            from: None,
            page_entries: DEFAULT_PAGE_ENTRIES,
            consistency: None,
            timeout: None,
        }
    }

    pub(super) fn entries(client: Client) -> Self {
        Self {
            with_values: true,
            ..Self::keys(client)
        }
    }

    common_options!();
    read_options!();

    /// Only keys that begin with `prefix`.
    pub fn prefix(mut self, prefix: impl AsRef<[u8]>) -> Self {
        self.prefix = prefix.as_ref().to_vec();
        self
    }

    /// Only one shard, by its number in the map.
    pub const fn shard(mut self, shard: u16) -> Self {
        self.only = Some(shard);
        self
    }

    /// Goes on where an earlier scan with the same prefix stopped.
    pub const fn resume(mut self, cursor: Cursor) -> Self {
        self.from = Some(cursor);
        self
    }

    /// Entries a page is asked for, from 1 to 65,536.
    pub const fn page_size(mut self, entries: u32) -> Self {
        self.page_entries = entries;
        self
    }

    /// The page at `cursor`; the first at [`Scan::first`]. The time allowed is for this page.
    pub async fn page(&self, cursor: Cursor) -> Result<ScanPage, Error> {
        if self.prefix.len() > generation_proto::limits::MAX_KEY_LEN {
            return Err(Rejected::InvalidArgument("the prefix is longer than a key can be".to_owned()).into());
        }
        if self.page_entries == 0 || self.page_entries as usize > MAX_BATCH {
            let error = format!("a page has 1 to {MAX_BATCH} entries, not {}", self.page_entries);
            return Err(Rejected::InvalidArgument(error).into());
        }
        let inner = &self.client.inner;
        let shard = cursor.shard;
        let scan = request::Scan {
            shard,
            limit: self.page_entries,
            cursor: cursor.position,
            prefix: &self.prefix,
        };
        let operation = if self.with_values {
            Operation::Entries(scan)
        } else {
            Operation::Keys(scan)
        };
        let consistency = self.consistency.as_ref().unwrap_or(&inner.settings.consistency);
        let options = RequestOptions::default();
        let answer = inner
            .call(To::Shard(shard), operation, options, Some(consistency), self.timeout)
            .await?;
        let body = answer.body();
        let (page, entries) = Page::decode(&body).map_err(|error| answer.malformed(&error))?;
        let entries = entries
            .map(|entry| {
                let entry = entry?;
                let (key, value) = keep_both(entry.key, entry.value);
                Ok(ScanEntry {
                    key,
                    value,
                    version: entry.version,
                    expires_at_ms: Some(entry.expires_at_ms).filter(|&expires_at_ms| expires_at_ms != 0),
                    shard,
                })
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| answer.malformed(&error))?;
        Ok(ScanPage {
            entries,
            next: self.after(cursor, &page),
            meta: answer.meta,
        })
    }

    /// Where the scan begins.
    pub fn first(&self) -> Cursor {
        self.from.unwrap_or(Cursor {
            shard: self.only.unwrap_or(0),
            position: 0,
        })
    }

    /// The entries one by one. The next page is fetched while this one is being taken. A page is asked for again, elsewhere if need be, for
    /// as long as its time lasts; after an error the stream is over, and [`ScanStream::cursor`] is where to go on.
    pub fn stream(self) -> ScanStream {
        ScanStream {
            at: Some(self.first()),
            scan: self,
            entries: VecDeque::new(),
            taking: None,
            ahead: Ahead::Unasked,
        }
    }

    fn after(&self, cursor: Cursor, page: &Page) -> Option<Cursor> {
        if !page.done {
            return Some(Cursor {
                shard: cursor.shard,
                position: page.next,
            });
        }
        let next = cursor.shard + 1;
        let more = self.only.is_none() && next < self.client.inner.read_routes().shards();
        more.then_some(Cursor {
            shard: next,
            position: 0,
        })
    }
}

type Fetched = Result<ScanPage, Error>;

/// The entries of a scan, one by one.
///
/// After an error the stream ends; [`Scan::resume`] with [`ScanStream::cursor`] goes on, with what was in the page under way
/// listed again.
pub struct ScanStream {
    scan: Scan,
    /// What is left of the page being taken, and where that page began.
    entries: VecDeque<ScanEntry>,
    taking: Option<Cursor>,
    /// The page after it; `None`: there is none.
    at: Option<Cursor>,
    ahead: Ahead,
}

/// The page at [`ScanStream::at`].
enum Ahead {
    Unasked,
    Asked(Pin<Box<dyn Future<Output = Fetched> + Send>>, Need),
    Here(Fetched, Need),
    Failed,
}

/// Whether somebody waited for a page when it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Now,
    /// Its time may have passed while the entries before it were taken.
    Later,
}

impl ScanStream {
    /// Where a scan has to go on to miss nothing that was not yet taken from this one; `None`: nothing is left.
    pub const fn cursor(&self) -> Option<Cursor> {
        match self.taking {
            Some(cursor) => Some(cursor),
            None => self.at,
        }
    }

    /// Sees that the next page is asked for, so that it travels while the current one is taken.
    fn look_ahead(&mut self, cx: &mut Context<'_>) {
        if let (Ahead::Unasked, Some(cursor)) = (&self.ahead, self.at) {
            let scan = self.scan.clone();
            let need = if self.entries.is_empty() {
                Need::Now
            } else {
                Need::Later
            };
            self.ahead = Ahead::Asked(Box::pin(async move { scan.page(cursor).await }), need);
        }
        if let Ahead::Asked(page, need) = &mut self.ahead
            && let Poll::Ready(page) = page.as_mut().poll(cx)
        {
            self.ahead = Ahead::Here(page, *need);
        }
    }
}

impl Stream for ScanStream {
    type Item = Result<ScanEntry, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(entry) = this.entries.pop_front() {
                if this.entries.is_empty() {
                    this.taking = None;
                }
                return Poll::Ready(Some(Ok(entry)));
            }
            this.look_ahead(cx);
            match std::mem::replace(&mut this.ahead, Ahead::Unasked) {
                Ahead::Here(Ok(page), _) => {
                    this.taking = this.at.filter(|_| !page.entries.is_empty());
                    this.at = page.next;
                    this.entries = page.entries.into();
                    this.look_ahead(cx);
                }
                // Now it has all its time.
                Ahead::Here(Err(_), Need::Later) => {}
                Ahead::Here(Err(error), Need::Now) => {
                    this.ahead = Ahead::Failed;
                    return Poll::Ready(Some(Err(error)));
                }
                Ahead::Unasked => return Poll::Ready(None),
                Ahead::Failed => {
                    this.ahead = Ahead::Failed;
                    return Poll::Ready(None);
                }
                asked @ Ahead::Asked(..) => {
                    this.ahead = asked;
                    return Poll::Pending;
                }
            }
        }
    }
}

impl fmt::Debug for ScanStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScanStream")
            .field("cursor", &self.cursor())
            .finish_non_exhaustive()
    }
}

/// Key and value in one allocation of their own, so that a page's buffer goes when the page is taken.
fn keep_both(key: &[u8], value: &[u8]) -> (Bytes, Bytes) {
    let mut both = BytesMut::with_capacity(key.len() + value.len());
    both.extend_from_slice(key);
    both.extend_from_slice(value);
    let mut both = both.freeze();
    let key = both.split_to(key.len());
    (key, both)
}
