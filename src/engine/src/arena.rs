//! Slots for entries, in pages of equal slots, in chunks from the system.
//!
//! Owns where slots are and which are free. A page belongs to one size class; pages are blocks of a buddy system of base four
//! (8, 32, 128, 512 KiB, 2 MiB) inside a chunk. What makes it keep its size when the sizes of entries drift is that it can name a
//! page (or a whole chunk) whose few entries had better live elsewhere; the store, which can move entries, then empties it
//! ([`Arena::next_to_move`]). It knows nothing of what is in a slot but whether the slot is taken.
//!
//! Invariants ([`Arena::check`]): a slot is live or free, never both; a page with a free slot is in its class's list of partial
//! pages unless it is being emptied; a page without a live slot does not exist; free blocks of a chunk never include the four
//! quarters of a larger block.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::classes::{self, UNIT_BYTES};
use crate::entry::{self, Header};
use crate::memory::{CHUNK_BYTES, Chunk};

/// Names a slot: page number (24 bits) and slot in the page (8 bits). The page number counts units of 8 KiB, so a shard addresses
/// 128 GiB.
pub(crate) type Ref = u32;

/// No slot.
pub(crate) const NIL: Ref = Ref::MAX;

/// No page.
const NO_PAGE: u32 = u32::MAX;

const UNITS_PER_CHUNK: usize = CHUNK_BYTES / UNIT_BYTES;

/// Block orders: 8 KiB to the whole chunk.
const ORDERS: usize = 5;

const _: () = assert!(
    UNITS_PER_CHUNK == 1 << (2 * (ORDERS - 1)),
    "the largest block is a chunk"
);

/// A page that has never been swept for expiry times has none.
pub(crate) const NEVER: u32 = u32::MAX;

/// Chunks kept although nothing is in them, so that a shard at the edge of one does not map and unmap with each write.
const SPARE_CHUNKS: usize = 1;

/// Free blocks that are left alone in any case, in units.
const EVACUATE_FROM_UNITS: u64 = 32;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Page {
    /// Neighbours in the class's list of partial pages.
    previous: u32,
    next: u32,
    /// A lower bound of the expiry times in this page, in units of the store; [`NEVER`] if none expires.
    earliest: u32,
    /// Live slots.
    live: u16,
    /// Head of the list of freed slots; [`END_OF_FREE`] if there is none.
    free: u16,
    /// Slots from here on have never been used.
    fresh: u16,
    class: u8,
    unused: u8,
}

/// The records of all pages, by page number. They are in chunks of their own, so that growth neither moves them nor asks a general
/// allocator, which may take its time. What is not the beginning of a page has a record that means nothing.
#[derive(Debug, Default)]
struct Pages {
    chunks: Vec<Chunk>,
}

impl Pages {
    const PER_CHUNK: usize = 1 << 16;

    /// Makes room for records below `pages`.
    fn grow(&mut self, pages: usize) {
        while self.chunks.len() * Self::PER_CHUNK < pages {
            self.chunks.push(Chunk::new());
        }
    }

    #[inline]
    fn get(&self, page: u32) -> &Page {
        let chunk = &self.chunks[page as usize / Self::PER_CHUNK];
        let records = <[Page; Self::PER_CHUNK]>::ref_from_prefix(&**chunk);
        let (records, _) = records.expect("invariant: a chunk is aligned and larger than its records");
        &records[page as usize % Self::PER_CHUNK]
    }

    #[inline]
    fn get_mut(&mut self, page: u32) -> &mut Page {
        let chunk = &mut self.chunks[page as usize / Self::PER_CHUNK];
        let records = <[Page; Self::PER_CHUNK]>::mut_from_prefix(&mut **chunk);
        let (records, _) = records.expect("invariant: a chunk is aligned and larger than its records");
        &mut records[page as usize % Self::PER_CHUNK]
    }
}

const _: () = assert!(Pages::PER_CHUNK * size_of::<Page>() <= CHUNK_BYTES);

const END_OF_FREE: u16 = u16::MAX;

