//! How do the sessions survive a restart? A file follows the map, a moment behind it; what must not come back waits.
//!
//! One thread writes. Whatever changed in the meantime is one transaction, on the disk when it is committed: after
//! [`COMMIT_INTERVAL`] at the latest, at once when somebody waits in [`SessionFile::settle`]. Changes are gathered by
//! session, so that what waits is never more than there are sessions, however slow the disk.
//!
//! When a write fails, what it held is kept and tried again on a newly opened file, until it works or the process ends.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use redb::backends::FileBackend;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use tokio::sync::watch;

use crate::session::id::{KEY_STORED_BYTES, SessionKey};
use crate::session::store::{EndEvent, Ending, StoreError};

/// An open file and the thread that writes it. Its end flushes.
pub(super) struct SessionFile {
    desk: Arc<Desk>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// One thing that a file held when it was opened.
pub(super) enum Kept<'a> {
    Session { key: SessionKey, expires: u64, record: &'a [u8] },
    End { number: u64, part: u16, event: EndEvent },
}

/// What changes together; nothing at all where there is no file. All that is noted with one value is in one
/// transaction.
pub(super) struct Notes<'a>(Option<(&'a Desk, MutexGuard<'a, Pending>)>);

/// Why a file cannot be used. Nothing of it was changed.
#[derive(Debug)]
pub enum FileError {
    /// Another process has it.
    Taken(PathBuf),
    /// It is no session file, or no longer one.
    Damaged(PathBuf, String),
    /// It was written by a later Cloakroom.
    Newer(PathBuf),
    /// No such folder, no permission, no disk.
    Unreachable(PathBuf, io::Error),
}

/// A crash loses what was created and touched in this time; nobody waits for it.
const COMMIT_INTERVAL: Duration = Duration::from_millis(50);
/// A file that could not be written is opened anew after this long.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// A disk that takes longer does not answer.
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// The map is in memory already: redb needs few pages besides.
const PAGE_CACHE_BYTES: usize = 16 << 20;

/// The layout of what follows.
const LAYOUT: u64 = 1;
const ABOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("about");
/// By key: when it expires (Unix ms, 8 bytes, big-endian), then the record as the codec writes it.
const SESSIONS: TableDefinition<'_, &[u8; KEY_STORED_BYTES], &[u8]> = TableDefinition::new("sessions");
/// Ends that nobody was told of, by number: MessagePack of [`EndRow`].
const ENDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("ends");
const EXPIRY_BYTES: usize = 8;

/// Part, session, user, ending, time.
type EndRow = (u16, String, String, String, u64);

/// Where changes are handed over.
struct Desk {
    pending: Mutex<Pending>,
    wake: Condvar,
    progress: watch::Sender<Progress>,
}

struct Pending {
    changes: Changes,
    /// Of the batch that is being gathered; the first is 1.
    batch: u64,
    since: Option<Instant>,
    is_urgent: bool,
    is_closing: bool,
}

#[derive(Default)]
struct Changes {
    sessions: HashMap<SessionKey, Change>,
    /// None: it has been told.
    ends: BTreeMap<u64, Option<(u16, EndEvent)>>,
}

enum Change {
    Begun { expires: u64, record: Vec<u8> },
    Touched { expires: u64 },
    Ended,
}

#[derive(Clone, Default)]
struct Progress {
    /// All batches up to this one are on the disk.
    written: u64,
    failure: Option<Arc<str>>,
    is_closed: bool,
}

impl SessionFile {
    /// Opens or creates it, and gives all that is in it to `take`.
    pub(super) fn open(path: &Path, take: impl FnMut(Kept<'_>)) -> Result<Self, FileError> {
        Self::open_with(path, Box::new(FileOpener(path.to_owned())), take)
    }

    fn open_with(path: &Path, opener: Box<dyn Opener>, mut take: impl FnMut(Kept<'_>)) -> Result<Self, FileError> {
        let is_new = !path.exists();
        let database = opener.open(Existence::MayBeNew)?;
        if is_new {
            // Else a power cut could leave the file without its name.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let synced = File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|cause| FileError::Unreachable(path.to_owned(), cause))?;
        }
        guarded(|| read(&database, &mut take)).map_err(|error| cannot_use(path, error))?;

        let pending =
            Pending { changes: Changes::default(), batch: 1, since: None, is_urgent: false, is_closing: false };
        let (progress, _) = watch::channel(Progress::default());
        let desk = Arc::new(Desk { pending: Mutex::new(pending), wake: Condvar::new(), progress });
        let writer =
            Writer { desk: Arc::clone(&desk), opener, database: Some(database), path: path.display().to_string() };
        let thread = std::thread::Builder::new().name("session-file".to_owned()).spawn(move || writer.run());
        let thread = thread.map_err(|cause| FileError::Unreachable(path.to_owned(), cause))?;
        Ok(Self { desk, writer: Mutex::new(Some(thread)) })
    }

    /// Takes the locks of the desk: after those of the map, never before.
    pub(super) fn notes(&self) -> Notes<'_> {
        Notes(Some((&self.desk, self.desk.pending.lock())))
    }

    /// Returns when all that was noted before is on the disk.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when it is not, and cannot be at the moment.
    pub(super) async fn settle(&self) -> Result<(), StoreError> {
        let batch = {
            let mut pending = self.desk.pending.lock();
            if pending.changes.is_empty() {
                pending.batch - 1
            } else {
                pending.is_urgent = true;
                self.desk.wake.notify_one();
                pending.batch
            }
        };
        let mut progress = self.desk.progress.subscribe();
        let settled =
            |progress: &Progress| batch <= progress.written || progress.failure.is_some() || progress.is_closed;
        if settled(&progress.borrow()) {
            return progress.borrow().outcome(batch);
        }
        match tokio::time::timeout(SETTLE_MAX, progress.wait_for(settled)).await {
            Ok(Ok(progress)) => progress.outcome(batch),
            Ok(Err(_)) | Err(_) => Err(StoreError::Unavailable("the session file is not written in time".into())),
        }
    }

    /// Writes what is left, and lets go of the file.
    pub(super) fn close(&self) {
        self.desk.pending.lock().is_closing = true;
        self.desk.wake.notify_one();
        if let Some(writer) = self.writer.lock().take() {
            let _ = writer.join();
        }
    }
}

impl Drop for SessionFile {
    fn drop(&mut self) {
        self.close();
    }
}

impl Progress {
    fn outcome(&self, batch: u64) -> Result<(), StoreError> {
        match &self.failure {
            _ if batch <= self.written => Ok(()),
            Some(cause) => Err(StoreError::Unavailable(cause.as_ref().into())),
            None => Err(StoreError::Unavailable("the session file is closed".into())),
        }
    }
}

impl Notes<'_> {
    /// Where there is no file.
    pub(super) fn nowhere() -> Self {
        Self(None)
    }

