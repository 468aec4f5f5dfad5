/* Which of a process's memory to read, proc_pid_pagemap(5), and its content. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "parts.h"

#define SMALL_FILE (64 * 1024) /* bytes of a mapped file that are read, whatever it is */

enum { REGIONS = 256, ENTRIES = 512, VECTORS = 256 }; /* of one system call */

/* --- what of it was touched ------------------------------------------------------------------ */

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
    struct region regions[REGIONS];
    while (start < end) {
        struct scan scan = {.size = sizeof scan, .start = start, .end = end,
                            .regions = (uintptr_t)regions, .regions_size = REGIONS,
                            .any = PRESENT_OR_SWAPPED, .told = PRESENT_OR_SWAPPED};
        int count = ioctl(pagemap, SCAN, &scan);
        if (count < 0 || count > REGIONS || scan.walk_end <= start) return -1;
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
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), entries[ENTRIES], run = 0;
    while (start < end) {
        uint64_t wanted = (end - start) / page < ENTRIES ? (end - start) / page : ENTRIES;
        if (!wanted) return -1;
        ssize_t got = pread(pagemap, entries, wanted * 8, (off_t)(start / page * 8));
        if (got != (ssize_t)(wanted * 8)) return -1;
        for (uint64_t one = 0; one < wanted; one++, start += page) {
            int is_touched = entries[one] >> 62 != 0; /* present or swapped */
            if (!is_touched && run && put_piece(crash, start - run, run, readable)) return -1;
            run = is_touched ? run + page : 0;
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
    struct stat status;
    return !look_at_file(crash, mapping, &status) && status.st_blocks * 512 >= status.st_size;
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

static int put_loads(struct crash *crash, int pagemap, int sure) {
    for (uint32_t one = 0; one < crash->loads_found; one++)
        if (put_load(crash, pagemap, &crash->loads[one], sure)) return -1;
    return 0;
}

int find_pieces(struct crash *crash) {
    int pagemap = openat(crash->place, "pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) return -1;
    int failed = put_loads(crash, pagemap, 1);
    crash->sure = crash->pieces_found;
    if (!failed) failed = put_loads(crash, pagemap, 0);
    close(pagemap);
    return failed;
}

/* --- its content ----------------------------------------------------------------------------- */

void read_code(struct crash *crash) {
    const struct mapping *mapping = mapping_of(crash, crash->counter, 1);
    if (!mapping || !mapping->code || crash->counter > LAST_OFFSET) return;
    size_t left = mapping->end - crash->counter, size = left < LONGEST_CODE ? left : LONGEST_CODE;
    int memory = openat(crash->place, "mem", O_RDONLY | O_CLOEXEC);
    if (memory < 0) return;
    ssize_t got = pread(memory, crash->code, size, (off_t)crash->counter);
    crash->code_size = got > 0 ? (uint32_t)got : 0;
    close(memory);
}

/* Read the pieces that are sure, process_vm_readv(2): twice as fast as proc_pid_mem(5), but of what
 * was never touched it could wait for a userfaultfd(2). Returns how many pieces are there. */
static uint32_t read_sure(const struct crash *crash, char **into) {
    struct iovec there[VECTORS];
    uint32_t done = 0;
    while (done < crash->sure) {
        uint32_t some = crash->sure - done < VECTORS ? crash->sure - done : VECTORS;
        size_t size = 0;
        for (uint32_t one = 0; one < some; one++) {
            const struct piece *piece = &crash->pieces[done + one];
            there[one] = (struct iovec){(void *)(uintptr_t)piece->address, piece->size};
            size += piece->size;
        }
        struct iovec here = {*into, size};
        if (process_vm_readv(crash->pid, &here, 1, there, some, 0) != (ssize_t)size) break;
        *into += size;
        done += some;
    }
    return done;
}

/* Read a piece whole; what is not there of it is zeros. */
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
    uint32_t done = read_sure(crash, &into);
    int memory = openat(crash->place, "mem", O_RDONLY | O_CLOEXEC), failed = 0;
    if (memory < 0) return -1;
    for (; !failed && done < crash->pieces_found; into += crash->pieces[done++].size)
        failed = read_piece(memory, &crash->pieces[done], into);
    close(memory);
    return failed;
}
