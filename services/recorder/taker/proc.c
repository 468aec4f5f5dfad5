/* What /proc tells of a process, and its cgroups of it: into the arena, see taker.h. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "parts.h"

#define LONGEST_MAPS (256 * 1024)
#define LONGEST_STATUS (64 * 1024)
#define LONGEST_MOUNTS (64 * 1024)

/* --- one after the other -------------------------------------------------------------------- */

static int put_number(struct crash *crash, uint32_t number) {
    if (crash->used + sizeof number > ARENA) return -1;
    memcpy(crash->arena + crash->used, &number, sizeof number);
    crash->used += sizeof number;
    return 0;
}

/* Put what `size` says was written behind the next length, with a NUL. */
static int put_written(struct crash *crash, ssize_t size) {
    if (put_number(crash, size < 0 ? ABSENT : (uint32_t)size)) return -1;
    if (size >= 0) crash->arena[crash->used + (size_t)size] = 0, crash->used += (uint32_t)size + 1;
    return 0;
}

/* Where the next content goes, and how much of it. */
static char *next(struct crash *crash, size_t *room) {
    size_t begin = crash->used + sizeof(uint32_t);
    *room = begin + 1 < ARENA ? ARENA - begin - 1 : 0; /* for the NUL */
    return crash->arena + begin;
}

