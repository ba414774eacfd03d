//! One connection to one core of one node: a lane on which small requests are pipelined, and a stream each for what is large.
//!
//! Callers encode straight into one buffer; a writer task hands to QUIC whatever has gathered while it was away, so a busy
//! connection batches by itself. A reader task takes replies apart and wakes whom they are for. A third task gives up requests
//! whose time has passed: it sleeps until the earliest deadline it has seen, so a deadline costs a comparison, not a timer.
//!
//! Invariants:
//! - What is unanswered is bounded by `IN_FLIGHT` permits of `PERMIT_BYTES` each; beyond that callers wait.
//! - A future that is dropped leaves no entry behind. Where its request is still in the buffer its permits follow it out.
//! - When the connection ends, each request learns whether it can have been executed: if it was handed to QUIC, unless the node
//!   stopped in good order, which it does only after it has answered what it took (close code `shutting down`).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use generation_proto::{Decoder, Frame, Limits, Side, close_code};
use quinn::{ReadError, RecvStream, SendStream, VarInt};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::health::NodeHealth;
use crate::core::pending::Pending;

/// Permits for unanswered requests on a connection.
const IN_FLIGHT: usize = 8192;
/// Bytes of a request that one permit covers, so that permits bound memory too.
const PERMIT_BYTES: usize = 4096;
/// Most permits one request takes, so that the largest does not need the connection to itself.
const MAX_PERMITS: usize = IN_FLIGHT / 4;
/// Room made in the buffer at a time.
const BUFFER_BYTES: usize = 16 << 10;
/// Pieces of the stream taken from QUIC at a time.
const READ_CHUNKS: usize = 32;
/// Requests of this many bytes and more get a stream of their own, so that the small ones do not wait behind them.
pub(crate) const LARGE_REQUEST_BYTES: usize = 64 << 10;
/// Code with which a stream is given up whose request nobody waits for any more.
const CANCELLED: VarInt = VarInt::from_u32(1);
/// Codes a connection is closed with.
const NONE: VarInt = VarInt::from_u32(close_code::NONE);
const PROTOCOL: VarInt = VarInt::from_u32(close_code::PROTOCOL);
const SHUTTING_DOWN: VarInt = VarInt::from_u32(close_code::SHUTTING_DOWN);
/// How long a node that has ended a stream may take to say why.
const LAST_WORD: Duration = Duration::from_secs(1);

/// What the node said of itself in its answer to `Hello`.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Its address, for messages.
    pub(crate) addr: String,
    pub(crate) node: u64,
    pub(crate) core: u16,
    pub(crate) cores: u16,
    pub(crate) limits: Limits,
    /// Longest frame payload it accepts, and so makes, in bytes.
    pub(crate) max_frame_len: usize,
}

impl Peer {
    /// Longest reply that is read, in bytes: a node of tight limits may still answer with a map longer than they are.
    pub(crate) fn longest_reply(&self) -> usize {
        self.max_frame_len.max(Limits::default().max_frame_len())
    }
}

/// Why a request has no reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The connection ended before the request was handed to QUIC, or the node stopped without having taken it.
    NotExecuted(Arc<str>),
    /// The connection ended afterwards.
    Lost(Arc<str>),
    /// Time ran out; `queued` tells whether the request may still go out, or has.
    TimedOut { queued: bool },
}

/// An open connection.
pub(crate) struct Connection {
    pub(crate) peer: Peer,
    /// What is known of the node.
    pub(crate) health: Arc<NodeHealth>,
    quic: quinn::Connection,
    state: Mutex<State>,
    permits: Semaphore,
    /// Room for large requests on their way. A node keeps at most one longest frame's worth of unfinished ones for a connection
    /// and leaves what is beyond it unread, where it uses up the connection's flow control.
    uploads: Semaphore,
    sweeper: Notify,
    open: AtomicBool,
}

struct State {
    pending: Pending<Waiting>,
    /// Requests not yet handed to QUIC.
    out: BytesMut,
    /// Number of the batch that `out` will be; those below it have been handed over.
    batch: u64,
    /// Permits of requests in `out` whose callers went away.
    orphans: usize,
    writer: Option<Waker>,
    /// No request's deadline is before this; `None`: nobody has asked to be woken.
    earliest: Option<Instant>,
    /// Why nothing more can be sent. What was sent may still be answered.
    closed: Option<Arc<str>>,
    /// Nothing will be answered any more.
    ended: bool,
}

struct Waiting {
    batch: u64,
    deadline: Instant,
    progress: Progress,
}

