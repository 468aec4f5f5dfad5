/* What a process has mapped, proc_pid_maps(5), and the files among it. */
#define _GNU_SOURCE
#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "parts.h"

#define DEVICES 16 /* that its files lie on; each is looked for among the mounts */

static int parse_number(const char **at, int base, char after, uint64_t *number) {
    char *end;
    if (!isxdigit((unsigned char)**at)) return -1;
    *number = strtoull(*at, &end, base);
    if (*end != after) return -1;
    *at = end + 1;
    return 0;
}

static int parse_device(const char **at, int base, uint64_t *device) {
    uint64_t major_number, minor_number;
    if (parse_number(at, base, ':', &major_number)) return -1;
    if (parse_number(at, base, ' ', &minor_number)) return -1;
    *device = major_number << 32 | minor_number;
    return 0;
}

/* Tell by its name, which ends the line, whether a mapping without a file is memory of its own. */
static int is_memory(const char *name) {
    return *name == '\n' || !strncmp(name, "[heap]\n", 7) || !strncmp(name, "[stack]\n", 8) ||
           !strncmp(name, "[anon:", 6);
}

static int parse_mapping(const char *at, const char *end, struct mapping *mapping) {
    uint64_t offset;
    if (parse_number(&at, 16, '-', &mapping->start)) return -1;
    if (parse_number(&at, 16, ' ', &mapping->end) || mapping->start >= mapping->end) return -1;
    const char *rights = at;
    if (end - at < 5 || at[4] != ' ') return -1;
    at += 5;
    if (parse_number(&at, 16, ' ', &offset)) return -1;
    if (parse_device(&at, 16, &mapping->device)) return -1;
    if (parse_number(&at, 10, ' ', &mapping->inode)) return -1;
    at += strspn(at, " "); /* more of them before short addresses */
    mapping->readable = rights[0] == 'r';
    mapping->code = rights[2] == 'x';
    mapping->private_memory = !mapping->inode && rights[3] == 'p' && is_memory(at);
    mapping->file = mapping->inode ? at : NULL;
    mapping->length = mapping->inode ? (uint32_t)(end - at) : 0;
    return 0;
}

int parse_mappings(struct crash *crash, const char *maps) {
    for (const char *line = maps, *end; *line; line = end + 1) {
        struct mapping *mapping = &crash->mappings[crash->mappings_found];
        if (crash->mappings_found == MAPPINGS || !(end = strchr(line, '\n'))) return -1;
        if (parse_mapping(line, end, mapping)) return -1;
        if (crash->mappings_found && mapping->start < mapping[-1].end) return -1;
        crash->mappings_found++;
    }
    return crash->mappings_found ? 0 : -1;
}

const struct mapping *mapping_of(const struct crash *crash, uint64_t start, uint64_t size) {
    uint32_t low = 0, high = crash->mappings_found;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (crash->mappings[middle].end <= start) low = middle + 1;
        else high = middle;
    }
    const struct mapping *found = &crash->mappings[low];
    if (low == crash->mappings_found || found->start > start || found->end - start < size) return NULL;
    return found;
}

/* --- where its files lie: proc_pid_mountinfo(5) ----------------------------------------------- */

/* File systems of this host alone: a page of them comes for sure. */
static const char *const local_types[] = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs",
                                          "zfs", "tmpfs", "squashfs", "erofs"};

static int is_local_type(const char *type) {
    size_t length = strcspn(type, " \n");
    for (size_t one = 0; one < sizeof local_types / sizeof *local_types; one++)
        if (length == strlen(local_types[one]) && !memcmp(type, local_types[one], length)) return 1;
    return 0;
}

/* No sscanf(3) here: it looks for the end of all mounts for each of them. */
static int is_local_device(const char *mounts, uint64_t device) {
    for (const char *line = mounts, *end; *line; line = *end ? end + 1 : end) {
        uint64_t ignored, found;
        const char *at = line;
        end = strchrnul(line, '\n');
        if (parse_number(&at, 10, ' ', &ignored) || parse_number(&at, 10, ' ', &ignored)) continue;
        if (parse_device(&at, 10, &found) || found != device) continue;
        const char *type = memmem(line, (size_t)(end - line), " - ", 3);
        return type && is_local_type(type + 3);
    }
    return 0;
}

int need_local_files(const struct crash *crash, const char *mounts) {
    uint64_t local[DEVICES];
    uint32_t found = 0;
    for (uint32_t one = 0; one < crash->mappings_found; one++) {
        const struct mapping *mapping = &crash->mappings[one];
        if (!mapping->file) continue;
        uint32_t known = 0;
        while (known < found && local[known] != mapping->device) known++;
        if (known < found) continue;
        if (found == DEVICES || !is_local_device(mounts, mapping->device)) return -1;
        local[found++] = mapping->device;
    }
    return 0;
}

/* --- the files themselves: proc_pid_map_files(5) ---------------------------------------------- */

enum { FILE_NAME = 64 };

static void name_file(const struct mapping *mapping, char name[FILE_NAME]) {
    snprintf(name, FILE_NAME, "map_files/%llx-%llx", (unsigned long long)mapping->start,
             (unsigned long long)mapping->end);
}

int look_at_file(const struct crash *crash, const struct mapping *mapping, struct stat *status) {
    char name[FILE_NAME];
    name_file(mapping, name);
    return fstatat(crash->place, name, status, 0) || !S_ISREG(status->st_mode) ? -1 : 0;
}

static void open_file(struct crash *crash, const struct mapping *mapping) {
    char name[FILE_NAME];
    struct stat status;
    /* To open a device is to act on it: look first. What is mapped stays while it is held. */
    if (look_at_file(crash, mapping, &status)) return;
    name_file(mapping, name);
    int file = openat(crash->place, name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (file >= 0)
        crash->files[crash->files_found++] = (struct opened){mapping->start, mapping->end, file};
}

static int is_same_file(const struct mapping *one, const struct mapping *other) {
    return one->file && one->device == other->device && one->inode == other->inode &&
           one->length == other->length && !memcmp(one->file, other->file, one->length);
}

static const struct mapping *first_of_file(const struct crash *crash, const struct mapping *mapping) {
    const struct mapping *first = crash->mappings;
    while (!is_same_file(first, mapping)) first++;
    return first;
}

static int is_open(const struct crash *crash, const struct mapping *mapping) {
    for (uint32_t one = 0; one < crash->files_found; one++)
        if (crash->files[one].start == mapping->start) return 1;
    return 0;
}

/* Open what is mapped as code, by its file's first mapping. */
void open_modules(struct crash *crash) {
    uint32_t most = crash->modules < MODULES ? crash->modules : MODULES;
    for (uint32_t one = 0; one < crash->mappings_found && crash->files_found < most; one++) {
        const struct mapping *code = &crash->mappings[one];
        if (!code->code || !code->file) continue;
        const struct mapping *first = first_of_file(crash, code);
        if (!is_open(crash, first)) open_file(crash, first);
    }
}

void close_modules(struct crash *crash) {
    while (crash->files_found) close(crash->files[--crash->files_found].file);
}
