/* SIGSEGV below the stack: recursion without end. */
static int crash_here(volatile int depth) {
    volatile char frame[4096];
    frame[0] = (char)depth;
    return crash_here(depth + 1) + frame[0];
}

int main(void) { return crash_here(0); }
