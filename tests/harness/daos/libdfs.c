/*
 * A stand-in for libdfs and the little of libdaos that the driver calls: the documented behaviour, on local files.
 *
 * $STANDIN_DAOS/agent must exist, or dfs_init() fails as it does without a daos_agent. A container is the directory
 * $STANDIN_DAOS/POOL/CONTAINER; its extended attributes, which local file systems keep too small, are files
 * in CONTAINER.attributes. Calls of several threads and processes run at once, as they do in libdfs.
 *
 * As in DAOS: a lookup through a file is ENOENT; a file can be made in a directory that has been removed, and is never
 * seen again; an attribute set with XATTR_CREATE appears whole, in one step, or not at all.
 *
 * Tests inject faults with the standin_ functions at the end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

typedef struct { void *buf; size_t buf_len, len; } iov_t;
typedef struct { uint32_t nr, nr_out; iov_t *iovs; } sgl_t;
typedef struct { uint16_t type, shard; uint32_t flags; uint64_t sub_anchors; uint8_t buf[104]; } anchor_t;
typedef struct { uint64_t lo, hi; } oid_t;
typedef struct { uint32_t oclass; uint64_t chunk; uint32_t dir_oclass, file_oclass; oid_t oid; } info_t;
typedef struct { char root[PATH_MAX / 2]; int amode; } dfs_t;
typedef struct { int fd, parent; char name[NAME_MAX + 1]; mode_t mode; bool orphan; } obj_t;

enum { ANCHOR_KEY = 2, ANCHOR_EOF = 3, PAGE_OF_NAMES = 24, MAX_FAULTS = 16, XATTR_MAX = 65536 };

/* ---- faults ---- */

typedef struct { char call[32]; int skip, times, error, delay_ms; bool after; } fault_t;
static struct { char call[32]; int wanted, inside, peak; } gate;
static fault_t faults[MAX_FAULTS];
static int fault_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t arrived = PTHREAD_COND_INITIALIZER;

/* Count a call; wait where the test wants so many at once; return what shall go wrong with it. */
static fault_t enter(const char *call) {
    fault_t due = {0};
    pthread_mutex_lock(&lock);
    for (int i = 0; i < fault_count; i++) {
        fault_t *f = &faults[i];
        if (strcmp(f->call, call) || f->times == 0) continue;
        if (f->skip > 0) { f->skip--; continue; }
        f->times--;
        due = *f;
        break;
    }
    if (!strcmp(gate.call, call)) {
        if (++gate.inside > gate.peak) gate.peak = gate.inside;
        pthread_cond_broadcast(&arrived);
        struct timespec end;
        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_sec += 20;
        while (gate.peak < gate.wanted && pthread_cond_timedwait(&arrived, &lock, &end) == 0) {}
    }
    pthread_mutex_unlock(&lock);
    if (due.delay_ms) {
        struct timespec pause = {due.delay_ms / 1000, due.delay_ms % 1000 * 1000000L};
        nanosleep(&pause, NULL);
    }
    return due;
}

static int leave(const char *call, fault_t due, int result) {
    pthread_mutex_lock(&lock);
    if (!strcmp(gate.call, call)) gate.inside--;
    pthread_mutex_unlock(&lock);
    return due.after && due.error > 0 ? due.error : result;
}

#define CALL(name, ...) \
    fault_t due = enter(name); \
    int rc = 0; \
    if (due.error > 0 && !due.after) rc = due.error; \
    else do __VA_ARGS__ while (0); \
    return leave(name, due, rc)

#define FAIL(number) { rc = (number); break; }

/* ---- attributes ---- */

static int attributes_lock(dfs_t *dfs) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s.attributes", dfs->root);
    mkdir(path, 0777);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) flock(fd, LOCK_EX);
    return fd;
}

static void attribute_name(char *out, size_t size, ino_t ino, const char *name) {
    snprintf(out, size, "%lu-%s", (unsigned long)ino, name);
}