/// No page begins at this unit.
const NO_CLASS: u8 = u8::MAX;

const _: () = assert!(classes::CLASSES <= NO_CLASS as usize);

/// What finding a slot needs of its chunk, close together and apart from what is known of pages, so that the way to a slot costs no
/// cache miss of its own.
#[derive(Debug)]
struct Place {
    /// `None`: it was given back.
    chunk: Option<Chunk>,
    /// The class of the page that begins at each unit, [`NO_CLASS`] if none does.
    classes: [u8; UNITS_PER_CHUNK],
}

const _: () = assert!(UNITS_PER_CHUNK == 1 << 8, "a byte names a unit of a chunk");

impl Place {
    const VACANT: Self = Self {
        chunk: None,
        classes: [NO_CLASS; UNITS_PER_CHUNK],
    };

    #[inline]
    fn held(&self) -> &Chunk {
        let chunk = self.chunk.as_ref();
        chunk.expect("invariant: references point into chunks that are held")
    }

    #[inline]
    fn held_mut(&mut self) -> &mut Chunk {
        let chunk = self.chunk.as_mut();
        chunk.expect("invariant: references point into chunks that are held")
    }

    /// Where in the chunk a slot begins, and its length.
    #[inline]
    fn locate(&self, slot: Ref) -> (usize, usize) {
        let unit = (slot >> 8) as u8;
        let stride = classes::stride(self.classes[unit as usize]);
        debug_assert!(stride > 0, "a reference into no page");
        (unit as usize * UNIT_BYTES + (slot as usize & 0xff) * stride, stride)
    }

    /// Where in the chunk a slot is.
    #[inline]
    fn range(&self, slot: Ref) -> Range<usize> {
        let (start, stride) = self.locate(slot);
        start..start + stride
    }

    /// Where in the chunk the header of a slot is.
    #[inline]
    fn header(&self, slot: Ref) -> Range<usize> {
        let (start, _) = self.locate(slot);
        start..start + size_of::<Header>()
    }
}

/// How much of a chunk is in use. All zero for one that is not held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Extent {
    /// Units below this have been handed out at some time, so their memory is resident.
    touched: u16,
    /// Units in pages.
    used: u16,
}

#[derive(Debug, Clone, Copy)]
struct Class {
    first: u32,
    last: u32,
    pages: u32,
    live: u64,
}

/// What is being emptied.
#[derive(Debug, Clone, Copy)]
struct Emptying {
    page: u32,
    /// The next slot to look at.
    slot: u16,
}

#[derive(Debug)]
pub(crate) struct Arena {
    chunks: Vec<Place>,
    pages: Pages,
    extents: Vec<Extent>,
    /// Units touched, over all chunks.
    touched: u64,
    /// Numbers of chunks given back.
    vacant: BTreeSet<u32>,
    /// Free blocks by order, by their first unit.
    free: [BTreeSet<u32>; ORDERS],
    classes: [Class; classes::CLASSES],
    /// Bytes of all pages.
    page_bytes: u64,
    /// Bytes of all live slots.
    live_bytes: u64,
    emptying: Option<Emptying>,
    /// The chunk whose pages are emptied one after the other; its free blocks are out of reach.
    evacuating: Option<u32>,
    /// After a search for something to empty found nothing, how many releases to let pass before the next.
    patience: u32,
    /// Chunks touched all over that no huge page has been asked for.
    plain: VecDeque<u32>,
}

