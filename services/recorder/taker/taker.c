/* Read a small process, whole, while it is held; see taker.h.
 *
 * Whatever is read here was written by whoever crashed, or stands in files that they named: each
 * length is bounded, and what does not look as expected is not taken. A process that is not taken is
 * held longer, and nothing else.
 */
#define _GNU_SOURCE
#include "taker.h"

#include <ctype.h>
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <limits.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_MAPS (256 * 1024)
#define LONGEST_STATUS (64 * 1024)
#define LONGEST_MOUNTS (64 * 1024)
#define DEVICES 16                  /* that its files lie on; each is looked for among the mounts */
#define SMALL_FILE (64 * 1024)      /* bytes of a mapped file that are read, whatever it is */
#define SPIN_NS (300 * 1000)        /* longer than a wake-up takes; what comes at all comes at once */
#define LAST_OFFSET INT64_MAX       /* of a file; only x86-64's vsyscall page lies beyond */

size_t crash_size(void) { return sizeof(struct crash); }

size_t known_size(void) { return offsetof(struct crash, loads_found); }

/* --- what is found ------------------------------------------------------------------------- */

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

/* Read up to `most` bytes of a file; returns its content, or NULL where the arena is full. */
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
    if (got < 0) done = 0;
    return put_written(crash, (ssize_t)done) ? NULL : into;
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

static int put_descriptor(struct crash *crash, int directory, const char *name) {
    const char *target = put_link(crash, directory, name);
    if (target && !strncmp(target, "socket:", 7)) crash->sockets = 1;
    return target ? 0 : -1;
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

/* Note the longest path in proc_pid_cgroup(5); of version 2, if that is as long. */
static void find_group(struct crash *crash, const char *groups) {
    crash->group_size = 0;
    for (const char *line = groups, *end; *line; line = *end ? end + 1 : end) {
        end = strchrnul(line, '\n');
        const char *path = memchr(line, ':', (size_t)(end - line));
        path = path ? memchr(path + 1, ':', (size_t)(end - path - 1)) : NULL;
        if (!path) continue;
        size_t size = (size_t)(end - ++path);
        if (size > crash->group_size || (size == crash->group_size && *line == '0'))
            crash->group = path, crash->group_size = (uint32_t)size;
    }
}

/* Names of cgroups are chosen by whoever may make them. */
static int leads_up(const char *path) {
    for (const char *found = path; (found = strstr(found, "..")); found += 2)
        if ((found == path || found[-1] == '/') && (!found[2] || found[2] == '/')) return 1;
    return 0;
}

static int open_group(const struct crash *crash, const char *hierarchy) {
    char path[PATH_MAX];
    if (!crash->group_size) return -1;
    int size = snprintf(path, sizeof path, "%s/%.*s", hierarchy, (int)crash->group_size, crash->group);
    if (size >= (int)sizeof path || leads_up(path)) return -1;
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static int put_wanted(struct crash *crash) {
    int place = crash->place, failed = 0;
    for (uint32_t one = 0; !failed && one < crash->wanteds; one++) {
        const struct wanted *wanted = &crash->wanted[one];
        if (wanted->kind == 'g') {
            if (place >= 0 && place != crash->place) close(place);
            place = open_group(crash, wanted->name);
        } else if (wanted->kind == 'd')
            failed = put_entries(crash, place, wanted->name, wanted->most, put_descriptor) < 0;
        else if (wanted->kind == 'l')
            failed = !put_link(crash, place, wanted->name);
        else if (place < 0)
            failed = put_written(crash, 0);
        else
            failed = !put_file(crash, place, wanted->name, wanted->most);
    }
    if (place >= 0 && place != crash->place) close(place);
    return failed ? -1 : 0;
}

/* --- how it arrives: include/uapi/linux/coredump.h and pidfd.h ------------------------------------ */

#define PEER_PIDFD 77
#define KERNEL_AND_WAIT ((1 << 0) | (1 << 3))

struct message { /* struct coredump_req, struct coredump_ack */
    uint32_t size, other;
    uint64_t mask;
};
struct pidfd_information { /* struct pidfd_info of Linux 6.13, of which later ones are longer */
    uint64_t mask, cgroup;
    uint32_t pid, others[11];
};
#define PIDFD_INFORMATION _IOWR(0xff, 11, struct pidfd_information)

static int comes_soon(int file);

static int find_peer(struct crash *crash) {
    struct pidfd_information found = {0};
    socklen_t size = sizeof crash->pidfd;
    if (getsockopt(crash->core, SOL_SOCKET, PEER_PIDFD, &crash->pidfd, &size)) return -1;
    if (!ioctl(crash->pidfd, PIDFD_INFORMATION, &found) && found.pid) {
        crash->pid = (int32_t)found.pid;
        return 0;
    }
    close(crash->pidfd);
    return -1;
}

int greet(struct crash *crash) {
    struct message request, answer = {sizeof answer, 0, KERNEL_AND_WAIT};
    crash->head_size = 0;
    if (find_peer(crash)) return -1;
    if (comes_soon(crash->core)) {
        ssize_t got = read(crash->core, crash->head, sizeof request);
        crash->head_size = got > 0 ? (uint32_t)got : 0;
        memcpy(&request, crash->head, sizeof request);
        if (got == sizeof request && request.size == sizeof request && !(KERNEL_AND_WAIT & ~request.mask) &&
            write(crash->core, &answer, sizeof answer) == sizeof answer)
            return 0;
    }
    close(crash->pidfd);
    return -1;
}

/* --- its core's head: elf(5) ---------------------------------------------------------------- */

static int comes_soon(int file) {
    struct pollfd waiting = {.fd = file, .events = POLLIN};
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        if (poll(&waiting, 1, 0)) return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begin.tv_sec) * 1000000000L + now.tv_nsec - begin.tv_nsec < SPIN_NS);
    return 0;
}

