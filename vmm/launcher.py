"""A laboratory on this machine: three processes, private sockets, private keys, and nothing left at the end.

    with launch() as lab, lab.create("guest.elf") as machine:
        ...

The processes are spawned, not forked, and end with the block, with an exception, or with this process, however it ends.
One that dies by itself is restarted (vmm.supervisor), from a process that waits for that (vmm.spare).
Their folder is private to the user and lies in memory where the machine has room there, since guest RAM is files in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import os
import shutil
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from vmm.child import ChildSpec
from vmm.janitor import removed_at_the_end
from vmm.spare import AFTER_DEATH, AFTER_START, Blank, Spares
from vmm.supervisor import DEFAULT_BUDGET, Budget, LocalProcess, Supervisor
from vtlab.channels import ServerConfig
from vtlab.client import Addresses, Lab
from vtlab.errors import InternalError, TimedOut, VtlabError
from vtlab.process import remove_folder
from vtlab.ram import create_stores
from vtlab.trust.certificates import ensure_trust
from vtlab.trust.roles import Role

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only private folders are made in it
ROOM_WANTED = 256 << 20  # bytes that must be free there, else the folder goes to the disk
PREFIX = "vtlab-lab-"
SOCKET_PATH_LIMIT = 107  # bytes, sun_path of unix(7)
SOCKETS = ("guest/vcpu.sock", "monitor/vcpu.sock", "monitor/clients.sock", "vmm/clients.sock")
SHORT_BASE = "/tmp"  # noqa: S108 - only private folders are made in it

_FOR_LEVELS = 0.75  # of the time that the VMM has to be back, what it may wait for a level

# role -> the module whose main() serves it, in the order of their end: the VMM still speaks to the levels
SERVERS = {Role.VMM: "vmm.server", Role.GUEST: "vtl0_guest.server", Role.MONITOR: "vtl1_monitor.server"}


class LocalLab(Lab):
    """A laboratory of this process.

    Attributes:
        directory: its private folder; each process's log is ROLE.log in it.
        supervisor: of its processes.
    """

    def __init__(self, addresses: Addresses, directory: Path, supervisor: Supervisor) -> None:
        self.directory = directory
        self.supervisor = supervisor
        super().__init__(addresses)

    @property
    def pids(self) -> dict[str, int]:
        """Process numbers by role."""
        return {role.value: int(local.process.pid) for role, local in self.supervisor.processes.items()}


@contextlib.contextmanager
def launch(
    rules: Any = None,
    *,
    directory: Path | str | None = None,
    vmm_listen: str = "",
    monitor_listen: str = "",
    timeout: float = 180.0,
    budget: Budget = DEFAULT_BUDGET,
    between: Callable[[Role, str], str] = lambda _role, address: address,
    log_format: str = "text",
    metrics: Sequence[str] = ("", ""),
    traces: str = "",
) -> Iterator[LocalLab]:
    """Starts guest, monitor and VMM, and connects to them as operator.

    Args:
        rules: rules in Python for the monitor; functions of a notebook or a script are shipped whole.
        directory: where to make the private folder; chosen if None.
        vmm_listen, monitor_listen: addresses for clients in place of Unix sockets, "127.0.0.1:0".
        timeout: seconds for all three to answer, and for one that is restarted.
        budget: how often a process may die.
        between: gives the address at which the VMM reaches a level that is served at another, for a relay in between.
        log_format: "text" or "json" (vtlab.logs).
        metrics: where VMM and monitor answer Prometheus, "HOST:PORT" each; "" for nowhere (vtlab.metrics).
        traces: folder or http address for spans of VTL switches; "" for nowhere (vtlab.traces).

    Raises:
        VtlabError: as the process that could not start reports it, or TimedOut.
    """
    with _private_directory(directory) as folder, _socket_directory(folder) as sockets:
        trust = ensure_trust(folder / "trust")
        processes: dict[Role, LocalProcess] = {}
        with contextlib.ExitStack() as stack:
            stack.callback(_stop, processes)
            spares = Spares(lambda: list(SERVERS.values()))
            stack.callback(spares.close)
            configs = _configs(folder, sockets, trust, vmm_listen, monitor_listen)
            for role, address in zip((Role.VMM, Role.MONITOR), metrics, strict=True):
                configs[role] = replace(configs[role], metrics=address)
            if traces and Path(traces).is_dir():
                (Path(traces) / f"{Role.GUEST}.jsonl").touch(mode=0o600)  # its process may make no file
            for role in SERVERS:
                configs[role] = replace(configs[role], log_format=log_format, traces=traces)
            vmm = configs[Role.VMM]
            guest, monitor = between(Role.GUEST, vmm.guest), between(Role.MONITOR, vmm.monitor)
            configs[Role.VMM] = replace(vmm, guest=guest, monitor=monitor, restart_budget=timeout * _FOR_LEVELS)
            blob = _ship(rules)

            def start(role: Role) -> LocalProcess:
                shipped = blob if role is Role.MONITOR else b""
                return _start(spares.take(), role, configs[role], shipped, folder)

            def await_ready(role: Role, local: LocalProcess) -> None:
                _await_ready({role: local}, timeout)
                spares.prepare(AFTER_DEATH)

            for role in (Role.GUEST, Role.MONITOR, Role.VMM):
                processes[role] = start(role)
            bound = _await_ready(processes, timeout)
            for role in SERVERS:
                configs[role] = replace(configs[role], listen=bound[role])
            addresses = Addresses(bound[Role.VMM][0], bound[Role.MONITOR][1], trust / Role.OPERATOR)
            supervisor = Supervisor(processes, start, await_ready, budget)
            stack.callback(supervisor.close)
            spares.prepare(AFTER_START)
            lab = stack.enter_context(LocalLab(addresses, folder, supervisor))
            stack.callback(lab.destroy_machines)  # a VMM that merely ends leaves them to the next one
            yield lab


def _configs(
    folder: Path, socket_folder: Path, trust: Path, vmm_listen: str, monitor_listen: str
) -> dict[Role, ServerConfig]:
    sockets = {name: f"unix:{socket_folder / name}" for name in SOCKETS}
    listen = {
        Role.GUEST: (sockets["guest/vcpu.sock"],),
        Role.MONITOR: (sockets["monitor/vcpu.sock"], monitor_listen or sockets["monitor/clients.sock"]),
        Role.VMM: (vmm_listen or sockets["vmm/clients.sock"],),
    }
    configs = {}
    for role in SERVERS:
        for own in {folder / role, socket_folder / role}:
            own.mkdir(mode=0o700)
        configs[role] = ServerConfig(listen[role], trust / role, role.value, folder / role, memory=folder / Role.VMM)
    create_stores(folder / Role.VMM)
    vmm = configs[Role.VMM]
    configs[Role.VMM] = replace(vmm, guest=sockets["guest/vcpu.sock"], monitor=sockets["monitor/vcpu.sock"])
    return configs


def _ship(rules: Any) -> bytes:
    """What is defined in a script or a notebook goes by value, with the globals that it uses and no others."""
    if rules is None:
        return b""
    import dill

    class Pickler(dill.Pickler):  # type: ignore[misc]
        """dill ships the contents of a module that is installed editable; here modules go by name."""

        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, types.ModuleType) and value.__name__ != "__main__" and value.__spec__ is not None:
                return importlib.import_module, (value.__name__,)
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, recurse=True).dump(rules)
    return buffer.getvalue()


def _start(blank: Blank, role: Role, config: ServerConfig, rules: bytes, folder: Path) -> LocalProcess:
    log = None if os.environ.get("VTLAB_DEBUG") else folder / f"{role}.log"
    spec = ChildSpec(
        module=SERVERS[role],
        config=config,
        rules=rules,
        log=log,
    )
    return blank.become(spec)


def _await_ready(processes: dict[Role, LocalProcess], timeout: float) -> dict[Role, tuple[str, ...]]:
    deadline = time.monotonic() + timeout
    bound: dict[Role, tuple[str, ...]] = {}
    while len(bound) < len(processes):
        waiting = {local.ready: role for role, local in processes.items() if role not in bound}
        heard = wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not heard:
            missing = ", ".join(sorted(waiting.values()))
            raise TimedOut(missing, f"did not start in {timeout:g} s", seconds=timeout)
        for pipe in heard:
            role = waiting[pipe]
            bound[role] = _receive(role, processes[role])
    return bound


def _receive(role: Role, local: LocalProcess) -> tuple[str, ...]:
    try:
        said = local.ready.recv()
    except EOFError:
        local.process.join(1)
        said = InternalError(role, f"ended with code {local.process.exitcode} at start: {local.last_words()}")
    if isinstance(said, VtlabError):
        raise said
    return tuple(said)


def _stop(processes: dict[Role, LocalProcess], grace: float = 5.0) -> None:
    """VMM first, then the levels; who does not drain in time is killed. A second Ctrl-C hurries it."""
    order = [processes[role].process for role in SERVERS if role in processes]
    try:
        for group in (order[:1], order[1:]):
            for process in group:
                process.terminate()
            deadline = time.monotonic() + grace
            for process in group:
                process.join(max(deadline - time.monotonic(), 0))
    finally:
        for process in order:
            if process.is_alive():
                process.kill()
            process.join()
        for local in processes.values():
            local.ready.close()


@contextlib.contextmanager
def _private_directory(directory: Path | str | None) -> Iterator[Path]:
    base = Path(directory) if directory is not None else _roomy_base()
    sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # 0700
    try:
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            with removed_at_the_end(folder):
                yield folder
        finally:
            os.close(descriptor)
    finally:
        remove_folder(folder)


@contextlib.contextmanager
def _socket_directory(folder: Path) -> Iterator[Path]:
    """The folder itself, or a private one elsewhere if its path is too long for the address of a Unix socket."""
    if all(len(os.fsencode(folder / name)) <= SOCKET_PATH_LIMIT for name in SOCKETS):
        yield folder
        return
    with _private_directory(SHORT_BASE) as short:
        yield short


def _roomy_base() -> Path:
    try:
        status = os.statvfs(SHARED_MEMORY)
        if status.f_bavail * status.f_frsize >= ROOM_WANTED and os.access(SHARED_MEMORY, os.W_OK):
            return SHARED_MEMORY
    except OSError:
        pass
    return Path(tempfile.gettempdir())


def sweep(base: Path, age: float = 60.0) -> list[Path]:
    """Removes folders of laboratories that died with all their processes; returns them.

    A living one holds the lock in its folder. One that was made a moment ago may not hold it yet, so it is left alone.
    """
    removed = []
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < age:
                continue
            descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return removed
