/* The former owner of core_pattern is started from here and not by the recorder: the kernel has
 * started us just as it started that owner, as root, in the initial namespaces, with no environment,
 * in /, and with RLIMIT_CORE 1, so that a handler that crashes is not handled in turn. A recorder may be
 * in a container, and has few capabilities.
 */
#include "chain.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ORDER = 512, WORDS = 64, ANSWER = 64 }; /* core_pattern has 127 bytes */
enum { MOST_SECONDS = 3600 }; /* as CRASHBUS_RECORDER_CHAIN_DEADLINE */

/* The process is held by whoever has its core open: from here on the recorder alone. */
static int give_up_core(void) {
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    return null >= 0 && dup2(null, STDIN_FILENO) == STDIN_FILENO ? 0 : -1;
}

static ssize_t receive(int recorder, char *order, int *core) {
    char room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {.iov_base = order, .iov_len = ORDER - 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    ssize_t size = recvmsg(recorder, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (!header || header->cmsg_type != SCM_RIGHTS) return -1;
    memcpy(core, CMSG_DATA(header), sizeof *core);
    return size;
}

/* Make the handler's arguments; 0 where the kernel's do not fit what the recorder says. */
static int make_arguments(char *words, const char *end, char **expanded, char **arguments) {
    int count = 0;
    for (char *word = words; word < end; word += strlen(word) + 1) {
        if (count == WORDS - 1) return 0;
        if (strcmp(word, "%") == 0 && !*expanded) return 0;
        arguments[count++] = strcmp(word, "%") ? word : *expanded++;
    }
    arguments[count] = NULL;
    return *expanded ? 0 : count;
}

static int start(char **arguments, int core, pid_t *handler) {
    char *environment[] = {NULL};
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP); /* to be killed as a whole */
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, core, STDIN_FILENO);
    return posix_spawn(handler, arguments[0], &actions, &attributes, arguments, environment);
}

/* Whatever was said, no process is held for ever. */
static int deadline_of(const char *order) {
    long seconds = strtol(order, NULL, 10);
    return 1000 * (int)(seconds < 0 ? 0 : seconds > MOST_SECONDS ? MOST_SECONDS : seconds);
}

static void wait_for(pid_t handler, int milliseconds, char *answer) {
    int status = 0;
    struct pollfd waiting = {.fd = (int)syscall(SYS_pidfd_open, handler, 0), .events = POLLIN};
    if (waiting.fd < 0 || poll(&waiting, 1, milliseconds) != 1) {
        kill(-handler, SIGKILL);
        snprintf(answer, ANSWER, "deadline\n");
    } else if (waitpid(handler, &status, 0) == handler && WIFSIGNALED(status)) {
        snprintf(answer, ANSWER, "signal %d\n", WTERMSIG(status));
    } else {
        snprintf(answer, ANSWER, "exit %d\n", WEXITSTATUS(status));
    }
}

const char *chain_kept(char *handler, int core, char **expanded) {
    static char answer[ANSWER];
    char *arguments[WORDS], *end = handler + strlen(handler), *words = strchr(handler, ' ');
    pid_t started;
    for (char *at = handler; at < end; at++)
        if (*at == ' ') *at = '\0';
    if (!words || !make_arguments(words + 1, end, expanded, arguments))
        return "its words do not fit";
    errno = start(arguments, core, &started);
    if (errno) return "it cannot be started";
    wait_for(started, deadline_of(handler), answer);
    if (!strncmp(answer, "exit 0", 6)) return NULL;
    answer[strcspn(answer, "\n")] = '\0';
    return answer;
}

int chain(int recorder, char **expanded) {
    char order[ORDER] = {0}, answer[ANSWER], *arguments[WORDS];
    int core = -1;
    pid_t handler;
    if (give_up_core()) return 1;
    ssize_t size = receive(recorder, order, &core);
    if (size < 0) return 0;
    char *words = order + strlen(order) + 1;
    int error = make_arguments(words, order + size, expanded, arguments)
                    ? start(arguments, core, &handler)
                    : EINVAL;
    close(core);
    if (error)
        snprintf(answer, sizeof answer, "error %d\n", error);
    else
        wait_for(handler, deadline_of(order), answer);
    send(recorder, answer, strlen(answer), MSG_NOSIGNAL);
    return 0;
}
