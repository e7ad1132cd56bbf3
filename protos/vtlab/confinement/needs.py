"""Which files and ports each role needs, from what a server is told (vtlab.channels.ServerConfig)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vtlab.channels import ServerConfig
from vtlab.confinement.landlock import Access
from vtlab.ram import MACHINES, Store, store_folder
from vtlab.trust.certificates import own_part
from vtlab.trust.roles import Role

_READ = Access.READ_FILE | Access.READ_DIR
_USE = Access.READ_FILE | Access.WRITE_FILE
_OWN = (
    _READ
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.MAKE_REG
    | Access.MAKE_DIR
    | Access.MAKE_SYM
    | Access.MAKE_SOCK
    | Access.REMOVE_FILE
    | Access.REMOVE_DIR
    | Access.REFER
)

# Where libraries, and what the C library asks for names and times, are found.
_SYSTEM = (
    "/usr/lib", "/lib", "/lib64", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
    "/etc/localtime", "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/sys/devices/system/cpu", "/dev/urandom",
)  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """What a server may use.

    Attributes:
        files: file or folder -> rights.
        bind, connect: TCP ports.
        code: folders that Python code is loaded from.
        notes: where it can do more than its role should, and why.
    """

    files: dict[Path, Access]
    bind: tuple[int, ...]
    connect: tuple[int, ...]
    code: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def tcp(self) -> bool:
        return bool(self.bind or self.connect)


def needs(config: ServerConfig, modules: Iterable[str] = ()) -> Needs:
    """Args: modules: top-level packages that this process loads beyond those of the three roles."""
    role = Role(config.role)
    code = tuple(_code({"vtlab", "vmm", "vtl0_guest", "vtl1_monitor", *modules}))
    files: dict[Path, Access] = {}
    notes: list[str] = []

    def allow(path: Path, access: Access) -> None:
        files[path] = files.get(path, Access(0)) | access

    for path in (*code, *map(Path, _SYSTEM), own_part(config.trust, role), Path("/proc/self")):
        allow(path, _READ)
    allow(Path("/dev/null"), _USE)
    for address in config.listen:
        if address.startswith("unix:"):
            # The guest process can remove nothing: what a former life left is gone before (vtlab.confinement.confine).
            remove = Access(0) if role is Role.GUEST else Access.REMOVE_FILE
            allow(Path(address.removeprefix("unix:")).parent, Access.MAKE_SOCK | remove)
    if role is not Role.GUEST:
        allow(config.state, _OWN)
    if role is not Role.VMM:
        for path, access in _memory(config.memory, role):
            allow(path, access)
        if not store_folder(config.memory, Store.SEALED).is_dir():
            allow(config.memory, _USE | _READ)
            if config.memory.is_dir() and config.memory.stat().st_uid == os.geteuid():
                notes.append(
                    f"{config.memory} holds no folder a right, and is of the same user: nothing tells its files apart"
                )
    folder, collector = _traces(config.traces, role)
    if folder is not None:
        allow(folder, Access.MAKE_REG | Access.WRITE_FILE)
    reached = (config.guest, config.monitor, collector)
    if config.rules:  # code of the user's own, which may read what the user may
        allow(Path("/"), _READ)
    return Needs(files, _ports((*config.listen, config.metrics)), _ports(reached), code, tuple(notes))


def _memory(memory: Path, role: Role) -> Iterator[tuple[Path, Access]]:
    yield memory / MACHINES, _READ
    yield store_folder(memory, Store.WRITABLE), _USE
    yield store_folder(memory, Store.SEALED), Access.READ_FILE if role is Role.GUEST else _USE
    if role is not Role.GUEST:
        yield store_folder(memory, Store.PRIVATE), _USE


def _code(packages: Iterable[str]) -> Iterator[Path]:
    """Folders of the interpreter, of what is installed for it, and of those packages; not what else is on sys.path."""
    prefixes = {Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)}
    yield from (prefix / "lib" for prefix in prefixes)
    for entry in map(Path, filter(None, sys.path)):
        if entry.name in ("site-packages", "dist-packages") or any(
            entry.is_relative_to(one / "lib") for one in prefixes
        ):
            yield entry
    for name in packages:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield from (Path(os.path.realpath(path)) for path in getattr(module, "__path__", ()))


def _traces(where: str, role: Role) -> tuple[Path | None, str]:
    """The folder that spans are written to, or HOST:PORT of who collects them (ServerConfig.traces)."""
    if "://" not in where:
        path = Path(where)
        return (path if path.is_dir() else path.parent) if where else None, ""
    if role is Role.GUEST:  # it gets no network for that: its part of a trace is missing
        return None, ""
    parts = urlsplit(where)
    return None, f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _ports(addresses: Iterable[str]) -> tuple[int, ...]:
    return tuple(int(one.rpartition(":")[2]) for one in addresses if one and not one.startswith("unix:"))
