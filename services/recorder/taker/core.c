/* How a crash arrives: who it is of, and the head of its core. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "parts.h"

#define NOTES_AT (64 * 1024) /* bytes behind the headers, at most: core_head.py */
#define SPIN_NS (300 * 1000) /* longer than a wake-up takes; what comes at all comes at once */

static int comes_soon(int file) {
    struct pollfd waiting = {.fd = file, .events = POLLIN};
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        if (poll(&waiting, 1, 0)) return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begin.tv_sec) * 1000000000L + now.tv_nsec - begin.tv_nsec < SPIN_NS);
    return 0;
}

/* --- the request: include/uapi/linux/coredump.h and pidfd.h ---------------------------------- */

#define PEER_PIDFD 77
#define KERNEL_AND_WAIT ((1 << 0) | (1 << 3))

struct message { /* struct coredump_req, struct coredump_ack */
    uint32_t size, other;
    uint64_t mask;
};
struct pidfd_information { /* struct pidfd_info of Linux 6.13, of which later ones are longer */
    uint64_t mask, cgroup;
    uint32_t pid, others[11];
};
#define PIDFD_INFORMATION _IOWR(0xff, 11, struct pidfd_information)

static int find_peer(struct arrival *arrival) {
    struct pidfd_information found = {0};
    socklen_t size = sizeof arrival->pidfd;
    if (getsockopt(arrival->core, SOL_SOCKET, PEER_PIDFD, &arrival->pidfd, &size)) return -1;
    if (!ioctl(arrival->pidfd, PIDFD_INFORMATION, &found) && found.pid) {
        arrival->pid = (int32_t)found.pid;
        return 0;
    }
    close(arrival->pidfd);
    return -1;
}

static int acknowledge(struct arrival *arrival) {
    struct message request, answer = {sizeof answer, 0, KERNEL_AND_WAIT};
    if (!comes_soon(arrival->core)) return -1;
    ssize_t got = read(arrival->core, arrival->request, sizeof request);
    arrival->took = got > 0 ? (uint32_t)got : 0;
    if (got != sizeof request) return -1;
    memcpy(&request, arrival->request, sizeof request);
    if (request.size != sizeof request || KERNEL_AND_WAIT & ~request.mask) return -1;
    return write(arrival->core, &answer, sizeof answer) == sizeof answer ? 0 : -1;
}

void greet(struct arrival *arrival) {
    arrival->pid = 0, arrival->took = 0;
    if (find_peer(arrival) || !acknowledge(arrival)) return;
    close(arrival->pidfd);
    arrival->pid = 0;
}

int accept_crash(int listening, struct arrival *arrival) {
    arrival->core = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
    if (arrival->core < 0) return errno;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* to greet it takes its time, for which it is held */
    arrival->at = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
    greet(arrival);
    return 0;
}

/* --- the head: elf(5) ------------------------------------------------------------------------ */

/* Have so many bytes of what comes; they are taken from the stream. */
static int head_until(struct crash *crash, uint64_t size) {
    struct pollfd waiting = {.fd = crash->core, .events = POLLIN};
    if (size > HEAD) return -1;
    while (crash->head_size < size) {
        if (!comes_soon(crash->core) && poll(&waiting, 1, (int)crash->patience) <= 0) return -1;
        ssize_t got = read(crash->core, crash->head + crash->head_size, size - crash->head_size);
        if (got <= 0) return -1;
        crash->head_size += (uint32_t)got;
    }
    return 0;
}

static int is_wide(const char *core) { return core[EI_CLASS] == ELFCLASS64; }

/* Return the file's header; what is 32 bits wide is widened as far as we look at it. */
static Elf64_Ehdr file_header(const char *core) {
    Elf64_Ehdr wide;
    Elf32_Ehdr narrow;
    memcpy(&wide, core, sizeof wide);
    memcpy(&narrow, core, sizeof narrow);
    if (is_wide(core)) return wide;
    return (Elf64_Ehdr){.e_type = narrow.e_type, .e_machine = narrow.e_machine, .e_phoff = narrow.e_phoff,
                        .e_phentsize = narrow.e_phentsize, .e_phnum = narrow.e_phnum};
}

