/* Fills as many MiB as it is told with bytes that do not compress, says so, and waits. */
#include "fill.h"

#include <stdio.h>
#include <unistd.h>

int main(int count, char **arguments) {
    fill(count, arguments);
    puts("ready");
    fflush(stdout);
    for (;;) pause();
}
