"""The same file rights by uid, as in containers: the VMM owns, the monitor is the group, the guest is among the others.

A process of each role is a fork of this one with that role's uid and gid, and no capability.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.journal import Journal
from vtlab.ram import MACHINES, RamFile, Store, create_ram_files, create_stores, link_to_stores, store_folder
from vtlab.trust.certificates import ensure_trust, hand_out

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

VMM, GUEST, MONITOR, AUTHORITY = 10000, 10001, 10002, 10004  # deploy/Dockerfile
SIZE = 2 << 20


def succeeds(user: int, step: Callable[[], object], groups: tuple[int, ...] = ()) -> bool:
    """Whether somebody with that uid gets through."""
    child = os.fork()
    if not child:
        try:
            os.setgroups(groups)
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            step()
        except OSError:
            os._exit(1)
        except BaseException:  # noqa: BLE001 - a fork of the test must not go on as the test
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 0


def opens(path: Path, flags: int) -> Callable[[], object]:
    return lambda: os.open(path, flags)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody passes through; those of pytest are its user's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.fixture
def state(shared: Path) -> Path:
    """The volume `memory` of deploy/compose.yaml with a machine in it, made by the VMM's user."""
    memory = shared / "memory"
    memory.mkdir()
    os.chown(memory, VMM, MONITOR)
    memory.chmod(0o2751)

    def make() -> None:
        create_stores(memory)
        directory = memory / MACHINES / "machine"
        directory.mkdir()
        link_to_stores(directory, memory, [file.value for file in RamFile])
        create_ram_files(directory, SIZE)
        (memory / "images").mkdir(mode=0o700)
        Journal(memory / "journal.sqlite")

    assert succeeds(VMM, make, groups=(MONITOR,))
    return memory


READ, WRITE = os.O_RDONLY, os.O_RDWR


@pytest.mark.parametrize(
    ("store", "name", "guest", "monitor"),
    [
        (Store.WRITABLE, "ram.rw", {READ, WRITE}, {READ, WRITE}),
        (Store.SEALED, "ram.ro", {READ}, {READ, WRITE}),
        (Store.PRIVATE, "private", set(), {READ, WRITE}),
    ],
)
def test_memory(state: Path, store: Store, name: str, guest: set[int], monitor: set[int]) -> None:
    for path in (store_folder(state, store) / f"machine.{name}", state / MACHINES / "machine" / name):
        for user, rights in ((VMM, {READ, WRITE}), (GUEST, guest), (MONITOR, monitor), (AUTHORITY + 1, guest)):
            assert {flags for flags in (READ, WRITE) if succeeds(user, opens(path, flags))} == rights, (path, user)


@pytest.mark.parametrize("user", [GUEST, MONITOR])
def test_what_is_the_vmm_s_alone(state: Path, user: int) -> None:
    assert not succeeds(user, opens(state / "journal.sqlite", READ))
    assert not succeeds(user, lambda: os.listdir(state / "images"))  # noqa: PTH208 - one call
    for folder in (state, state / MACHINES, store_folder(state, Store.WRITABLE), store_folder(state, Store.PRIVATE)):
        assert not succeeds(user, opens(folder / "made", os.O_CREAT | os.O_WRONLY))
    ram = store_folder(state, Store.WRITABLE) / "machine.ram.rw"
    assert not succeeds(user, ram.unlink)
    assert not succeeds(user, lambda: ram.chmod(0o600))
    assert succeeds(VMM, lambda: ram.chmod(0o666))


def test_keys(shared: Path) -> None:
    """Handed out as the compose file does: the authority writes, the role's group reads."""
    authority = ensure_trust(shared / "authority")
    out = shared / "out"
    out.mkdir()
    for role, user in (("vmm", VMM), ("guest", GUEST), ("monitor", MONITOR)):
        (out / role).mkdir()
        os.chown(out / role, AUTHORITY, user)
        (out / role).chmod(0o2750)
    hand_out(authority, out)
    for role, user in (("vmm", VMM), ("guest", GUEST), ("monitor", MONITOR)):
        key = out / role / f"{role}.key"
        assert succeeds(user, opens(key, READ))
        assert not succeeds(user, opens(key, WRITE))
        for other in {VMM, GUEST, MONITOR, AUTHORITY + 1} - {user}:
            assert not succeeds(other, opens(key, READ)), (role, other)
    assert not succeeds(AUTHORITY + 1, opens(authority / "ca" / "ca.key", READ))


def test_processes_of_other_users() -> None:
    """What a guest process with a uid of its own could do to the others without Landlock or seccomp."""
    victim = os.fork()
    if not victim:
        os.setresuid(MONITOR, MONITOR, MONITOR)
        signal.pause()
        os._exit(0)
    try:
        for step in (lambda: os.kill(victim, 0), opens(Path(f"/proc/{victim}/mem"), READ)):
            assert not succeeds(GUEST, step)
    finally:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
