/* SIGFPE: integer division by zero. */
static int crash_here(volatile int number, volatile int by) { return number / by; }

int main(void) { return crash_here(1, 0); }