/* Have so many bytes of what comes; they are taken from the stream. */
static int head_until(struct crash *crash, uint64_t size) {
    struct pollfd waiting = {.fd = crash->core, .events = POLLIN};
    if (size > HEAD) return -1;
    while (crash->head_size < size) {
        if (!comes_soon(crash->core) && poll(&waiting, 1, (int)crash->patience) <= 0) return -1;
        ssize_t got = read(crash->core, crash->head + crash->head_size, size - crash->head_size);
        if (got <= 0) return -1;
        crash->head_size += (uint32_t)got;
    }
    return 0;
}

/* Where the program counter is in the first note, which is the crashing thread's NT_PRSTATUS:
 * behind the note's own header and name, and the beginning of struct elf_prstatus. */
static void find_counter(struct crash *crash, const char *notes, size_t size, int machine) {
    static const struct { int machine; size_t at, width; } known[] = {
        {EM_X86_64, 112 + 16 * 8, 8}, {EM_AARCH64, 112 + 32 * 8, 8}, {EM_386, 72 + 12 * 4, 4}};
    for (size_t one = 0; one < sizeof known / sizeof *known; one++)
        if (known[one].machine == machine && size >= 20 + known[one].at + known[one].width)
            memcpy(&crash->counter, notes + 20 + known[one].at, known[one].width);
}

static int read_head(struct crash *crash) {
    const char *core = crash->head + crash->mark;
    if (head_until(crash, crash->mark + sizeof(Elf32_Ehdr))) return -1;
    for (uint32_t one = 0; one < crash->mark; one++)
        if (crash->head[one]) return -1;
    int wide = core[EI_CLASS] == ELFCLASS64;
    if (memcmp(core, ELFMAG, SELFMAG) || core[EI_DATA] != ELFDATA2LSB) return -1;
    if (!wide && core[EI_CLASS] != ELFCLASS32) return -1;
    if (head_until(crash, crash->mark + (wide ? sizeof(Elf64_Ehdr) : sizeof(Elf32_Ehdr)))) return -1;
    Elf64_Ehdr first;
    Elf32_Ehdr narrow;
    memcpy(&first, core, wide ? sizeof first : sizeof narrow);
    memcpy(&narrow, core, sizeof narrow);
    uint64_t table = wide ? first.e_phoff : narrow.e_phoff;
    uint32_t entries = wide ? first.e_phnum : narrow.e_phnum;
    uint32_t entry = wide ? first.e_phentsize : narrow.e_phentsize;
    if (narrow.e_type != ET_CORE || entry != (wide ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr))) return -1;
    if (entries > MAPPINGS || table > HEAD) return -1;
    if (head_until(crash, crash->mark + table + (uint64_t)entries * entry)) return -1;

    uint64_t end = 0, data = 0, notes = 0;
    for (uint32_t one = 0; one < entries; one++) {
        Elf64_Phdr header;
        const char *at = core + table + (size_t)one * entry;
        if (wide)
            memcpy(&header, at, sizeof header);
        else {
            Elf32_Phdr small;
            memcpy(&small, at, sizeof small);
            header = (Elf64_Phdr){.p_type = small.p_type, .p_offset = small.p_offset,
                                  .p_vaddr = small.p_vaddr, .p_filesz = small.p_filesz};
        }
        if (!header.p_filesz) continue;
        if (header.p_offset < end || header.p_filesz > crash->largest) return -1;
        if (header.p_offset > crash->largest - header.p_filesz) return -1;
        end = header.p_offset + header.p_filesz;
        if (header.p_type == PT_NOTE && !notes) notes = header.p_offset;
        if (header.p_type != PT_LOAD) continue;
        if (!data) data = header.p_offset;
        if (header.p_vaddr > UINT64_MAX - header.p_filesz) return -1;
        crash->loads[crash->loads_found++] = (struct piece){header.p_vaddr, header.p_filesz, 0};
    }
    if (!data || !notes || notes > data || head_until(crash, crash->mark + data)) return -1;
    find_counter(crash, core + notes, data - notes, narrow.e_machine);
    return 0;
}

