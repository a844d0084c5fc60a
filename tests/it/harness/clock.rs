//! What time is it for another process? A clock that a test can set, also while the process runs.

use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// Stands before the C library where a program asks for the time of day (ld.so(8), `LD_PRELOAD`). Clocks that only go on,
/// and that nobody can set, go on.
const SOURCE: &str = r#"
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/time.h>
    #include <time.h>
    #include <unistd.h>
    static volatile long *ahead;
    __attribute__((constructor)) static void find(void) {
        ahead = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, open(getenv("CLOCK_AHEAD"), O_RDONLY), 0);
    }
    int clock_gettime(clockid_t clock, struct timespec *now) {
        int failed = syscall(SYS_clock_gettime, clock, now);
        if (!failed && ahead && clock == CLOCK_REALTIME) now->tv_sec += *ahead;
        return failed;
    }
    int gettimeofday(struct timeval *now, void *zone) {
        struct timespec precise;
        int failed = clock_gettime(CLOCK_REALTIME, &precise);
        now->tv_sec = precise.tv_sec;
        now->tv_usec = precise.tv_nsec / 1000;
        return failed;
    }
    time_t time(time_t *copy) {
        struct timespec precise;
        clock_gettime(CLOCK_REALTIME, &precise);
        if (copy) *copy = precise.tv_sec;
        return precise.tv_sec;
    }
"#;

/// For processes that are started with it.
#[derive(Debug)]
pub(crate) struct Clock {
    folder: TempDir,
}

impl Clock {
    /// Right, until it is set.
    pub(crate) fn new() -> Self {
        let clock = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::write(clock.path("clock.c"), SOURCE).unwrap();
        clock.set(0);
        // The compiler that links this test.
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(clock.path("clock.so")).arg(clock.path("clock.c"));
        assert!(compiler.status().unwrap().success());
        clock
    }

    /// So many seconds ahead of everybody else's from now on, or behind.
    pub(crate) fn set(&self, ahead: i64) {
        // In place, because those who look have this file before them.
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(self.path("ahead"));
        std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), &ahead.to_ne_bytes(), 0).unwrap();
    }

    /// What `command` starts has this clock.
    pub(crate) fn given_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", self.path("clock.so")).env("CLOCK_AHEAD", self.path("ahead"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
