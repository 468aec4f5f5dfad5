/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Stands in for the kernel's own headers, which bcc includes before every program. The program
 * uses nothing of the kernel's insides but offsets it is given, so these few types are enough.
 */
#define CONFIG_BPF_SYSCALL 1

#include <linux/types.h>

typedef __u8 u8;
typedef __s8 s8;
typedef __u16 u16;
typedef __s16 s16;
typedef __u32 u32;
typedef __s32 s32;
typedef __u64 u64;
typedef __s64 s64;
typedef _Bool bool;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
typedef int pid_t;
typedef unsigned int uid_t;
typedef unsigned int gid_t;

#define NULL ((void *)0)
#define PAGE_SIZE 4096