/* Read up to `most` bytes of a file, none where it cannot be read; NULL: the arena is full. */
static char *put_file(struct crash *crash, int place, const char *name, size_t most) {
    size_t room, done = 0;
    char *into = next(crash, &room);
    if (!room) return NULL;
    int file = openat(place, name, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : 0;
    while (file >= 0 && done < most) {
        if (done == room) { close(file); return NULL; }
        size_t ask = most - done < room - done ? most - done : room - done;
        got = read(file, into + done, ask);
        if (got <= 0) break;
        done += (size_t)got;
    }
    if (file >= 0) close(file);
    return put_written(crash, got < 0 ? 0 : (ssize_t)done) ? NULL : into;
}

static const char *put_link(struct crash *crash, int place, const char *name) {
    size_t room;
    char *into = next(crash, &room);
    if (room < PATH_MAX) return NULL;
    ssize_t size = readlinkat(place, name, into, PATH_MAX);
    if (size < 0) into = "";
    return put_written(crash, size) ? NULL : into;
}

static int put_text(struct crash *crash, const char *text) {
    size_t room, size = strlen(text);
    char *into = next(crash, &room);
    if (room < size) return -1;
    memcpy(into, text, size);
    return put_written(crash, (ssize_t)size);
}

static DIR *open_directory(int place, const char *name) {
    int file = openat(place, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = file < 0 ? NULL : fdopendir(file);
    if (!directory && file >= 0) close(file);
    return directory;
}

/* Put each entry of a directory with what `put_entry` tells of it; returns how many, or -1. */
static int put_entries(struct crash *crash, int place, const char *name, uint32_t most,
                       int (*put_entry)(struct crash *, int directory, const char *name)) {
    uint32_t at = crash->used, count = 0;
    if (put_number(crash, 0)) return -1;
    DIR *directory = open_directory(place, name);
    if (!directory) return 0;
    for (struct dirent *entry; count < most && (entry = readdir(directory));) {
        if (!isdigit((unsigned char)entry->d_name[0])) continue;
        if (put_text(crash, entry->d_name) || put_entry(crash, dirfd(directory), entry->d_name)) {
            closedir(directory);
            return -1;
        }
        count++;
    }
    closedir(directory);
    memcpy(crash->arena + at, &count, sizeof count);
    return (int)count;
}

/* --- the process ---------------------------------------------------------------------------- */

static int is_small(const struct crash *crash, const char *status) {
    const char *found = strstr(status, "\nVmRSS:"); /* absent: its memory is gone */
    return found && strtoull(found + 7, NULL, 10) <= crash->resident / 1024;
}

/* NSpid has one number for each PID namespace that it is in. */
static int is_in_namespace(const char *status) {
    const char *found = strstr(status, "\nNSpid:\t");
    return found && found[8 + strspn(found + 8, "0123456789")] == '\t';
}

int put_status(struct crash *crash) {
    note_next(crash, STATUS);
    const char *status = put_file(crash, crash->place, "status", LONGEST_STATUS);
    if (!status || !is_small(crash, status)) return -1;
    crash->namespaced = is_in_namespace(status);
    return 0;
}

int put_executable(struct crash *crash) {
    note_next(crash, EXE);
    const char *executable = put_link(crash, crash->place, "exe"); /* absent: its memory is gone */
    return executable && *executable ? 0 : -1;
}

const char *put_maps(struct crash *crash) {
    note_next(crash, MAPS);
    const char *maps = put_file(crash, crash->place, "maps", LONGEST_MAPS);
    return maps && strlen(maps) < LONGEST_MAPS ? maps : NULL;
}

const char *put_mounts(struct crash *crash) {
    const char *namespace = put_link(crash, crash->place, "ns/mnt");
    note_next(crash, ROOT);
    const char *root = namespace ? put_link(crash, crash->place, "root") : NULL;
    if (!root || !*namespace || !*root) return NULL;
    if (!strcmp(namespace, crash->namespace) && !strcmp(root, crash->root))
        return put_number(crash, ABSENT) ? NULL : crash->mounts;
    return put_file(crash, crash->place, "mountinfo", LONGEST_MOUNTS);
}

/* A thread's name, and what it is in its own PID namespace if that is another: proc_tid(5). */
static int put_thread(struct crash *crash, int directory, const char *name) {
    char path[300];
    snprintf(path, sizeof path, "%s/comm", name);
    if (!put_file(crash, directory, path, LONGEST_STATUS)) return -1;
    snprintf(path, sizeof path, "%s/status", name);
    if (!crash->namespaced) return put_number(crash, ABSENT);
    return put_file(crash, directory, path, LONGEST_STATUS) ? 0 : -1;
}

int put_threads(struct crash *crash) {
    int threads = put_entries(crash, crash->place, "task", crash->threads + 1, put_thread);
    return threads > 0 && (uint32_t)threads <= crash->threads ? 0 : -1;
}

/* --- what taken.py wants beside ------------------------------------------------------------- */

const char *put_groups(struct crash *crash) {
    note_next(crash, CGROUP);
    return put_file(crash, crash->place, "cgroup", LONGEST_STATUS);
}

/* Find the longest path in proc_pid_cgroup(5); that of version 2, if it is as long. */
static size_t find_group(const char *groups, const char **group) {
    size_t longest = 0;
    for (const char *line = groups, *end; *line; line = *end ? end + 1 : end) {
        end = strchrnul(line, '\n');
        const char *path = memchr(line, ':', (size_t)(end - line));
        path = path ? memchr(path + 1, ':', (size_t)(end - path - 1)) : NULL;
        if (!path) continue;
        size_t size = (size_t)(end - ++path);
        if (size > longest || (size == longest && *line == '0')) *group = path, longest = size;
    }
    return longest;
}

/* Names of cgroups are chosen by whoever may make them. */
static int leads_up(const char *path) {
    for (const char *found = path; (found = strstr(found, "..")); found += 2)
        if ((found == path || found[-1] == '/') && (!found[2] || found[2] == '/')) return 1;
    return 0;
}

static int open_group(const char *groups, const char *hierarchy) {
    char path[PATH_MAX];
    const char *group;
    size_t size = find_group(groups, &group);
    if (!size) return -1;
    int length = snprintf(path, sizeof path, "%s/%.*s", hierarchy, (int)size, group);
    if (length >= (int)sizeof path || leads_up(path)) return -1;
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static int put_descriptor(struct crash *crash, int directory, const char *name) {
    const char *target = put_link(crash, directory, name);
    if (target && !strncmp(target, "socket:", 7)) crash->sockets = 1;
    return target ? 0 : -1;
}

/* Of a group that cannot be opened, -1, each file is empty. */
static int put_one(struct crash *crash, int place, const struct wanted *wanted) {
    note_next(crash, wanted->part);
    if (wanted->kind == 'l') return put_link(crash, place, wanted->name) ? 0 : -1;
    if (wanted->kind == 'f') return put_file(crash, place, wanted->name, wanted->most) ? 0 : -1;
    return put_entries(crash, place, wanted->name, wanted->most, put_descriptor) < 0 ? -1 : 0;
}

int put_wanted(struct crash *crash, const char *groups) {
    int group = -1, failed = 0, place = crash->place;
    for (uint32_t one = 0; !failed && one < crash->wanteds; one++) {
        const struct wanted *wanted = &crash->wanted[one];
        if (wanted->kind == 'g') {
            if (group >= 0) close(group);
            place = group = open_group(groups, wanted->name);
        } else
            failed = put_one(crash, place, wanted);
    }
    if (group >= 0) close(group);
    return failed;
}