/// When deadlines are looked at again.
enum Next {
    At(Instant),
    /// Nothing is unanswered.
    WhenWoken,
    /// The connection has ended.
    Never,
}

enum Progress {
    Unanswered(Option<Waker>),
    Done(Result<Frame, Loss>),
}

impl Connection {
    /// Takes over an open connection whose `Hello` has been answered.
    pub(crate) fn start(
        peer: Peer,
        health: Arc<NodeHealth>,
        quic: quinn::Connection,
        send: SendStream,
        recv: RecvStream,
        decoder: Decoder,
    ) -> Arc<Self> {
        let uploads = Semaphore::new((peer.max_frame_len / PERMIT_BYTES).max(1));
        let connection = Arc::new(Self {
            peer,
            health,
            uploads,
            quic,
            state: Mutex::new(State {
                pending: Pending::default(),
                out: BytesMut::new(),
                batch: 0,
                orphans: 0,
                writer: None,
                earliest: None,
                closed: None,
                ended: false,
            }),
            permits: Semaphore::new(IN_FLIGHT),
            sweeper: Notify::new(),
            open: AtomicBool::new(true),
        });
        let stopped = send.stopped();
        tokio::spawn(write_lane(connection.clone(), send));
        tokio::spawn(read_lane(connection.clone(), stopped, recv, decoder));
        tokio::spawn(sweep(connection.clone()));
        connection
    }

    /// Whether requests can be sent.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Sends a request on the lane and waits for its reply. `len` is about how many bytes `encode` will append.
    pub(crate) async fn request(
        &self,
        len: usize,
        deadline: Instant,
        encode: impl FnOnce(u64, &mut BytesMut),
    ) -> Result<Frame, Loss> {
        let permit = self.permit(len, deadline).await?;
        self.enqueue(permit, deadline, encode)?.await
    }

    /// Sends a request on a stream of its own and waits for its reply.
    pub(crate) async fn request_alone(
        &self,
        len: usize,
        deadline: Instant,
        encode: impl FnOnce(u64, &mut BytesMut),
    ) -> Result<Frame, Loss> {
        let _permit = self.permit(len, deadline).await?;
        let _upload = self.upload(len, deadline).await?;
        let mut request = BytesMut::with_capacity(len);
        encode(0, &mut request);
        let opened = timeout_at(deadline, self.quic.open_bi()).await;
        let (send, mut recv) = match opened {
            Ok(Ok(streams)) => streams,
            Ok(Err(error)) => return Err(Loss::NotExecuted(self.reason(&error))),
            Err(_) => return Err(Loss::TimedOut { queued: false }),
        };
        let mut send = CancelOnDrop(Some(send));
        let exchange = async {
            if let Err(error) = send.write(request.freeze()).await {
                // A node that is stopping says so on every stream; what it had not read whole it has not executed.
                return Err(match error {
                    quinn::WriteError::Stopped(code) if code == SHUTTING_DOWN => NoFrame::Ended,
                    quinn::WriteError::Stopped(code) => {
                        NoFrame::Broken(format!("the node stopped reading the request: {}", code_name(code)))
                    }
                    other => NoFrame::Broken(other.to_string()),
                });
            }
            let mut decoder = Decoder::new(Side::Client, self.peer.longest_reply());
            next_frame(&mut recv, &mut decoder).await
        };
        let reply = timeout_at(deadline, exchange).await;
        if reply.is_ok() {
            send.disarm();
        }
        match reply {
            Ok(Ok(frame)) => Ok(frame),
            Ok(Err(NoFrame::Ended)) => {
                let wait = deadline.min(Instant::now() + LAST_WORD);
                match timeout_at(wait, self.is_shut_down()).await {
                    Ok(()) => Err(Loss::NotExecuted("the node is shutting down".into())),
                    Err(_) => Err(Loss::Lost("the node ended the stream without a reply".into())),
                }
            }
            Ok(Err(NoFrame::Broken(reason))) => Err(Loss::Lost(match self.quic.close_reason() {
                Some(error) => self.reason(&error),
                None => reason.into(),
            })),
            Err(_) => Err(Loss::TimedOut { queued: true }),
        }
    }

    /// Permits that are taken: at least one for each request that is unanswered or not yet written.
    pub(crate) fn permits_taken(&self) -> usize {
        IN_FLIGHT - self.permits.available_permits()
    }

    /// Ends the connection; unanswered requests learn it.
    pub(crate) fn close(&self, reason: &str) {
        self.quic.close(NONE, reason.as_bytes());
        self.fail(&reason.into(), false);
    }

    /// Completes when QUIC has closed too.
    pub(crate) async fn closed(&self) {
        self.quic.closed().await;
    }

