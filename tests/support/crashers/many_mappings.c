/* Crashes with every kind of mapping whose pages a core holds in a way of its own. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define GUARD_INSTALL 102 /* MADV_GUARD_INSTALL, Linux >= 6.13 */

static void fill(char *memory, size_t size, unsigned seed) {
    for (size_t i = 0; i < size; i++) memory[i] = (char)(seed = seed * 1103515245 + 12345) ^ (char)(seed >> 16);
}

static char *map(size_t size, int flags, int file) {
    char *memory = mmap(0, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (memory == MAP_FAILED) exit(2);
    return memory;
}

static int file_of(size_t size) {
    char path[] = "/tmp/crasher-XXXXXX";
    int file = mkstemp(path);
    char page[PAGE];
    unlink(path);
    for (size_t at = 0; at < size; at += PAGE) {
        fill(page, PAGE, at);
        if (write(file, page, size - at < PAGE ? size - at : PAGE) < 0) exit(2);
    }
    return file;
}

void crash_here(void) { *(volatile int *)0 = 1; }

int main(int count, char **arguments) {
    size_t bulk = count > 1 ? strtoull(arguments[1], 0, 10) << 20 : 20UL << 20;
    int private = MAP_PRIVATE | MAP_ANONYMOUS;
    /* More than one thread is worth it, more than one block is read. */
    fill(map(bulk, private, -1), bulk, 1);
    /* Every other page touched, and runs of odd lengths. */
    char *sparse = map(1024 * PAGE, private, -1);
    for (int i = 0; i < 1024; i += 2 + i % 7) fill(sparse + i * PAGE, 100, i);
    /* Content behind no permission at all. */
    char *closed = map(8 * PAGE, private, -1);
    fill(closed, 8 * PAGE, 3);
    mprotect(closed, 8 * PAGE, PROT_NONE);
    /* Read, never written: the zero page. */
    char *zero = map(64 * PAGE, private, -1);
    zero[0] = 1;
    for (int i = 1; i < 64; i++) zero[0] += zero[i * PAGE];
    /* Shared memory, partly touched. */
    char *shared = map(256 * PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
    fill(shared + 9 * PAGE, 5 * PAGE, 4);
    /* A private file mapping: one page written, others from the file, the last behind its end. */
    char *copied = map(16 * PAGE, MAP_PRIVATE, file_of(9 * PAGE + 77));
    fill(copied + 3 * PAGE, 10, 5);
    /* What must not be dumped. */
    char *hidden = map(16 * PAGE, private, -1);
    fill(hidden, 16 * PAGE, 6);
    madvise(hidden, 16 * PAGE, MADV_DONTDUMP);
    /* Pages that cannot be read. */
    char *guarded = map(16 * PAGE, private, -1);
    fill(guarded, 16 * PAGE, 7);
    madvise(guarded + 2 * PAGE, 3 * PAGE, GUARD_INSTALL);
    /* Given back after use. */
    char *returned = map(512 * PAGE, private, -1);
    fill(returned, 512 * PAGE, 8);
    madvise(returned + 100 * PAGE, 200 * PAGE, MADV_DONTNEED);
    crash_here();
}
