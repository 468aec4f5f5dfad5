#ifndef CRASHBUS_TAKER_H
#define CRASHBUS_TAKER_H

#include <stddef.h>
#include <stdint.h>

/* Read a small process, whole, while it is held: services/recorder/taker/taking.py calls this by
 * ctypes, without the interpreter's lock.
 *
 * What is read of /proc lies in `arena` one after the other: 4 bytes of length and as many bytes;
 * a NUL; ABSENT is the length of what cannot be read. A list begins with 4 bytes that count its entries.
 */

enum {
    ABSENT = 0xffffffff,
    MODULES = 64,         /* files opened of one process */
    LONGEST_CODE = 15,    /* bytes of an instruction */
    MAPPINGS = 4096,
    PIECES = 8192,
    ARENA = 1024 * 1024,  /* bytes */
    HEAD = 1024 * 1024,   /* bytes of a core's headers and notes: some 256 threads */
    NOTE = 64 * 1024,     /* bytes of the note about it, services/common/unrecorded.py */
};

/* The parts of that note, as PARTS there. */
enum part { CRASH, BOOT_ID, STAT, STATUS, COMM, CGROUP, EXE, CMDLINE, CORE, CWD, ROOT, LIMITS, MAPS, ENVIRON, PARTS };

/* What to read, in this order: a (f)ile, a (l)ink, a (d)irectory of links; after a c(g)roup
 * hierarchy, files of the process's directory in it. */
struct wanted {
    const char *name;
    uint32_t most; /* bytes of a file, entries of a directory */
    uint32_t part; /* of the note; PARTS: of none */
    char kind;
};

struct piece {
    uint64_t address, size;
    uint32_t readable; /* zeros are the right content of what cannot be read */
};

struct mapping {
    uint64_t start, end, device, inode;
    const char *file; /* its path, up to the end of the line; NULL: no file */
    uint32_t length;  /* of that */
    char private_memory, readable, code;
};

struct opened {
    uint64_t start, end;
    int32_t file;
};

struct arrival {
    int32_t core;      /* where the request comes, and the core */
    int32_t pid;       /* who crashes; 0: that could not be told at once */
    int32_t pidfd;     /* if it could */
    uint32_t took;     /* bytes taken from the request, if not */
    char request[16];
    uint64_t at;       /* nanoseconds of CLOCK_MONOTONIC, when it was accepted */
};

struct crash {
    /* given */
    int32_t core;       /* where its core comes */
    int32_t pid, place; /* O_PATH of /proc/PID */
    uint32_t mark;      /* bytes before that, all zero */
    uint32_t patience;  /* milliseconds to wait for a byte of it */
    uint32_t modules;   /* files to open */
    uint64_t resident;  /* bytes, at most */
    uint64_t largest;   /* bytes of a core, at most */
    uint64_t touched;   /* bytes of memory, at most */
    uint32_t threads;   /* at most */
    uint32_t wanteds;
    const struct wanted *wanted;
    const char *namespace, *root; /* of who sees `mounts` */
    const char *mounts;           /* proc_pid_mountinfo(5) */
    const char *boot_id;
    uint64_t arrived;             /* Unix seconds */
    char *arena, *head, *note;    /* of these sizes */
    /* found */
    uint32_t used;         /* bytes of the arena */
    uint32_t head_size;    /* bytes taken from the core */
    uint32_t note_size;
    uint32_t pieces_found, sure; /* the first `sure` are there, and to read them waits for nobody */
    uint32_t files_found;
    uint32_t sockets;      /* it has some open */
    uint32_t code_size;
    uint64_t memory;       /* bytes of all pieces */
    char code[16];         /* at the program counter */
    struct opened files[MODULES];
    struct piece pieces[PIECES];
    /* its own */
    uint32_t loads_found, mappings_found, namespaced;
    uint64_t counter; /* the program counter */
    int16_t signal;
    uint32_t parts[PARTS]; /* of the note: where in the arena, from 1 on; 0: not there */
    struct piece loads[MAPPINGS];
    struct mapping mappings[MAPPINGS];
};

/* Bytes of all of it, and of what its caller knows: that, and struct arrival. */
size_t crash_size(void);
size_t known_size(void);

/* Learn who crashes, and acknowledge the kernel's request, if both can be at once. */
void greet(struct arrival *arrival);

/* Wait until a crash comes, and do the same. Returns 0, or why none can be accepted: errno(3). */
int accept_crash(int listening, struct arrival *arrival);

/* Read everything but its memory, and make the note about it. Returns 0, or -1: it is not small, or not sure; then `head` has
 * what was taken from the core, and no file is open. */
int look(struct crash *crash);

/* Read its memory, piece after piece. Returns 0, or -1: that cannot be. */
int read_memory(const struct crash *crash, char *into);

#endif
