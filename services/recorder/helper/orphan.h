#ifndef CRASHBUS_ORPHAN_H
#define CRASHBUS_ORPHAN_H

/* What the former handler is to get of a crash that was kept; chain.h.
 *
 * core: open for reading; -1 where it gets nothing, for no memory may be kept.
 * handler: how it is started; NULL where there is none.
 */
struct kept {
    int core;
    char *handler;
};

/* Keep a crash that the recorder does not take: what /proc tells, and the core on standard input.
 *
 * It lies in a directory <time>-<pid>, locked with flock(2) while it is written, until the
 * recorder is back and makes crash files of it: services/recorder/kept/orphans.py. Where that is,
 * how much may be kept and for how long, stands in the file "rules" beside the helper.
 *
 * Returns what went wrong, or NULL.
 */
const char *keep_orphan(const char *helper, const char *crash, const char *pid, const char *tid,
                        const char *time, struct kept *kept);

#endif