/* --- its mappings: proc_pid_maps(5) ----------------------------------------------------------- */

static int parse_number(const char **at, int base, char after, uint64_t *number) {
    char *end;
    if (!isxdigit((unsigned char)**at)) return -1;
    *number = strtoull(*at, &end, base);
    if (*end != after) return -1;
    *at = end + 1;
    return 0;
}

static int parse_mapping(const char *line, const char *end, struct mapping *mapping) {
    uint64_t inode;
    const char *at = line, *device;
    if (parse_number(&at, 16, '-', &mapping->start) || parse_number(&at, 16, ' ', &mapping->end)) return -1;
    if (end - at < 5 || at[4] != ' ' || mapping->start >= mapping->end) return -1;
    const char *rights = at;
    at += 5;
    if (parse_number(&at, 16, ' ', &mapping->offset)) return -1;
    device = at;
    if (!(at = memchr(at, ' ', (size_t)(end - at)))) return -1;
    at++;
    const char *digits = at;
    if (at >= end || !isdigit((unsigned char)*at)) return -1;
    inode = strtoull(at, (char **)&at, 10);
    if (at > end || (at == digits)) return -1;
    while (at < end && *at == ' ') at++;
    size_t size = (size_t)(end - at);
    int named = !size || (size == 6 && !memcmp(at, "[heap]", 6)) ||
                (size == 7 && !memcmp(at, "[stack]", 7)) || (size >= 6 && !memcmp(at, "[anon:", 6));
    mapping->readable = rights[0] == 'r';
    mapping->code = rights[2] == 'x';
    mapping->private_memory = !inode && rights[3] == 'p' && named;
    mapping->file = inode ? device : NULL;
    mapping->length = inode ? (uint32_t)(end - device) : 0;
    return 0;
}

static int parse_mappings(struct crash *crash, const char *maps) {
    for (const char *line = maps, *end; *line; line = end + 1) {
        struct mapping *mapping = &crash->mappings[crash->mappings_found];
        if (crash->mappings_found == MAPPINGS || !(end = strchr(line, '\n'))) return -1;
        if (parse_mapping(line, end, mapping)) return -1;
        if (crash->mappings_found && mapping->start < mapping[-1].end) return -1;
        crash->mappings_found++;
    }
    return crash->mappings_found ? 0 : -1;
}

static const struct mapping *mapping_of(const struct crash *crash, uint64_t start, uint64_t size) {
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

/* --- where it lies: proc_pid_mountinfo(5) ------------------------------------------------------ */

/* File systems of this host alone: a page of them comes for sure. */
static const char *const local_types[] = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs",
                                          "zfs", "tmpfs", "squashfs", "erofs"};

static int is_local_type(const char *type) {
    size_t length = strcspn(type, " \n");
    for (size_t one = 0; one < sizeof local_types / sizeof *local_types; one++)
        if (length == strlen(local_types[one]) && !memcmp(type, local_types[one], length)) return 1;
    return 0;
}

struct device {
    uint64_t major_number, minor_number;
};

