/* Reads this process as a crashed one, with what /proc tells and its core's head made hostile.
 *
 *     hostile_taker <empty directory> <rounds> <seed>
 *
 * Built with sanitizers, which end it at the first byte out of bounds. Prints how many rounds were
 * taken: the first, in which nothing was changed, and others that were not changed enough.
 */
#include "../../services/recorder/taker/proc.c"

#include "../../services/recorder/taker/core.c"
#include "../../services/recorder/taker/mappings.c"
#include "../../services/recorder/taker/memory.c"
#include "../../services/recorder/taker/note.c"
#include "../../services/recorder/taker/taker.c"

#include <sys/mman.h>

enum { MOST = 256 * 1024, NAMES = 5, HEAD_FILE = NAMES - 1 };

static const char *const names[NAMES] = {"status", "maps", "cgroup", "mountinfo", "core"};
static char originals[NAMES][MOST], changed[2 * MOST];
static size_t sizes[NAMES];
static struct crash crash;
static const struct wanted wanted[] = {{"endless", UINT32_MAX, PARTS, 'f'}, {"limits", 65536, LIMITS, 'f'},
                                       {"endless", NOTE + 4096, ENVIRON, 'f'},
                                       {"stat", 65536, STAT, 'f'}, {"cwd", 0, CWD, 'l'}, {"fd", 16, PARTS, 'd'},
                                       {"/sys/fs/cgroup/memory", 0, PARTS, 'g'},
                                       {"memory.stat", 65536, PARTS, 'f'}};

static void die(const char *what) { perror(what); exit(1); }

static size_t slurp(const char *path, char *into) {
    FILE *file = fopen(path, "r");
    if (!file) die(path);
    size_t size = fread(into, 1, MOST - 1, file);
    fclose(file);
    return size;
}

static void spill(int place, const char *name, const char *from, size_t size, int is_core) {
    unlinkat(place, name, 0); /* a file system may write what is truncated and written to disk */
    int file = openat(place, name, O_CREAT | O_WRONLY, 0600);
    if (file < 0 || write(file, from, size) != (ssize_t)size) die(name);
    if (is_core && ftruncate(file, 4 * HEAD)) die(name);
    close(file);
}

/* The head of a core of the small mappings. */
static size_t make_head(const char *maps, char *head) {
    Elf64_Ehdr first = {.e_ident = {0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB}, .e_type = ET_CORE,
                        .e_machine = EM_X86_64, .e_phoff = sizeof first, .e_phentsize = sizeof(Elf64_Phdr)};
    Elf64_Phdr *headers = (Elf64_Phdr *)(head + sizeof first);
    size_t place;
    unsigned long long start, end;
    headers[first.e_phnum++] = (Elf64_Phdr){.p_type = PT_NOTE, .p_filesz = 512};
    for (const char *line = maps; *line && first.e_phnum < 400; line = strchr(line, '\n') + 1)
        if (sscanf(line, "%llx-%llx r", &start, &end) == 2 && end - start <= 256 * 1024 && end < INT64_MAX)
            headers[first.e_phnum++] =
                (Elf64_Phdr){.p_type = PT_LOAD, .p_vaddr = start, .p_filesz = end - start};
    place = headers[0].p_offset = sizeof first + first.e_phnum * sizeof *headers;
    size_t data = place += 512;
    for (int one = 1; one < first.e_phnum; place += headers[one++].p_filesz) headers[one].p_offset = place;
    memcpy(head, &first, sizeof first);
    return data;
}

static size_t change(const char *from, size_t size) {
    static const char *const worst[] = {"18446744073709551615", "ffffffffffffffff-0", "..", "\n", ":", " - ",
                                        "0", "", "\xff\xff\xff\xff\xff\xff\xff\x7f"};
    memcpy(changed, from, size);
    for (int times = rand() % 4; times && size; times--) {
        size_t at = (size_t)rand() % size, left = size - at;
        const char *bad = worst[(size_t)rand() % (sizeof worst / sizeof *worst)];
        switch (rand() % 4) {
        case 0: changed[at] = (char)rand(); break;
        case 1: size = at; break;
        case 2: memcpy(changed + at, bad, strlen(bad) < left ? strlen(bad) : left); break;
        default:
            if (size + left < sizeof changed / 2) memmove(changed + at + left, changed + at, left), size += left;
        }
    }
    return size;
}

