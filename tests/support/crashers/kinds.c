/* Has memory of each kind that coredump_filter knows, then crashes: kinds MASK FILE. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIZE = 1 << 20, HUGE = 2 << 20 };

static void fill(void *memory, const char *word)
{
    if (memory == MAP_FAILED)
        return;
    for (char *place = memory; place < (char *)memory + SIZE; place += 16)
        memcpy(place, word, strlen(word));
}

static void *map(int flags, int file, size_t size)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
}

static volatile int crash_here(int *nowhere)
{
    return *nowhere;
}

int main(int count, char **arguments)
{
    if (count < 3)
        return 2;
    int filter = open("/proc/self/coredump_filter", O_WRONLY);
    if (filter < 0 || write(filter, arguments[1], strlen(arguments[1])) < 0)
        return 2;
    int file = open(arguments[2], O_RDWR | O_CREAT, 0600);
    int unnamed = memfd_create("unnamed", 0);
    if (ftruncate(file, SIZE) || ftruncate(unnamed, SIZE))
        return 2;
    fill(map(MAP_PRIVATE | MAP_ANONYMOUS, -1, SIZE), "private-memory");
    fill(map(MAP_SHARED | MAP_ANONYMOUS, -1, SIZE), "shared-memory");
    fill(map(MAP_SHARED, unnamed, SIZE), "unnamed-file");
    fill(map(MAP_SHARED, file, SIZE), "shared-file");
    mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, file, 0);
    mmap(NULL, SIZE, PROT_READ, MAP_SHARED, open(arguments[2], O_RDONLY), 0); /* counts as private */
    fill(map(MAP_PRIVATE, file, SIZE), "changed-file");
    mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE, open("/proc/self/exe", O_RDONLY), 0);
    fill(map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, HUGE), "private-huge");
    fill(map(MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, HUGE), "shared-huge");
    return crash_here(NULL);
}