    /// Completes when the node has closed the connection because it is stopping; never, if it does so for another reason.
    async fn is_shut_down(&self) {
        match self.quic.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) if close.error_code == SHUTTING_DOWN => {}
            _ => std::future::pending().await,
        }
    }

    fn reason(&self, error: &quinn::ConnectionError) -> Arc<str> {
        match &self.lock().closed {
            // What this side knew first says more than that it then closed the connection.
            Some(reason) => reason.clone(),
            None => describe(error).into(),
        }
    }

    async fn permit(&self, len: usize, deadline: Instant) -> Result<SemaphorePermit<'_>, Loss> {
        let permits = (1 + len / PERMIT_BYTES).min(MAX_PERMITS) as u32;
        if let Ok(permit) = self.permits.try_acquire_many(permits) {
            return Ok(permit);
        }
        // Waiting is the exception: boxed, it does not make every request's future larger.
        match Box::pin(timeout_at(deadline, self.permits.acquire_many(permits))).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(Loss::NotExecuted(self.closed_reason())),
            Err(_) => Err(Loss::TimedOut { queued: false }),
        }
    }

    async fn upload(&self, len: usize, deadline: Instant) -> Result<Option<SemaphorePermit<'_>>, Loss> {
        if len < LARGE_REQUEST_BYTES {
            return Ok(None);
        }
        let most = (self.peer.max_frame_len / PERMIT_BYTES).max(1);
        let permits = len.div_ceil(PERMIT_BYTES).min(most) as u32;
        match timeout_at(deadline, self.uploads.acquire_many(permits)).await {
            Ok(permit) => Ok(permit.ok()),
            Err(_) => Err(Loss::TimedOut { queued: false }),
        }
    }

    fn closed_reason(&self) -> Arc<str> {
        self.lock().closed.clone().unwrap_or_else(|| "closed".into())
    }

    fn enqueue<'c>(
        &'c self,
        permit: SemaphorePermit<'c>,
        deadline: Instant,
        encode: impl FnOnce(u64, &mut BytesMut),
    ) -> Result<InFlight<'c>, Loss> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(reason) = &state.closed {
            return Err(Loss::NotExecuted(reason.clone()));
        }
        let id = state.pending.next_id();
        if state.out.capacity() - state.out.len() < 1024 {
            state.out.reserve(BUFFER_BYTES);
        }
        encode(id, &mut state.out);
        let batch = state.batch;
        state.pending.insert(Waiting {
            batch,
            deadline,
            progress: Progress::Unanswered(None),
        });
        let writer = state.writer.take();
        let sooner = state.earliest.is_none_or(|earliest| deadline < earliest);
        if sooner {
            state.earliest = Some(deadline);
        }
        drop(guard);
        if let Some(writer) = writer {
            writer.wake();
        }
        if sooner {
            self.sweeper.notify_one();
        }
        Ok(InFlight {
            connection: self,
            id,
            permit: Some(permit),
        })
    }

    /// The state. A caller that panicked while it encoded left at worst half a frame, for which the node closes the connection.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch for QUIC and the permits to give back once it is written; `None` when the connection has ended.
    fn poll_batch(&self, cx: &mut Context<'_>) -> Poll<Option<(Bytes, usize)>> {
        let mut state = self.lock();
        if state.closed.is_some() {
            return Poll::Ready(None);
        }
        if state.out.is_empty() {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        state.batch += 1;
        let orphans = std::mem::take(&mut state.orphans);
        Poll::Ready(Some((state.out.split().freeze(), orphans)))
    }

    /// Hands replies to those who wait for them.
    fn complete(&self, frames: &mut Vec<Frame>, wakers: &mut Vec<Waker>) {
        let mut state = self.lock();
        let mut is_late = false;
        for frame in frames.drain(..) {
            match state.pending.get_mut(frame.request_id) {
                Some(waiting) => wakers.extend(waiting.finish(Ok(frame))),
                // Nobody waits for it: its time had passed, or another answer came first.
                None => is_late = true,
            }
        }
        drop(state);
        if is_late {
            self.health.answered_late();
        }
        for waker in wakers.drain(..) {
            waker.wake();
        }
    }

    /// Takes no more requests, and ends those not handed to QUIC. The others may still be answered.
    fn stop_sending(&self, reason: &Arc<str>) {
        self.open.store(false, Ordering::Release);
        let mut guard = self.lock();
        let state = &mut *guard;
        let batch = state.batch;
        let mut wakers: Vec<Waker> = state.writer.take().into_iter().collect();
        for waiting in state.pending.iter_mut().filter(|waiting| waiting.batch >= batch) {
            wakers.extend(waiting.finish(Err(Loss::NotExecuted(reason.clone()))));
        }
        state.out = BytesMut::new();
        state.closed.get_or_insert_with(|| reason.clone());
        drop(guard);
        self.permits.close();
        for waker in wakers {
            waker.wake();
        }
    }

    /// Ends every request on the lane: no reply will come. `refused`: the node has not executed what it did not answer.
    fn fail(&self, reason: &Arc<str>, refused: bool) {
        self.stop_sending(reason);
        let mut state = self.lock();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        tracing::debug!(peer = %self.peer.addr, core = self.peer.core, %reason, "connection ended");
        let mut wakers = Vec::new();
        for waiting in state.pending.iter_mut() {
            let loss = if refused {
                Loss::NotExecuted(reason.clone())
            } else {
                Loss::Lost(reason.clone())
            };
            wakers.extend(waiting.finish(Err(loss)));
        }
        drop(state);
        self.sweeper.notify_one();
        for waker in wakers {
            waker.wake();
        }
    }

    /// Gives up what is past its deadline; says when to look again.
    fn sweep(&self, now: Instant) -> Next {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.ended {
            return Next::Never;
        }
        if let Some(earliest) = state.earliest.filter(|&earliest| earliest > now) {
            return Next::At(earliest);
        }
        let mut wakers = Vec::new();
        let mut earliest = None;
        for waiting in state.pending.iter_mut() {
            if matches!(waiting.progress, Progress::Done(_)) {
                continue;
            }
            if waiting.deadline <= now {
                wakers.extend(waiting.finish(Err(Loss::TimedOut { queued: true })));
            } else {
                earliest = Some(earliest.map_or(waiting.deadline, |earliest: Instant| earliest.min(waiting.deadline)));
            }
        }
        state.earliest = earliest;
        drop(guard);
        for waker in wakers {
            waker.wake();
        }
        earliest.map_or(Next::WhenWoken, Next::At)
    }
}

