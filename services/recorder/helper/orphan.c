/* A crash that the recorder does not take, kept until it is back. See orphan.h.
 *
 * All is done by a second thread, because any step may wait for a disk that does not answer. At
 * the deadline the first one closes standard input for both, which lets the crashed process go.
 */
#define _GNU_SOURCE
#include "orphan.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum {
    RULES = 64 * 1024,   /* bytes of the file */
    OFF = 1024,          /* rules of whom no memory is kept */
    BLOCK = 256 * 1024,  /* bytes read at once; headers and notes of most cores fit */
    PAGE = 4096,
    TASKS = 256,         /* threads told */
    CONTAINER_ID = 64,   /* hexadecimal digits, whatever the runtime */
    GRACE = 2,           /* seconds beyond the deadline until the process is let go */
    LOOKS = 100,         /* at a lock that others have for a moment */
    LOOK_EVERY = 10 * 1000 * 1000, /* ns */
};
enum { MAX_ENVIRON = 128 * 1024 + 1, MAX_MAPS = 8 << 20, MAX_SMALL = 256 * 1024 };

static struct {
    const char *crash, *pid, *tid, *time;
    char rules[RULES + 1];
    const char *directory; /* for all orphans */
    char *off[OFF];        /* rules that say of whom no memory is kept */
    unsigned offs;
    bool head_only; /* no memory of anybody's */
    struct timespec end;
    const char *fault;
    struct kept kept;
} job = {.kept = {.core = -1}};

/* Rules that are numbers: each is there, and once. */
enum { LIMIT, RESERVE, MOST, SECONDS, NUMBERS };
static struct {
    const char *key;
    uint64_t least, most, value;
    bool is_told;
} numbers[NUMBERS] = {
    [LIMIT] = {.key = "limit", .most = INT64_MAX},         /* bytes of a core; 0: any number */
    [RESERVE] = {.key = "reserve", .most = 1000},          /* per mille of the disk that stay free */
    [MOST] = {.key = "most", .most = 1 << 20},             /* crashes that wait */
    [SECONDS] = {.key = "seconds", .least = 1, .most = 60}, /* that a process is held */
};

static bool is_over(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec >= job.end.tv_sec;
}

/* Read the file beside the helper, if it is what the recorder left there: root's alone to write. */
static const char *read_rules(const char *helper) {
    char path[PATH_MAX];
    struct stat status;
    const char *slash = strrchr(helper, '/');
    if (!slash || snprintf(path, sizeof path, "%.*s/rules", (int)(slash - helper), helper) >=
                      (int)sizeof path)
        return "the helper's place is not known";
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return "the recorder took nothing and left no rules";
    bool is_ours = !fstat(fd, &status) && S_ISREG(status.st_mode) &&
                   status.st_uid == geteuid() && !(status.st_mode & 022);
    ssize_t size = is_ours ? read(fd, job.rules, RULES) : -1;
    close(fd);
    if (!is_ours) return "the recorder took nothing, and the rules are not ours alone";
    if (size < 0 || size == RULES) return "the rules cannot be read, or are too long";
    /* What stood behind a NUL would not be heeded. */
    return strlen(job.rules) == (size_t)size ? NULL : "the rules are no text";
}

static const char *refuse(const char *key) {
    static char fault[80];
    snprintf(fault, sizeof fault, "the recorder took nothing, and the rules are wrong at '%s'", key);
    errno = EINVAL;
    return fault;
}

static bool take_number(int which, const char *value) {
    size_t digits = strspn(value, "0123456789");
    if (numbers[which].is_told || !digits || digits > 19 || value[digits]) return false;
    uint64_t number = strtoull(value, NULL, 10); /* 19 digits are less than 2^64 */
    numbers[which].is_told = true;
    numbers[which].value = number;
    return number >= numbers[which].least && number <= numbers[which].most;
}

/* Take in a rule; return what is wrong with it. One that is not understood is no fault, but may
 * have been one about memory. */
