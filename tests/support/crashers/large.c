/* Fills as many MiB as it is told with bytes that do not compress, then SIGSEGV. */
#include <stdint.h>
#include <stdlib.h>

static void crash_here(int *pointer) { *pointer = 42; }

int main(int count, char **arguments) {
    size_t words = (count > 1 ? strtoull(arguments[1], 0, 10) : 1) << 17;
    uint64_t *heap = malloc(words * sizeof *heap), state = 88172645463325252u;
    if (heap == 0) return 2;
    for (size_t i = 0; i < words; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        heap[i] = state;
    }
    crash_here(0);
    return 0;
}
