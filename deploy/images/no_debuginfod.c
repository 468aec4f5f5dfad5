/* Stands in for libdebuginfod in the recorder's image.
 *
 * drgn is linked with a client for servers of debug information, and with it with libcurl,
 * Kerberos and LDAP: 85 MB that are never called, because a backtrace is made without a network.
 */
#include <errno.h>
#include <stddef.h>

void *debuginfod_begin(void) { return NULL; } /* debuginfod_find_debuginfo(3): no client */
void debuginfod_end(void *client) { (void)client; }
int debuginfod_find_debuginfo(void) { return -ENOSYS; }
int debuginfod_find_executable(void) { return -ENOSYS; }
const char *debuginfod_get_url(void) { return NULL; }
void *debuginfod_get_user_data(void) { return NULL; }
void debuginfod_set_user_data(void) {}
void debuginfod_set_progressfn(void) {}
