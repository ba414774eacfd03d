//! How a command reaches the `generation dev` that runs on a directory: a Unix socket in it, one request and one answer a
//! connection, each a line of JSON.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cli::{Exit, Failure};

/// Name of the socket.
const SOCKET: &str = "dev.sock";
/// Longest request or answer, in bytes.
const LONGEST: u64 = 64 << 10;
/// How long the other side may take to send its line. Starting a node can take as long as reading its data back.
const PATIENCE: Duration = Duration::from_mins(2);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// End this node if it runs, and start it again.
    RestartNode(u64),
    /// Start one node more, and take it into the cluster.
    AddNode {
        /// Its zone; without one, the next in turn.
        zone: Option<String>,
    },
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// It runs.
    Running {
        /// Its id.
        id: u64,
        /// Where it listens.
        addr: String,
        /// Its process.
        pid: u32,
    },
    /// Why not.
    Refused(String),
}

/// A request under way, with where its answer goes.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) request: Request,
    stream: UnixStream,
}

impl Asked {
    /// Answers. Who asked may be gone.
    pub(super) fn answer(mut self, answer: &Answer) {
        if let Err(error) = write_line(&mut self.stream, answer) {
            tracing::debug!(%error, "a command went away before its answer");
        }
    }
}

/// The path of the socket by way of the directory's descriptor: paths of sockets are at most 107 bytes long.
fn address(directory: &File) -> PathBuf {
    format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()).into()
}

/// Listens in `directory`, which the caller holds, and hands every request to `each` on a thread of its own.
pub(super) fn listen(directory: &Path, each: impl Fn(Asked) + Send + 'static) -> io::Result<()> {
    let opened = File::open(directory)?;
    let address = address(&opened);
    match fs::remove_file(&address) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&address)?;
    thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let request = stream
                .set_read_timeout(Some(PATIENCE))
                .and_then(|()| read_line(&stream));
            match request {
                Ok(request) => each(Asked { request, stream }),
                Err(error) => tracing::debug!(%error, "not a request"),
            }
        }
    })?;
    Ok(())
}

/// Asks the `generation dev` that runs on `directory`.
pub(super) fn ask(directory: &Path, request: &Request) -> Result<Answer, Failure> {
    let nobody = |error: io::Error| {
        Failure::new(
            Exit::Unavailable,
            format!(
                "no `generation dev` runs on {}: {error}; start one, or name its directory with --data",
                directory.display()
            ),
        )
    };
    let opened = File::open(directory).map_err(nobody)?;
    let mut stream = UnixStream::connect(address(&opened)).map_err(nobody)?;
    let lost = |error: io::Error| {
        Failure::new(
            Exit::InDoubt,
            format!(
                "`generation dev` on {} gave no answer: {error}; see what it printed",
                directory.display()
            ),
        )
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
    write_line(&mut stream, request).map_err(lost)?;
    read_line(&stream).map_err(lost)
}

fn write_line(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string(message).map_err(io::Error::other)?;
    text.push('\n');
    stream.write_all(text.as_bytes())
}

fn read_line<T: for<'de> Deserialize<'de>>(stream: &UnixStream) -> io::Result<T> {
    let mut text = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut text)?;
    if text.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_str(&text).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_and_nonsense_harms_nobody() {
        let directory = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let deep = directory.path().join("d".repeat(120));
        fs::create_dir(&deep).unwrap();
        let refused = ask(&deep, &Request::RestartNode(1)).unwrap_err();
        assert_eq!(refused.exit, Exit::Unavailable);
        let answer = Answer::Refused("there is no node 7".to_owned());
        let given = answer.clone();
        listen(&deep, move |asked| {
            assert_eq!(asked.request, Request::RestartNode(7));
            asked.answer(&given);
        })
        .unwrap();
        let opened = File::open(&deep).unwrap();
        let mut nonsense = UnixStream::connect(address(&opened)).unwrap();
        nonsense.write_all(b"{]\n").unwrap();
        assert_eq!(ask(&deep, &Request::RestartNode(7)).unwrap(), answer);
        let mut rest = Vec::new();
        nonsense.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }
}