static int parse_device(const char *at, int base, struct device *device) {
    return parse_number(&at, base, ':', &device->major_number) ||
           parse_number(&at, base, ' ', &device->minor_number) ? -1 : 0;
}

static int is_same(const struct device *one, const struct device *other) {
    return one->major_number == other->major_number && one->minor_number == other->minor_number;
}

/* No sscanf(3) here: it looks for the end of all mounts for each of them. */
static int is_local_device(const char *mounts, const struct device *device) {
    for (const char *line = mounts, *end; *line; line = *end ? end + 1 : end) {
        struct device found;
        uint64_t ignored;
        const char *at = line;
        end = strchrnul(line, '\n');
        if (parse_number(&at, 10, ' ', &ignored) || parse_number(&at, 10, ' ', &ignored)) continue;
        if (parse_device(at, 10, &found) || !is_same(&found, device)) continue;
        const char *type = memmem(line, (size_t)(end - line), " - ", 3);
        return type && is_local_type(type + 3);
    }
    return 0;
}

static int are_all_local(const struct crash *crash, const char *mounts) {
    struct device local[DEVICES], device;
    uint32_t found = 0;
    for (uint32_t one = 0; one < crash->mappings_found; one++) {
        if (!crash->mappings[one].file) continue;
        if (parse_device(crash->mappings[one].file, 16, &device)) return 0;
        uint32_t known = 0;
        while (known < found && !is_same(&local[known], &device)) known++;
        if (known < found) continue;
        if (found == DEVICES || !is_local_device(mounts, &device)) return 0;
        local[found++] = device;
    }
    return 1;
}

/* --- what is mapped as code: proc_pid_map_files(5) --------------------------------------------- */

static int same_file(const struct mapping *one, const struct mapping *other) {
    return other->file && one->length == other->length && !memcmp(one->file, other->file, one->length);
}

static void file_name(const struct mapping *mapping, char *name, size_t size) {
    snprintf(name, size, "map_files/%llx-%llx", (unsigned long long)mapping->start,
             (unsigned long long)mapping->end);
}

static void open_file(struct crash *crash, const struct mapping *first) {
    char name[64];
    struct stat status;
    file_name(first, name, sizeof name);
    /* To open a device is to act on it: look first. What is mapped stays while it is held. */
    if (fstatat(crash->place, name, &status, 0) || !S_ISREG(status.st_mode)) return;
    int file = openat(crash->place, name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (file >= 0) crash->files[crash->files_found++] = (struct opened){first->start, first->end, file};
}

static void open_modules(struct crash *crash) {
    uint32_t most = crash->modules < MODULES ? crash->modules : MODULES;
    for (uint32_t one = 0; one < crash->mappings_found && crash->files_found < most; one++) {
        const struct mapping *first = &crash->mappings[one];
        int seen = !first->file, code = 0;
        for (uint32_t other = 0; !seen && other < one; other++)
            seen = same_file(first, &crash->mappings[other]);
        for (uint32_t other = one; !seen && !code && other < crash->mappings_found; other++)
            code = crash->mappings[other].code && same_file(first, &crash->mappings[other]);
        if (code) open_file(crash, first);
    }
}

static void close_modules(struct crash *crash) {
    while (crash->files_found) close(crash->files[--crash->files_found].file);
}

/* --- which of its memory to read: proc_pid_pagemap(5) ------------------------------------------ */

struct scan { /* struct pm_scan_arg, linux/fs.h of Linux 6.7 */
    uint64_t size, flags, start, end, walk_end, regions, regions_size, most_pages, inverted, all, any, told;
};
struct region {
    uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan)
#define PRESENT_OR_SWAPPED ((1 << 3) | (1 << 4))

static int put_piece(struct crash *crash, uint64_t address, uint64_t size, int readable) {
    if (crash->pieces_found == PIECES || size > crash->touched - crash->memory) return -1;
    crash->pieces[crash->pieces_found++] = (struct piece){address, size, (uint32_t)readable};
    crash->memory += size;
    return 0;
}

static int put_scanned(struct crash *crash, int pagemap, uint64_t start, uint64_t end, int readable) {
    struct region regions[256];
    while (start < end) {
        struct scan scan = {.size = sizeof scan, .start = start, .end = end,
                            .regions = (uintptr_t)regions, .regions_size = 256,
                            .any = PRESENT_OR_SWAPPED, .told = PRESENT_OR_SWAPPED};
        int count = ioctl(pagemap, SCAN, &scan);
        if (count < 0 || count > 256 || scan.walk_end <= start) return -1;
        for (int one = 0; one < count; one++) {
            uint64_t first = regions[one].start, last = regions[one].end;
            if (first < start || last <= first || last > end) return -1;
            if (put_piece(crash, first, last - first, readable)) return -1;
        }
        start = scan.walk_end;
    }
    return 0;
}

/* The same before Linux 6.7: an entry of 8 bytes for each page. */
static int put_looked_up(struct crash *crash, int pagemap, uint64_t start, uint64_t end, int readable) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), entries[512], run = 0;
    while (start < end) {
        uint64_t wanted = (end - start) / page < 512 ? (end - start) / page : 512;
        if (!wanted) return -1;
        ssize_t got = pread(pagemap, entries, wanted * 8, (off_t)(start / page * 8));
        if (got != (ssize_t)(wanted * 8)) return -1;
        for (uint64_t one = 0; one < wanted; one++, start += page) {
            if (entries[one] >> 62) run += page;
            else if (run && put_piece(crash, start - run, run, readable)) return -1;
            if (!(entries[one] >> 62)) run = 0;
        }
    }
    return run ? put_piece(crash, end - run, run, readable) : 0;
}