impl Waiting {
    /// Sets the result, once; gives the waker of whoever waits.
    fn finish(&mut self, result: Result<Frame, Loss>) -> Option<Waker> {
        match std::mem::replace(&mut self.progress, Progress::Done(result)) {
            Progress::Unanswered(waker) => waker,
            done @ Progress::Done(_) => {
                self.progress = done;
                None
            }
        }
    }
}

/// A request on the lane, until its reply.
struct InFlight<'c> {
    connection: &'c Connection,
    id: u64,
    /// `None` once the reply was taken.
    permit: Option<SemaphorePermit<'c>>,
}

impl Future for InFlight<'_> {
    type Output = Result<Frame, Loss>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.connection.lock();
        let waiting = state
            .pending
            .get_mut(self.id)
            .expect("invariant: only this future takes its entry out");
        if let Progress::Unanswered(waker) = &mut waiting.progress {
            match waker {
                Some(waker) => waker.clone_from(cx.waker()),
                None => *waker = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        let waiting = state.pending.remove(self.id);
        drop(state);
        self.permit = None;
        match waiting.map(|waiting| waiting.progress) {
            Some(Progress::Done(result)) => Poll::Ready(result),
            _ => unreachable!("invariant: checked above under the same lock"),
        }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else {
            return;
        };
        let mut state = self.connection.lock();
        let waiting = state.pending.remove(self.id);
        let in_buffer = waiting.is_some_and(|waiting| waiting.batch == state.batch);
        if in_buffer && state.closed.is_none() {
            state.orphans += permit.num_permits();
            permit.forget();
        }
    }
}

/// A stream of its own, reset when its request is cancelled: half a request must not look like a whole one.
struct CancelOnDrop(Option<SendStream>);

impl CancelOnDrop {
    async fn write(&mut self, request: Bytes) -> Result<(), quinn::WriteError> {
        let Some(send) = &mut self.0 else { return Ok(()) };
        send.write_chunk(request).await?;
        // Nothing follows, and the node can forget the stream when it has answered.
        let _ = send.finish();
        Ok(())
    }

    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(send) = &mut self.0 {
            let _ = send.reset(CANCELLED);
        }
    }
}

