"""Gives up, once and for good, what a server's role does not need; to be called before it makes a thread.

VTLAB_CONFINEMENT says how strictly: unset, what this kernel has is used and what is missing is reported; `required`, a
process that cannot be confined wholly does not serve; `off`, nothing is given up, for debuggers.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vtlab.channels import ServerConfig
from vtlab.confinement import bpf, landlock, privileges
from vtlab.confinement.calls import allowed_calls
from vtlab.confinement.needs import Needs, needs
from vtlab.errors import BadArgument, Unsupported
from vtlab.trust.roles import Role

VARIABLE = "VTLAB_CONFINEMENT"
# The first Landlock that keeps files, their truncation, TCP ports and signals.
LANDLOCK_WANTED = 6


class Mode(StrEnum):
    """Values of VTLAB_CONFINEMENT."""

    AVAILABLE = ""
    REQUIRED = "required"
    OFF = "off"


@dataclass(frozen=True)
class Confinement:
    """What holds.

    Attributes:
        landlock: its version; 0 where none holds.
        seccomp: whether a filter holds.
        missing: what does not hold, and why.
    """

    landlock: int
    seccomp: bool
    missing: tuple[str, ...]


def mode() -> Mode:
    """Raises BadArgument for a value that is none."""
    given = os.environ.get(VARIABLE, "")
    try:
        return Mode(given)
    except ValueError:
        raise BadArgument(VARIABLE, f"{given!r} is neither empty nor 'required' nor 'off'") from None


def confine(config: ServerConfig, modules: Iterable[str] = (), keep: Iterable[int] = ()) -> Confinement | None:
    """Confines this process to its role.

    Args:
        modules: packages that it loads beyond those of the three roles.
        keep: inherited descriptors that it uses.

    Returns:
        What holds; None where it is switched off.

    Raises:
        BadArgument: VTLAB_CONFINEMENT has no meaning.
        Unsupported: it is required, and something is missing.
    """
    wanted = mode()
    if wanted is Mode.OFF:
        return None
    role, what = Role(config.role), needs(config, modules)
    _remove_sockets(config.listen)
    missing = list(what.notes)
    privileges.close_inherited(keep)
    if role is Role.GUEST:
        privileges.forget_environment()
        privileges.limit_files()
    if not privileges.give_up_capabilities(what.code):
        missing.append("capabilities are kept: without them root cannot read this installation")
    privileges.no_new_privileges()
    version = _try(missing, "Landlock", lambda: _landlock(what))
    if 0 < version < LANDLOCK_WANTED:
        missing.append(f"Landlock {version} of this kernel keeps {', '.join(landlock.kept(version))} alone")
    privileges.stay_unseen()
    seccomp = bool(_try(missing, "seccomp", lambda: _seccomp(role, what)))
    if missing and wanted is Mode.REQUIRED:
        raise Unsupported(f"confinement of the {role}", f"{VARIABLE} requires it: {'; '.join(missing)}")
    for one in missing:
        sys.stderr.write(f"{role}: not confined: {one}\n")
    return Confinement(version, seccomp, tuple(missing))


def _try(missing: list[str], name: str, step: Callable[[], int]) -> int:
    try:
        return step()
    except OSError as error:
        missing.append(f"no {name}: {error.strerror}")
        return 0


def _landlock(what: Needs) -> int:
    threads = os.listdir("/proc/self/task")  # noqa: PTH208 - their number is all that counts
    if len(threads) > 1:
        raise OSError(0, f"{len(threads)} threads run already, which it would not bind")
    # Held open for good: a rule is about this very entry of /proc, which the kernel forgets when nobody uses it.
    os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)
    return landlock.restrict(what.files, what.bind, what.connect)


def _seccomp(role: Role, what: Needs) -> int:
    if not bpf.available():
        raise OSError(0, "this kernel takes no filter, or this processor has other numbers for its calls")
    bpf.install(bpf.assemble(allowed_calls(role, os.getpid(), what.tcp, bool(what.connect))))
    return 1


def _remove_sockets(addresses: Iterable[str]) -> None:
    """What a former life of this server left."""
    for address in addresses:
        path = Path(address.removeprefix("unix:"))
        try:
            if address.startswith("unix:") and stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        except FileNotFoundError:
            continue
