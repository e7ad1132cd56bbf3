"""An attacker's native code in the guest process: same uid, same certificate, same descriptors. It gets nowhere.

Each step is also done where nothing is confined, and gets through there.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.escape.conftest import TOKEN, Escaped
from vmm.launcher import LocalLab
from vtl0_guest.kernels import selfguard_image
from vtlab.client import Machine
from vtlab.confinement.privileges import LOG_LIMIT
from vtlab.ram import Store, store_folder

REFUSALS = {errno.EACCES, errno.EPERM}
Place = Callable[[LocalLab], Path]


def refused(escaped: Escaped, step: str, *arguments: Any) -> None:
    with pytest.raises(OSError) as failed:
        escaped(step, *arguments)
    assert failed.value.errno in REFUSALS, failed.value


def machine_of(escaped: Escaped) -> Iterator[Machine]:
    with escaped.lab.create(selfguard_image(), name="victim", command_line="heki=1") as created:
        created.start()
        created.pause()  # its memory is mapped; it need not run
        yield created


@pytest.fixture(scope="module", autouse=True)
def victim(confined: Escaped) -> Iterator[Machine]:
    yield from machine_of(confined)


@pytest.fixture(scope="module", autouse=True)
def victim_unguarded(unguarded: Escaped) -> Iterator[Machine]:
    yield from machine_of(unguarded)


def memory(store: Store, name: str) -> Place:
    return lambda lab: store_folder(lab.directory / "vmm", store) / f"victim.{name}"


def below(path: str) -> Place:
    return lambda lab: lab.directory / path


PRIVATE, SEALED, WRITABLE = (
    memory(store, name)
    for store, name in ((Store.PRIVATE, "private"), (Store.SEALED, "ram.ro"), (Store.WRITABLE, "ram.rw"))
)


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("read_file", PRIVATE),
        ("open_writable", PRIVATE),
        ("open_writable", SEALED),
        ("truncate", SEALED),
        ("truncate", WRITABLE),
        ("truncate_descriptor", WRITABLE),
        ("change_mode", SEALED),
        ("change_mode", WRITABLE),
        ("change_times", WRITABLE),
        ("open_writable", below("vmm/machines/victim/image")),
        ("read_file", below("vmm/machines/victim/private")),
        ("read_file", below("vmm/journal.sqlite")),
        ("open_writable", below("vmm/journal.sqlite")),
        ("list_folder", below("vmm/images")),
        ("read_file", below("monitor/sealed.key")),
        ("read_file", below("monitor/sealed.counter")),
        ("read_file", below("monitor.log")),
        ("read_file", below("trust/ca/ca.key")),
        ("read_file", below("trust/vmm/vmm.key")),
        ("read_file", below("trust/monitor/monitor.key")),
        ("read_file", below("trust/monitor/quote.key")),
        ("read_file", below("trust/operator/operator.key")),
        ("open_writable", below("trust/guest/guest.key")),
        ("list_folder", below(".")),
        ("list_folder", below("trust")),
        ("list_folder", lambda _lab: Path.home()),
        ("read_file", lambda _lab: Path("/etc/passwd")),
        ("read_file", lambda _lab: Path("/proc/self/../1/status")),
    ],
)
def test_files_of_others(confined: Escaped, unguarded: Escaped, step: str, place: Place) -> None:
    unguarded(step, str(place(unguarded.lab)))
    refused(confined, step, str(place(confined.lab)))


@pytest.mark.parametrize(
    "folder", [".", "guest", "vmm", "vmm/machines/victim", "vmm/ram/vtl0-writes", "trust/guest", "/tmp"]
)
@pytest.mark.parametrize("step", ["create", "make_folder", "symlink", "hard_link"])
def test_nothing_is_made_anywhere(confined: Escaped, unguarded: Escaped, step: str, folder: str) -> None:
    """Not even in its own folder; a link would be a trap for who follows it later."""
    for escaped in (unguarded, confined):
        directory = escaped.lab.directory
        made = directory / folder / f"made-{os.getpid()}"
        target = {"symlink": [str(directory / "monitor" / "sealed.key")], "hard_link": [str(made.parent / "base")]}
        if step == "hard_link":
            (made.parent / "base").touch()
        try:
            if escaped is unguarded:
                escaped(step, str(made), *target.get(step, []))
                assert made.exists()
            else:
                refused(escaped, step, str(made), *target.get(step, []))
        finally:
            if made.is_dir() and not made.is_symlink():
                made.rmdir()
            made.unlink(missing_ok=True)
            (made.parent / "base").unlink(missing_ok=True)


@pytest.mark.parametrize("folder", [".", "guest", "vmm", "vmm/ram/vtl0-writes", "vmm/machines/victim", "trust/guest"])
@pytest.mark.parametrize("step", ["remove", "rename"])
def test_nothing_is_removed_or_put_in_the_place_of_another(
    confined: Escaped, unguarded: Escaped, step: str, folder: str
) -> None:
    for escaped in (unguarded, confined):
        there = escaped.lab.directory / folder / "theirs"
        other = [str(there.with_name("elsewhere"))] if step == "rename" else []
        there.write_text("of somebody else")
        if escaped is unguarded:
            escaped(step, str(there), *other)
            assert not there.exists()
        else:
            refused(escaped, step, str(there), *other)
            assert there.read_text() == "of somebody else"
        there.unlink(missing_ok=True)
        there.with_name("elsewhere").unlink(missing_ok=True)


def test_the_log_does_not_fill_the_disk(confined: Escaped, unguarded: Escaped) -> None:
    try:
        unguarded("fill_log", LOG_LIMIT + (1 << 20))
        with pytest.raises(OSError, match="File too large"):
            confined("fill_log", LOG_LIMIT + (1 << 20))
    finally:
        for escaped in (unguarded, confined):
            os.truncate(escaped.lab.directory / "guest.log", 0)


PROC = ["mem", "maps", "environ", "status", "cmdline", "auxv", "stack", "pagemap", "cwd/.", "root/etc/hostname"]


@pytest.mark.parametrize("role", ["vmm", "monitor"])
@pytest.mark.parametrize("entry", PROC)
def test_proc_of_the_siblings(confined: Escaped, unguarded: Escaped, role: str, entry: str) -> None:
    step = "list_folder" if entry.endswith(".") else "read_file"
    for escaped in (unguarded, confined):
        path = f"/proc/{escaped.lab.pids[role]}/{entry}"
        if escaped is confined:
            refused(escaped, step, path)
        elif entry not in ("mem", "stack"):  # page 0 is not mapped; and stacks are root's alone
            escaped(step, path)


@pytest.mark.parametrize("role", ["vmm", "monitor"])
@pytest.mark.parametrize("folder", ["fd", "map_files", "task", "ns"])
def test_descriptors_and_mappings_of_the_siblings(
    confined: Escaped, unguarded: Escaped, role: str, folder: str
) -> None:
    unguarded("list_folder", f"/proc/{unguarded.lab.pids[role]}/{folder}")
    refused(confined, "list_folder", f"/proc/{confined.lab.pids[role]}/{folder}")
    refused(confined, "open_writable", f"/proc/{confined.lab.pids[role]}/fd/1")


@pytest.mark.parametrize("role", ["vmm", "monitor"])
@pytest.mark.parametrize(
    "step",
    [
        "signal_process",
        "signal_thread",
        "signal_by_descriptor",
        "signal_by_owner",
        "trace",
        "take_descriptor_of",
        "set_limit_of",
        "set_affinity_of",
        "set_priority_of",
    ],
)
def test_the_siblings_themselves(confined: Escaped, unguarded: Escaped, role: str, step: str) -> None:
    unguarded(step, unguarded.lab.pids[role])
    refused(confined, step, confined.lab.pids[role])


def test_whoever_started_it(confined: Escaped) -> None:
    """The launcher is this process: of the same user, and outside."""
    for step in ("signal_process", "trace", "take_descriptor_of", "set_limit_of"):
        refused(confined, step, os.getpid())
    refused(confined, "read_file", f"/proc/{os.getpid()}/environ")


@pytest.mark.parametrize("role", ["vmm", "monitor"])
@pytest.mark.parametrize("step", ["read_memory_of", "write_memory_of"])
def test_memory_of_the_siblings(confined: Escaped, unguarded: Escaped, role: str, step: str) -> None:
    for escaped in (unguarded, confined):
        process = escaped.lab.pids[role]
        try:
            maps = Path(f"/proc/{process}/maps").read_text().splitlines()
        except PermissionError:
            pytest.skip("only root sees where the memory of a process that cannot be dumped lies")
        heap = next(line for line in maps if line.endswith("[heap]"))
        address = int(heap.partition("-")[0], 16)
        if escaped is unguarded:
            escaped(step, process, address)
        else:
            refused(escaped, step, process, address)


@pytest.mark.parametrize("name", ["monitor/vcpu.sock", "monitor/clients.sock", "vmm/clients.sock", "guest/vcpu.sock"])
def test_no_port_of_the_laboratory_is_reached(confined: Escaped, unguarded: Escaped, name: str) -> None:
    """Before any certificate is looked at. What its own would open is in test_what_its_certificate_opens."""
    unguarded("connect_unix", str(unguarded.lab.directory / name))
    refused(confined, "connect_unix", str(confined.lab.directory / name))


def test_no_other_port_is_reached_or_opened(confined: Escaped, unguarded: Escaped) -> None:
    name = f"vtlab-test-{os.getpid()}"
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        abstract.bind("\0" + name)
        for opened in (listener, abstract):
            opened.listen()
        steps: list[tuple[str, tuple[Any, ...]]] = [
            ("connect_tcp", (listener.getsockname()[1],)),
            ("connect_abstract", (name,)),
            ("listen_tcp", ()),
            ("make_socket", (socket.AF_INET, socket.SOCK_STREAM)),
            ("make_socket", (socket.AF_INET6, socket.SOCK_DGRAM)),
            ("make_socket", (socket.AF_UNIX, socket.SOCK_DGRAM)),
            ("make_socket", (socket.AF_NETLINK, socket.SOCK_RAW)),
        ]
        for step, arguments in steps:
            unguarded(step, *arguments)
            refused(confined, step, *arguments)


@pytest.mark.parametrize("step", ["start_program", "fork"])
def test_no_other_process_is_made(confined: Escaped, unguarded: Escaped, step: str) -> None:
    unguarded(step)
    refused(confined, step)


# Name, number, arguments with which the kernel would not say EPERM to root.
CALLS = [
    ("ptrace", 101, (1, -1, 0, 0)),
    ("mount", 165, (0, 0, 0, 0, 0)),
    ("chroot", 161, (0,)),
    ("setuid", 105, (0,)),
    ("unshare", 272, (0x400,)),
    ("setns", 308, (-1, 0)),
    ("init_module", 175, (0, 0, 0)),
    ("keyctl", 250, (0, -3, 0, 0, 0)),
    ("add_key", 248, (0, 0, 0, 0, 0)),
    ("perf_event_open", 298, (0, 0, -1, -1, 0)),
    ("open_by_handle_at", 304, (-1, 0, 0)),
    ("name_to_handle_at", 303, (-1, 0, 0, 0, 0)),
    ("kcmp", 312, (-1, -1, 0, 0, 0)),
    ("bpf", 321, (0, 0, 0)),
    ("userfaultfd", 323, (0xFFFF,)),
    ("memfd_create", 319, (0, 0)),
    ("io_uring_setup", 425, (0, 0)),
    ("pidfd_open", 434, (-1, 0)),
    ("execveat", 322, (-1, 0, 0, 0, 0)),
    ("shmget", 29, (0, 0, 0)),
    ("mq_open", 240, (0, 0, 0, 0)),
    ("personality", 135, (0xFFFFFFFF,)),
    ("splice", 275, (-1, 0, -1, 0, 1, 0)),
    ("process_madvise", 440, (-1, 0, 0, 0, 0)),
    ("migrate_pages", 256, (-1, 0, 0, 0)),
]


@pytest.mark.parametrize(("name", "number", "arguments"), CALLS, ids=[name for name, *_ in CALLS])
def test_calls_that_no_processor_needs(
    confined: Escaped, unguarded: Escaped, name: str, number: int, arguments: tuple[int, ...]
) -> None:
    with pytest.raises(PermissionError, match="Operation not permitted"):
        confined("system_call", number, *arguments)
    if os.geteuid() == 0:  # others are refused some of them anyway
        assert _error(unguarded, number, arguments) != errno.EPERM, f"{name} shows nothing"


def _error(escaped: Escaped, number: int, arguments: tuple[int, ...]) -> int | None:
    try:
        escaped("system_call", number, *arguments)
    except OSError as error:
        return error.errno
    return None


def test_its_own_mappings_stay_as_they_are(confined: Escaped, unguarded: Escaped) -> None:
    """That a file was opened read-only holds with and without confinement; what opens it again is what it ends."""
    for escaped in (unguarded, confined):
        escaped("protect_writable", ".ram.rw")
        refused(escaped, "protect_writable", ".ram.ro")
        with pytest.raises(OSError, match=r"Input/output error|Bad address|Permission denied"):
            escaped("write_through_memory_file", ".ram.ro")
    if os.geteuid() == 0:
        unguarded("reopen_mapping", ".ram.ro")
    refused(confined, "reopen_mapping", ".ram.ro")
    unguarded("reopen_descriptor", ".ram.ro")
    refused(confined, "reopen_descriptor", ".ram.ro")


def test_it_stays_unseen(confined: Escaped, unguarded: Escaped) -> None:
    for step in ("be_dumpable", "raise_core_limit"):
        unguarded(step)
        refused(confined, step)


def test_what_it_holds(confined: Escaped) -> None:
    """No file but its log and its memory, no key, no pipe that somebody unpickles or acts on."""
    opened = confined("descriptors")
    kinds = ("socket:", "pipe:", "anon_inode:[event", "/dev/null", "/proc/")
    files = {str(place(confined.lab)) for place in (below("guest.log"), WRITABLE, SEALED)}
    assert {one for one in opened if not one.startswith(kinds)} == files
    assert sum(one.startswith("pipe:") for one in opened) <= 2, "to learn of its parent's end, and to tell of its own"
    lines = confined("identity")
    assert [line.split()[-1] for line in lines if line.startswith("Cap")] == ["0" * 16] * 5
    assert {line for line in lines if line.startswith(("NoNewPrivs", "Seccomp"))} == {"NoNewPrivs:\t1", "Seccomp:\t2"}


def test_the_users_environment_is_not_in_it(confined: Escaped, unguarded: Escaped) -> None:
    """Neither where the kernel put it, nor in copies that Python made."""
    assert unguarded("find_in_memory", TOKEN) > 0
    assert confined("find_in_memory", TOKEN) == 0
