#include <stdint.h>
#include <stdlib.h>

/* Fill as many MiB as the first argument says with bytes that do not compress. */
static void fill(int count, char **arguments) {
    size_t words = (count > 1 ? strtoull(arguments[1], 0, 10) : 1) << 17;
    uint64_t *heap = malloc(words * sizeof *heap), state = 88172645463325252u;
    if (heap == 0) exit(2);
    for (size_t i = 0; i < words; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        heap[i] = state;
    }
}
