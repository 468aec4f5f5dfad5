/* corepipe: the program that core_pattern names, core(5).
 *
 *     corepipe <socket>|- <pid> <tid> <signal> <time> [+ <for another handler>…]
 *
 * The kernel starts it as root with the core on standard input. It hands standard input and
 * its arguments to the recorder and ends: no core passes through it. The process that crashed
 * stays held until the recorder closes the descriptor (core_pipe_limit > 0).
 *
 * The recorder greets who connects with a byte, and asks for the crash with another when its turn
 * comes. Without both nothing is handed over, because it could not be taken back from a recorder
 * that stands still, or is killed while others wait; the crash is kept as an orphan.
 *
 * With a "+" it stays, and starts another handler once the recorder is done, see chain.h; also when
 * it has kept the crash because there is no recorder.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "chain.h"
#include "orphan.h"

enum { ARGUMENTS = 6, MESSAGE = 128 };
/* Seconds: until a recorder that is well has greeted, and until as many as may crash at once had their
 * turn. A recorder that has come to its end meanwhile has closed the connection. */
enum { SECONDS = 10, TURN = 60 };

/* There is nobody else to tell: standard error leads nowhere. */
static int tell(const char *pid, const char *what, const char *why) {
    char line[256];
    int kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    int size = snprintf(line, sizeof line, "crashbus: crash of PID %.20s %s: %s: %m\n", pid, what,
                        why);
    if (kmsg >= 0 && size > 0) {
        ssize_t ignored = write(kmsg, line, (size_t)size);
        (void)ignored;
    }
    return 1;
}

static int fail(const char *pid, const char *why) { return tell(pid, "not captured", why); }

/* Blocks while the recorder's backlog is full, but never for ever. */
static int connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = SECONDS};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || strlen(path) >= sizeof address.sun_path) return -1;
    strcpy(address.sun_path, path);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return connect(fd, (struct sockaddr *)&address, sizeof address) ? -1 : fd;
}

static int is_told(int fd, int seconds) {
    struct pollfd waiting = {.fd = fd, .events = POLLIN};
    char byte;
    return poll(&waiting, 1, seconds * 1000) == 1 && recv(fd, &byte, 1, 0) == 1;
}

static int hand_over(int fd, char *text, size_t size) {
    char room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {.iov_base = text, .iov_len = size};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    *(int *)CMSG_DATA(header) = STDIN_FILENO;
    return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)size ? 0 : -1;
}

static int is_number(const char *text) { return *text && !text[strspn(text, "0123456789")]; }

int main(int count, char **arguments) {
    char text[MESSAGE];
    if (count < ARGUMENTS) return fail("?", "wrong arguments in core_pattern");
    /* They become parts of paths. */
    for (int i = 2; i < ARGUMENTS; i++)
        if (!is_number(arguments[i])) return fail("?", "wrong arguments in core_pattern");
    const char *pid = arguments[2];
    int size = snprintf(text, sizeof text, "%s %s %s %s\n", pid, arguments[3], arguments[4],
                        arguments[5]);
    if (size < 0 || size >= MESSAGE) return fail(pid, "arguments too long");
    int fd = strcmp(arguments[1], "-") ? connect_to(arguments[1]) : -1;
    if (fd >= 0 && is_told(fd, SECONDS) && is_told(fd, TURN) && hand_over(fd, text, (size_t)size) == 0)
        return count > ARGUMENTS ? chain(fd, arguments + ARGUMENTS + 1) : 0;
    if (fd >= 0) close(fd);
    struct kept kept = {.core = -1};
    const char *fault = keep_orphan(arguments[0], text, pid, arguments[3], arguments[5], &kept);
    if (fault) return fail(pid, fault);
    if (count == ARGUMENTS || !kept.handler || kept.core < 0) return 0;
    fault = chain_kept(kept.handler, kept.core, arguments + ARGUMENTS + 1);
    return fault ? tell(pid, "not given to the former handler", fault) : 0;
}
