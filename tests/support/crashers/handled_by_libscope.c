/* SIGSEGV, handled in a library named libscope.so; ends by SIGABRT two seconds later, or never,
 * if an argument is given: as where the library cannot write. */
#include <signal.h>

void install_handler(int number, int stuck);

static void crash_here(int *pointer) { *pointer = 42; }

int main(int count, char **arguments) {
    (void)arguments;
    install_handler(SIGSEGV, count > 1);
    crash_here(0);
    return 0;
}
