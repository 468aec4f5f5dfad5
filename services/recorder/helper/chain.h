#ifndef CRASHBUS_CHAIN_H
#define CRASHBUS_CHAIN_H

/* Start who had core_pattern before the recorder, when the recorder says so;
 * services/recorder/handover/chain.py.
 *
 * The recorder sends "<seconds>\0<word>\0<word>\0…" and the core, open for reading. A word "%" stands
 * for the next of `expanded`, which the kernel made of this crash. The answer is one line: "exit
 * <status>", "signal <number>", "deadline", or "error <errno>" where it could not be started.
 *
 * Returns when that handler has ended, or when the recorder wants none.
 */
int chain(int recorder, char **expanded);

/* Start it for a crash that was kept because there is no recorder; orphan.h.
 *
 * `handler` is "<seconds> <word> <word> …", as above with spaces for NULs. Returns what went wrong,
 * or NULL.
 */
const char *chain_kept(char *handler, int core, char **expanded);

#endif
