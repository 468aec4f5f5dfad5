/* Look at a small process, step by step; see taker.h. */
#include "parts.h"

size_t crash_size(void) { return sizeof(struct crash); }

size_t known_size(void) { return offsetof(struct crash, loads_found) + sizeof(struct arrival); }

/* What is put into the arena is read in this order, too. */
static int look_at(struct crash *crash) {
    const char *maps, *groups, *mounts;
    if (put_status(crash) || put_executable(crash)) return -1;
    if (!(maps = put_maps(crash)) || parse_mappings(crash, maps)) return -1;
    if (!(groups = put_groups(crash))) return -1;
    if (!(mounts = put_mounts(crash)) || need_local_files(crash, mounts)) return -1;
    if (put_threads(crash) || put_wanted(crash, groups) || read_head(crash)) return -1;
    open_modules(crash);
    read_code(crash);
    return find_pieces(crash) || make_note(crash) ? -1 : 0;
}

int look(struct crash *crash) {
    crash->used = crash->head_size = crash->pieces_found = crash->sure = crash->files_found = 0;
    crash->sockets = crash->code_size = crash->loads_found = crash->mappings_found = 0;
    crash->memory = crash->counter = 0;
    crash->signal = 0, crash->note_size = 0;
    for (int one = 0; one < PARTS; one++) crash->parts[one] = 0;
    if (!look_at(crash)) return 0;
    close_modules(crash);
    return -1;
}
