/* SIGSEGV in one of many threads, once all run. Arguments: how many others (default 8), how many
 * MiB of memory are filled before (default 0). */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_barrier_t all_run;

static void crash_here(int *pointer) { *pointer = 42; }

static void *wait_for_ever(void *unused) {
    pthread_barrier_wait(&all_run);
    for (;;) pause();
    return unused;
}

static void *crash(void *unused) {
    pthread_barrier_wait(&all_run);
    crash_here(0);
    return unused;
}

int main(int count, char **arguments) {
    int others = count > 1 ? atoi(arguments[1]) : 8;
    size_t bytes = count > 2 ? strtoull(arguments[2], 0, 10) << 20 : 0;
    pthread_t thread;
    if (bytes) memset(malloc(bytes), 1, bytes);
    pthread_barrier_init(&all_run, 0, others + 2);
    for (int i = 0; i < others; i++) pthread_create(&thread, 0, wait_for_ever, 0);
    pthread_create(&thread, 0, crash, 0);
    wait_for_ever(0);
    return 0;
}
