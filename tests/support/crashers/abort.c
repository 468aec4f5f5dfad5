/* SIGABRT, sent by the thread to itself: abort(3). */
#include <stdlib.h>

static void crash_here(void) { abort(); }

int main(void) {
    crash_here();
    return 0;
}
