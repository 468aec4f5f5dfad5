"""Which members of kernel structures ``bpf/detector.bpf.c`` reads, and where they lie."""

import structlog

from services.detector.btf import Btf, BtfError

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Without these a crash cannot be named.
_NEEDED = {
    "AT_TASK_LEADER": ("task_struct", "group_leader"),
    "AT_TASK_START": ("task_struct", "start_boottime"),
    "AT_TASK_TGID": ("task_struct", "tgid"),
    "AT_TASK_PID": ("task_struct", "pid"),
    "AT_TASK_COMM": ("task_struct", "comm"),
    "AT_TASK_MM": ("task_struct", "mm"),
    "AT_TASK_SIGNAL": ("task_struct", "signal"),
    "AT_TASK_REAL_CRED": ("task_struct", "real_cred"),
    "AT_TASK_THREAD_PID": ("task_struct", "thread_pid"),
    "AT_PID_LEVEL": ("pid", "level"),
    "AT_PID_NUMBERS": ("pid", "numbers"),
    "AT_CRED_UID": ("cred", "uid.val"),
    "AT_CRED_GID": ("cred", "gid.val"),
    "AT_SIGNAL_FLAGS": ("signal_struct", "flags"),
    "AT_SIGNAL_EXIT_CODE": ("signal_struct", "group_exit_code"),
}

# Without one of these groups, /proc is asked, if the process is still there. A member may have
# had other names in other kernels.
_Group = dict[str, tuple[str, tuple[str, ...]]]
_ARGUMENTS: _Group = {
    "AT_MM_ARG_START": ("mm_struct", ("arg_start",)),
    "AT_MM_ARG_END": ("mm_struct", ("arg_end",)),
}
_EXECUTABLE: _Group = {
    "AT_MM_EXE_FILE": ("mm_struct", ("exe_file",)),
    "AT_FILE_DENTRY": ("file", ("f_path.dentry",)),
    "AT_FILE_MNT": ("file", ("f_path.mnt",)),
    "AT_MOUNT_MNT": ("mount", ("mnt",)),
    "AT_MOUNT_PARENT": ("mount", ("mnt_parent",)),
    "AT_MOUNT_MOUNTPOINT": ("mount", ("mnt_mountpoint",)),
    "AT_VFSMOUNT_ROOT": ("vfsmount", ("mnt_root",)),
    "AT_DENTRY_NAME": ("dentry", ("d_name.name",)),
    "AT_DENTRY_PARENT": ("dentry", ("d_parent",)),
}
_CGROUP: _Group = {
    "AT_TASK_CGROUPS": ("task_struct", ("cgroups",)),
    "AT_CSS_SET_DFL": ("css_set", ("dfl_cgrp",)),
    "AT_CGROUP_KN": ("cgroup", ("kn",)),
    "AT_KN_NAME": ("kernfs_node", ("name",)),
    "AT_KN_PARENT": ("kernfs_node", ("parent", "__parent")),  # renamed in 6.15
}
_CORE: _Group = {
    "AT_MM_FLAGS": ("mm_struct", ("flags",)),  # a bitmap of its own since 6.18, as it lies there
    "AT_SIGNAL_CORE_LIMIT": ("signal_struct", ("rlim[4].rlim_cur",)),  # RLIMIT_CORE
}
_OOM: _Group = {
    "AT_MM_TOTAL_VM": ("mm_struct", ("total_vm",)),
    # Per-CPU counters since 6.2. By include/linux/mm_types_task.h: MM_FILEPAGES, MM_ANONPAGES and,
    # after MM_SWAPENTS, MM_SHMEMPAGES.
    "AT_MM_FILE_RSS": ("mm_struct", ("rss_stat[0].count", "rss_stat.count[0]")),
    "AT_MM_ANON_RSS": ("mm_struct", ("rss_stat[1].count", "rss_stat.count[1]")),
    "AT_MM_SHMEM_RSS": ("mm_struct", ("rss_stat[3].count", "rss_stat.count[3]")),
    "AT_SIGNAL_OOM_SCORE_ADJ": ("signal_struct", ("oom_score_adj",)),
}


def definitions(btf: Btf) -> dict[str, int]:
    """Return the program's definitions for the kernel that `btf` describes.

    Raises:
        BtfError: the kernel keeps something elsewhere without which a crash cannot be named.
    """
    found = {name: btf.offset(*where) for name, where in _NEEDED.items()}
    found["SIZE_UPID"] = btf.size("upid")
    for what, group in (("arguments", _ARGUMENTS), ("executable", _EXECUTABLE)):
        found |= _optional(btf, what, group)
    found |= (cgroup := _optional(btf, "cgroup", _CGROUP))
    if cgroup:
        found |= _memory_controller(btf)
    found |= _optional(btf, "core limits", _CORE)
    if _victim_is_task(btf):
        found["MARK_VICTIM_GIVES_TASK"] = 1
        found |= _optional(btf, "oom", _OOM)
    return found


def _optional(btf: Btf, what: str, group: _Group) -> dict[str, int]:
    """Return a group's offsets, all or none."""
    try:
        return {name: _first(btf, *where) for name, where in group.items()}
    except BtfError as error:
        log.warning("this kernel hides something, /proc is asked for it", what=what, error=error)
        return {}


def _first(btf: Btf, structure: str, members: tuple[str, ...]) -> int:
    for member in members[:-1]:
        try:
            return btf.offset(structure, member)
        except BtfError:
            continue
    return btf.offset(structure, members[-1])


def _memory_controller(btf: Btf) -> dict[str, int]:
    """Return where the memory controller's cgroup hangs; nothing on a kernel without it."""
    try:
        index = btf.enumerator("cgroup_subsys_id", "memory_cgrp_id")
        return {
            "AT_CSS_SET_MEMORY": btf.offset("css_set", f"subsys[{index}]"),
            "AT_CSS_CGROUP": btf.offset("cgroup_subsys_state", "cgroup"),
        }
    except BtfError:
        return {}


def _victim_is_task(btf: Btf) -> bool:
    """Tell whether oom:mark_victim gives the task and not only its PID.

    It does since 6.9, and in stable kernels that took that change over, Debian's 6.1 for one.
    """
    try:
        return btf.points_to("btf_trace_mark_victim", 1) == "task_struct"
    except BtfError:
        return False