static int put_touched(struct crash *crash, int pagemap, uint64_t start, uint64_t end, int readable) {
    errno = 0;
    if (!put_scanned(crash, pagemap, start, end, readable)) return 0;
    return errno == ENOTTY ? put_looked_up(crash, pagemap, start, end, readable) : -1;
}

/* To read a hole of a mapped file could fill it, tmpfs(5). */
static int is_whole_file(const struct crash *crash, const struct mapping *mapping) {
    char name[64];
    struct stat status;
    file_name(mapping, name, sizeof name);
    return !fstatat(crash->place, name, &status, 0) && S_ISREG(status.st_mode) &&
           status.st_blocks * 512 >= status.st_size;
}

static int put_load(struct crash *crash, int pagemap, const struct piece *load, int sure) {
    const struct mapping *mapping = mapping_of(crash, load->address, load->size);
    if (!mapping) return -1;
    if (load->address + load->size > LAST_OFFSET) return mapping->readable ? -1 : 0;
    if (sure != (mapping->private_memory && mapping->readable)) return 0;
    if (mapping->private_memory)
        return put_touched(crash, pagemap, load->address, load->address + load->size, mapping->readable);
    if (mapping->file && load->size > SMALL_FILE && !is_whole_file(crash, mapping)) return -1;
    return put_piece(crash, load->address, load->size, mapping->readable);
}

static int find_pieces(struct crash *crash) {
    int pagemap = openat(crash->place, "pagemap", O_RDONLY | O_CLOEXEC), failed = pagemap < 0;
    for (int sure = 1; !failed && sure >= 0; sure--) {
        for (uint32_t one = 0; !failed && one < crash->loads_found; one++)
            failed = put_load(crash, pagemap, &crash->loads[one], sure);
        if (sure) crash->sure = crash->pieces_found;
    }
    if (pagemap >= 0) close(pagemap);
    return failed ? -1 : 0;
}

/* --- all of it --------------------------------------------------------------------------------- */

static int field(const char *text, const char *name, uint64_t *number) {
    const char *found = strstr(text, name);
    if (!found) return -1;
    char *end;
    found += strlen(name);
    *number = strtoull(found, &end, 10);
    return end == found ? -1 : 0;
}

/* NSpid has one number for each PID namespace that it is in. */
static int is_in_namespace(const char *status) {
    const char *found = strstr(status, "\nNSpid:\t");
    return found && found[8 + strspn(found + 8, "0123456789")] == '\t';
}

static int is_small(struct crash *crash) {
    uint64_t resident;
    const char *status = put_file(crash, crash->place, "status", LONGEST_STATUS);
    if (!status || field(status, "\nVmRSS:", &resident) || resident > crash->resident / 1024) return 0;
    crash->namespaced = is_in_namespace(status);
    return 1;
}