    /// All of it, whether it is new or another than before.
    pub(super) fn begun(&mut self, key: &SessionKey, expires: u64, record: Vec<u8>) {
        self.note(|changes| {
            changes.sessions.insert(key.clone(), Change::Begun { expires, record });
        });
    }

    pub(super) fn touched(&mut self, key: &SessionKey, expires: u64) {
        self.note(|changes| match changes.sessions.get_mut(key) {
            Some(Change::Begun { expires: at, .. } | Change::Touched { expires: at }) => *at = expires,
            Some(Change::Ended) => {}
            None => {
                changes.sessions.insert(key.clone(), Change::Touched { expires });
            }
        });
    }

    pub(super) fn ended(&mut self, key: &SessionKey) {
        self.note(|changes| {
            changes.sessions.insert(key.clone(), Change::Ended);
        });
    }

    /// Somebody is to be told.
    pub(super) fn end(&mut self, number: u64, part: u16, event: &EndEvent) {
        self.note(|changes| {
            changes.ends.insert(number, Some((part, event.clone())));
        });
    }

    pub(super) fn told(&mut self, number: u64) {
        self.note(|changes| {
            changes.ends.insert(number, None);
        });
    }

    fn note(&mut self, note: impl FnOnce(&mut Changes)) {
        let Some((desk, pending)) = &mut self.0 else { return };
        note(&mut pending.changes);
        if pending.since.is_none() {
            pending.since = Some(Instant::now());
            desk.wake.notify_one();
        }
    }
}

impl Changes {
    fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.ends.is_empty()
    }

