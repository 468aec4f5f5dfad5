/* SIGSEGV, handled in a library named libscope.so; ends by SIGABRT two seconds later. */
#include <signal.h>

void install_handler(int number);

static void crash_here(int *pointer) { *pointer = 42; }

int main(void) {
    install_handler(SIGSEGV);
    crash_here(0);
    return 0;
}