/* Put the worst number into a field of a core's head that has few pieces, so that each matters. */
static void change_core(char *head) {
    static const uint64_t worst[] = {0, 1, 64, HEAD - 1, HEAD, HEAD + 1, 2 * HEAD, 1 << 29, UINT32_MAX,
                                     UINT64_MAX, UINT64_MAX - 4095, INT64_MAX};
    uint16_t pieces = (uint16_t)(2 + rand() % 2);
    memcpy(head + offsetof(Elf64_Ehdr, e_phnum), &pieces, sizeof pieces);
    size_t field = sizeof(Elf64_Ehdr) + 8 * (size_t)(rand() % (7 * pieces));
    Elf64_Phdr *headers = (Elf64_Phdr *)(head + sizeof(Elf64_Ehdr));
    if (rand() % 4 == 0) headers[0].p_type = PT_LOAD, headers[1].p_type = PT_NOTE;
    memcpy(head + field, &worst[(size_t)rand() % (sizeof worst / sizeof *worst)], 8);
}

static void check_that_both_ways_to_find_pages_agree(void) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = 2000;
    char *memory = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    madvise(memory, pages * page, MADV_NOHUGEPAGE);
    for (size_t one = 0; one < pages; one += 1 + (size_t)rand() % 5) memory[one * page] = 1;
    struct piece *found = calloc(PIECES, sizeof *found);
    crash.touched = UINT64_MAX;
    for (int way = 0; way < 2; way++) {
        crash.memory = crash.pieces_found = 0;
        uint64_t start = (uintptr_t)memory, end = start + pages * page;
        if ((way ? put_looked_up : put_touched)(&crash, pagemap, start, end, 1)) die("pagemap");
        if (!way) memcpy(found, crash.pieces, sizeof crash.pieces);
        if (crash.pieces_found < 100 || memcmp(found, crash.pieces, crash.pieces_found * sizeof *found)) {
            fprintf(stderr, "other pages were found\n");
            exit(1);
        }
    }
    free(found);
    munmap(memory, pages * page);
    close(pagemap);
}

/* The most mounts and mappings that are looked at, and each mapping on another device than the last. */
static void check_that_devices_are_found_at_once(void) {
    static char mounts[LONGEST_MOUNTS];
    const uint64_t disk = 253ull << 32;
    size_t size = 0;
    for (int one = 1; size + 64 < sizeof mounts; one++)
        size += (size_t)sprintf(mounts + size, "%d 1 253:%d / /m rw - ext4 m rw\n", one, one);
    crash.mappings_found = MAPPINGS;
    for (int one = 0; one < MAPPINGS; one++)
        crash.mappings[one] = (struct mapping){.file = "", .device = disk + (one % 2 ? 0x6a4 : 1)};
    clock_t begin = clock();
    int remote = need_local_files(&crash, mounts);
    if (remote || clock() - begin > CLOCKS_PER_SEC / 4) {
        fprintf(stderr, "%d after %ld us\n", remote, (long)(clock() - begin));
        exit(1);
    }
    for (int one = 0; one <= DEVICES; one++) crash.mappings[one].device = disk + 1 + (uint64_t)one;
    crash.mappings_found = DEVICES;
    remote = need_local_files(&crash, mounts);
    crash.mappings_found++; /* one more than are remembered */
    int others = !need_local_files(&crash, mounts);
    crash.mappings[0].device = disk - 1, crash.mappings_found = 1;
    others += !need_local_files(&crash, mounts);
    memcpy(strstr(mounts, "ext4"), "nfs4", 4);
    crash.mappings[0].device = disk + 1;
    others += !need_local_files(&crash, mounts);
    if (remote || others) {
        fprintf(stderr, "other devices are local\n");
        exit(1);
    }
}

/* Whatever it was made of, its parts are as long as it says. */
static void check_note(void) {
    uint32_t sizes[PARTS], sum = 4 + sizeof sizes;
    memcpy(sizes, crash.note + 4, sizeof sizes);
    for (int one = 0; one < PARTS; one++) sum += sizes[one] <= NOTE ? sizes[one] : NOTE + 1;
    if (sum != crash.note_size || sum > NOTE || memcmp(crash.note, "note", 4)) {
        fprintf(stderr, "a note of %u bytes has %u\n", crash.note_size, sum);
        exit(1);
    }
}