    /// Puts back what could not be written, under what has changed since.
    fn put_under(&mut self, older: Self) {
        for (key, change) in older.sessions {
            let Some(newer) = self.sessions.get_mut(&key) else {
                self.sessions.insert(key, change);
                continue;
            };
            if let (Change::Touched { expires }, Change::Begun { record, .. }) = (&*newer, change) {
                *newer = Change::Begun { expires: *expires, record };
            }
        }
        for (number, end) in older.ends {
            self.ends.entry(number).or_insert(end);
        }
    }
}

/// How the file is opened, the first time and after a failure.
trait Opener: Send {
    fn open(&self, existence: Existence) -> Result<Database, FileError>;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Existence {
    MayBeNew,
    /// After a failure: what was in it would be missing from another one.
    Required,
}

struct FileOpener(PathBuf);

impl Opener for FileOpener {
    fn open(&self, existence: Existence) -> Result<Database, FileError> {
        open_database(&self.0, open_file(&self.0, existence)?)
    }
}

fn open_file(path: &Path, existence: Existence) -> Result<FileBackend, FileError> {
    let unreachable = |cause| FileError::Unreachable(path.to_owned(), cause);
    let may_be_new = existence == Existence::MayBeNew;
    // Records tell who the users are: nobody else may read them.
    let opened = OpenOptions::new().read(true).write(true).create(may_be_new).mode(0o600).open(path);
    let file = opened.map_err(unreachable)?;
    let permissions = file.metadata().map_err(unreachable)?.mode() & 0o777;
    if permissions & 0o077 != 0 {
        let file = path.display();
        tracing::warn!(%file, permissions = format_args!("{permissions:o}"), "the session file is open to others");
    }
    FileBackend::new(file).map_err(|error| cannot_use(path, error.into()))
}

fn open_database(path: &Path, file: impl StorageBackend) -> Result<Database, FileError> {
    let opened = guarded(|| {
        let database = Builder::new()
            .set_cache_size(PAGE_CACHE_BYTES)
            // A page that is not as it was written is found now, not when it is used.
            .set_check_integrity_on_open(true)
            .create_with_backend(file)?;
        let layout = claim(&database)?;
        Ok((database, layout))
    });
    match opened {
        Ok((database, Layout::Ours)) => Ok(database),
        Ok((_, Layout::Newer)) => Err(FileError::Newer(path.to_owned())),
        Ok((_, Layout::Foreign)) => Err(FileError::Damaged(path.to_owned(), "it holds something else".to_owned())),
        Err(error) => Err(cannot_use(path, error)),
    }
}

enum Layout {
    Ours,
    Newer,
    Foreign,
}

/// A new file becomes ours; in an old one the layout must be.
fn claim(database: &Database) -> Result<Layout, redb::Error> {
    let transaction = database.begin_write()?;
    let is_new = transaction.list_tables()?.next().is_none();
    let layout = {
        let mut about = transaction.open_table(ABOUT)?;
        let layout = about.get("layout")?.map(|layout| layout.value());
        match layout {
            Some(LAYOUT) => Layout::Ours,
            Some(_) => Layout::Newer,
            None if is_new => {
                about.insert("layout", LAYOUT)?;
                Layout::Ours
            }
            None => Layout::Foreign,
        }
    };
    match layout {
        Layout::Ours => {
            transaction.open_table(SESSIONS)?;
            transaction.open_table(ENDS)?;
            transaction.commit()?;
        }
        Layout::Newer | Layout::Foreign => transaction.abort()?,
    }
    Ok(layout)
}

fn read(database: &Database, take: &mut impl FnMut(Kept<'_>)) -> Result<(), redb::Error> {
    let transaction = database.begin_read()?;
    for row in transaction.open_table(SESSIONS)?.iter()? {
        let (key, value) = row?;
        // What is no key of ours nobody can come with.
        let Some(key) = SessionKey::of_bytes(key.value()) else { continue };
        // No expiry: it has expired, and is cleared away like all that has.
        let (expires, record) = value.value().split_first_chunk::<EXPIRY_BYTES>().unwrap_or((&[0; 8], &[]));
        take(Kept::Session { key, expires: u64::from_be_bytes(*expires), record });
    }
    for row in transaction.open_table(ENDS)?.iter()? {
        let (number, value) = row?;
        let number = number.value();
        let Ok((part, session, user, ending, at)) = rmp_serde::from_slice::<EndRow>(value.value()) else { continue };
        let Some(ending) = Ending::of_label(&ending) else { continue };
        let token = number.to_be_bytes().to_vec();
        take(Kept::End { number, part, event: EndEvent { token, session, user, ending, at } });
    }
    Ok(())
}

struct Writer {
    desk: Arc<Desk>,
    opener: Box<dyn Opener>,
    /// None after a failure, until it could be opened again.
    database: Option<Database>,
    path: String,
}

impl Writer {
    fn run(mut self) {
        while let Some((changes, batch)) = self.next() {
            match self.write(&changes) {
                Ok(()) => self.succeed(batch),
                Err(error) => self.fail(changes, &*error),
            }
        }
        // Before anybody is told that it is closed: whoever waited may want to open it.
        self.database = None;
        self.desk.progress.send_modify(|progress| progress.is_closed = true);
    }

    /// The changes of one transaction; nothing when all is written and it is time to end.
    fn next(&self) -> Option<(Changes, u64)> {
        let desk = &self.desk;
        let is_failing = desk.progress.borrow().failure.is_some();
        let mut pending = desk.pending.lock();
        let retry_at = Instant::now() + RETRY_INTERVAL;
        loop {
            let Some(since) = pending.since else {
                if pending.is_closing {
                    return None;
                }
                desk.wake.wait(&mut pending);
                continue;
            };
            let due = if is_failing { retry_at } else { since + COMMIT_INTERVAL };
            let is_due = pending.is_closing || pending.is_urgent && !is_failing;
            if is_due || desk.wake.wait_until(&mut pending, due).timed_out() {
                break;
            }
        }
        let batch = pending.batch;
        pending.batch += 1;
        pending.since = None;
        pending.is_urgent = false;
        Some((std::mem::take(&mut pending.changes), batch))
    }

    fn write(&mut self, changes: &Changes) -> Result<(), Box<dyn Error>> {
        let database = match self.database.take() {
            Some(database) => database,
            None => self.opener.open(Existence::Required)?,
        };
        // After an error redb wants to be opened anew: only a good one is kept.
        guarded(|| commit(&database, changes))?;
        self.database = Some(database);
        Ok(())
    }

    fn succeed(&self, batch: u64) {
        let was_failing = self.desk.progress.borrow().failure.is_some();
        self.desk.progress.send_modify(|progress| {
            progress.written = batch;
            progress.failure = None;
        });
        if was_failing {
            tracing::info!(file = self.path, "the session file is written again; nothing of it is missing");
        }
    }

    fn fail(&self, changes: Changes, error: &dyn Error) {
        let was_failing = self.desk.progress.borrow().failure.is_some();
        if !was_failing {
            tracing::error!(
                file = self.path,
                cause = %error,
                "the session file cannot be written: sessions go on in memory, logouts get 503 and could be undone by a \
                 restart, until it can be written again"
            );
        }
        let mut pending = self.desk.pending.lock();
        pending.changes.put_under(changes);
        if pending.is_closing {
            let lost = pending.changes.sessions.len();
            tracing::error!(file = self.path, cause = %error, lost, "changes of sessions are lost: the file cannot be written");
            pending.changes = Changes::default();
            pending.since = None;
        } else {
            pending.since.get_or_insert_with(Instant::now);
        }
        drop(pending);
        self.desk.progress.send_modify(|progress| progress.failure = Some(error.to_string().into()));
    }
}

fn commit(database: &Database, changes: &Changes) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut sessions = transaction.open_table(SESSIONS)?;
        for (key, change) in &changes.sessions {
            let key = &key.to_bytes();
            match change {
                Change::Begun { expires, record } => {
                    sessions.insert(key, row(*expires, record).as_slice())?;
                }
                Change::Touched { expires } => {
                    let touched =
                        sessions.get(key)?.and_then(|old| Some(row(*expires, old.value().get(EXPIRY_BYTES..)?)));
                    if let Some(touched) = touched {
                        sessions.insert(key, touched.as_slice())?;
                    }
                }
                Change::Ended => {
                    sessions.remove(key)?;
                }
            }
        }
        let mut ends = transaction.open_table(ENDS)?;
        for (number, end) in &changes.ends {
            match end {
                Some((part, event)) => {
                    let EndEvent { token: _, session, user, ending, at } = event;
                    let row = rmp_serde::to_vec(&(part, session, user, ending.label(), at));
                    ends.insert(number, row.map_err(|_| redb::Error::ValueTooLarge(user.len()))?.as_slice())?;
                }
                None => {
                    ends.remove(number)?;
                }
            }
        }
    }
    // Its durability is `Immediate` unless told otherwise: synchronized when this returns.
    transaction.commit()?;
    Ok(())
}