static Elf64_Phdr program_header(const char *core, const Elf64_Ehdr *header, uint32_t number) {
    const char *at = core + header->e_phoff + (size_t)number * header->e_phentsize;
    Elf64_Phdr wide;
    Elf32_Phdr narrow;
    memcpy(is_wide(core) ? (void *)&wide : &narrow, at, header->e_phentsize);
    if (is_wide(core)) return wide;
    return (Elf64_Phdr){.p_type = narrow.p_type, .p_offset = narrow.p_offset, .p_vaddr = narrow.p_vaddr,
                        .p_filesz = narrow.p_filesz};
}

/* Have all headers; what the kernel writes is longer than the file's wider one. */
static int read_headers(struct crash *crash, Elf64_Ehdr *header) {
    const char *core = crash->head + crash->mark;
    if (head_until(crash, crash->mark + sizeof *header)) return -1;
    for (uint32_t one = 0; one < crash->mark; one++)
        if (crash->head[one]) return -1;
    if (memcmp(core, ELFMAG, SELFMAG) || core[EI_DATA] != ELFDATA2LSB) return -1;
    if (!is_wide(core) && core[EI_CLASS] != ELFCLASS32) return -1;
    *header = file_header(core);
    if (header->e_type != ET_CORE || header->e_phnum > MAPPINGS || header->e_phoff > HEAD) return -1;
    if (header->e_phentsize != (is_wide(core) ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr))) return -1;
    return head_until(crash, crash->mark + header->e_phoff + header->e_phnum * header->e_phentsize);
}

struct places { /* in the core; 0: not yet known */
    uint64_t notes, data, end;
};

/* Note what a header speaks of. Parts follow each other. */
static int put_part(struct crash *crash, const Elf64_Phdr *part, struct places *places) {
    if (!part->p_filesz) return 0;
    if (part->p_offset < places->end || part->p_filesz > crash->largest) return -1;
    if (part->p_offset > crash->largest - part->p_filesz) return -1;
    places->end = part->p_offset + part->p_filesz;
    if (part->p_type == PT_NOTE && !places->notes) places->notes = part->p_offset;
    if (part->p_type != PT_LOAD) return 0;
    if (!places->data) places->data = part->p_offset;
    if (part->p_vaddr > UINT64_MAX - part->p_filesz) return -1;
    crash->loads[crash->loads_found++] = (struct piece){part->p_vaddr, part->p_filesz, 0};
    return 0;
}

/* Find signal and program counter in the first note, which is the crashing thread's NT_PRSTATUS:
 * behind the note's own header and name, and the beginning of struct elf_prstatus. */
static int read_status(struct crash *crash, const char *notes, size_t size, int machine) {
    static const struct { int machine; size_t at, width; } known[] = {
        {EM_X86_64, 112 + 16 * 8, 8}, {EM_AARCH64, 112 + 32 * 8, 8}, {EM_386, 72 + 12 * 4, 4}};
    for (size_t one = 0; one < sizeof known / sizeof *known; one++)
        if (known[one].machine == machine && size >= 20 + known[one].at + known[one].width)
            memcpy(&crash->counter, notes + 20 + known[one].at, known[one].width);
    if (size < 20 + 36) return -1; /* as core_head.py wants it */
    memcpy(&crash->signal, notes + 20 + 12, sizeof crash->signal);
    return 0;
}

int read_head(struct crash *crash) {
    const char *core = crash->head + crash->mark;
    Elf64_Ehdr header;
    if (read_headers(crash, &header)) return -1;
    uint64_t table_end = header.e_phoff + header.e_phnum * header.e_phentsize;
    struct places places = {.end = table_end};
    for (uint32_t one = 0; one < header.e_phnum; one++) {
        Elf64_Phdr part = program_header(core, &header, one);
        if (put_part(crash, &part, &places)) return -1;
    }
    if (!places.data || !places.notes || places.notes > places.data) return -1;
    if (places.notes - table_end > NOTES_AT || head_until(crash, crash->mark + places.data)) return -1;
    return read_status(crash, core + places.notes, places.data - places.notes, header.e_machine);
}
