/* Crashes with one page touched of 60 TiB, which come first in its core: what comes behind them
 * the kernel would reach after hours. */
#include <sys/mman.h>

void crash_here(void) { *(volatile int *)0 = 1; }

int main(void) {
    char *memory = mmap((void *)(1UL << 32), 60UL << 40, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (memory == MAP_FAILED) return 2;
    memory[0] = 1;
    crash_here();
}
