//! One HTTP/2 stream, as pingora wants to see a client: a request that is here, a body to be read, and a response.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::HttpTask;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session;
use pingora::protocols::http::date::get_cached_date;
use pingora::protocols::http::v2::write_body;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, OrErr, Result};

use crate::proxy::context::{self, Connection};
use crate::proxy::streams::InFlight;

/// So much of a body is kept for another attempt, as of one that comes in HTTP/1.
const BODY_KEPT_BYTES: usize = 64 << 10;

/// Fields that HTTP/2 has no place for (RFC 9113, section 8.2.2).
const OF_ONE_CONNECTION: [HeaderName; 5] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

pub(super) struct Stream {
    request: RequestHeader,
    body: RecvStream,
    body_is_read: bool,
    kept: Kept,
    respond: SendResponse<Bytes>,
    /// From the head of the response on.
    sending: Option<SendStream<Bytes>>,
    response: Option<Box<ResponseHeader>>,
    response_is_whole: bool,
    is_answered: Arc<AtomicBool>,
    in_flight: Arc<InFlight>,
    bytes_read: usize,
    bytes_sent: usize,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
    drain_timeout: Option<Duration>,
}

/// The beginning of the body, for another attempt.
enum Kept {
    No,
    Bytes(BytesMut),
    TooMuch,
}

impl Stream {
    /// What the application must know of `connection` it finds among the extensions of the request.
    pub(super) fn new(
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
        connection: &Arc<Connection>,
    ) -> Self {
        let (mut parts, body) = request.into_parts();
        let in_flight = Arc::<InFlight>::default();
        let how_it_came = context::Request { connection: Arc::clone(connection), in_flight: Arc::clone(&in_flight) };
        parts.extensions.insert(how_it_came);
        Self {
            request: RequestHeader::from(parts),
            body,
            body_is_read: false,
            kept: Kept::No,
            respond,
            sending: None,
            response: None,
            response_is_whole: false,
            is_answered: Arc::default(),
            in_flight,
            bytes_read: 0,
            bytes_sent: 0,
            read_timeout: None,
            write_timeout: None,
            drain_timeout: None,
        }
    }

    /// Becomes true with the head of the response.
    pub(super) fn is_answered(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_answered)
    }

    pub(super) fn in_flight(&self) -> Arc<InFlight> {
        Arc::clone(&self.in_flight)
    }

    /// While a response is on its way, its pauses are what counts: a client that only listens says nothing.
    fn patience(&self) -> Option<Duration> {
        let is_responding = self.response.is_some() && !self.response_is_whole;
        self.read_timeout.filter(|_| !is_responding)
    }

    fn body_is_done(&self) -> bool {
        self.body_is_read || self.body.is_end_stream()
    }

    /// Waits until the client takes its request back, the connection is gone, or the request is cut.
    async fn gone(&mut self) -> Box<Error> {
        let taken_back = std::future::poll_fn(|task| {
            if let Poll::Ready(Err(error)) = self.in_flight.may_read() {
                return Poll::Ready(Error::because(ErrorType::ReadError, "while waiting for the client", error));
            }
            let reset = match &mut self.sending {
                Some(sending) => sending.poll_reset(task),
                None => self.respond.poll_reset(task),
            };
            let cause = ready!(reset).map_or_else(|error| error, h2::Error::from);
            Poll::Ready(Error::because(ErrorType::H2Error, "the client took its request back", cause))
        });
        taken_back.await
    }

    fn send_head(&mut self, mut head: Box<ResponseHeader>, is_last: bool) -> Result<()> {
        if self.response.is_some() || self.response_is_whole {
            return Ok(()); // a second answer: there is one already
        }
        for name in &OF_ONE_CONNECTION {
            head.remove_header(name);
        }
        if head.status.is_informational() {
            // 101 means nothing here, and whoever sent it is no backend to rely on: what follows will fail.
            if head.status != StatusCode::SWITCHING_PROTOCOLS {
                let head = Response::from_parts(head.as_owned_parts(), ());
                self.respond.send_informational(head).or_err(ErrorType::WriteError, "while informing the client")?;
            }
            return Ok(());
        }
        head.insert_header(header::DATE, get_cached_date())?;
        let response = Response::from_parts(head.as_owned_parts(), ());
        let sending =
            self.respond.send_response(response, is_last).or_err(ErrorType::WriteError, "while writing a head")?;
        self.sending = Some(sending);
        self.response = Some(head);
        self.response_is_whole = is_last;
        self.is_answered.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn send_body(&mut self, bytes: Bytes, is_last: bool) -> Result<()> {
        if self.response_is_whole || (bytes.is_empty() && !is_last) {
            return Ok(());
        }
        let Some(sending) = &mut self.sending else {
            return Error::e_explain(ErrorType::InternalError, "a body before its head");
        };
        let count = bytes.len();
        write_body(sending, bytes, is_last, self.write_timeout).await?;
        self.bytes_sent += count;
        self.response_is_whole = is_last;
        Ok(())
    }

    fn send_trailers(&mut self, mut trailers: HeaderMap) -> Result<()> {
        if self.response_is_whole {
            return Ok(());
        }
        let Some(sending) = &mut self.sending else {
            return Error::e_explain(ErrorType::InternalError, "trailers before the head");
        };
        for name in &OF_ONE_CONNECTION {
            trailers.remove(name);
        }
        sending.send_trailers(trailers).or_err(ErrorType::WriteError, "while writing trailers")?;
        self.response_is_whole = true;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if let Some(sending) = self.sending.as_mut().filter(|_| !self.response_is_whole) {
            sending.send_data(Bytes::new(), true).or_err(ErrorType::WriteError, "while ending a response")?;
            self.response_is_whole = true;
        }
        Ok(())
    }

    /// Whether the response is whole.
    async fn send(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let mut is_whole = false;
        for task in tasks {
            is_whole |= match task {
                HttpTask::Header(head, is_last) => {
                    self.send_head(head, is_last)?;
                    is_last
                }
                HttpTask::Body(bytes, is_last) => {
                    self.send_body(bytes.unwrap_or_default(), is_last).await?;
                    is_last
                }
                HttpTask::Trailer(Some(trailers)) => {
                    self.send_trailers(*trailers)?;
                    true
                }
                HttpTask::Trailer(None) | HttpTask::Done => true,
                HttpTask::UpgradedBody(..) => {
                    return Error::e_explain(ErrorType::InternalError, "another protocol inside of HTTP/2");
                }
                HttpTask::Failed(error) => return Err(error),
            };
        }
        if is_whole {
            self.end()?;
        }
        Ok(is_whole)
    }
}

