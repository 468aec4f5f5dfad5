/* Handles SIGSEGV at an even rate. Arguments: faults a second, seconds. */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static sigjmp_buf back;

static void on_fault(int number) { siglongjmp(back, number); }

static void crash_here(volatile int *pointer) { *pointer = 42; }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    double rate = atof(arguments[1]), seconds = atof(arguments[2]), began = now();
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, 0);
    volatile long done = 0;
    while (now() - began < seconds) {
        long due = (now() - began) * rate;
        for (; done < due && now() - began < seconds; done++)
            if (sigsetjmp(back, 0) == 0) crash_here(0);
        nanosleep(&(struct timespec){.tv_nsec = 200000}, 0);
    }
    printf("%ld\n", done);
    return 0;
}
