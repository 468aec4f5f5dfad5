/* A library whose handler takes a signal and ends the process as AppScope's libscope.so does:
 * it stays for two seconds (writing its files), then aborts; where it cannot write it tries on. */
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static int is_stuck;

static void on_signal(int number) {
    (void)number;
    while (is_stuck)
        usleep(1000);
    sleep(2);
    abort();
}

void install_handler(int number, int stuck) {
    is_stuck = stuck;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND};
    sigaction(number, &action, 0);
}
