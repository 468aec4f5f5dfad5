/* The note about a crash for a recorder that comes after one that was killed:
 * docs/decisions/0023-notes.md. */
#include <stdio.h>
#include <string.h>

#include "parts.h"

#define MARK "note"

void note_next(struct crash *crash, enum part part) {
    if (part < PARTS) crash->parts[part] = crash->used + 1;
}

/* Put what fits; what does not is left out. Returns its bytes. */
static uint32_t note_part(struct crash *crash, const char *content, uint32_t size) {
    if (size > NOTE - crash->note_size) return 0;
    memcpy(crash->note + crash->note_size, content, size);
    crash->note_size += size;
    return size;
}

static uint32_t note_read(struct crash *crash, uint32_t at) {
    uint32_t size;
    if (!at) return 0;
    memcpy(&size, crash->arena + at - 1, sizeof size);
    return size == ABSENT ? 0 : note_part(crash, crash->arena + at - 1 + sizeof size, size);
}

int make_note(struct crash *crash) {
    char first[64];
    uint32_t sizes[PARTS];
    int size = snprintf(first, sizeof first, "%d %d %d %llu\n", crash->pid, crash->pid, crash->signal,
                        (unsigned long long)crash->arrived);
    crash->note_size = sizeof MARK - 1 + sizeof sizes;
    for (int one = 0; one < PARTS; one++)
        if (one == CRASH) sizes[one] = note_part(crash, first, (uint32_t)size);
        else if (one == BOOT_ID) sizes[one] = note_part(crash, crash->boot_id, (uint32_t)strlen(crash->boot_id));
        else if (one == CORE) sizes[one] = note_part(crash, crash->head + crash->mark, crash->head_size - crash->mark);
        else sizes[one] = note_read(crash, crash->parts[one]);
    memcpy(crash->note, MARK, sizeof MARK - 1);
    memcpy(crash->note + sizeof MARK - 1, sizes, sizeof sizes);
    return sizes[STAT] ? 0 : -1; /* without it nobody could say whose it is */
}
