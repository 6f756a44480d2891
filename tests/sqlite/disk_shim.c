/* A disk that misbehaves on request, for one program (LD_PRELOAD).

   The file that DISK_SHIM names says how, at each call: "slow SECONDS" lets every fsync take so long,
   "eio" and "erofs" let every write and fsync fail.  Only files whose name has "state.db" in it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int is_state(int fd) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    return strstr(name, "state.db") != NULL;
}

static int mood(int fd, double *seconds) {
    char text[64] = "";
    const char *path = getenv("DISK_SHIM");
    if (!path || !is_state(fd)) return 0;
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t length = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    if (length <= 0) return 0;
    if (!strncmp(text, "slow ", 5)) { *seconds = atof(text + 5); return 0; }
    if (!strncmp(text, "eio", 3)) return EIO;
    if (!strncmp(text, "erofs", 5)) return EROFS;
    return 0;
}

static int before(int fd, int waits) {
    double seconds = 0;
    int failure = mood(fd, &seconds);
    if (waits && seconds > 0) {
        struct timespec time = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
        nanosleep(&time, NULL);
    }
    errno = failure;
    return failure ? -1 : 0;
}

int fsync(int fd) { return before(fd, 1) ? -1 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return before(fd, 1) ? -1 : (int)syscall(SYS_fdatasync, fd); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    return before(fd, 0) ? -1 : syscall(SYS_pwrite64, fd, data, size, place);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    return pwrite64(fd, data, size, place);
}
ssize_t write(int fd, const void *data, size_t size) {
    return before(fd, 0) ? -1 : syscall(SYS_write, fd, data, size);
}