static void attributes_forget(int attributes, ino_t ino) {
    char prefix[32];
    int length = snprintf(prefix, sizeof prefix, "%lu-", (unsigned long)ino);
    DIR *dir = fdopendir(openat(attributes, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (!strncmp(e->d_name, prefix, length)) unlinkat(attributes, e->d_name, 0);
    if (dir) closedir(dir);
}

static int attribute_write(int attributes, ino_t ino, const char *name, const void *value, size_t size) {
    char path[NAME_MAX + 64];
    attribute_name(path, sizeof path, ino, name);
    int fd = openat(attributes, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return errno;
    ssize_t done = write(fd, value, size);
    close(fd);
    return done == (ssize_t)size ? 0 : EIO;
}

static ssize_t attribute_read(int attributes, ino_t ino, const char *name, void *value, size_t size) {
    char path[NAME_MAX + 64];
    attribute_name(path, sizeof path, ino, name);
    int fd = openat(attributes, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t done = read(fd, value, size);
    close(fd);
    return done;
}

/* ---- connections ---- */

static int started;

int dfs_init(void) {
    CALL("dfs_init", {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/agent", getenv("STANDIN_DAOS") ? getenv("STANDIN_DAOS") : "");
        if (access(path, F_OK)) FAIL(EIO);
        started++;
    });
}

int dfs_fini(void) {
    CALL("dfs_fini", { started--; });
}

int dfs_connect(const char *pool, const char *sys, const char *cont, int flags, void *attr, dfs_t **out) {
    (void)sys, (void)attr;
    CALL("dfs_connect", {
        if (!started) FAIL(EACCES);
        dfs_t *dfs = calloc(1, sizeof *dfs);
        dfs->amode = flags & O_ACCMODE;
        snprintf(dfs->root, sizeof dfs->root, "%s/%s/%s", getenv("STANDIN_DAOS"), pool, cont);
        if (access(dfs->root, F_OK)) { free(dfs); FAIL(ENOENT); }
        *out = dfs;
    });
}

int dfs_disconnect(dfs_t *dfs) {
    CALL("dfs_disconnect", { free(dfs); });
}

/* ---- objects ---- */

static obj_t *object(int fd, int parent, const char *name) {
    struct stat st;
    obj_t *obj = calloc(1, sizeof *obj);
    fstat(fd, &st);
    obj->fd = fd, obj->parent = parent, obj->mode = st.st_mode;
    snprintf(obj->name, sizeof obj->name, "%s", name);
    return obj;
}

static int opened(int parent, const char *name, int access, obj_t **out, mode_t *mode) {
    struct stat st;
    if (fstatat(parent, name, &st, AT_SYMLINK_NOFOLLOW)) return errno == ENOTDIR ? ENOENT : errno;
    int how = S_ISLNK(st.st_mode) ? O_PATH | O_NOFOLLOW : S_ISDIR(st.st_mode) ? O_RDONLY : access;
    int fd = openat(parent, name, how | O_CLOEXEC);
    if (fd < 0) return errno;
    *out = object(fd, dup(parent), name);
    if (mode) *mode = st.st_mode;
    return 0;
}

int dfs_lookup(dfs_t *dfs, const char *path, int flags, obj_t **out, mode_t *mode, struct stat *st) {
    (void)st;
    CALL("dfs_lookup", {
        char above[PATH_MAX];
        snprintf(above, sizeof above, "%s%s", dfs->root, path);
        char *slash = strrchr(above, '/');
        char name[NAME_MAX + 2];
        snprintf(name, sizeof name, "%s", slash[1] ? slash + 1 : ".");
        *slash = 0;
        int parent = open(above, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (parent < 0) FAIL(errno == ENOTDIR ? ENOENT : errno);
        rc = opened(parent, name, flags & O_ACCMODE, out, mode);
        close(parent);
    });
}

int dfs_lookup_rel(dfs_t *dfs, obj_t *parent, const char *name, int flags, obj_t **out, mode_t *mode, struct stat *st) {
    (void)dfs, (void)st;
    CALL("dfs_lookup_rel", {
        if (!S_ISDIR(parent->mode)) FAIL(ENOTDIR);
        rc = opened(parent->fd, name, flags & O_ACCMODE, out, mode);
    });
}

int dfs_open(dfs_t *dfs, obj_t *parent, const char *name, mode_t mode, int flags, uint32_t oclass, uint64_t chunk,
             const char *value, obj_t **out) {
    (void)value;
    CALL("dfs_open", {
        if (!S_ISDIR(parent->mode)) FAIL(ENOTDIR);
        if (dfs->amode != O_RDWR && (flags & O_CREAT)) FAIL(EPERM);
        if (!S_ISREG(mode) || strlen(name) > NAME_MAX || strchr(name, '/')) FAIL(EINVAL);
        int fd = openat(parent->fd, name, flags | O_CLOEXEC | O_NOFOLLOW, mode & 07777);
        bool orphan = fd < 0 && errno == ENOENT && (flags & O_CREAT);
        if (orphan) fd = memfd_create("orphan", MFD_CLOEXEC);
        if (fd < 0) FAIL(errno == EISDIR ? EINVAL : errno);
        *out = object(fd, dup(parent->fd), name);
        (*out)->orphan = orphan;
        struct stat st;
        fstat(fd, &st);
        int attributes = attributes_lock(dfs);
        info_t made = {.oclass = oclass, .chunk = chunk ? chunk : 1 << 20};
        if (!orphan && st.st_size == 0) rc = attribute_write(attributes, st.st_ino, "layout", &made, sizeof made);
        close(attributes);
    });
}

int dfs_release(obj_t *obj) {
    CALL("dfs_release", {
        close(obj->fd);
        close(obj->parent);
        free(obj);
    });
}

int dfs_obj2id(obj_t *obj, oid_t *oid) {
    CALL("dfs_obj2id", {
        struct stat st;
        fstat(obj->fd, &st);
        oid->lo = st.st_ino, oid->hi = st.st_dev;
    });
}

int dfs_obj_get_info(dfs_t *dfs, obj_t *obj, info_t *info) {
    CALL("dfs_obj_get_info", {
        struct stat st;
        fstat(obj->fd, &st);
        int attributes = attributes_lock(dfs);
        if (attribute_read(attributes, st.st_ino, "layout", info, sizeof *info) < 0) rc = EINVAL;
        close(attributes);
    });
}

int dfs_mkdir(dfs_t *dfs, obj_t *parent, const char *name, mode_t mode, uint32_t oclass) {
    (void)oclass;
    CALL("dfs_mkdir", {
        if (dfs->amode != O_RDWR) FAIL(EPERM);
        if (!S_ISDIR(parent->mode)) FAIL(ENOTDIR);
        if (mkdirat(parent->fd, name, mode)) rc = errno;
    });
}

int dfs_remove(dfs_t *dfs, obj_t *parent, const char *name, bool force, oid_t *oid) {
    (void)force, (void)oid;
    CALL("dfs_remove", {
        struct stat st;
        if (dfs->amode != O_RDWR) FAIL(EPERM);
        if (fstatat(parent->fd, name, &st, AT_SYMLINK_NOFOLLOW)) FAIL(errno);
        int attributes = attributes_lock(dfs);
        if (unlinkat(parent->fd, name, S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0)) rc = errno;
        else attributes_forget(attributes, st.st_ino);
        close(attributes);
    });
}

int dfs_get_size(dfs_t *dfs, obj_t *obj, uint64_t *size) {
    (void)dfs;
    CALL("dfs_get_size", {
        struct stat st;
        if (fstat(obj->fd, &st)) FAIL(errno);
        *size = st.st_size;
    });
}

int dfs_stat(dfs_t *dfs, obj_t *parent, const char *name, struct stat *st) {
    (void)dfs;
    CALL("dfs_stat", {
        if (fstatat(parent->fd, name, st, AT_SYMLINK_NOFOLLOW)) rc = errno;
    });
}

int dfs_readdir(dfs_t *dfs, obj_t *obj, anchor_t *anchor, uint32_t *nr, struct dirent *out) {
    (void)dfs;
    CALL("dfs_readdir", {
        if (!S_ISDIR(obj->mode)) FAIL(ENOTDIR);
        DIR *dir = fdopendir(openat(obj->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (!dir) FAIL(errno);
        uint32_t wanted = *nr < PAGE_OF_NAMES ? *nr : PAGE_OF_NAMES;
        uint32_t found = 0;
        long place;
        memcpy(&place, anchor->buf, sizeof place);
        if (anchor->type == ANCHOR_KEY) seekdir(dir, place);
        anchor->type = ANCHOR_EOF;
        for (struct dirent *e; (e = readdir(dir));) {
            if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
            memset(&out[found], 0, sizeof out[found]); /* only d_name is filled */
            strcpy(out[found].d_name, e->d_name);
            if (++found == wanted) {
                place = telldir(dir);
                memcpy(anchor->buf, &place, sizeof place);
                anchor->type = ANCHOR_KEY;
                break;
            }
        }
        *nr = found;
        closedir(dir);
    });
}

/* ---- data ---- */

int dfs_write(dfs_t *dfs, obj_t *obj, sgl_t *sgl, uint64_t offset, void *event) {
    (void)event;
    CALL("dfs_write", {
        if (dfs->amode != O_RDWR) FAIL(EPERM);
        for (uint32_t i = 0; i < sgl->nr && !rc; i++)
            for (size_t done = 0; done < sgl->iovs[i].len;) {
                ssize_t moved = pwrite(obj->fd, (char *)sgl->iovs[i].buf + done, sgl->iovs[i].len - done, offset);
                if (moved < 0) FAIL(errno);
                done += moved, offset += moved;
            }
    });
}

int dfs_read(dfs_t *dfs, obj_t *obj, sgl_t *sgl, uint64_t offset, uint64_t *size, void *event) {
    (void)dfs, (void)event;
    CALL("dfs_read", {
        size_t wanted = sgl->iovs[0].len;
        if (due.error < 0) wanted /= 2; /* the rest of the file is missing */
        *size = 0;
        while (*size < wanted) {
            ssize_t moved = pread(obj->fd, (char *)sgl->iovs[0].buf + *size, wanted - *size, offset + *size);
            if (moved < 0) FAIL(errno);
            if (moved == 0) break;
            *size += moved;
        }
    });
}

int dfs_setxattr(dfs_t *dfs, obj_t *obj, const char *name, const void *value, uint64_t size, int flags) {
    CALL("dfs_setxattr", {
        struct stat st;
        if (dfs->amode != O_RDWR) FAIL(EPERM);
        if (size > XATTR_MAX || size == 0) FAIL(EINVAL);
        if (obj->orphan) break;
        int attributes = attributes_lock(dfs);
        char had[1];
        /* an attribute belongs to the entry of that name, whatever object it leads to by now */
        if (fstatat(obj->parent, obj->name, &st, AT_SYMLINK_NOFOLLOW)) rc = ENOENT;
        else if (flags == XATTR_CREATE && attribute_read(attributes, st.st_ino, name, had, 1) >= 0) rc = EEXIST;
        else rc = attribute_write(attributes, st.st_ino, name, value, size);
        close(attributes);
    });
}

int dfs_getxattr(dfs_t *dfs, obj_t *obj, const char *name, void *value, uint64_t *size) {
    CALL("dfs_getxattr", {
        struct stat st;
        fstat(obj->fd, &st);
        int attributes = attributes_lock(dfs);
        ssize_t found = attribute_read(attributes, st.st_ino, name, value, *size);
        close(attributes);
        if (found < 0) FAIL(ENODATA);
        *size = found;
    });
}

/* ---- object classes ---- */

static const struct { const char *name; uint32_t id; } classes[] = {
    {"S1", 1001}, {"SX", 1002}, {"RP_2G1", 1003}, {"RP_2GX", 1004}, {"EC_8P2GX", 1005}};

int daos_oclass_name2id(const char *name) {
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        if (!strcmp(classes[i].name, name)) return classes[i].id;
    return 0;
}

int daos_oclass_id2name(uint32_t id, char *name) {
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        if (classes[i].id == id) return strcpy(name, classes[i].name), 0;
    return -1;
}

int dfs_suggest_oclass(dfs_t *dfs, const char *hint, uint32_t *id) {
    (void)dfs;
    CALL("dfs_suggest_oclass", {
        if (!strcmp(hint, "file:max")) *id = daos_oclass_name2id("RP_2GX");
        else if (!strcmp(hint, "file:single")) *id = daos_oclass_name2id("RP_2G1");
        else rc = EINVAL;
    });
}

/* ---- for tests ---- */

/* Of the calls of one name, let `times` go wrong after the first `skip`: wait, then fail with `error` (negative, of
 * dfs_read: end early), or, with `after`, do what is asked and then fail. */
void standin_fault(const char *call, int skip, int times, int error, int delay_ms, bool after) {
    pthread_mutex_lock(&lock);
    fault_t *f = &faults[fault_count++ % MAX_FAULTS];
    *f = (fault_t){.skip = skip, .times = times, .error = error, .delay_ms = delay_ms, .after = after};
    snprintf(f->call, sizeof f->call, "%s", call);
    pthread_mutex_unlock(&lock);
}

/* Hold every call of one name until so many are in it at once, for up to 20 s. */
void standin_gate(const char *call, int wanted) {
    pthread_mutex_lock(&lock);
    snprintf(gate.call, sizeof gate.call, "%s", call);
    gate.wanted = wanted, gate.inside = gate.peak = 0;
    pthread_mutex_unlock(&lock);
}

int standin_peak(void) { return gate.peak; }

void standin_reset(void) {
    pthread_mutex_lock(&lock);
    fault_count = 0;
    memset(faults, 0, sizeof faults);
    memset(&gate, 0, sizeof gate);
    pthread_mutex_unlock(&lock);
}

void standin_sizes(long out[5]) {
    out[0] = sizeof(struct stat), out[1] = sizeof(struct dirent), out[2] = sizeof(anchor_t);
    out[3] = sizeof(sgl_t), out[4] = sizeof(info_t);
}