fn row(expires: u64, record: &[u8]) -> Vec<u8> {
    [expires.to_be_bytes().as_slice(), record].concat()
}

/// redb panics over some damaged files; that is an error like others, and no end of the process.
fn guarded<T>(work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, redb::Error> {
    let panicked = |_| Err(redb::Error::Corrupted("it contradicts itself".to_owned()));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

fn cannot_use(path: &Path, error: redb::Error) -> FileError {
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => FileError::Taken(path),
        // So redb says that it is no file of its own.
        redb::Error::Io(cause) if cause.kind() == io::ErrorKind::InvalidData => {
            FileError::Damaged(path, cause.to_string())
        }
        redb::Error::Io(cause) => FileError::Unreachable(path, cause),
        other => FileError::Damaged(path, other.to_string()),
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken(path) => write!(
                f,
                "store.memory.file {} is open in another process: end that one, or give each its own file; several \
                 Cloakrooms that are to share sessions need [store.redis]",
                path.display()
            ),
            Self::Damaged(path, cause) => write!(
                f,
                "store.memory.file {} is damaged, or no session file: {cause}; move it away to begin without sessions: \
                 all users have to log in again",
                path.display()
            ),
            Self::Newer(path) => write!(
                f,
                "store.memory.file {} was written by a newer Cloakroom: run that one, or move the file away: all users \
                 have to log in again",
                path.display()
            ),
            Self::Unreachable(path, _) => write!(
                f,
                "store.memory.file {} cannot be opened: its folder must exist, and be writable for this user",
                path.display()
            ),
        }
    }
}

