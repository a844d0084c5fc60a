//! How do lines get out? In the background, many at a time; what nobody reads or nothing can hold is dropped and counted,
//! never waited for.

use std::io::{self, Write};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use prometheus::IntCounter;

/// Lines gather for this long before they are written in one system call: a write and a wake-up for each would
/// cost more than the request that it tells of.
const GATHER: Duration = Duration::from_millis(50);

/// When the reader of our output is stuck, lines beyond this are dropped and counted.
const WAITING_BYTES_MAX: usize = 4 << 20;

/// At the end, how long the last lines may take to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where lines are left; cheap to clone.
#[derive(Clone, Debug)]
pub struct Lines {
    shared: Arc<Shared>,
}

/// Writes what is left in [`Lines`]; dropping it writes the rest.
#[derive(Debug)]
pub struct LineWriter {
    shared: Arc<Shared>,
    done: Mutex<mpsc::Receiver<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    something: Condvar,
    dropped: OnceLock<IntCounter>,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    dropped: u64,
    closed: bool,
}

impl Lines {
    /// Lines to `output`, and the thread that writes them.
    pub fn to(name: &str, output: impl Write + Send + 'static) -> io::Result<(Self, LineWriter)> {
        let shared = Arc::new(Shared::default());
        let (reader, (finished, done)) = (Arc::clone(&shared), mpsc::channel());
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            reader.drain(output);
            let _ = finished.send(());
        })?;
        Ok((Self { shared: Arc::clone(&shared) }, LineWriter { shared, done: Mutex::new(done) }))
    }

    /// Leaves what `write` appends: whole lines.
    pub fn push(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut waiting = self.shared.waiting.lock();
        if WAITING_BYTES_MAX < waiting.lines.len() {
            waiting.dropped += 1;
            return;
        }
        let was_empty = waiting.lines.is_empty();
        write(&mut waiting.lines);
        drop(waiting);
        if was_empty {
            self.shared.something.notify_one();
        }
    }
}

/// For `tracing`, which writes each event whole.
impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(|lines| lines.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn count_dropped(&self, lines: u64) {
        if let Some(counter) = self.dropped.get() {
            counter.inc_by(lines);
        }
    }

    fn drain(&self, mut output: impl Write) {
        let (mut lines, mut fails) = (Vec::new(), false);
        loop {
            let mut waiting = self.waiting.lock();
            while waiting.lines.is_empty() && !waiting.closed {
                self.something.wait(&mut waiting);
            }
            self.something.wait_while_for(&mut waiting, |waiting| !waiting.closed, GATHER);
            lines.clear();
            std::mem::swap(&mut lines, &mut waiting.lines);
            let (dropped, closed) = (std::mem::take(&mut waiting.dropped), waiting.closed);
            drop(waiting);
            if 0 < dropped {
                tracing::warn!(dropped, "log lines dropped: nobody reads them");
            }
            // A closed or full output must not touch the traffic. It is told once, where perhaps another output is.
            let written = output.write_all(&lines).and_then(|()| output.flush());
            let lost = if written.is_ok() { 0 } else { memchr::memchr_iter(b'\n', &lines).count() as u64 };
            if let Err(error) = &written
                && !fails
            {
                tracing::error!(%error, "log lines cannot be written, and are dropped");
            }
            fails = written.is_err();
            self.count_dropped(dropped + lost);
            if closed {
                return;
            }
        }
    }
}

impl LineWriter {
    /// Lines that are dropped from now on are counted here.
    pub fn count_dropped(&self, counter: IntCounter) {
        let _ = self.shared.dropped.set(counter);
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        self.shared.waiting.lock().closed = true;
        self.shared.something.notify_one();
        // An output that nobody reads must not keep the process.
        let _ = self.done.get_mut().recv_timeout(LAST_LINES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe that nobody reads: writing never ends.
    struct Stuck(mpsc::Sender<()>, mpsc::Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(());
            let _ = self.1.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_output_that_nobody_reads_holds_up_nobody() {
        let (writing, is_writing) = mpsc::channel();
        let (_never, released) = mpsc::channel();
        let (lines, writer) = Lines::to("test", Stuck(writing, released)).unwrap();
        lines.push(|line| line.extend_from_slice(b"first\n"));
        is_writing.recv().unwrap();
        for _ in 0..3 * WAITING_BYTES_MAX / 1024 {
            lines.push(|line| line.resize(line.len() + 1024, b'x'));
        }
        let waiting = lines.shared.waiting.lock();
        assert!(waiting.lines.len() <= WAITING_BYTES_MAX + 1024, "memory stays bounded");
        assert!(0 < waiting.dropped, "and what is dropped is counted");
        drop(waiting);
        drop(writer);
    }

    /// As a disk is that is full now and then.
    struct Full(Arc<std::sync::atomic::AtomicBool>);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let is_full = self.0.load(std::sync::atomic::Ordering::SeqCst);
            if is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(bytes.len()) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_an_output_does_not_take_is_counted() {
        let is_full = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (lines, writer) = Lines::to("test", Full(Arc::clone(&is_full))).unwrap();
        let dropped = IntCounter::new("dropped", "lines").unwrap();
        writer.count_dropped(dropped.clone());
        lines.push(|line| line.extend_from_slice(b"one\ntwo\n"));
        lines.push(|line| line.extend_from_slice(b"three\n"));
        while dropped.get() < 3 {
            std::thread::yield_now();
        }
        is_full.store(false, std::sync::atomic::Ordering::SeqCst);
        lines.push(|line| line.extend_from_slice(b"four\n"));
        drop(writer);
        assert_eq!(dropped.get(), 3, "what is written is not dropped");
    }
}