async fn write_lane(connection: Arc<Connection>, mut send: SendStream) {
    while let Some((batch, orphans)) = poll_fn(|cx| connection.poll_batch(cx)).await {
        if let Err(error) = send.write_chunk(batch).await {
            // A node that takes no more requests may have answered some: the reader goes on to the end of the lane.
            let reason: Arc<str> = match error {
                quinn::WriteError::ConnectionLost(error) => describe(&error).into(),
                quinn::WriteError::Stopped(code) => {
                    format!("the node takes no more requests: {}", code_name(code)).into()
                }
                other => other.to_string().into(),
            };
            connection.stop_sending(&reason);
            break;
        }
        if orphans > 0 {
            connection.permits.add_permits(orphans);
        }
    }
}

async fn read_lane(
    connection: Arc<Connection>,
    stopped: impl Future<Output = Result<Option<VarInt>, quinn::StoppedError>>,
    mut recv: RecvStream,
    mut decoder: Decoder,
) {
    match read_frames(&connection, &mut recv, &mut decoder).await {
        // The node has said all it had to say here. Replies on other streams may still be on their way.
        End::Finished => {
            let refused = tokio::select! {
                code = stopped => matches!(code, Ok(Some(code)) if code == SHUTTING_DOWN),
                () = connection.is_shut_down() => true,
                () = sleep(LAST_WORD) => false,
            };
            let reason = if refused {
                "the node is shutting down"
            } else {
                "the node ended the lane"
            };
            connection.fail(&reason.into(), refused);
        }
        End::Broken(code, reason) => {
            connection.quic.close(code, b"");
            connection.fail(&reason.into(), false);
        }
    }
}

/// How a lane ends.
enum End {
    Finished,
    /// Nothing that follows can be trusted. With what code to close, and why.
    Broken(VarInt, String),
}

/// Reads until the lane ends; says why it did.
async fn read_frames(connection: &Connection, recv: &mut RecvStream, decoder: &mut Decoder) -> End {
    let mut chunks = [const { Bytes::new() }; READ_CHUNKS];
    let (mut frames, mut wakers) = (Vec::new(), Vec::new());
    loop {
        let count = match recv.read_chunks(&mut chunks).await {
            Ok(Some(count)) => count,
            Ok(None) => return End::Finished,
            Err(ReadError::ConnectionLost(error)) => return End::Broken(NONE, describe(&error)),
            Err(error) => return End::Broken(NONE, format!("the lane was reset: {error}")),
        };
        for chunk in &mut chunks[..count] {
            decoder.feed(std::mem::take(chunk));
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => {
                        connection.complete(&mut frames, &mut wakers);
                        return End::Broken(PROTOCOL, format!("the node does not follow the protocol: {error}"));
                    }
                }
            }
        }
        connection.complete(&mut frames, &mut wakers);
    }
}

async fn sweep(connection: Arc<Connection>) {
    loop {
        match connection.sweep(Instant::now()) {
            Next::At(next) => tokio::select! {
                () = connection.sweeper.notified() => {}
                () = sleep_until(next) => {}
            },
            Next::WhenWoken => connection.sweeper.notified().await,
            Next::Never => break,
        }
    }
}

/// Why a stream gave no frame.
pub(crate) enum NoFrame {
    /// The node ended it.
    Ended,
    Broken(String),
}

/// The next frame of a stream that is read by one request alone.
pub(crate) async fn next_frame(recv: &mut RecvStream, decoder: &mut Decoder) -> Result<Frame, NoFrame> {
    loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => return Ok(frame),
            Ok(None) => {}
            Err(error) => {
                return Err(NoFrame::Broken(format!(
                    "the node does not follow the protocol: {error}"
                )));
            }
        }
        match recv.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => decoder.feed(chunk.bytes),
            Ok(None) => return Err(NoFrame::Ended),
            Err(error) => return Err(NoFrame::Broken(error.to_string())),
        }
    }
}

/// What ended a connection, in words.
pub(crate) fn describe(error: &quinn::ConnectionError) -> String {
    use quinn::ConnectionError as E;
    match error {
        E::ApplicationClosed(close) if close.reason.is_empty() => {
            format!("closed by the node: {}", code_name(close.error_code))
        }
        E::ApplicationClosed(close) => format!("closed by the node: {}", String::from_utf8_lossy(&close.reason)),
        E::ConnectionClosed(close) => format!("aborted by the node: {close}"),
        E::TimedOut => "the node has gone silent".to_owned(),
        E::Reset => "the node was restarted".to_owned(),
        E::LocallyClosed => "closed by this client".to_owned(),
        other => other.to_string(),
    }
}

/// An application error code in words.
fn code_name(code: VarInt) -> String {
    let known = close_code::ALL
        .iter()
        .find(|(known, _)| VarInt::from_u32(*known) == code);
    known.map_or_else(|| format!("code {code}"), |(_, name)| (*name).to_owned())
}
