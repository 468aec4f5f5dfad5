/* SIGILL: the ud2 instruction (udf on arm64). */
static void crash_here(void) {
#ifdef __x86_64__
    __asm__ volatile("ud2");
#else
    __builtin_trap();
#endif
}

int main(void) {
    crash_here();
    return 0;
}
