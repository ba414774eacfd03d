//! Size classes: which stride of slots an entry of a given size goes to, and how large the pages of a stride are.
//!
//! A page of `2^13 * 4^order` bytes is cut into 16 to 256 equal slots; the strides are those that leave (almost) nothing over at
//! its end, so small ones are two bytes apart. Rounding a size up to its stride wastes some 1 % at 100 B and 4 % at the large end.

/// The smallest page, and the unit of page numbers.
pub(crate) const UNIT_BYTES: usize = 8 << 10;

/// Every entry whose size is at most this has a slot of its own; larger ones put key and value into an allocation of their own.
pub(crate) const MAX_STRIDE: usize = 8 << 10;

/// Every stride is at least this; also the size of the slot of an entry whose bytes are elsewhere.
pub(crate) const MIN_STRIDE: usize = 32;

/// Page orders in use: 8, 32 and 128 KiB.
const ORDERS: usize = 3;

/// The finest spacing of neighbouring strides, per order, as a divisor: larger pages have fewer classes, because each class may
/// hold a page that is half empty.
const SPACING: [usize; ORDERS] = [usize::MAX, 24, 16];

/// How many classes there are.
pub(crate) const CLASSES: usize = build().1;

/// Strides in ascending order, and the page order of each.
const STRIDES: [(u16, u8); CLASSES] = {
    let (all, count) = build();
    let mut strides = [(0, 0); CLASSES];
    let mut at = 0;
    while at < count {
        strides[at] = all[at];
        at += 1;
    }
    strides
};

/// The class of each size, by half the size rounded up.
static CLASS_OF: [u8; MAX_STRIDE / 2 + 1] = {
    let mut table = [0; MAX_STRIDE / 2 + 1];
    let (mut half, mut class) = (0, 0);
    while half < table.len() {
        while (STRIDES[class].0 as usize) < half * 2 {
            class += 1;
        }
        table[half] = class as u8;
        half += 1;
    }
    table
};

const _: () = assert!(CLASSES <= u8::MAX as usize, "a class is a byte");
const _: () = assert!(STRIDES[0].0 as usize == MIN_STRIDE && STRIDES[CLASSES - 1].0 as usize == MAX_STRIDE);
const _: () = assert!(UNIT_BYTES / MIN_STRIDE <= 256, "a slot number is a byte");

const fn build() -> ([(u16, u8); 256], usize) {
    let mut all = [(0, 0); 256];
    let (mut count, mut order, mut last) = (0, 0, 0);
    while order < ORDERS {
        let page = UNIT_BYTES << (2 * order);
        let mut slots = if order == 0 { UNIT_BYTES / MIN_STRIDE } else { 63 };
        while slots >= 16 {
            let stride = page / slots / 2 * 2;
            // The last stride of an order is always there, so that each order takes over where the one before ends.
            if stride > last && (stride >= last + last / SPACING[order] || slots == 16) {
                all[count] = (stride as u16, order as u8);
                last = stride;
                count += 1;
            }
            slots -= 1;
        }
        order += 1;
    }
    (all, count)
}

/// The class for entries of `len_bytes`, at most [`MAX_STRIDE`].
#[inline]
pub(crate) fn class_of(len_bytes: usize) -> u8 {
    CLASS_OF[len_bytes.div_ceil(2)]
}

/// The bytes of a slot of this class.
#[inline]
pub(crate) fn stride(class: u8) -> usize {
    // As long as a byte can count, so that no index needs a check.
    static OF: [u16; 256] = {
        let mut strides = [0; 256];
        let mut class = 0;
        while class < CLASSES {
            strides[class] = STRIDES[class].0;
            class += 1;
        }
        strides
    };
    OF[class as usize] as usize
}

/// The order of this class's pages.
#[inline]
pub(crate) fn order(class: u8) -> u8 {
    STRIDES[class as usize].1
}

/// The number of slots of a page of this class, 16 to 256.
#[inline]
pub(crate) fn slots(class: u8) -> usize {
    page_bytes(order(class)) / stride(class)
}

/// The bytes of a page of this order.
#[inline]
pub(crate) fn page_bytes(order: u8) -> usize {
    UNIT_BYTES << (2 * order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_the_smallest_stride_that_holds_it() {
        for len in 1..=MAX_STRIDE {
            let class = class_of(len);
            assert!(stride(class) >= len);
            assert!(class == 0 || stride(class - 1) < len);
        }
    }

    #[test]
    fn little_is_left_over() {
        for class in 0..CLASSES as u8 {
            assert!(
                (16..=256).contains(&slots(class)),
                "class {class}: {} slots",
                slots(class)
            );
            let page = page_bytes(order(class));
            assert!(
                page - slots(class) * stride(class) <= page / 64,
                "stride {} in {page}",
                stride(class)
            );
            if class > 0 {
                assert!(
                    stride(class) <= stride(class - 1) * 9 / 8 + 2,
                    "stride {}",
                    stride(class)
                );
            }
        }
    }
}