static const char *take_rule(const char *key, char *value) {
    for (int i = 0; i < NUMBERS; i++)
        if (!strcmp(key, numbers[i].key)) return take_number(i, value) ? NULL : refuse(key);
    if (!strcmp(key, "directory")) {
        if (job.directory || *value != '/') return refuse(key);
        job.directory = value;
    } else if (!strcmp(key, "handler")) {
        if (job.kept.handler) return refuse(key);
        job.kept.handler = value;
    } else if (!strcmp(key, "off") && job.offs < OFF) {
        job.off[job.offs++] = value; /* for when it is known who crashed */
    } else {
        job.head_only = true;
    }
    return NULL;
}

/* The file's lines are "<key> <value>"; services/recorder/kept/orphan_rules.py. */
static const char *parse_rules(void) {
    char *rest = job.rules;
    for (char *line; (line = strsep(&rest, "\n"));) {
        char *value = strchr(line, ' ');
        if (value) *value++ = '\0';
        if (!value && *line) job.head_only = true;
        const char *fault = value ? take_rule(line, value) : NULL;
        if (fault) return fault;
    }
    for (int i = 0; i < NUMBERS; i++)
        if (!numbers[i].is_told) return refuse(numbers[i].key);
    return job.directory ? NULL : refuse("directory");
}