/* Whoever connects, what is not the kernel's request is not acknowledged, and nothing of it is lost. */
static void check_requests(void) {
    for (int round = 0; round < 200; round++) {
        struct message requests[2] = {{sizeof *requests, 16, 0xf}, {(uint32_t)rand(), 0, 0}};
        size_t size = (size_t)rand() % (sizeof requests + 1);
        if (rand() % 2) ((char *)requests)[rand() % (int)sizeof *requests] = (char)rand();
        int good = size >= sizeof *requests && requests[0].size == sizeof *requests && !(~requests[0].mask & 9);
        int ends[2];
        char answer[64];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) die("socketpair");
        if (write(ends[1], requests, size) != (ssize_t)size) die("request");
        struct arrival arrival = {.core = ends[0]};
        greet(&arrival);
        size_t kept = size < sizeof *requests ? size : sizeof *requests;
        ssize_t answered = recv(ends[1], answer, sizeof answer, MSG_DONTWAIT);
        if (good != (arrival.pid == getpid()) || good != (answered == 16) || arrival.took != kept ||
            memcmp(arrival.request, requests, kept)) {
            fprintf(stderr, "a request of %zu bytes: %d, %zd\n", size, arrival.pid, answered);
            exit(1);
        }
        if (good) close(arrival.pidfd);
        close(ends[0]), close(ends[1]);
    }
}

int main(int count, char **words) {
    if (count != 4) return 2;
    int place = open(words[1], O_DIRECTORY | O_RDONLY), rounds = atoi(words[2]), taken = 0;
    uint64_t touched = 0;
    int last = NAMES;
    char *room = malloc(16 * 1024 * 1024), *half = NULL;
    crash.arena = malloc(ARENA), crash.head = malloc(HEAD), crash.note = malloc(NOTE);
    crash.boot_id = "boot";
    srand((unsigned)atoi(words[3]));
    check_that_both_ways_to_find_pages_agree();
    check_that_devices_are_found_at_once();
    check_requests();
    for (int one = 0; one < HEAD_FILE; one++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/%s", names[one]);
        sizes[one] = slurp(path, originals[one]);
    }
    sizes[HEAD_FILE] = make_head(originals[1], originals[HEAD_FILE]);
    const char *const links[] = {"exe", "task", "fd", "pagemap", "mem", "map_files", "limits", "cwd", "root", "ns", "stat"};
    if (symlinkat("/dev/zero", place, "endless")) die("endless");
    for (size_t one = 0; one < sizeof links / sizeof *links; one++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/%s", links[one]);
        if (symlinkat(path, place, links[one])) die(path);
    }
    for (int round = 0; round < rounds; round++) {
        int victim = round ? rand() % NAMES : NAMES; /* one at a time: the others shall be read */
        for (int one = 0; one < NAMES; one++) {
            if (one != victim && round && one != last) continue;
            size_t size = one == victim ? change(originals[one], sizes[one]) : sizes[one];
            if (victim == HEAD_FILE && rand() % 4) change_core(memcpy(changed, originals[HEAD_FILE], size = sizes[HEAD_FILE]));
            spill(place, names[one], one == victim ? changed : originals[one], size, one == HEAD_FILE);
        }
        last = victim;
        crash.pid = getpid(), crash.place = place, crash.core = openat(place, "core", O_RDONLY);
        crash.patience = 0, crash.modules = MODULES, crash.threads = 256;
        crash.resident = 1 << 30, crash.largest = 1 << 30;
        int narrow = round % 16 == 9;
        crash.touched = narrow ? touched / 2 : round ? touched : 16 * 1024 * 1024;
        int endless = round % 8 == 7;
        crash.wanted = wanted + !endless, crash.wanteds = sizeof wanted / sizeof *wanted - !endless;
        crash.namespace = crash.root = crash.mounts = "";
        if (!look(&crash)) {
            check_note();
            taken += !read_memory(&crash, narrow ? half : room);
            close_modules(&crash);
        }
        close(crash.core);
        if (!round && !taken) die("not even itself was taken");
        if (!round) touched = crash.memory + 64 * 1024, room = realloc(room, touched), half = malloc(touched / 2);
    }
    free(room), free(half), free(crash.arena), free(crash.head), free(crash.note);
    printf("%d\n", taken);
    return 0;
}
