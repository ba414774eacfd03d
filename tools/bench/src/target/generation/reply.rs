//! What a frame of a node means to the engine: a completion, or what a greeting waits for.

use generation_proto::reply::MultiResult;
use generation_proto::{Frame, Map, Opcode, Reply, Status};

use crate::target::{Completion, Failure, Outcome, Token};

/// Request id of `Hello`; tokens of the engine are 32 bits wide.
pub(super) const HELLO_ID: u64 = u64::MAX;
/// Request id of `Map`.
pub(super) const MAP_ID: u64 = u64::MAX - 1;

/// What a link's frames say apart from completions, while connecting.
#[derive(Default)]
pub(super) struct Greeting {
    /// Links that were answered.
    pub(super) greeted: usize,
    /// The map, where it was asked for.
    pub(super) map: Option<Map>,
}

/// Turns a reply into a completion, or into what a greeting waits for.
#[inline]
pub(super) fn answer(
    frame: &Frame,
    logical: usize,
    greeted: &mut bool,
    completions: &mut Vec<Completion>,
    greeting: &mut Greeting,
) -> Result<(), String> {
    let reply = Reply::decode(frame).map_err(|error| error.to_string())?;
    let Ok(token) = Token::try_from(reply.id) else {
        if reply.meta.status() != Some(Status::Ok) {
            let status = reply.meta.status().map_or("an unknown status", Status::name);
            return Err(format!(
                "it answered {status} to the greeting: {}",
                reply.options.message.unwrap_or_default()
            ));
        }
        if reply.id == HELLO_ID {
            *greeted = true;
            greeting.greeted += 1;
        } else {
            greeting.map = Some(Map::decode(reply.body).map_err(|error| error.to_string())?);
        }
        return Ok(());
    };
    completions.push(Completion {
        token,
        connection: logical,
        outcome: outcome(&reply)?,
    });
    Ok(())
}

#[inline]
fn outcome(reply: &Reply<'_>) -> Result<Outcome, String> {
    let Some(status) = reply.meta.status() else {
        return Ok(Outcome::Failed(Failure::Rejected));
    };
    Ok(match status {
        Status::Ok if reply.opcode == Opcode::Get.code() => Outcome::Hit {
            version: reply.meta.version,
        },
        Status::Ok if reply.opcode == Opcode::MultiGet.code() => {
            let (mut hits, mut misses) = (0, 0);
            for result in MultiResult::decode_all(reply.body) {
                let result = result.map_err(|error| error.to_string())?;
                match Status::from_code(result.status) {
                    Some(Status::Ok) => hits += 1,
                    Some(Status::NotFound) => misses += 1,
                    _ => return Ok(Outcome::Failed(Failure::Unavailable)),
                }
            }
            Outcome::Multi { hits, misses }
        }
        Status::Ok => Outcome::Stored,
        Status::NotFound => Outcome::Miss,
        Status::ConditionFailed => Outcome::Conflict,
        Status::OutOfMemory => Outcome::Failed(Failure::OutOfMemory),
        Status::Busy => Outcome::Failed(Failure::Busy),
        Status::Moved
        | Status::NoQuorum
        | Status::TooStale
        | Status::DeadlineExceeded
        | Status::ShuttingDown
        | Status::ReadOnly => Outcome::Failed(Failure::Unavailable),
        Status::InDoubt | Status::Internal => Outcome::Failed(Failure::InDoubt),
        _ => Outcome::Failed(Failure::Rejected),
    })
}
