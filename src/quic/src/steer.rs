//! Which core a datagram belongs to: the first byte of its destination connection id, modulo the number of cores.
//!
//! The same rule is what the kernel's steering program applies to choose a socket, so in the steady state the answer is always
//! "here"; it differs where steering is missing, or where one GSO train carried datagrams of several connections.

/// Position of the connection id's length in a packet with a long header (RFC 8999, section 5.1).
const LONG_LEN_AT: usize = 5;
/// Position of the connection id in a packet with a long header.
const LONG_CID_AT: usize = 6;
/// Position of the connection id in a packet with a short header (RFC 8999, section 5.2).
const SHORT_CID_AT: usize = 1;

/// The core that owns `datagram` among `cores`, or `None` when it carries no connection id (malformed, or an empty id).
///
/// # Panics
/// When `cores` is 0.
pub fn core_of(datagram: &[u8], cores: u16) -> Option<u16> {
    let first = *datagram.first()?;
    let at = if first & 0x80 == 0 {
        SHORT_CID_AT
    } else if *datagram.get(LONG_LEN_AT)? == 0 {
        return None;
    } else {
        LONG_CID_AT
    };
    Some(u16::from(*datagram.get(at)?) % cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_header_forms_name_their_core() {
        let long = [0xc3, 0, 0, 0, 1, 8, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(core_of(&long, 4), Some(1));
        let short = [0x43, 7, 1, 2, 3];
        assert_eq!(core_of(&short, 4), Some(3));
    }

    #[test]
    fn what_has_no_connection_id_has_no_core() {
        assert_eq!(core_of(&[], 4), None);
        assert_eq!(core_of(&[0x43], 4), None);
        assert_eq!(core_of(&[0xc3, 0, 0, 0, 1], 4), None);
        assert_eq!(core_of(&[0xc3, 0, 0, 0, 1, 0, 9], 4), None);
        assert_eq!(core_of(&[0xc3, 0, 0, 0, 1, 8], 4), None);
    }
}
