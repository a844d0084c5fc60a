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
