/* Crashes as a process under AppScope's library does, writing its files under the root given
 * as argument: mkdir, info, cfg, backtrace at once, the core in pieces, a pause, then abort().
 *
 * usage: appscope_like ROOT [recover]   recover: return to work instead of abort(), thrice
 *
 * With WITHOUT_CORE in its environment the kernel dumps nothing of it, prctl(2): where no recorder
 * is meant, it must not wait for one that another test has stopped.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *root;
static int recover;
static sigjmp_buf again;

static int create(const char *kind, time_t epoch, mode_t mode)
{
	char path[512];
	snprintf(path, sizeof path, "%s/%d/%s_%ld", root, getpid(), kind, (long)epoch);
	int file = open(path, O_CREAT | O_WRONLY, mode);
	if (file < 0 || fchmod(file, mode) != 0)
		_exit(3);
	return file;
}

static void put(const char *kind, time_t epoch, const char *text)
{
	int file = create(kind, epoch, 0755);
	if (write(file, text, strlen(text)) < 0)
		_exit(3);
	close(file);
}

static void handler(int number)
{
	char text[256];
	time_t epoch = time(NULL);

	snprintf(text, sizeof text, "%s/%d", root, getpid());
	mkdir(text, 0777);
	snprintf(text, sizeof text,
		 "Scope Version: v1.4.3\nUnix Time: 1795388 sec\nPID: %d\nProcess name: appscope_like",
		 getpid());
	put("info", epoch, text);
	put("cfg", epoch,
	    "{\"libscope\":{\"snapshot\":{\"coredump\":\"true\",\"backtrace\":\"true\"}}}");
	snprintf(text, sizeof text,
		 "backtrace info: signal %d errno 0 fault address 0x10, reason of fault:\n"
		 "Address not mapped to object\n--- backtrace\n#0 0x7f70b00f3972 snapBacktrace + 2301\n",
		 number);
	put("backtrace", epoch, text);

	static unsigned block[1 << 14]; /* like real memory, it hardly compresses */
	unsigned word = 2463534242;
	for (unsigned i = 0; i < sizeof block / sizeof *block; i++) {
		word ^= word << 13;
		word ^= word >> 17;
		word ^= word << 5;
		block[i] = word;
	}
	int core = create("core", epoch, 0600);
	for (int i = 0; i < 64; i++) {
		if (write(core, block, sizeof block) < 0)
			_exit(3);
		usleep(2000);
	}
	close(core);
	if (recover) {
		sleep(1); /* the next set gets another epoch */
		siglongjmp(again, 1);
	}
	sleep(2); /* as the library does */
	abort();
}

int main(int argc, char **argv)
{
	root = argc > 1 ? argv[1] : "/tmp/appscope";
	recover = argc > 2;
	if (getenv("WITHOUT_CORE"))
		prctl(PR_SET_DUMPABLE, 0);
	signal(SIGSEGV, handler);
	for (volatile int i = 0; i < 3; i++) {
		if (sigsetjmp(again, 1) == 0)
			*(volatile int *)16 = 1;
	}
	pause();
	return 0;
}