static size_t read_at(int directory, const char *name, char *text, size_t room) {
    int fd = openat(directory, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    size_t got = 0;
    for (ssize_t more; fd >= 0 && got < room - 1; got += (size_t)more)
        if ((more = read(fd, text + got, room - 1 - got)) <= 0) break;
    if (fd >= 0) close(fd);
    text[got] = '\0';
    return got;
}

/* Tell whether a cgroup's path names a container whose ID begins so. */
static bool is_in_container(const char *cgroup, const char *begin) {
    size_t digits = 0, size = strlen(begin);
    for (const char *at = cgroup; *at; at++) {
        digits = strchr("0123456789abcdef", *at) ? digits + 1 : 0;
        if (digits >= CONTAINER_ID && size <= CONTAINER_ID &&
            !strncmp(at + 1 - CONTAINER_ID, begin, size))
            return true;
    }
    return false;
}

/* Tell whether a command line, of arguments that each end with a NUL, has one of this form. */
static bool has_argument(const char *form, const char *arguments, size_t size) {
    for (const char *at = arguments; at < arguments + size; at += strlen(at) + 1)
        if (!fnmatch(form, at, FNM_NOESCAPE)) return true;
    return false;
}

/* Tell whether a path has this form, without what the kernel puts behind that of a program whose
 * file was replaced meanwhile, too; proc_pid_exe(5). */
static bool is_executable(const char *form, const char *path) {
    static const char replaced[] = " (deleted)";
    char plain[PATH_MAX];
    size_t size = strlen(path), more = sizeof replaced - 1;
    if (!fnmatch(form, path, FNM_NOESCAPE)) return true;
    if (size < more || strcmp(path + size - more, replaced)) return false;
    snprintf(plain, sizeof plain, "%.*s", (int)(size - more), path);
    return !fnmatch(form, plain, FNM_NOESCAPE);
}

/* Who crashed, as rules may name them.
 *
 * arguments: each ends with a NUL; all of `told` bytes.
 */
struct crashed {
    char status[MAX_SMALL], cgroup[MAX_SMALL], arguments[MAX_SMALL];
    char executable[PATH_MAX], name[32], user[16];
    size_t told;
};

static void look_at(int process, int thread, struct crashed *one) {
    size_t size = read_at(process, "comm", one->name, sizeof one->name);
    if (size) one->name[size - 1] = '\0'; /* the line feed */
    read_at(process, "status", one->status, sizeof one->status);
    read_at(process, "cgroup", one->cgroup, sizeof one->cgroup);
    one->told = read_at(thread, "cmdline", one->arguments, sizeof one->arguments);
    const char *line = strstr(one->status, "\nUid:");
    if (line) sscanf(line, "\nUid: %15s", one->user);
    if (readlinkat(thread, "exe", one->executable, sizeof one->executable - 1) < 0)
        strcpy(one->executable, one->name);
}

/* Tell whether a rule that follows "off" is about this process. One that is not understood is:
 * memory that nobody may keep must not be kept by mistake. */
static bool fits(char *rule, const struct crashed *one) {
    char *value = strchr(rule, ' ');
    if (value) *value++ = '\0';
    if (!strcmp(rule, "containers")) return is_in_container(one->cgroup, "");
    if (value && !strcmp(rule, "executable")) return is_executable(value, one->executable);
    if (value && !strcmp(rule, "argument")) /* what was not read may have it */
        return one->told == sizeof one->arguments - 1 ||
               has_argument(value, one->arguments, one->told);
    if (value && !strcmp(rule, "comm")) return !strcmp(value, one->name);
    if (value && !strcmp(rule, "user")) return !strcmp(value, one->user);
    if (value && !strcmp(rule, "container")) return is_in_container(one->cgroup, value);
    return true;
}

/* Decide what may be kept of a process, before a byte of its memory is. */
static void apply_rules(const struct crashed *one) {
    for (unsigned i = 0; i < job.offs; i++)
        if (fits(job.off[i], one)) job.head_only = true;
}

static bool write_all(int fd, const char *data, size_t size) {
    for (ssize_t more; size; data += more, size -= (size_t)more)
        if ((more = write(fd, data, size)) <= 0) return false;
    return true;
}

static int make_file(int directory, const char *name) {
    return openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
}

static void write_file(int directory, const char *name, const char *text) {
    int fd = make_file(directory, name);
    if (fd < 0) return;
    write_all(fd, text, strlen(text));
    close(fd);
}

/* Append what a file holds; what cannot be read is left out. */
static void append(int from, const char *name, int to, size_t most) {
    static char part[PAGE * 4];
    int fd = openat(from, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) return;
    for (ssize_t more; most && !is_over(); most -= (size_t)more) {
        more = read(fd, part, most < sizeof part ? most : sizeof part);
        if (more <= 0 || !write_all(to, part, (size_t)more)) break;
    }
    close(fd);
}

static void copy_file(int from, const char *name, int directory, size_t most) {
    int to = make_file(directory, name);
    if (to < 0) return;
    append(from, name, to, most);
    close(to);
}

static void copy_link(int from, const char *name, int directory) {
    char target[PATH_MAX];
    ssize_t size = readlinkat(from, name, target, sizeof target - 1);
    if (size <= 0) return;
    target[size] = '\0';
    if (symlinkat(target, directory, name)) return;
}

/* The threads' names: each one's status, one after the other. */
static void copy_tasks(int process, int directory) {
    char name[NAME_MAX + sizeof "/status"];
    int to = make_file(directory, "tasks"), fd = openat(process, "task", O_RDONLY | O_DIRECTORY);
    DIR *tasks = fd < 0 ? NULL : fdopendir(fd);
    unsigned count = 0;
    for (struct dirent *one; tasks && (one = readdir(tasks)) && count < TASKS && !is_over();) {
        if (*one->d_name == '.') continue;
        snprintf(name, sizeof name, "%s/status", one->d_name);
        append(fd, name, to, PAGE);
        count++;
    }
    if (tasks) closedir(tasks);
    if (to >= 0) close(to);
}

static void copy_facts(int process, int thread, int directory) {
    static const char *const of_process[] = {"stat", "status", "comm", "cgroup"};
    static const char *const of_thread[] = {"cmdline", "limits", "mountinfo", "oom_score_adj"};
    static const char *const links[] = {"exe", "cwd", "root"};
    for (size_t i = 0; i < 4; i++) copy_file(process, of_process[i], directory, MAX_SMALL);
    /* When its first thread has ended, the process shows no memory; the one that crashed does. */
    for (size_t i = 0; i < 4; i++) copy_file(thread, of_thread[i], directory, MAX_SMALL);
    for (size_t i = 0; i < 3; i++) copy_link(thread, links[i], directory);
    copy_file(thread, "environ", directory, MAX_ENVIRON);
    copy_file(thread, "maps", directory, MAX_MAPS);
    copy_tasks(process, directory);
}

/* Return where headers and notes of a core end and memory begins; 0 where that is not seen. */
static size_t head_end(const char *raw, size_t size) {
    Elf64_Ehdr header;
    Elf64_Phdr entry;
    if (size < sizeof header) return 0;
    memcpy(&header, raw, sizeof header);
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_ident[EI_CLASS] != ELFCLASS64 ||
        header.e_phentsize != sizeof entry || header.e_phnum == PN_XNUM)
        return 0;
    if (header.e_phoff > size || header.e_phnum * sizeof entry > size - header.e_phoff) return 0;
    for (unsigned i = 0; i < header.e_phnum; i++) {
        memcpy(&entry, raw + header.e_phoff + i * sizeof entry, sizeof entry);
        if (entry.p_type == PT_LOAD && entry.p_filesz)
            return entry.p_offset <= size ? entry.p_offset : 0;
    }
    return 0;
}

