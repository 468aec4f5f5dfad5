/* SIGBUS: touches the second page of a mapping whose file has only one. */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static void crash_here(volatile char *page) { page[0] = 1; }

int main(void) {
    char name[] = "/tmp/crasher_XXXXXX";
    int file = mkstemp(name);
    unlink(name);
    long page = sysconf(_SC_PAGESIZE);
    if (file < 0 || ftruncate(file, page) != 0) return 1;
    char *map = mmap(0, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return 1;
    crash_here(map + page);
    return 0;
}
