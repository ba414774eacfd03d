//! Steering by connection id: a classic-BPF program attached to the sockets of one port chooses the socket, so that a connection
//! stays on its core whatever address its packets come from (RFC 8999 gives the positions it reads, for every QUIC version).
//!
//! The program returns the index of a socket in the order in which they were bound. It needs no privilege. An index that does
//! not exist makes the kernel fall back to its hash of the addresses; that is also what happens without the program at all, and
//! the node then forwards what reached the wrong core.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Classic BPF opcodes (Linux, `uapi/linux/bpf_common.h`): class, size or operation, mode or source.
mod op {
    pub(super) const LOAD_BYTE_ABSOLUTE: u16 = 0x30;
    pub(super) const JUMP_IF_EQUAL: u16 = 0x15;
    pub(super) const JUMP_IF_SET: u16 = 0x45;
    pub(super) const JUMP: u16 = 0x05;
    pub(super) const MODULO: u16 = 0x94;
    pub(super) const RETURN_A: u16 = 0x16;
    pub(super) const RETURN_K: u16 = 0x06;
}

/// Bit of the first byte that tells a long header from a short one (RFC 8999 section 5).
const LONG_HEADER: u32 = 0x80;
/// Offset of the destination connection id's length in a long header (RFC 8999 section 5.1).
const LONG_ID_LENGTH: u32 = 5;
/// Offset of the destination connection id in a long header.
const LONG_ID: u32 = 6;
/// Offset of the destination connection id in a short header (RFC 8999 section 5.2).
const SHORT_ID: u32 = 1;
/// A socket that does not exist: leave the choice to the kernel.
const NO_SOCKET: u32 = u32::MAX;

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// The program for `cores` sockets: first byte of the destination connection id, modulo the cores. A datagram too short to have
/// one ends the program with socket 0 (a load out of bounds returns 0).
fn program(cores: u16) -> [libc::sock_filter; 10] {
    [
        instruction(op::LOAD_BYTE_ABSOLUTE, 0, 0, 0),
        instruction(op::JUMP_IF_SET, 0, 4, LONG_HEADER),
        instruction(op::LOAD_BYTE_ABSOLUTE, 0, 0, LONG_ID_LENGTH),
        instruction(op::JUMP_IF_EQUAL, 5, 0, 0),
        instruction(op::LOAD_BYTE_ABSOLUTE, 0, 0, LONG_ID),
        instruction(op::JUMP, 0, 0, 1),
        instruction(op::LOAD_BYTE_ABSOLUTE, 0, 0, SHORT_ID),
        instruction(op::MODULO, 0, 0, u32::from(cores)),
        instruction(op::RETURN_A, 0, 0, 0),
        instruction(op::RETURN_K, 0, 0, NO_SOCKET),
    ]
}

/// Attaches the steering program for `cores` sockets to the port that `socket` is bound to. All sockets of the port must be bound
/// already, in the order of their cores.
pub fn attach(socket: &impl AsFd, cores: u16) -> io::Result<()> {
    let mut instructions = program(cores);
    let program = libc::sock_fprog {
        len: instructions.len() as u16,
        filter: instructions.as_mut_ptr(),
    };
    let length = size_of_val(&program) as libc::socklen_t;
    // SAFETY: `program` is a valid sock_fprog of `length` bytes that points to `len` initialised instructions, and both outlive
    // the call; the kernel copies them and keeps no pointer. The descriptor is open, because it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