/* Read until a block is full; less comes only at the end, or when the time is over. */
static size_t fill(char *block) {
    size_t got = 0;
    struct pollfd waiting = {.fd = STDIN_FILENO, .events = POLLIN};
    while (got < BLOCK && !is_over()) {
        /* Never longer: standard input cannot be closed under a poll(2). */
        if (poll(&waiting, 1, 500) <= 0) continue;
        ssize_t more = read(STDIN_FILENO, block + got, BLOCK - got);
        if (more < 0 && errno == EAGAIN) continue;
        if (more <= 0) break;
        got += (size_t)more;
    }
    return got;
}

/* Write a block, with holes where there are only zeros. */
static bool write_sparse(int core, const char *block, size_t size, uint64_t place) {
    static const char zeros[PAGE];
    for (size_t at = 0; at < size; at += PAGE) {
        size_t part = size - at < PAGE ? size - at : PAGE;
        if (!memcmp(block + at, zeros, part)) continue;
        if (pwrite(core, block + at, part, (off_t)(place + at)) != (ssize_t)part) return false;
    }
    return true;
}

/* Return how large a core of this size may become. Others are written to the same disk. */
static uint64_t may_have(int core, uint64_t size) {
    struct statvfs disk;
    if (fstatvfs(core, &disk)) return size;
    uint64_t kept = disk.f_blocks / 1000 * numbers[RESERVE].value, most = size;
    uint64_t limit = numbers[LIMIT].value;
    if (disk.f_bavail > kept) most += (disk.f_bavail - kept) * disk.f_frsize;
    return limit && limit < most ? limit : most;
}

/* Copy the core as far as it goes; return why it is not whole, or "". */
static const char *copy_core(int directory) {
    static char block[BLOCK];
    int core = make_file(directory, "core");
    if (core < 0) return "no file could be made for it";
    uint64_t size = 0;
    const char *fault = "";
    fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
    fcntl(STDIN_FILENO, F_SETPIPE_SZ, 1 << 20);
    for (size_t got; (got = fill(block));) {
        if (job.head_only) got = head_end(block, got);
        uint64_t limit = may_have(core, size);
        bool is_cut = size + got > limit;
        if (is_cut) got = (size_t)(limit - size);
        if (!write_sparse(core, block, got, size)) {
            fault = "there was no room on the disk";
            break;
        }
        size += got;
        if (is_cut) fault = "it was at its limit, or the disk at its reserve";
        if (job.head_only) fault = "no memory may be kept";
        if (*fault || got < BLOCK) break;
    }
    if (!*fault && is_over()) fault = "it took too long";
    if (ftruncate(core, (off_t)size)) fault = "there was no room on the disk";
    close(core);
    return fault;
}

/* Tell whether there is room for one more crash: all of one user have three quarters of it. An orphan's
 * user is the group of its directory, which root alone can enter. What does not begin with a digit
 * was put aside by the recorder. */
