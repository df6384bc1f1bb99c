// LD_PRELOAD: counts file operations below $FAULT_DIR, writes them to $FAULT_LOG (with inode and size), and at operation number $FAULT_N fails
// (FAULT_KIND=errno's number; $FAULT_STICKY: from there on), writes half ("short") or kills the process group ("kill").
// Reads nothing but the environment. Processes count together, in the eight bytes of the file $FAULT_COUNT.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define LONGEST 1024 // of a path that is looked at: threads of drivers have stacks of 16 kB

enum fault { NONE, ERROR, SHORT, KILL };
static pid_t owner;
static long *count, at;
static int sticky, error_number, log_fd = -1;
static enum fault kind;
static char folder[LONGEST];

#define REAL(name)                   \
    static __typeof__(&name) real;   \
    if (!real) real = dlsym(RTLD_NEXT, #name)

static void start(void) {
    if (getpid() == owner) return;
    owner = getpid(), at = -1, kind = NONE, folder[0] = 0;
    const char *text = getenv("FAULT_DIR");
    if (text) strncpy(folder, text, sizeof folder - 1);
    if ((text = getenv("FAULT_N"))) at = atol(text);
    sticky = getenv("FAULT_STICKY") != NULL;
    if ((text = getenv("FAULT_KIND"))) {
        kind = !strcmp(text, "short") ? SHORT : !strcmp(text, "kill") ? KILL : ERROR;
        error_number = atoi(text);
    }
    int (*opening)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    static long alone;
    count = &alone;
    if ((text = getenv("FAULT_COUNT"))) {
        int file = opening(text, O_RDWR | O_CLOEXEC);
        void *shared = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (shared == MAP_FAILED) abort();
        count = shared, close(file);
    }
    if ((text = getenv("FAULT_LOG"))) {
        log_fd = opening(text, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    }
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, LONGEST - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return path[0] == '/';
}

static enum fault point(const char *operation, const char *path, unsigned long inode, long long bytes) {
    start();
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return NONE;
    int saved = errno;
    long number = __sync_add_and_fetch(count, 1);
    if (log_fd >= 0) {
        char line[LONGEST + 96];
        int size = snprintf(line, sizeof line, "%s %lu %lld %.*s\n", operation, inode, bytes, LONGEST - 1, path);
        ssize_t (*writing)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
        writing(log_fd, line, size);
    }
    errno = saved;
    if (at < 0 || !(number == at || (sticky && number > at))) return NONE;
    if (kind == KILL) {
        kill(0, SIGKILL);
        pause();
    }
    return kind;
}

static enum fault point_fd(const char *operation, int fd) {
    char path[LONGEST];
    struct stat info;
    start();
    if (!folder[0] || fd == log_fd || !path_of(fd, path) || fstat(fd, &info)) return NONE;
    return point(operation, path, info.st_ino, info.st_size);
}

#define FAIL_IF(what)             \
    if ((what) == ERROR) {        \
        errno = error_number;     \
        return -1;                \
    }

#define WRITING(name, declared, passed)                \
    ssize_t name declared {                            \
        REAL(name);                                    \
        enum fault found = point_fd("write", fd);      \
        FAIL_IF(found)                                 \
        if (found == SHORT && size > 1) size /= 2;     \
        return real passed;                            \
    }
WRITING(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITING(pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place))
WRITING(pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place))

WRITING(sendfile, (int fd, int from, off_t *place, size_t size), (fd, from, place, size))
WRITING(sendfile64, (int fd, int from, off64_t *place, size_t size), (fd, from, place, size))

ssize_t copy_file_range(int from, off64_t *start, int fd, off64_t *place, size_t size, unsigned flags) {
    REAL(copy_file_range);
    enum fault found = point_fd("write", fd);
    FAIL_IF(found)
    if (found == SHORT && size > 1) size /= 2;
    return real(from, start, fd, place, size, flags);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    FAIL_IF(point_fd("write", fd))
    return real(fd, parts, count);
}

#define OF_FD(name, operation, declared, passed) \
    int name declared {                          \
        REAL(name);                              \
        FAIL_IF(point_fd(operation, fd))         \
        return real passed;                      \
    }
OF_FD(fsync, "fsync", (int fd), (fd))
OF_FD(fdatasync, "fsync", (int fd), (fd))
OF_FD(ftruncate, "write", (int fd, off_t size), (fd, size))
OF_FD(ftruncate64, "write", (int fd, off64_t size), (fd, size))

#define OF_PATHS(name, declared, passed, path)   \
    int name declared {                          \
        REAL(name);                              \
        FAIL_IF(point(#name, path, 0, 0))           \
        return real passed;                      \
    }
OF_PATHS(rename, (const char *from, const char *to), (from, to), to)
OF_PATHS(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags), to)
OF_PATHS(link, (const char *from, const char *to), (from, to), to)
OF_PATHS(mkdir, (const char *path, mode_t mode), (path, mode), path)

// What removes is counted, and may be killed, but does not fail: nothing can be tidied on a disk that lets nothing go.
#define REMOVING(name, declared, passed, path) \
    int name declared {                        \
        REAL(name);                            \
        point(#name, path, 0, 0);                 \
        return real passed;                    \
    }
REMOVING(unlink, (const char *path), (path), path)
REMOVING(rmdir, (const char *path), (path), path)

int unlinkat(int fd, const char *name, int flags) {
    REAL(unlinkat);
    if (name[0] == '/' || fd == AT_FDCWD)
        point("unlinkat", name, 0, 0);
    else
        point_fd("unlinkat", fd);
    return real(fd, name, flags);
}

#define OPENING(name)                                                              \
    int name(const char *path, int flags, ...) {                                   \
        REAL(name);                                                                \
        mode_t mode = 0;                                                           \
        if (flags & (O_CREAT | O_TMPFILE)) {                                       \
            va_list rest;                                                          \
            va_start(rest, flags);                                                 \
            mode = va_arg(rest, mode_t);                                           \
            va_end(rest);                                                          \
        }                                                                          \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR)) FAIL_IF(point("open", path, 0, 0)) \
        return real(path, flags, mode);                                            \
    }
OPENING(open)
OPENING(open64)