#[async_trait]
impl Session for Stream {
    fn req_header(&self) -> &RequestHeader {
        &self.request
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    /// Trailers are dropped, as in HTTP/1: no rule has looked at them.
    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        if self.body_is_read {
            return Ok(None);
        }
        let patience = self.patience();
        let next = std::future::poll_fn(|task| {
            if let Poll::Ready(Err(error)) = self.in_flight.may_read() {
                return Poll::Ready(Err(Error::because(ErrorType::ReadError, "while reading a body", error)));
            }
            let read = ready!(self.body.poll_data(task)).transpose();
            Poll::Ready(read.or_err(ErrorType::ReadError, "while reading a body"))
        });
        let next = match patience {
            Some(limit) => match tokio::time::timeout(limit, next).await {
                Ok(next) => next,
                Err(_) => return Error::e_explain(ErrorType::ReadTimedout, "while reading a body"),
            },
            None => next.await,
        };
        let Some(bytes) = next? else {
            self.body_is_read = true;
            return Ok(None);
        };
        self.bytes_read += bytes.len();
        match &mut self.kept {
            Kept::Bytes(kept) if kept.len() + bytes.len() <= BODY_KEPT_BYTES => kept.extend_from_slice(&bytes),
            Kept::Bytes(_) => self.kept = Kept::TooMuch,
            Kept::No | Kept::TooMuch => {}
        }
        // It fails when the stream is gone, which the next read says.
        let _ = self.body.flow_control().release_capacity(bytes.len());
        Ok(Some(bytes))
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if no_body_expected || self.body_is_done() {
            return Err(self.gone().await);
        }
        self.read_body_bytes().await
    }

    /// Nothing has to be read away here: the next request is another stream.
    async fn drain_request_body(&mut self) -> Result<()> {
        Ok(())
    }

    fn is_body_done(&mut self) -> bool {
        self.body_is_done()
    }

    fn is_body_empty(&mut self) -> bool {
        self.bytes_read == 0 && self.body_is_done()
    }

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, is_last: bool) -> Result<()> {
        self.send_head(head, is_last).map_err(|error| error.into_down())
    }

    async fn write_response_header_ref(&mut self, head: &ResponseHeader, is_last: bool) -> Result<()> {
        self.send_head(Box::new(head.clone()), is_last).map_err(|error| error.into_down())
    }

    async fn write_body(&mut self, bytes: Bytes, is_last: bool) -> Result<()> {
        self.send_body(bytes, is_last).await.map_err(|error| error.into_down())
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.send_trailers(trailers).map_err(|error| error.into_down())
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        self.send(tasks).await.map_err(|mut error| {
            // What failed with the backend is told as that.
            if *error.esource() == pingora::ErrorSource::Unset {
                error.as_down();
            }
            error
        })
    }

    async fn finish(&mut self) -> Result<()> {
        self.end().map_err(|error| error.into_down())
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.response.as_deref()
    }

    async fn shutdown(&mut self, _: u32, _: &str) {
        if !self.response_is_whole {
            self.respond.send_reset(Reason::INTERNAL_ERROR);
        }
    }

    fn enable_retry_buffering(&mut self) {
        if matches!(self.kept, Kept::No) {
            self.kept = Kept::Bytes(BytesMut::new());
        }
    }

    fn retry_buffer_truncated(&self) -> bool {
        matches!(self.kept, Kept::TooMuch)
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        match &self.kept {
            Kept::Bytes(kept) if !kept.is_empty() => Some(kept.clone().freeze()),
            Kept::Bytes(_) | Kept::No | Kept::TooMuch => None,
        }
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read_timeout = timeout;
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.read_timeout
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write_timeout = timeout;
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.write_timeout
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.drain_timeout = timeout;
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.drain_timeout
    }

    fn request_summary(&self) -> String {
        format!("{} {}", self.request.method, self.request.uri.path())
    }

    fn body_bytes_sent(&self) -> usize {
        self.bytes_sent
    }

    fn body_bytes_read(&self) -> usize {
        self.bytes_read
    }

    // The rest belongs to the connection, which `Connection` tells of, or to protocols of other kinds.

    fn digest(&self) -> Option<&Digest> {
        None
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        None
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        None
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        None
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        Bytes::new()
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_reader(&mut self) -> Option<Messages> {
        None
    }

    fn restore_custom_message_reader(&mut self, _: Messages) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}

/// Of protocols that have messages beside requests.
type Messages = Box<dyn futures_core::Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>;
