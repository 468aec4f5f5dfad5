/* Says "ready" and its PID, then waits for a signal with nothing installed. */
#include <stdio.h>
#include <unistd.h>

static void wait_here(void) {
    for (;;) pause();
}

int main(void) {
    printf("ready %d\n", (int)getpid());
    fflush(stdout);
    wait_here();
    return 0;
}