static bool has_room(int orphans, gid_t user) {
    uint64_t all = 0, same = 0, most = numbers[MOST].value;
    struct stat status;
    DIR *entries = fdopendir(dup(orphans));
    for (struct dirent *one; entries && (one = readdir(entries));) {
        if (*one->d_name < '0' || *one->d_name > '9') continue;
        all++;
        if (fstatat(orphans, one->d_name, &status, AT_SYMLINK_NOFOLLOW)) continue;
        same += status.st_gid == user;
    }
    if (entries) closedir(entries);
    return all < most && same < most - most / 4;
}

/* Have others that come at once look for room when this one has taken its place. A lock that is not
 * given back holds no crash for long: then there are a few more than should be. */
static void lock(int orphans) {
    struct timespec pause = {.tv_nsec = LOOK_EVERY};
    for (int i = 0; i < LOOKS && flock(orphans, LOCK_EX | LOCK_NB); i++) nanosleep(&pause, NULL);
}

/* Open the directory of all orphans, if it is root's alone and has room for one more; locked. */
static int open_orphans(gid_t user) {
    struct stat status;
    int fd = open(job.directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) || status.st_uid != geteuid() || status.st_mode & 077) {
        job.fault = "the recorder took nothing, and its directory for that is missing or not ours";
        return -1;
    }
    lock(fd);
    if (has_room(fd, user)) return fd;
    job.fault = "the recorder took nothing, and too many crashes wait for it already";
    return -1;
}

static int make_directory(int orphans, const char *name, gid_t user) {
    if (mkdirat(orphans, name, 0700)) return -1;
    int fd = openat(orphans, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int fault = fd < 0 ? 0 : fchown(fd, (uid_t)-1, user);
    (void)fault; /* a file system without groups: it counts as root's */
    return fd;
}

static void *keep(void *unused) {
    (void)unused;
    static struct crashed crashed;
    char name[64];
    int proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int process = openat(proc, job.pid, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int thread = openat(proc, job.tid, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (process < 0 || thread < 0) {
        job.fault = "the recorder took nothing, and the process is gone";
        return NULL;
    }
    look_at(process, thread, &crashed);
    apply_rules(&crashed);
    gid_t user = (gid_t)strtoul(crashed.user, NULL, 10);
    int orphans = open_orphans(user);
    if (orphans < 0) return NULL;
    snprintf(name, sizeof name, "%.20s-%.20s", job.time, job.pid);
    int directory = make_directory(orphans, name, user);
    flock(orphans, LOCK_UN);
    if (directory < 0 || flock(directory, LOCK_EX)) {
        job.fault = "the recorder took nothing, and no directory could be made";
        return NULL;
    }
    write_file(directory, "crash", job.crash);
    int boot = make_file(directory, "boot_id");
    append(proc, "sys/kernel/random/boot_id", boot, PAGE);
    copy_facts(process, thread, directory);
    write_file(directory, "end", copy_core(directory));
    if (!job.head_only) job.kept.core = openat(directory, "core", O_RDONLY | O_CLOEXEC);
    close(directory); /* the next recorder may have it */
    return NULL;
}

const char *keep_orphan(const char *helper, const char *crash, const char *pid, const char *tid,
                        const char *time, struct kept *kept) {
    pthread_t thread;
    job.crash = crash, job.pid = pid, job.tid = tid, job.time = time;
    const char *fault = read_rules(helper);
    if (!fault) fault = parse_rules();
    if (fault) return fault;
    clock_gettime(CLOCK_MONOTONIC, &job.end);
    job.end.tv_sec += (time_t)numbers[SECONDS].value;
    if (pthread_create(&thread, NULL, keep, NULL)) return "no thread";
    struct timespec end = job.end;
    for (int i = 0; i < 2; i++) {
        end.tv_sec += GRACE;
        if (!pthread_clockjoin_np(thread, NULL, CLOCK_MONOTONIC, &end)) {
            *kept = job.kept;
            return job.fault;
        }
        close(STDIN_FILENO);
    }
    return "the recorder took nothing, and the disk does not answer";
}
