/* Kills the process at its N-th file operation below a folder, or lets that operation fail with an errno.

   Loaded with LD_PRELOAD, so that operations of C++ libraries such as tensorstore count too. Nothing is counted before
   `fail_at(folder, number, error)` is called; with error 0 the process is killed, and `operations()` tells how many there
   were. A killed write writes half of its bytes first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static int fatal = -1, error_number;
static atomic_int count;

void fail_at(const char *folder, int number, int error) {
  strncpy(root, folder, sizeof root - 1);
  count = 0;
  fatal = number;
  error_number = error;
}

int operations(void) { return count; }

/* Whether this operation is the fatal one; then errno is set, or the process is gone. */
static int fails(const char *path, int half_a_write, int fd, const void *data, size_t size) {
  if (!root[0] || !path || !strstr(path, root)) return 0;
  if (atomic_fetch_add(&count, 1) + 1 != fatal) return 0;
  if (!error_number) {
    if (half_a_write) {
      ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
      if (real(fd, data, size / 2) < 0) size = 0;
    }
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  errno = error_number;
  return 1;
}

static const char *path_of(int fd, char *buffer, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = root[0] ? readlink(link, buffer, size - 1) : -1;
  if (length < 0) return NULL;
  buffer[length] = 0;
  return buffer;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define BY_PATH(name, path, parameters, arguments) \
  int name parameters { REAL(name); return fails(path, 0, -1, NULL, 0) ? -1 : real arguments; }
#define BY_FD(type, name, parameters, arguments, is_write, data, bytes) \
  type name parameters { char buffer[4096]; REAL(name); \
    return fails(path_of(fd, buffer, sizeof buffer), is_write, fd, data, bytes) ? -1 : real arguments; }

BY_PATH(rename, from, (const char *from, const char *to), (from, to))
BY_PATH(renameat, from, (int a, const char *from, int b, const char *to), (a, from, b, to))
BY_PATH(mkdir, path, (const char *path, mode_t mode), (path, mode))
BY_PATH(mkdirat, path, (int at, const char *path, mode_t mode), (at, path, mode))
BY_PATH(rmdir, path, (const char *path), (path))
BY_PATH(unlink, path, (const char *path), (path))
BY_PATH(link, from, (const char *from, const char *to), (from, to))
BY_FD(int, fsync, (int fd), (fd), 0, NULL, 0)
BY_FD(int, fdatasync, (int fd), (fd), 0, NULL, 0)
BY_FD(int, ftruncate, (int fd, off_t length), (fd, length), 0, NULL, 0)
BY_FD(int, ftruncate64, (int fd, off64_t length), (fd, length), 0, NULL, 0)
BY_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), 1, data, size)
BY_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), 0, NULL, 0)
BY_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), 0, NULL, 0)
BY_FD(ssize_t, writev, (int fd, const struct iovec *parts, int number), (fd, parts, number), 0, NULL, 0)

/* shutil.rmtree names files relative to an open folder. */
int unlinkat(int fd, const char *path, int flags) {
  char buffer[4096];
  REAL(unlinkat);
  const char *where = path[0] == '/' ? path : path_of(fd, buffer, sizeof buffer);
  return fails(where, 0, -1, NULL, 0) ? -1 : real(fd, path, flags);
}

#define OPEN(name, at, parameters, arguments) \
  int name parameters { mode_t mode = 0; REAL(name); \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); } \
    return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path, 0, -1, NULL, 0) ? -1 : real arguments; }

OPEN(open, , (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, , (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, , (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, , (int at, const char *path, int flags, ...), (at, path, flags, mode))
