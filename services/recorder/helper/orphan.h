#ifndef CRASHBUS_ORPHAN_H
#define CRASHBUS_ORPHAN_H

/* Keep a crash that the recorder does not take: what /proc tells, and the core on standard input.
 *
 * It lies in a directory <time>-<pid>, locked with flock(2) while it is written, until the
 * recorder is back and makes crash files of it: services/recorder/orphans.py. Where that is, how
 * much may be kept and for how long, stands in the file "rules" beside the helper.
 *
 * Returns what went wrong, or NULL.
 */
const char *keep_orphan(const char *helper, const char *crash, const char *pid, const char *tid,
                        const char *time);

#endif