static const char *mounts_seen(struct crash *crash) {
    const char *namespace = put_link(crash, crash->place, "ns/mnt");
    const char *root = namespace ? put_link(crash, crash->place, "root") : NULL;
    if (!root || !*namespace || !*root) return NULL;
    if (!strcmp(namespace, crash->namespace) && !strcmp(root, crash->root))
        return put_number(crash, ABSENT) ? NULL : crash->mounts;
    return put_file(crash, crash->place, "mountinfo", LONGEST_MOUNTS);
}

static void read_code(struct crash *crash) {
    const struct mapping *mapping = mapping_of(crash, crash->counter, 1);
    if (!mapping || !mapping->code || crash->counter > LAST_OFFSET) return;
    size_t left = mapping->end - crash->counter, size = left < LONGEST_CODE ? left : LONGEST_CODE;
    int memory = openat(crash->place, "mem", O_RDONLY | O_CLOEXEC);
    if (memory < 0) return;
    ssize_t got = pread(memory, crash->code, size, (off_t)crash->counter);
    crash->code_size = got > 0 ? (uint32_t)got : 0;
    close(memory);
}

static int look_at(struct crash *crash) {
    if (!is_small(crash)) return -1;
    const char *executable = put_link(crash, crash->place, "exe"); /* absent: its memory is gone */
    if (!executable || !*executable) return -1;
    const char *maps = put_file(crash, crash->place, "maps", LONGEST_MAPS);
    if (!maps || strlen(maps) >= LONGEST_MAPS || parse_mappings(crash, maps)) return -1;
    const char *groups = put_file(crash, crash->place, "cgroup", LONGEST_STATUS);
    if (!groups) return -1;
    find_group(crash, groups);
    const char *mounts = mounts_seen(crash);
    if (!mounts || !are_all_local(crash, mounts)) return -1;
    int threads = put_entries(crash, crash->place, "task", crash->threads + 1, put_thread);
    if (threads <= 0 || (uint32_t)threads > crash->threads) return -1;
    if (put_wanted(crash) || read_head(crash)) return -1;
    open_modules(crash);
    read_code(crash);
    return find_pieces(crash);
}

int look(struct crash *crash) {
    crash->used = crash->head_size = crash->pieces_found = crash->sure = crash->files_found = 0;
    crash->sockets = crash->code_size = crash->loads_found = crash->mappings_found = 0;
    crash->memory = crash->counter = 0;
    if (!look_at(crash)) return 0;
    close_modules(crash);
    return -1;
}

/* Read the pieces that are sure, process_vm_readv(2): twice as fast as proc_pid_mem(5), but of what
 * was never touched it could wait for a userfaultfd(2). Returns how many pieces are there. */
static uint32_t read_sure(const struct crash *crash, char *into) {
    struct iovec there[256];
    uint32_t done = 0;
    while (done < crash->sure) {
        uint32_t some = crash->sure - done < 256 ? crash->sure - done : 256;
        size_t size = 0;
        for (uint32_t one = 0; one < some; one++) {
            const struct piece *piece = &crash->pieces[done + one];
            there[one] = (struct iovec){(void *)(uintptr_t)piece->address, piece->size};
            size += piece->size;
        }
        struct iovec here = {into, size};
        if (process_vm_readv(crash->pid, &here, 1, there, some, 0) != (ssize_t)size) return done;
        into += size;
        done += some;
    }
    return done;
}

/* Returns 0 when the piece was read whole; what is not there of it is zeros. */
static int read_piece(int memory, const struct piece *piece, char *into) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), done = 0;
    while (done < piece->size) {
        ssize_t got = pread(memory, into + done, piece->size - done, (off_t)(piece->address + done));
        if (!got) return -1; /* it was killed */
        if (got < 0) {
            if ((errno != EIO && errno != EFAULT) || !piece->readable) return -1;
            got = (ssize_t)(page < piece->size - done ? page : piece->size - done);
            memset(into + done, 0, (size_t)got);
        }
        done += (size_t)got;
    }
    return 0;
}

int read_memory(const struct crash *crash, char *into) {
    uint32_t done = read_sure(crash, into);
    int memory = openat(crash->place, "mem", O_RDONLY | O_CLOEXEC), failed = memory < 0;
    for (uint32_t one = 0; one < done; one++) into += crash->pieces[one].size;
    for (uint32_t one = done; !failed && one < crash->pieces_found; into += crash->pieces[one++].size)
        failed = read_piece(memory, &crash->pieces[one], into);
    if (memory >= 0) close(memory);
    return failed ? -1 : 0;
}
