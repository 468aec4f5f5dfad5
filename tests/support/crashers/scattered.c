/* Crashes with every other page touched of as many MiB as it is told, in one of many TiB. */
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096UL

void crash_here(void) { *(volatile int *)0 = 1; }

int main(int count, char **arguments) {
    size_t size = (count > 1 ? strtoull(arguments[1], 0, 10) : 1) << 20;
    char *memory = mmap(0, 4UL << 40, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return 2;
    madvise(memory, 4UL << 40, MADV_NOHUGEPAGE); /* one would make a run of many */
    for (size_t at = 0; at < size; at += 2 * PAGE) memory[at] = 1;
    crash_here();
}
