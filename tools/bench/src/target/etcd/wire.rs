//! A non-blocking socket, plain or TLS, behind the traits that h2 asks for.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll};

use mio::net::TcpStream;
use rustls::ClientConnection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The socket, with or without TLS, as h2 wants it. Nobody is woken by it: the readiness loop polls the connection when the
/// socket is ready.
pub(super) struct Wire {
    pub(super) stream: TcpStream,
    pub(super) tls: Option<Box<ClientConnection>>,
}

fn pending<T>(result: io::Result<T>) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        other => Poll::Ready(other),
    }
}

/// Calls again what a signal interrupted.
fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Wire {
    fn read(&mut self, free: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return again(|| self.stream.read(free));
        };
        loop {
            match tls.reader().read(free) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if again(|| tls.read_tls(&mut self.stream))? == 0 {
                return Ok(0);
            }
            tls.process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    /// Sends what TLS holds.
    fn drain(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                again(|| tls.write_tls(&mut self.stream))?;
            }
        }
        Ok(())
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        pending(self.read(buffer.initialize_unfilled())).map_ok(|read| buffer.advance(read))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.tls.is_none() {
            return pending(again(|| self.stream.write(bytes)));
        }
        // What was taken before goes first, so that the session's buffer stays within one write.
        if let Err(error) = self.drain() {
            return pending(Err(error));
        }
        let Some(tls) = &mut self.tls else {
            return Poll::Pending;
        };
        let written = tls.writer().write(bytes)?;
        match self.drain() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(written)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        pending(self.drain())
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
