/* A library whose handler takes a signal, as AppScope's libscope.so does. */
#include <signal.h>
#include <unistd.h>

static void on_signal(int number) { _exit(number); }

void install_handler(int number) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND};
    sigaction(number, &action, 0);
}
