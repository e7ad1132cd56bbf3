"""What native code in the guest process would try. Each step raises OSError, or returns because it got through.

Those that get through do no harm: they leave bytes, modes and limits as they were.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import signal
import socket
import stat
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_PAGE = 4096


def system_call(number: int, *arguments: int) -> int:
    """By number, past the C library."""
    ctypes.set_errno(0)
    result: int = _libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# ---------------------------------------------------------------------------------------------------------------- files


def read_file(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return len(os.read(descriptor, 16))
    finally:
        os.close(descriptor)


def open_writable(path: str) -> None:
    os.close(os.open(path, os.O_RDWR))


def list_folder(path: str) -> int:
    return len(os.listdir(path))  # noqa: PTH208 - one call, the one that is tried


def create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def remove(path: str) -> None:
    Path(path).unlink()


def rename(path: str, other: str) -> None:
    Path(path).rename(other)


def symlink(path: str, target: str) -> None:
    Path(path).symlink_to(target)


def hard_link(path: str, target: str) -> None:
    os.link(target, path)


def make_folder(path: str) -> None:
    Path(path).mkdir()


def change_mode(path: str) -> None:
    Path(path).chmod(Path(path).stat().st_mode & 0o7777)


def change_times(path: str) -> None:
    os.utime(path)


def truncate(path: str) -> None:
    os.truncate(path, Path(path).stat().st_size)


def truncate_descriptor(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def fill_log(size: int) -> None:
    """Who writes to it comes after what is there."""
    for _ in range(size >> 20):
        os.write(1, bytes(1 << 20))


# ----------------------------------------------------------------------------------------------------- other processes


def signal_process(process: int) -> None:
    """One that nobody notices."""
    os.kill(process, signal.SIGURG)


def signal_thread(process: int) -> None:
    system_call(234, process, process, signal.SIGURG)


def signal_by_queue(process: int) -> None:
    system_call(129, process, signal.SIGURG, 0)


def signal_by_descriptor(process: int) -> None:
    system_call(424, system_call(434, process, 0), 0, 0, 0)


def signal_by_owner(process: int) -> None:
    """Has the kernel send SIGIO there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fcntl.fcntl(ours, fcntl.F_SETOWN, process)
        fcntl.fcntl(ours, 10, signal.SIGURG)


def trace(process: int) -> None:
    """Attaches without a stop; the end of this thread lets go of it."""
    system_call(101, 0x4206, process, 0, 0)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_memory_of(process: int, address: int) -> None:
    buffer = ctypes.create_string_buffer(16)
    local, remote = _Vector(ctypes.addressof(buffer), 16), _Vector(address, 16)
    system_call(310, process, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)


def write_memory_of(process: int, address: int) -> None:
    """What is there already, where it could be read."""
    buffer = ctypes.create_string_buffer(16)
    local, remote = _Vector(ctypes.addressof(buffer), 16), _Vector(address, 16)
    system_call(310, process, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    system_call(311, process, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)


def take_descriptor_of(process: int) -> None:
    os.close(system_call(438, system_call(434, process, 0), 0, 0))


def set_limit_of(process: int) -> None:
    resource.prlimit(process, resource.RLIMIT_CORE, resource.prlimit(process, resource.RLIMIT_CORE))


def set_affinity_of(process: int) -> None:
    os.sched_setaffinity(process, os.sched_getaffinity(0))


def set_priority_of(process: int) -> None:
    os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, process))


def start_program() -> int:
    return os.posix_spawn("/bin/true", ["true"], {})


def fork() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    return os.waitpid(child, 0)[1]


# ------------------------------------------------------------------------------------------------------------- sockets


def connect_unix(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(path)


def connect_abstract(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect("\0" + name)


def connect_tcp(port: int) -> None:
    with socket.socket() as opened:
        opened.connect(("127.0.0.1", port))


def listen_tcp() -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))


def make_socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def send_descriptor() -> int:
    """Its log, to whoever is at the other end of each connection that it holds; returns how many there were."""
    sent = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names
        try:
            copy = os.dup(int(name))
        except OSError:
            continue
        try:
            opened = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)  # else the process would hold the files of a machine that is gone
            continue
        with opened:
            try:
                opened.getpeername()
            except OSError:
                continue
            if opened.getsockname() and "shell" not in str(opened.getsockname()):
                socket.send_fds(opened, [b"\0"], [1])
                sent += 1
    return sent


# ---------------------------------------------------------------------------------------------------------- its own


def _mapping(suffix: str) -> tuple[int, int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(suffix):
            first, last = line.split()[0].split("-")
            return int(first, 16), int(last, 16)
    raise OSError(errno.ENOENT, suffix)


def protect_writable(suffix: str) -> None:
    """Makes its mapping of a file writable."""
    first, _ = _mapping(suffix)
    if _libc.mprotect(ctypes.c_void_p(first), _PAGE, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def reopen_mapping(suffix: str) -> None:
    """A mapped file, for writing, where no path leads to it."""
    first, last = _mapping(suffix)
    os.close(os.open(f"/proc/self/map_files/{first:x}-{last:x}", os.O_RDWR))


def reopen_descriptor(suffix: str) -> None:
    """One that it holds to read, to write."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names
        path = f"/proc/self/fd/{name}"
        if os.path.realpath(path).endswith(suffix):
            os.close(os.open(path, os.O_RDWR))
            return
    raise OSError(errno.ENOENT, suffix)


def write_through_memory_file(suffix: str) -> None:
    """/proc/self/mem ignores the protection of private mappings."""
    first, _ = _mapping(suffix)
    descriptor = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(descriptor, os.pread(descriptor, 1, first), first)
    finally:
        os.close(descriptor)


def be_dumpable() -> None:
    if _libc.prctl(4, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def raise_core_limit() -> None:
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
    except ValueError as error:  # what Python makes of EPERM
        raise OSError(errno.EPERM, str(error)) from None


def type_into_terminal(descriptor: int) -> None:
    fcntl.ioctl(descriptor, 0x5412, b"x")  # TIOCSTI


def descriptors() -> list[str]:
    """Where they lead."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names
        try:
            found.append(str(Path("/proc/self/fd", name).readlink()))
        except OSError:
            continue
    return found


def identity() -> list[str]:
    """Lines of /proc/self/status that say what it may do."""
    wanted = ("Cap", "NoNewPrivs", "Seccomp:", "Groups")
    return [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(wanted)]


def say_that_it_is_dead() -> int:
    """Closes what it could write to in pipes: one of them tells its launcher, by its end, that this process is gone."""
    closed = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names
        try:
            pipe = stat.S_ISFIFO(os.fstat(int(name)).st_mode)
            if pipe and fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                os.close(int(name))
                closed += 1
        except OSError:
            continue
    return closed


def find_in_memory(halves: list[str]) -> int:
    """How often two strings stand one after the other in its private memory; put together here alone."""
    found = 0
    pattern = re.compile(re.escape(halves[0].encode()) + re.escape(halves[1].encode()))
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, *_, name = (*line.split()[:2], line.split()[-1])
        first, last = (int(part, 16) for part in place.split("-"))
        if rights.startswith("rw") and rights.endswith("p") and not name.startswith("[v") and last - first < 64 << 20:
            found += len(pattern.findall(ctypes.string_at(first, last - first)))
    return found
