//! Status codes of replies. The numbers are stable: a code is never reused or given another meaning.

use std::fmt;

/// What a status says about the request, which is what a caller decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Done as asked.
    Ok,
    /// Executed, and this is the answer: the condition did not hold, the key is absent. Trying again gives the same answer.
    Answer,
    /// Refused for what the request is; it was not executed and will be refused again unchanged.
    Rejected,
    /// Not proposed, for a reason that passes: it was not executed and may be sent again, as the status says where and when.
    NotProposed,
    /// It may or may not have been executed. Only a session can find out by sending it again.
    InDoubt,
}

macro_rules! statuses {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $class:ident;)+) => {
        /// The status of a reply.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Status {
            $($(#[doc = $doc])+ $name = $code,)+
        }

        impl Status {
            /// Every status this version knows, in the order of their codes.
            pub const ALL: &'static [Status] = &[$(Status::$name,)+];

            /// The status of a code; `None` for a code that a later minor version added.
            pub const fn from_code(code: u8) -> Option<Status> {
                match code {
                    $($code => Some(Status::$name),)+
                    _ => None,
                }
            }

            /// What the status means for the caller.
            pub const fn class(self) -> Class {
                match self {
                    $(Status::$name => Class::$class,)+
                }
            }

            /// The stable name, as printed in messages, metrics and JSON.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Status::$name => stringify!($name),)+
                }
            }
        }
    };
}

statuses! {
    /// Done.
    Ok = 0, Ok;
    /// The key is absent (or expired).
    NotFound = 1, Answer;
    /// `if-absent` or `if-version` did not hold; the reply's version is the entry's current one, 0 when absent.
    ConditionFailed = 2, Answer;
    /// `Incr` of a value that is not an ASCII decimal 64-bit signed number.
    NotANumber = 3, Answer;
    /// `Incr` beyond the range of a 64-bit signed number.
    Overflow = 4, Answer;
    /// The shard's budget is used up and its policy is `no-evict`; nothing was stored.
    OutOfMemory = 5, Answer;

    /// The frame or the request's body cannot be read as what it says it is.
    Malformed = 16, Rejected;
    /// `Hello` asked for another major version.
    UnsupportedVersion = 17, Rejected;
    /// An operation this node does not know.
    UnknownOperation = 18, Rejected;
    /// An option this node does not know and may not ignore, or one that does not go with the operation.
    UnsupportedOption = 19, Rejected;
    /// A value out of its range: an empty key, a page of no entries, a shard that does not exist.
    InvalidArgument = 20, Rejected;
    /// The key is longer than the node accepts.
    KeyTooLarge = 21, Rejected;
    /// The value is longer than the node accepts.
    ValueTooLarge = 22, Rejected;
    /// The frame announces more bytes than the node accepts; the connection is closed, since what follows cannot be trusted.
    FrameTooLarge = 23, Rejected;
    /// The first request on a connection must be `Hello`.
    HelloRequired = 24, Rejected;
    /// The client's certificate does not permit the operation.
    PermissionDenied = 25, Rejected;
    /// The session is unknown or has expired; the request was not executed, now or before under this answer.
    SessionExpired = 26, Rejected;

    /// The shard is led elsewhere: the option `moved` says where.
    Moved = 32, NotProposed;
    /// A queue on the way is full: try again after `retry-after`.
    Busy = 33, NotProposed;
    /// The shard has no majority to decide with.
    NoQuorum = 34, NotProposed;
    /// No replica here is as fresh as the read asked for; the option `age` says how stale this one is.
    TooStale = 35, NotProposed;
    /// The request's deadline passed before it was proposed.
    DeadlineExceeded = 36, NotProposed;
    /// The node is stopping and takes no new requests.
    ShuttingDown = 37, NotProposed;
    /// The disk is nearly full: the shard serves reads and refuses writes until space returns.
    ReadOnly = 38, NotProposed;
    /// What was asked for has to be written to the node's disk, which did not take it.
    DiskFailed = 39, NotProposed;

    /// Proposed, and its result is unknown: leadership was lost or the deadline passed on the way.
    InDoubt = 48, InDoubt;

    /// A bug in the node. What became of the request is unknown.
    Internal = 63, InDoubt;
}

impl Status {
    /// The code on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// How a code of a later minor version is to be understood: by its range, as `PROTOCOL.md` promises.
    pub const fn class_of_code(code: u8) -> Class {
        match Status::from_code(code) {
            Some(status) => status.class(),
            None => match code {
                0..=15 => Class::Answer,
                16..=31 => Class::Rejected,
                32..=47 => Class::NotProposed,
                _ => Class::InDoubt,
            },
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_code_lies_in_the_range_of_its_class() {
        for &status in Status::ALL {
            assert_eq!(Status::from_code(status.code()), Some(status));
            let range = match status.code() {
                0 => Class::Ok,
                1..=15 => Class::Answer,
                16..=31 => Class::Rejected,
                32..=47 => Class::NotProposed,
                _ => Class::InDoubt,
            };
            assert_eq!(status.class(), range, "{status}");
        }
    }
}
