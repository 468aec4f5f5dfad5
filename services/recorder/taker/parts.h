#ifndef CRASHBUS_TAKER_PARTS_H
#define CRASHBUS_TAKER_PARTS_H

/* What the parts offer each other, by file. All return 0, or -1 (NULL): the process is not taken.
 *
 * Whatever is read was written by whoever crashed, or stands in files that they named: each length
 * is bounded, and what does not look as expected is not taken. A process that is not taken is held
 * longer, and nothing else.
 */
#include <sys/stat.h>

#include "taker.h"

#pragma GCC visibility push(hidden) /* no name here is one of the program that loads this */

#define LAST_OFFSET INT64_MAX /* of a file; only x86-64's vsyscall page lies beyond */

/* proc.c: put /proc into the arena; what is returned lies there. */
int put_status(struct crash *crash); /* -1, too: it is not small */
int put_executable(struct crash *crash);
const char *put_maps(struct crash *crash);
const char *put_groups(struct crash *crash);
const char *put_mounts(struct crash *crash);
int put_threads(struct crash *crash);
int put_wanted(struct crash *crash, const char *groups);

/* note.c: keep for the note what is put into the arena next; make it, when all of it is there. */
void note_next(struct crash *crash, enum part part);
int make_note(struct crash *crash);

/* mappings.c */
int parse_mappings(struct crash *crash, const char *maps);
int need_local_files(const struct crash *crash, const char *mounts);
const struct mapping *mapping_of(const struct crash *crash, uint64_t start, uint64_t size);
int look_at_file(const struct crash *crash, const struct mapping *mapping, struct stat *status);
void open_modules(struct crash *crash);
void close_modules(struct crash *crash);

/* core.c: read its core up to where its memory begins. */
int read_head(struct crash *crash);

/* memory.c */
void read_code(struct crash *crash);
int find_pieces(struct crash *crash);

#pragma GCC visibility pop

#endif