impl Arena {
    pub(crate) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            pages: Pages::default(),
            extents: Vec::new(),
            touched: 0,
            vacant: BTreeSet::new(),
            free: Default::default(),
            classes: [Class {
                first: NO_PAGE,
                last: NO_PAGE,
                pages: 0,
                live: 0,
            }; classes::CLASSES],
            page_bytes: 0,
            live_bytes: 0,
            emptying: None,
            evacuating: None,
            patience: 0,
            plain: VecDeque::new(),
        }
    }

    /// The bytes of a slot.
    #[inline]
    pub(crate) fn slot(&self, slot: Ref) -> &[u8] {
        let place = self.place(slot);
        &place.held()[place.range(slot)]
    }

    /// The bytes of a slot.
    #[inline]
    pub(crate) fn slot_mut(&mut self, slot: Ref) -> &mut [u8] {
        let place = &mut self.chunks[chunk_of(slot >> 8)];
        let range = place.range(slot);
        &mut place.held_mut()[range]
    }

    /// The header of a slot: less work than [`Arena::slot`].
    #[inline]
    pub(crate) fn header(&self, slot: Ref) -> &Header {
        let place = self.place(slot);
        entry::header(&place.held()[place.header(slot)])
    }

    /// The header of a slot.
    #[inline]
    pub(crate) fn header_mut(&mut self, slot: Ref) -> &mut Header {
        let place = &mut self.chunks[chunk_of(slot >> 8)];
        let range = place.header(slot);
        entry::header_mut(&mut place.held_mut()[range])
    }

    #[inline]
    fn place(&self, slot: Ref) -> &Place {
        &self.chunks[chunk_of(slot >> 8)]
    }

    /// Copies the bytes of one slot to another of the same class.
    pub(crate) fn copy(&mut self, from: Ref, to: Ref) {
        let (source, target) = (self.place(from).range(from), self.place(to).range(to));
        let (from, to) = (chunk_of(from >> 8), chunk_of(to >> 8));
        if from == to {
            self.chunks[from].held_mut().copy_within(source, target.start);
        } else if let Ok([from, to]) = self.chunks.get_disjoint_mut([from, to]) {
            to.held_mut()[target].copy_from_slice(&from.held()[source]);
        }
    }

    /// The class a slot belongs to.
    #[inline]
    pub(crate) fn class(&self, slot: Ref) -> u8 {
        self.place(slot).classes[(slot >> 8) as usize % UNITS_PER_CHUNK]
    }

    /// Takes a free slot of this class. Its bytes are whatever they were, but marked as taken only by what the caller writes.
    pub(crate) fn allocate(&mut self, class: u8) -> Ref {
        let mut page = self.classes[class as usize].first;
        if page == NO_PAGE {
            page = self.new_page(class);
            self.push_partial(class, page);
        }
        let at = self.page(page);
        let slot = if at.free == END_OF_FREE {
            let slot = at.fresh;
            self.page_mut(page).fresh += 1;
            slot
        } else {
            let slot = at.free;
            let next = entry::free_next(self.slot(page << 8 | u32::from(slot)));
            self.page_mut(page).free = next;
            slot
        };
        let at = self.page_mut(page);
        at.live += 1;
        if usize::from(at.live) == classes::slots(class) {
            self.unlink_partial(class, page);
        }
        self.classes[class as usize].live += 1;
        self.live_bytes += classes::stride(class) as u64;
        page << 8 | u32::from(slot)
    }

    /// Gives a slot back.
    pub(crate) fn release(&mut self, slot: Ref) {
        let page = slot >> 8;
        let Page { class, free, live, .. } = *self.page(page);
        entry::set_free(self.slot_mut(slot), free);
        let was_full = usize::from(live) == classes::slots(class);
        let at = self.page_mut(page);
        at.free = (slot & 0xff) as u16;
        at.live -= 1;
        self.classes[class as usize].live -= 1;
        self.live_bytes -= classes::stride(class) as u64;
        let emptying = self.emptying.is_some_and(|emptying| emptying.page == page);
        if live == 1 {
            if emptying {
                self.emptying = None;
            } else if !was_full {
                self.unlink_partial(class, page);
            }
            self.drop_page(page);
        } else if was_full && !emptying {
            self.push_partial(class, page);
        }
    }

    /// The slot whose entry should move next, if memory is spread too thinly; `None` if all is well, or nothing is found within
    /// the work of one call (then another call goes on). The caller moves the entry to a slot of the same class and releases this one.
    pub(crate) fn next_to_move(&mut self) -> Option<Ref> {
        if self.emptying.is_none() {
            self.choose();
        }
        let Emptying { page, slot } = self.emptying?;
        let fresh = self.page(page).fresh;
        for at in slot..fresh {
            if entry::is_live(self.slot(page << 8 | u32::from(at))) {
                self.emptying = Some(Emptying { page, slot: at + 1 });
                return Some(page << 8 | u32::from(at));
            }
        }
        unreachable!("a page that is being emptied is dropped with its last live slot");
    }

    /// Puts a huge page behind one chunk that is touched all over; `false` if there is none left to do.
    pub(crate) fn make_huge(&mut self) -> bool {
        while let Some(number) = self.plain.pop_front() {
            let full = usize::from(self.extents[number as usize].touched) == UNITS_PER_CHUNK;
            if let Some(chunk) = &mut self.chunks[number as usize].chunk
                && full
            {
                // Refused: there will be none for the others either, and the kernel has the advice.
                if !chunk.make_huge() {
                    self.plain.clear();
                }
                return true;
            }
        }
        false
    }

    /// Lowers the bound of the expiry times in the page of `slot`.
    #[inline]
    pub(crate) fn note_expiry(&mut self, slot: Ref, earliest: u32) {
        let page = self.page_mut(slot >> 8);
        page.earliest = page.earliest.min(earliest);
    }

    /// Sets the bound of the expiry times in a page, after all of it has been looked at.
    pub(crate) fn set_earliest(&mut self, page: u32, earliest: u32) {
        self.page_mut(page).earliest = earliest;
    }

    /// The first page at or after unit `from`: its number, how many of its slots have ever been used, and its bound of expiry
    /// times.
    pub(crate) fn page_from(&self, from: u32) -> Option<(u32, u16, u32)> {
        let (number, mut unit) = split(from);
        let page = (number..).zip(self.chunks.get(number..)?).find_map(|(number, place)| {
            // From its beginning in every chunk but the first.
            let first = std::mem::take(&mut unit);
            let past = place.classes[first..].iter().position(|&class| class != NO_CLASS)?;
            Some((number * UNITS_PER_CHUNK + first + past) as u32)
        })?;
        let at = self.page(page);
        Some((page, at.fresh, at.earliest))
    }

    /// Whether the slot holds something.
    #[inline]
    pub(crate) fn is_live(&self, slot: Ref) -> bool {
        entry::is_live(self.slot(slot))
    }

    /// Memory resident for slots, and for the records of pages.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let of_pages = self.chunks.len() * (UNITS_PER_CHUNK * size_of::<Page>() + size_of::<Place>());
        self.touched * UNIT_BYTES as u64 + of_pages as u64
    }

    #[inline]
    fn page(&self, page: u32) -> &Page {
        self.pages.get(page)
    }

    #[inline]
    fn page_mut(&mut self, page: u32) -> &mut Page {
        self.pages.get_mut(page)
    }

    /// Makes a page; the caller links it.
    fn new_page(&mut self, class: u8) -> u32 {
        let order = classes::order(class);
        let block = self.take_block(order as usize);
        let (number, unit) = split(block);
        let units = 1 << (2 * order);
        let extent = &mut self.extents[number];
        extent.used += units;
        let touched = unit as u16 + units;
        if touched > extent.touched {
            self.touched += u64::from(touched - extent.touched);
            extent.touched = touched;
            if usize::from(touched) == UNITS_PER_CHUNK {
                self.chunks[number].held().allow_huge();
                self.plain.push_back(number as u32);
            }
        }
        self.chunks[number].classes[unit] = class;
        *self.page_mut(block) = Page {
            class,
            live: 0,
            free: END_OF_FREE,
            fresh: 0,
            previous: NO_PAGE,
            next: NO_PAGE,
            earliest: NEVER,
            unused: 0,
        };
        self.page_bytes += classes::page_bytes(order) as u64;
        self.classes[class as usize].pages += 1;
        block
    }

    fn drop_page(&mut self, page: u32) {
        let class = self.page(page).class;
        let order = classes::order(class);
        let (number, unit) = split(page);
        self.chunks[number].classes[unit] = NO_CLASS;
        let extent = &mut self.extents[number];
        extent.used -= 1 << (2 * order);
        let empty = extent.used == 0;
        self.page_bytes -= classes::page_bytes(order) as u64;
        self.classes[class as usize].pages -= 1;
        if self.evacuating == Some(number as u32) {
            // Its free blocks are already out of reach, and so is this one.
            if empty {
                self.evacuating = None;
                self.drop_chunk(number);
            }
        } else {
            self.put_block(page, order as usize);
        }
    }

    /// Takes a free block, the lowest there is of the smallest order that will do.
    fn take_block(&mut self, order: usize) -> u32 {
        let found = (order..ORDERS).find(|&order| !self.free[order].is_empty());
        let (mut held, block) = match found {
            Some(held) => (
                held,
                self.free[held]
                    .pop_first()
                    .expect("invariant: just seen to hold a block"),
            ),
            None => (ORDERS - 1, self.new_chunk()),
        };
        while held > order {
            held -= 1;
            for quarter in 1..4 {
                self.free[held].insert(block + (quarter << (2 * held)));
            }
        }
        block
    }

    /// Gives a block back, joined with its free neighbours.
    fn put_block(&mut self, mut block: u32, mut order: usize) {
        while order < ORDERS - 1 {
            let first = block & !((4 << (2 * order)) - 1);
            let mut others = (0..4)
                .map(|quarter| first + (quarter << (2 * order)))
                .filter(|&other| other != block);
            if !others.all(|other| self.free[order].contains(&other)) {
                break;
            }
            for quarter in 0..4 {
                self.free[order].remove(&(first + (quarter << (2 * order))));
            }
            block = first;
            order += 1;
        }
        if order == ORDERS - 1 && self.free[order].len() >= SPARE_CHUNKS {
            self.drop_chunk(chunk_of(block));
        } else {
            self.free[order].insert(block);
        }
    }

    fn new_chunk(&mut self) -> u32 {
        let number = self.vacant.pop_first().unwrap_or_else(|| {
            self.chunks.push(Place::VACANT);
            self.extents.push(Extent::default());
            self.pages.grow(self.chunks.len() * UNITS_PER_CHUNK);
            self.chunks.len() as u32 - 1
        });
        // The last chunk is left out, so that no slot is called NIL.
        assert!(
            number < (1 << 24) / UNITS_PER_CHUNK as u32 - 1,
            "a shard addresses 128 GiB"
        );
        self.chunks[number as usize].chunk = Some(Chunk::new());
        number * UNITS_PER_CHUNK as u32
    }

    fn drop_chunk(&mut self, number: usize) {
        self.chunks[number].chunk = None;
        self.touched -= u64::from(std::mem::take(&mut self.extents[number]).touched);
        self.vacant.insert(number as u32);
    }

    /// Looks for a page worth emptying: one of the class with the most free slots, or one of the chunk with the fewest pages.
    fn choose(&mut self) {
        if self.patience > 0 {
            self.patience -= 1;
            return;
        }
        // A 25th of the live bytes may be free slots, and a 25th free blocks; small shards get a little more.
        let allowed = self.live_bytes / 25 + (128 << 10);
        if self.page_bytes - self.live_bytes > allowed
            && let Some(page) = self.sparse_page()
        {
            self.start_emptying(page);
            return;
        }
        if self.evacuating.is_none() {
            self.choose_chunk();
        }
        if let Some(number) = self.evacuating {
            let (page, ..) = self
                .page_from(number * UNITS_PER_CHUNK as u32)
                .expect("invariant: it holds a page");
            self.start_emptying(page);
        } else {
            self.patience = 256;
        }
    }

    fn start_emptying(&mut self, page: u32) {
        let Page { class, live, .. } = *self.page(page);
        if usize::from(live) < classes::slots(class) {
            self.unlink_partial(class, page);
        }
        self.emptying = Some(Emptying { page, slot: 0 });
    }

    /// The emptiest of some pages of the class that has the most bytes in free slots, if its other pages can take its entries.
    fn sparse_page(&self) -> Option<u32> {
        let free_slots = |class: u8, of: &Class| u64::from(of.pages) * classes::slots(class) as u64 - of.live;
        let (class, of) = (0u8..)
            .zip(&self.classes)
            .filter(|&(class, of)| free_slots(class, of) >= classes::slots(class) as u64)
            .max_by_key(|&(class, of)| free_slots(class, of) * classes::stride(class) as u64)?;
        let mut best: Option<(u16, u32)> = None;
        // The list's end has the pages that became partial first and have had the most time to empty.
        let mut page = of.last;
        for _ in 0..32 {
            if page == NO_PAGE {
                break;
            }
            let at = self.page(page);
            if best.is_none_or(|(live, _)| at.live < live) {
                best = Some((at.live, page));
            }
            page = at.previous;
        }
        let (live, page) = best?;
        // What is free elsewhere in the class must hold what moves.
        let free_here = classes::slots(class) as u64 - u64::from(live);
        (free_slots(class, of) - free_here >= u64::from(live)).then_some(page)
    }

    /// Starts emptying the emptiest chunk, if enough blocks are free in the others.
    fn choose_chunk(&mut self) {
        let held = self.touched;
        let used = self.page_bytes / UNIT_BYTES as u64;
        if held - used <= used / 25 + EVACUATE_FROM_UNITS {
            return;
        }
        let emptiest = (0u32..)
            .zip(&self.extents)
            .map(|(number, &Extent { used, touched })| (used, touched, number))
            .filter(|&(used, ..)| used > 0)
            .min();
        let Some((moving, touched, number)) = emptiest else {
            return;
        };
        // What is free elsewhere must hold what moves, or a new chunk would only take this one's place.
        let free_elsewhere = held - used - u64::from(touched - moving);
        if free_elsewhere < u64::from(moving) + EVACUATE_FROM_UNITS / 2 {
            return;
        }
        let first = number * UNITS_PER_CHUNK as u32;
        let range = first..first + UNITS_PER_CHUNK as u32;
        for free in &mut self.free {
            let blocks: Vec<u32> = free.range(range.clone()).copied().collect();
            for block in blocks {
                free.remove(&block);
            }
        }
        self.evacuating = Some(number);
    }

    fn push_partial(&mut self, class: u8, page: u32) {
        let first = self.classes[class as usize].first;
        let at = self.page_mut(page);
        at.previous = NO_PAGE;
        at.next = first;
        if first == NO_PAGE {
            self.classes[class as usize].last = page;
        } else {
            self.page_mut(first).previous = page;
        }
        self.classes[class as usize].first = page;
    }

    fn unlink_partial(&mut self, class: u8, page: u32) {
        let Page { previous, next, .. } = *self.page(page);
        if previous == NO_PAGE {
            self.classes[class as usize].first = next;
        } else {
            self.page_mut(previous).next = next;
        }
        if next == NO_PAGE {
            self.classes[class as usize].last = previous;
        } else {
            self.page_mut(next).previous = previous;
        }
    }

    /// Panics on a broken invariant; returns the number of live slots.
    pub(crate) fn check(&self) -> u64 {
        let (mut live_slots, mut live_bytes, mut page_bytes) = (0, 0, 0);
        let mut found = [(0u32, 0u64); classes::CLASSES];
        let mut at = 0;
        while let Some((page, fresh, _)) = self.page_from(at) {
            at = page + 1;
            let held = self.page(page);
            let live = (0..u32::from(fresh))
                .filter(|slot| self.is_live(page << 8 | slot))
                .count();
            assert_eq!(live, usize::from(held.live), "a page's live slots are miscounted");
            assert!(live > 0, "an empty page was kept");
            let mut free = held.free;
            let mut listed = 0;
            while free != END_OF_FREE {
                let slot = self.slot(page << 8 | u32::from(free));
                assert!(!entry::is_live(slot), "a live slot is in the list of free ones");
                free = entry::free_next(slot);
                listed += 1;
                assert!(listed <= usize::from(fresh), "the list of free slots has a cycle");
            }
            assert_eq!(live + listed, usize::from(fresh), "a slot is neither live nor free");
            found[held.class as usize].0 += 1;
            found[held.class as usize].1 += live as u64;
            live_slots += live as u64;
            live_bytes += (live * classes::stride(held.class)) as u64;
            page_bytes += classes::page_bytes(classes::order(held.class)) as u64;
        }
        assert_eq!(
            (live_bytes, page_bytes),
            (self.live_bytes, self.page_bytes),
            "bytes are miscounted"
        );
        for (class, &(pages, live)) in (0u8..).zip(&found) {
            let of = &self.classes[class as usize];
            assert_eq!((pages, live), (of.pages, of.live), "class {class} is miscounted");
            let (mut page, mut previous, mut partial) = (of.first, NO_PAGE, 0);
            while page != NO_PAGE {
                let at = self.page(page);
                assert_eq!(
                    (at.class, at.previous),
                    (class, previous),
                    "the list of partial pages is broken"
                );
                assert!(
                    usize::from(at.live) < classes::slots(class),
                    "a full page is listed as partial"
                );
                partial += u64::from(classes::slots(class) as u32 - u32::from(at.live));
                previous = page;
                page = at.next;
            }
            assert_eq!(of.last, previous, "the list of partial pages ends elsewhere");
            let emptying = self.emptying.map_or(0, |emptying| {
                let at = self.page(emptying.page);
                if at.class == class {
                    classes::slots(class) as u64 - u64::from(at.live)
                } else {
                    0
                }
            });
            let free = u64::from(pages) * classes::slots(class) as u64 - live;
            assert_eq!(partial + emptying, free, "a page with room is not listed");
        }
        self.check_blocks();
        live_slots
    }

    fn check_blocks(&self) {
        let touched = self.extents.iter().map(|extent| u64::from(extent.touched)).sum::<u64>();
        assert_eq!(touched, self.touched, "touched units are miscounted");
        for number in 0..self.chunks.len() {
            let Place { chunk, classes } = &self.chunks[number];
            let held = chunk.is_some();
            assert_eq!(
                held,
                !self.vacant.contains(&(number as u32)),
                "a vacant chunk is not listed"
            );
            let first = number * UNITS_PER_CHUNK;
            if !held {
                assert_eq!(self.extents[number], Extent::default(), "a vacant chunk is in use");
                assert!(
                    classes.iter().all(|&class| class == NO_CLASS),
                    "a vacant chunk has pages"
                );
                continue;
            }
            let mut owned = [false; UNITS_PER_CHUNK];
            let mut claim = |unit: usize, order: usize| {
                for owned in &mut owned[unit..unit + (1 << (2 * order))] {
                    assert!(!*owned, "two blocks overlap");
                    *owned = true;
                }
            };
            let mut used = 0;
            for (unit, &class) in classes.iter().enumerate().filter(|&(_, &class)| class != NO_CLASS) {
                let order = classes::order(class) as usize;
                claim(unit, order);
                used += 1u16 << (2 * order);
                assert_eq!(class, self.page((first + unit) as u32).class, "a page has two classes");
            }
            assert_eq!(used, self.extents[number].used, "a chunk's units are miscounted");
            for (order, free) in self.free.iter().enumerate() {
                for &block in free.range(first as u32..(first + UNITS_PER_CHUNK) as u32) {
                    claim(split(block).1, order);
                }
            }
            let all = owned.iter().all(|&owned| owned);
            assert!(all || self.evacuating == Some(number as u32), "a block was lost");
        }
    }
}

/// The chunk and the unit inside it.
#[inline]
fn split(unit: u32) -> (usize, usize) {
    (unit as usize / UNITS_PER_CHUNK, unit as usize % UNITS_PER_CHUNK)
}

#[inline]
fn chunk_of(unit: u32) -> usize {
    unit as usize / UNITS_PER_CHUNK
}
