/* SPDX-License-Identifier: GPL-2.0 */
/* Empty: bcc includes it, nothing of it is used. */
