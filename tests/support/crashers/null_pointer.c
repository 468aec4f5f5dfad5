/* SIGSEGV, address not mapped: writes through a null pointer. */
static void crash_here(int *pointer) { *pointer = 42; }

int main(void) {
    crash_here(0);
    return 0;
}
