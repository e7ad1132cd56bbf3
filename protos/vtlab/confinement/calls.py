"""Which system calls each role makes: x86-64 numbers (Linux arch/x86/entry/syscalls/syscall_64.tbl) and tests.

What a role does not need is in no table: other programs (execve), other processes (ptrace, process_vm_*, pidfd_*),
the kernel's own management (bpf, mount, keyctl, userfaultfd, kexec_load, io_uring_*, open_by_handle_at), identities.
"""

from __future__ import annotations

from vtlab.confinement.bpf import Argument, Check, Filter
from vtlab.trust.roles import Role

_FILES = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "pread64": 17, "pwrite64": 18,
    "readv": 19, "writev": 20, "access": 21, "dup": 32, "dup2": 33, "flock": 73, "getdents64": 217, "getcwd": 79,
    "readlink": 89, "umask": 95, "statfs": 137, "fstatfs": 138, "fadvise64": 221, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "dup3": 292, "statx": 332, "close_range": 436, "faccessat2": 439,
}  # fmt: skip
_MEMORY = {
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
    "membarrier": 324,
}  # fmt: skip
_THREADS = {
    "sched_yield": 24, "exit": 60, "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146,
    "sched_get_priority_min": 147, "arch_prctl": 158, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
    "set_tid_address": 218, "exit_group": 231, "set_robust_list": 273, "getcpu": 309, "rseq": 334,
}  # fmt: skip
_SIGNALS = {
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pause": 34, "setitimer": 38, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "restart_syscall": 219,
}  # fmt: skip
_WAITING = {
    "poll": 7, "pipe": 22, "select": 23, "nanosleep": 35, "gettimeofday": 96, "times": 100, "time": 201,
    "epoll_create": 213, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "epoll_wait": 232,
    "epoll_ctl": 233, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "timerfd_create": 283, "eventfd": 284,
    "timerfd_settime": 286, "timerfd_gettime": 287, "eventfd2": 290, "epoll_create1": 291, "pipe2": 293,
    "epoll_pwait2": 441,
}  # fmt: skip
_SOCKETS = {
    "accept": 43, "recvfrom": 45, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51,
    "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "accept4": 288,
}  # fmt: skip
_SENDING = {"sendto": 44, "sendmsg": 46}
_ABOUT_ITSELF = {
    "getpid": 39, "uname": 63, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115, "getresuid": 118,
    "getresgid": 120, "getpgid": 121, "getsid": 124, "getrandom": 318,
}  # fmt: skip
_CHANGES_OF_FILES = {
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87,
    "chmod": 90, "fchmod": 91, "fchown": 93, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "fchmodat": 268,
    "utimensat": 280, "fallocate": 285, "renameat2": 316,
}  # fmt: skip
_CONNECT = {"connect": 42}
_OF_THE_VMM = {"sendfile": 40, "symlink": 88, "symlinkat": 266, "copy_file_range": 326}

_OPEN, _OPENAT, _OPENAT2 = 2, 257, 437
_IOCTL, _CLONE, _CLONE3, _FCNTL = 16, 56, 435, 72
_SOCKET, _SOCKETPAIR = 41, 53
_KILL, _TGKILL, _PRCTL, _PRLIMIT64 = 62, 234, 157, 302

_CLONE_THREAD = 0x10000
_O_CREAT, _O_TRUNC = 0o100, 0o1000
_O_TMPFILE = 0o20000000
_AF_UNIX, _AF_INET, _AF_INET6, _SOCK_STREAM, _SOCK_TYPE = 1, 2, 10, 1, 0xF
_MSG_FASTOPEN = 0x20000000
# TCGETS and TIOCGWINSZ (is it a terminal?), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_SETOWN, F_SETSIG, F_SETOWN_EX: they have the kernel send signals to others.
_COMMANDS_THAT_SIGNAL = (8, 10, 15)
# PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_CAPBSET_READ, PR_GET_NO_NEW_PRIVS, PR_SET_VMA
_PRCTL_OPTIONS = (3, 15, 16, 23, 39, 0x53564D41)

_CREATES_NOTHING = Check.NO_BIT_OF, (_O_CREAT | _O_TRUNC | _O_TMPFILE,)


def allowed_calls(role: Role, process: int, tcp: bool, dials: bool = False) -> Filter:
    """The filter of a role.

    Args:
        process: its own number, the only one that it may send signals to.
        tcp: it listens on TCP ports, or dials them.
        dials: it dials TCP ports; the VMM dials in any case.
    """
    names = _FILES | _MEMORY | _THREADS | _SIGNALS | _WAITING | _SOCKETS | _SENDING | _ABOUT_ITSELF
    absent = {_CLONE3, _OPENAT2}  # their arguments are behind a pointer, where no filter sees them
    own = Argument(0, Check.ONE_OF, (process,))
    stream = Argument(1, Check.MASKED, (_SOCK_TYPE, _SOCK_STREAM))
    families = (_AF_UNIX, _AF_INET, _AF_INET6) if tcp else (_AF_UNIX,)
    tested = {
        _IOCTL: (Argument(1, Check.ONE_OF, _REQUESTS),),
        _FCNTL: (Argument(1, Check.NONE_OF, _COMMANDS_THAT_SIGNAL),),
        _CLONE: (Argument(0, Check.MASKED, (_CLONE_THREAD, _CLONE_THREAD)),),
        _SOCKET: (Argument(0, Check.ONE_OF, families), stream),
        _SOCKETPAIR: (Argument(0, Check.ONE_OF, (_AF_UNIX,)), stream),
        _KILL: (own,),
        _TGKILL: (own,),
        _PRCTL: (Argument(0, Check.ONE_OF, _PRCTL_OPTIONS),),
        _PRLIMIT64: tuple(Argument(index, Check.ONE_OF, (0,), high) for index in (0, 2) for high in (False, True)),
    }
    if role is Role.GUEST:
        tested |= {_OPEN: (Argument(1, *_CREATES_NOTHING),), _OPENAT: (Argument(2, *_CREATES_NOTHING),)}
    else:
        names = names | _CHANGES_OF_FILES | {"open": _OPEN, "openat": _OPENAT}
    if role is Role.VMM:
        names = names | _OF_THE_VMM
    if role is Role.VMM or dials:
        names = names | _CONNECT
    elif tcp:  # or a connection could be opened by sending on it
        tested |= {
            _SENDING["sendto"]: (Argument(3, Check.NO_BIT_OF, (_MSG_FASTOPEN,)),),
            _SENDING["sendmsg"]: (Argument(2, Check.NO_BIT_OF, (_MSG_FASTOPEN,)),),
        }
    return Filter(frozenset(names.values()), tested, frozenset(absent))
