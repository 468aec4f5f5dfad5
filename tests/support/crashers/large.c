/* Fills as many MiB as it is told with bytes that do not compress, then SIGSEGV. */
#include "fill.h"

static void crash_here(int *pointer) { *pointer = 42; }

int main(int count, char **arguments) {
    fill(count, arguments);
    crash_here(0);
    return 0;
}
