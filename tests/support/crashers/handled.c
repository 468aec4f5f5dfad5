/* Handles SIGSEGV by siglongjmp, as runtimes do in their normal work.
 *
 * Arguments: how many faults (default 1), then "die" to end by a fault that kills, or "stay" to
 * wait for a signal afterwards. */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static sigjmp_buf back;

static void on_fault(int number) { siglongjmp(back, number); }

static void crash_here(volatile int *pointer) { *pointer = 42; }

int main(int count, char **arguments) {
    long faults = count > 1 ? atol(arguments[1]) : 1;
    const char *end = count > 2 ? arguments[2] : "";
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, 0);
    for (volatile long i = 0; i < faults; i++)
        if (sigsetjmp(back, 0) == 0) crash_here(0);
    printf("%p\n", (void *)(size_t)on_fault);
    fflush(stdout);
    if (strcmp(end, "stay") == 0) pause();
    if (strcmp(end, "die") == 0) {
        signal(SIGSEGV, SIG_DFL);
        crash_here(0);
    }
    return 0;
}
