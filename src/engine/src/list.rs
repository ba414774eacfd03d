//! Doubly linked lists through the headers of entries, by 32-bit references.

use crate::arena::{NIL, Ref};
use crate::entries::Entries;
use crate::entry::Header;

/// The two ends of a list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct List {
    pub(crate) newest: Ref,
    pub(crate) oldest: Ref,
}

impl List {
    pub(crate) const EMPTY: Self = Self {
        newest: NIL,
        oldest: NIL,
    };

    pub(crate) fn oldest(self) -> Option<Ref> {
        (self.oldest != NIL).then_some(self.oldest)
    }

    #[inline]
    pub(crate) fn push_newest(&mut self, entries: &mut Entries, entry: Ref) {
        let newest = self.newest;
        let header = entries.header_mut(entry);
        header.newer.set(NIL);
        header.older.set(newest);
        if newest == NIL {
            self.oldest = entry;
        } else {
            entries.header_mut(newest).newer.set(entry);
        }
        self.newest = entry;
    }

    #[inline]
    pub(crate) fn unlink(&mut self, entries: &mut Entries, entry: Ref) {
        let header = entries.header(entry);
        let (newer, older) = (header.newer.get(), header.older.get());
        if newer == NIL {
            self.newest = older;
        } else {
            entries.header_mut(newer).older.set(older);
        }
        if older == NIL {
            self.oldest = newer;
        } else {
            entries.header_mut(older).newer.set(newer);
        }
    }

    /// Makes an entry of this list, which is not its newest, the newest: sets the links in its header, and gives those it had, for
    /// [`List::raised`].
    #[inline]
    #[must_use = "without `raised` the list is broken"]
    pub(crate) fn raise(self, header: &mut Header) -> (Ref, Ref) {
        let links = (header.newer.get(), header.older.get());
        header.newer.set(NIL);
        header.older.set(self.newest);
        links
    }

    /// Closes the gap that an entry has left that was raised, and puts it at the end.
    #[inline]
    pub(crate) fn raised(&mut self, entries: &mut Entries, entry: Ref, (newer, older): (Ref, Ref)) {
        entries.header_mut(newer).older.set(older);
        if older == NIL {
            self.oldest = newer;
        } else {
            entries.header_mut(older).newer.set(newer);
        }
        entries.header_mut(self.newest).newer.set(entry);
        self.newest = entry;
    }

    /// The entry `old` of this list, with its header, is at `new` now.
    pub(crate) fn moved(&mut self, entries: &mut Entries, old: Ref, new: Ref) {
        let header = entries.header(new);
        let (newer, older) = (header.newer.get(), header.older.get());
        if newer == NIL {
            self.newest = new;
        } else {
            entries.header_mut(newer).older.set(new);
        }
        if older == NIL {
            self.oldest = new;
        } else {
            entries.header_mut(older).newer.set(new);
        }
        debug_assert!(
            self.newest != old && self.oldest != old,
            "the list still names the old place"
        );
    }

    /// Puts all of `older` below the oldest entry of this list, in its order.
    pub(crate) fn append_older(&mut self, entries: &mut Entries, older: Self) {
        if older.newest == NIL {
            return;
        }
        if self.oldest == NIL {
            *self = older;
            return;
        }
        entries.header_mut(self.oldest).older.set(older.newest);
        entries.header_mut(older.newest).newer.set(self.oldest);
        self.oldest = older.oldest;
    }

    /// The entries from the newest to the oldest, panicking on a link that does not lead back.
    pub(crate) fn checked(self, entries: &Entries) -> impl Iterator<Item = Ref> {
        let oldest = self.oldest;
        let (mut newer, mut at) = (NIL, self.newest);
        std::iter::from_fn(move || {
            if at == NIL {
                assert_eq!(oldest, newer, "a list does not end at its oldest entry");
                return None;
            }
            let header = entries.header(at);
            assert_eq!(header.newer.get(), newer, "the links of a list disagree");
            newer = at;
            at = header.older.get();
            Some(newer)
        })
    }
}
