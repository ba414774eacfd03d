//! How a command ends: the exit codes, and the failure that carries one.

use std::io::Write as _;
use std::process::ExitCode;

/// The exit codes of `generation`. Scripts rely on them; a code is never given a second meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// The request was refused and changed nothing.
    Rejected = 1,
    /// Bad usage or bad configuration.
    Usage = 2,
    /// The key does not exist.
    NotFound = 3,
    /// If-absent or if-version did not hold.
    ConditionFailed = 4,
    /// No quorum, busy, or not sent: trying again is safe.
    Unavailable = 5,
    /// A write may or may not have happened.
    InDoubt = 6,
    /// Stored data is damaged.
    Corruption = 7,
}

impl Exit {
    /// The stable name of the code, as `--json` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Rejected => "rejected",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::ConditionFailed => "condition_failed",
            Self::Unavailable => "unavailable",
            Self::InDoubt => "in_doubt",
            Self::Corruption => "corruption",
        }
    }
}

impl Exit {
    /// The exit of a process of this program, by its code.
    pub fn from_code(code: i32) -> Option<Self> {
        [
            Self::Ok,
            Self::Rejected,
            Self::Usage,
            Self::NotFound,
            Self::ConditionFailed,
            Self::Unavailable,
            Self::InDoubt,
            Self::Corruption,
        ]
        .into_iter()
        .find(|exit| *exit as i32 == code)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Whether a request that failed changed anything, as `--json` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The request never left.
    NotSent,
    /// The server refused it.
    Rejected,
    /// It may have been applied.
    InDoubt,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Rejected => "rejected",
            Self::InDoubt => "in_doubt",
        }
    }
}

/// Why a command failed: what the user reads, and the code the shell sees.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// A stable, machine-readable code; the exit code's name when nothing finer is known.
    pub code: &'static str,
    /// What went wrong and what to do about it, in one or more lines without a final stop or newline.
    pub message: String,
    /// Whether anything was changed.
    pub state: State,
}

impl Failure {
    /// A failure that never reached a server.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            code: exit.name(),
            message: message.into(),
            state: State::NotSent,
        }
    }

    /// Bad usage or configuration.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The same failure under a finer code.
    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code, ..self }
    }

    /// The same failure with another state.
    #[must_use]
    pub fn with_state(self, state: State) -> Self {
        Self { state, ..self }
    }

    /// Writes it to standard error: a line for people, or `{"error":{"code","message","state"}}`.
    pub fn report(&self, json: bool) {
        let text = if json {
            let error = serde_json::json!({
                "error": { "code": self.code, "message": self.message, "state": self.state.name() }
            });
            error.to_string()
        } else {
            format!("generation: {}", self.message)
        };
        // Standard error may be closed; then there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}