impl Error for FileError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unreachable(_, cause) => Some(cause),
            Self::Taken(_) | Self::Damaged(..) | Self::Newer(_) => None,
        }
    }
}

impl fmt::Debug for SessionFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionFile").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::super::MemoryStore;
    use super::*;
    use crate::session::id::SessionId;
    use crate::session::store::SessionStore;

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    fn sessions_in(path: &Path) -> Vec<(SessionKey, u64, Vec<u8>)> {
        let mut sessions = Vec::new();
        let take = |kept: Kept<'_>| {
            if let Kept::Session { key, expires, record } = kept {
                sessions.push((key, expires, record.to_vec()));
            }
        };
        SessionFile::open(path, take).unwrap();
        sessions
    }

    /// A disk that can be full.
    #[derive(Debug)]
    struct Disk {
        file: FileBackend,
        is_full: Arc<AtomicBool>,
    }

    impl Disk {
        fn check(&self) -> io::Result<()> {
            if self.is_full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            self.file.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.file.read(offset, out)
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.check()?;
            self.file.set_len(len)
        }
        fn sync_data(&self) -> io::Result<()> {
            self.check()?;
            self.file.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.check()?;
            self.file.write(offset, data)
        }
        fn close(&self) -> io::Result<()> {
            self.file.close()
        }
    }

    struct DiskOpener {
        path: PathBuf,
        is_full: Arc<AtomicBool>,
    }

    impl Opener for DiskOpener {
        fn open(&self, existence: Existence) -> Result<Database, FileError> {
            let file = open_file(&self.path, existence)?;
            open_database(&self.path, Disk { file, is_full: Arc::clone(&self.is_full) })
        }
    }

    fn on_disk(path: &Path) -> (SessionFile, Arc<AtomicBool>) {
        let is_full = Arc::new(AtomicBool::new(false));
        let opener = DiskOpener { path: path.to_owned(), is_full: Arc::clone(&is_full) };
        (SessionFile::open_with(path, Box::new(opener), |_| {}).unwrap(), is_full)
    }

    #[tokio::test]
    async fn a_full_disk_refuses_ends_loses_nothing_and_is_written_when_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (file, is_full) = on_disk(&path);
        let (before, touched, during) = (key(), key(), key());
        file.notes().begun(&before, 1_000, b"before".to_vec());
        file.notes().begun(&touched, 1_000, b"touched".to_vec());
        file.settle().await.unwrap();

        is_full.store(true, Ordering::Relaxed);
        file.notes().ended(&before);
        let refused = file.settle().await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "it could come back: {refused:?}");
        file.notes().begun(&during, 2_000, b"during".to_vec());
        file.notes().touched(&during, 3_000);
        file.notes().touched(&touched, 4_000);
        assert!(file.settle().await.is_err(), "at once, and not after a wait for each");

        is_full.store(false, Ordering::Relaxed);
        let mut progress = file.desk.progress.subscribe();
        let recovered = progress.wait_for(|progress| progress.failure.is_none());
        tokio::time::timeout(Duration::from_secs(20), recovered).await.expect("it is tried again").unwrap();
        file.settle().await.expect("what failed has been written meanwhile");
        drop(file);
        let mut sessions = sessions_in(&path);
        sessions.sort_by_key(|(_, expires, _)| *expires);
        let expected = [(during, 3_000, b"during".to_vec()), (touched, 4_000, b"touched".to_vec())];
        assert!(sessions == expected, "as if nothing had been: {}", sessions.len());
    }

    #[tokio::test]
    async fn while_the_disk_is_full_logouts_say_so_and_logins_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let (file, is_full) = on_disk(&folder.path().join("sessions.redb"));
        let store = MemoryStore::new(10);
        assert!(store.file.set(file).is_ok());
        is_full.store(true, Ordering::Relaxed);
        let session = crate::session::store::NewSession {
            identity: crate::identity::Identity { user: "ann".to_owned(), ..Default::default() },
            method: crate::session::record::LoginMethod::Password,
            client: crate::session::record::ClientHints { address: None, user_agent: String::new() },
            secrets: None,
            attributes: BTreeMap::new(),
            login: None,
        };
        let hour = Duration::from_secs(3_600);
        let lifetime = crate::session::Lifetime { idle: hour, absolute: hour };
        let first = key();
        let terms = |replaces| crate::session::store::Terms { lifetime, limit: None, replaces };
        store.create(&first, session.clone(), &terms(None)).await.unwrap();
        let second = key();
        store.create(&second, session, &terms(Some(first.clone()))).await.expect("no reason to refuse a login");
        assert!(store.recall(&first).is_none() && store.recall(&second).is_some(), "the map is the truth");
        for _ in 0..2 {
            let logout = store.destroy(&second, None, Ending::LoggedOut).await;
            assert!(matches!(logout, Err(StoreError::Unavailable(_))), "{logout:?}");
        }
        assert!(store.recall(&second).is_none(), "in this process it has ended all the same");
        store.ping().await.expect("sessions are served");
    }

    #[test]
    fn a_file_that_is_none_of_ours_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        for (what, bytes) in [("text", b"hello, world\n".repeat(1_000)), ("short", vec![1]), ("zeros", vec![0; 8_192])]
        {
            std::fs::write(&path, &bytes).unwrap();
            let error = SessionFile::open(&path, |_| {}).unwrap_err();
            assert!(matches!(error, FileError::Damaged(..)), "{what}: {error:?}");
            assert!(error.to_string().contains("move it away"), "it says the next move: {error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{what}: never overwritten");
        }

        std::fs::remove_file(&path).unwrap();
        let foreign: TableDefinition<'_, &str, u64> = TableDefinition::new("accounts");
        let database = Database::create(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(foreign).unwrap().insert("me", 1).unwrap();
        transaction.commit().unwrap();
        drop(database);
        assert!(matches!(SessionFile::open(&path, |_| {}), Err(FileError::Damaged(..))), "somebody else's database");

        std::fs::remove_file(&path).unwrap();
        drop(SessionFile::open(&path, |_| {}).unwrap());
        let database = Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(ABOUT).unwrap().insert("layout", LAYOUT + 1).unwrap();
        transaction.commit().unwrap();
        drop(database);
        assert!(matches!(SessionFile::open(&path, |_| {}), Err(FileError::Newer(_))));
    }

    /// redb itself complains on standard error about some of these: its panics are errors here.
    #[test]
    fn no_damage_makes_us_panic_or_read_what_was_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let file = SessionFile::open(&path, |_| {}).unwrap();
        for _ in 0..200 {
            file.notes().begun(&key(), 1_000, b"a record".repeat(20));
        }
        drop(file);
        let good = std::fs::read(&path).unwrap();
        let mut rng = StdRng::seed_from_u64(4);
        let mut refused = 0;
        for round in 0..60 {
            let mut bytes = good.clone();
            if round % 4 == 0 {
                bytes.truncate(rng.random_range(0..bytes.len()));
            } else {
                let from = rng.random_range(0..bytes.len());
                let length = rng.random_range(1..64.min(bytes.len() - from).max(2));
                bytes.iter_mut().skip(from).take(length).for_each(|byte| *byte = rng.random());
            }
            std::fs::write(&path, &bytes).unwrap();
            let read = SessionFile::open(&path, |kept| match kept {
                Kept::Session { expires, record, .. } => {
                    assert!(expires == 1_000 && record == b"a record".repeat(20), "damage was believed");
                }
                Kept::End { .. } => panic!("no end was written"),
            });
            refused += usize::from(read.is_err());
        }
        assert!(10 < refused, "{refused} of 60 damages were found");
    }

    #[test]
    fn what_could_not_be_written_goes_under_what_came_since() {
        let begun = |expires| Change::Begun { expires, record: vec![1] };
        let touched = |expires| Change::Touched { expires };
        let cases: [(&str, Change, Option<Change>, &str); 6] = [
            ("nothing since", begun(1), None, "begun 1"),
            ("touched since it began", begun(1), Some(touched(2)), "begun 2"),
            ("touched again", touched(1), Some(touched(2)), "touched 2"),
            ("ended since it began", begun(1), Some(Change::Ended), "ended"),
            ("ended since it was touched", touched(1), Some(Change::Ended), "ended"),
            ("nothing since it ended", Change::Ended, None, "ended"),
        ];
        for (what, older, newer, expected) in cases {
            let key = key();
            let (mut changes, mut failed) = (Changes::default(), Changes::default());
            failed.sessions.insert(key.clone(), older);
            changes.sessions.extend(newer.map(|newer| (key.clone(), newer)));
            changes.put_under(failed);
            let result = match &changes.sessions[&key] {
                Change::Begun { expires, .. } => format!("begun {expires}"),
                Change::Touched { expires } => format!("touched {expires}"),
                Change::Ended => "ended".to_owned(),
            };
            assert_eq!(result, expected, "{what}");
        }
    }
}
