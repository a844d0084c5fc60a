//! What went over the wire? HTTP/1.1 messages read byte by byte, so that nothing is tidied on the way.
//!
//! Both ends of a test read with this: the client its responses, the backend its requests.

use std::io::{self, Read};

/// More than any head in a test; a peer that sends more has lost its way.
const HEAD_BYTES_MAX: usize = 1024 * 1024;

/// Bytes from a connection, looked at one message at a time.
pub(crate) struct Reader<S> {
    stream: S,
    buffer: Vec<u8>,
    start: usize,
}

/// A start line and its fields, in order and in the spelling of the sender.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) start_line: String,
    pub(crate) fields: Vec<(String, String)>,
}

/// How long a body is (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    Exactly(u64),
    Chunked,
    UntilClose,
}

impl Head {
    /// Every value of a field, in order, whatever its case.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        self.fields.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
    }

    /// The value of a field that is there once.
    #[track_caller]
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        let values = self.values(name);
        assert!(values.len() <= 1, "{name} is there more than once: {values:?}");
        values.first().copied()
    }

    /// What frames the body; `otherwise` when nothing does.
    pub(crate) fn length(&self, otherwise: Length) -> Length {
        if self.values("transfer-encoding").iter().any(|value| value.to_ascii_lowercase().ends_with("chunked")) {
            return Length::Chunked;
        }
        match self.values("content-length").first().map(|text| text.trim().parse()) {
            Some(Ok(bytes)) => Length::Exactly(bytes),
            Some(Err(_)) => Length::UntilClose,
            None => otherwise,
        }
    }

    /// Whether the sender closes, or asks to close, the connection after this message.
    pub(crate) fn closes(&self) -> bool {
        self.values("connection").iter().any(|value| value.to_ascii_lowercase().contains("close"))
    }

    fn parse(bytes: &[u8]) -> Self {
        let text: String = bytes.iter().copied().map(char::from).collect();
        let mut lines = text.split("\r\n").filter(|line| !line.is_empty());
        let start_line = lines.next().unwrap_or_default().to_owned();
        let fields = lines.map(|line| {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            (name.to_owned(), value.trim_matches([' ', '\t']).to_owned())
        });
        Self { start_line, fields: fields.collect() }
    }
}

impl<S: Read> Reader<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::new(), start: 0 }
    }

    pub(crate) fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The next head; `None` when the connection ends before its first byte.
    ///
    /// # Errors
    /// `UnexpectedEof` when it ends within the head, and what the stream says.
    pub(crate) fn head(&mut self) -> io::Result<Option<Head>> {
        let mut searched = 0;
        loop {
            let unread = &self.buffer[self.start..];
            if let Some(end) = find(&unread[searched..], b"\r\n\r\n") {
                let length = searched + end + 4;
                let head = Head::parse(&unread[..length]);
                self.start += length;
                return Ok(Some(head));
            }
            if HEAD_BYTES_MAX < unread.len() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a head without an end"));
            }
            searched = unread.len().saturating_sub(3);
            if self.fill()? == 0 {
                return if self.unread() == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// A whole body, its chunks joined.
    ///
    /// # Errors
    /// `UnexpectedEof` when the connection ends within it, and what the stream says.
    pub(crate) fn body(&mut self, length: Length) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        match length {
            Length::Exactly(bytes) => self.take(bytes, &mut body)?,
            Length::UntilClose => while self.take_some(u64::MAX, &mut body)? != 0 {},
            Length::Chunked => while self.chunk(&mut body)? {},
        }
        Ok(body)
    }

    /// One chunk, added to `body`; whether there are more (RFC 9112, section 7.1).
    ///
    /// # Errors
    /// As [`Self::body`]; `InvalidData` for a size that is none.
    pub(crate) fn chunk(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        let line = self.line()?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = u64::from_str_radix(size, 16)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("not a chunk size: {line:?}")))?;
        self.take(size, body)?;
        if size != 0 {
            self.line()?;
            return Ok(true);
        }
        while !self.line()?.is_empty() {}
        Ok(false)
    }

    /// At least one and at most `limit` bytes, added to `body`; how many, 0 at the end of the connection.
    ///
    /// # Errors
    /// What the stream says.
    pub(crate) fn take_some(&mut self, limit: u64, body: &mut Vec<u8>) -> io::Result<usize> {
        if self.unread() == 0 && self.fill()? == 0 {
            return Ok(0);
        }
        let count = self.unread().min(usize::try_from(limit).unwrap_or(usize::MAX));
        body.extend_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }

    fn take(&mut self, bytes: u64, body: &mut Vec<u8>) -> io::Result<()> {
        let mut missing = bytes;
        while missing != 0 {
            match self.take_some(missing, body)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => missing -= count as u64,
            }
        }
        Ok(())
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            let unread = &self.buffer[self.start..];
            if let Some(end) = find(unread, b"\r\n") {
                let line = unread[..end].iter().copied().map(char::from).collect();
                self.start += end + 2;
                return Ok(line);
            }
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn unread(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn fill(&mut self) -> io::Result<usize> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let mut bytes = [0; 16 * 1024];
        let count = loop {
            match self.stream.read(&mut bytes) {
                // By a machine that was put to sleep and woke up: reads with a timeout end by that (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
