/* A disk that fails when it is told to, and that remembers what has reached it.
 *
 * Loaded with LD_PRELOAD, it stands between a process and the calls by which it writes files below FAULTY_DISK_FOLDER.
 * A test sets the fields of `struct orders`, in the file that FAULTY_DISK_ORDERS names, while the process runs. Where
 * FAULTY_DISK_RECORD names a file, each call is written there, in order, and what the process itself appends to it stands
 * between them: what would be on the disk after a power cut at any moment can be worked out from that.
 *
 * A call that fails does nothing else, as if the kernel had refused it. After a failed fsync the written pages are still
 * read by everybody, and never reach the disk: so does Linux (ext4, XFS, Btrfs; "fsyncgate", PostgreSQL wiki).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

struct orders {                  /* as in faulty_disk.py */
    int32_t fsync_fails_every;   /* the n-th of them fails; 0: none */
    int32_t fsync_errno;
    int32_t write_errno;         /* 0: writes work */
    int32_t open_errno;          /* of opening for writing; 0: it works */
    int32_t fsync_waits;         /* as long as it is not 0 */
    int32_t fsyncs;              /* counted here */
    int32_t failures;
};

struct head {                    /* of a record; the file's name and the written bytes follow */
    char kind;                   /* 'w'rite, 't'runcate, 'f'sync, 'u'nlink */
    char failed;
    uint16_t name_bytes;
    uint32_t data_bytes;
    uint64_t offset;
};

static struct orders none, *orders = &none;
static const char *folder = "";
static int record = -1;
static ssize_t (*real_pwrite)(int, const void *, size_t, off64_t);
static ssize_t (*real_write)(int, const void *, size_t);
static int (*real_ftruncate)(int, off64_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_open)(const char *, int, ...);
static int (*real_unlink)(const char *);

__attribute__((constructor)) static void begin(void)
{
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_write = dlsym(RTLD_NEXT, "write");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_open = dlsym(RTLD_NEXT, "open64");
    real_unlink = dlsym(RTLD_NEXT, "unlink");
    const char *path = getenv("FAULTY_DISK_ORDERS");
    int fd = path ? real_open(path, O_RDWR) : -1;
    if (fd >= 0) {
        void *shared = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (shared != MAP_FAILED)
            orders = shared;
        close(fd);
    }
    if ((path = getenv("FAULTY_DISK_RECORD")))
        record = real_open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
    folder = getenv("FAULTY_DISK_FOLDER");
    if (!folder)
        folder = "/no folder";
}

/* The name of a file below the folder; NULL of any other. */
static const char *within(const char *path)
{
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && path[length] == '/' ? path + length + 1 : NULL;
}

static const char *name_of(int fd, char *path)
{
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return NULL;
    path[length] = 0;
    return within(path);
}

static void note(char kind, int failed, const char *name, off64_t offset, const void *data, size_t count)
{
    if (record < 0 || (strlen(name) > 4 && strcmp(name + strlen(name) - 4, "-shm") == 0))
        return;  /* SQLite's shared memory is worth nothing after a crash */
    struct head head = {kind, failed, strlen(name), count, offset};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)name, head.name_bytes}, {(void *)data, count}};
    if (writev(record, parts, 3) < 0)
        abort();
}

static int refused(int32_t error)
{
    if (!error)
        return 0;
    __atomic_add_fetch(&orders->failures, 1, __ATOMIC_SEQ_CST);
    errno = error;
    return -1;
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset)
{
    char path[PATH_MAX];
    const char *name = name_of(fd, path);
    if (!name)
        return real_pwrite(fd, data, count, offset);
    if (refused(orders->write_errno))
        return -1;
    ssize_t written = real_pwrite(fd, data, count, offset);
    if (written > 0)
        note('w', 0, name, offset, data, written);
    return written;
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset)
{
    return pwrite64(fd, data, count, offset);
}

ssize_t write(int fd, const void *data, size_t count)
{
    char path[PATH_MAX];
    if (orders->write_errno && name_of(fd, path))
        return refused(orders->write_errno);
    return real_write(fd, data, count);
}

int ftruncate64(int fd, off64_t length)
{
    char path[PATH_MAX];
    const char *name = name_of(fd, path);
    if (!name)
        return real_ftruncate(fd, length);
    if (refused(orders->write_errno))
        return -1;
    int outcome = real_ftruncate(fd, length);
    if (outcome == 0)
        note('t', 0, name, length, NULL, 0);
    return outcome;
}

static int synced(int fd, int (*real)(int))
{
    char path[PATH_MAX];
    const char *name = name_of(fd, path);
    if (!name)
        return real(fd);
    int32_t count = __atomic_add_fetch(&orders->fsyncs, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&orders->fsync_waits, __ATOMIC_SEQ_CST))
        usleep(1000);
    int fails = orders->fsync_fails_every && count % orders->fsync_fails_every == 0;
    int outcome = fails ? refused(orders->fsync_errno) : real(fd);
    int error = errno;
    note('f', outcome != 0, name, 0, NULL, 0);
    errno = error;
    return outcome;
}

int fsync(int fd)
{
    return synced(fd, real_fsync);
}

int fdatasync(int fd)
{
    return synced(fd, real_fdatasync);
}

int open64(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    if ((flags & O_ACCMODE) != O_RDONLY && orders->open_errno && within(path))
        return refused(orders->open_errno);
    return real_open(path, flags, mode);
}

int unlink(const char *path)
{
    const char *name = within(path);
    int outcome = real_unlink(path);
    int error = errno;
    if (name && outcome == 0)
        note('u', 0, name, 0, NULL, 0);
    errno = error;
    return outcome;
}
