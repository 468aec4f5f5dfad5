/* A library whose handler takes a signal and ends the process as AppScope's libscope.so does:
 * it stays for two seconds (writing its files), then aborts. */
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static void on_signal(int number) {
    (void)number;
    sleep(2);
    abort();
}

void install_handler(int number) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND};
    sigaction(number, &action, 0);
}
