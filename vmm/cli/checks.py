"""What `vtlab doctor` looks at. Each check returns a finding and changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vtlab.errors import VtlabError

SHARED_MEMORY_WANTED = 256 << 20  # bytes
# OUT 0xF4, AL with AL = 0x2A, in real mode: the smallest guest that tells that it ran
TINY_GUEST = bytes.fromhex("b02a e6f4 fa f4")
TINY_GUEST_VALUE = 0x2A
START_WANTED = 2.0  # seconds from nothing to the guest's first instruction


class Level(Enum):
    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the check.
        level: FAILURE if a laboratory cannot work.
        detail: what was found.
        fix: what to do; empty if nothing.
    """

    name: str
    level: Level
    detail: str
    fix: str = ""


def python() -> Finding:
    """pip and `make setup` have refused a Python that is too old; here is what else may differ."""
    found = (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return Finding("python", Level.WARNING, f"{found}; only Linux on x86_64 is tested")
    return Finding("python", Level.OK, found)


def packages() -> Finding:
    """Versions against what the package itself requires."""
    try:
        requirements = importlib.metadata.requires("vtlab") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", Level.FAILURE, "vtlab is not installed", "pip install -e .")
    problems, count = [], 0
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        count += 1
        problem = _package_problem(requirement)
        if problem:
            problems.append(problem)
    if problems:
        return Finding("packages", Level.FAILURE, "; ".join(problems), "make setup, or pip install -e . again")
    return Finding("packages", Level.OK, f"{count} requirements met, unicorn {importlib.metadata.version('unicorn')}")


def _package_problem(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    name = match[0] if match else requirement
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is missing"
    for operator, bound in re.findall(r"(>=|==|<)\s*([\d.]+)", requirement):
        have, want = _release(version), _release(bound)
        met = {">=": have >= want, "==": have == want, "<": have < want}[operator]
        if not met:
            return f"{name} is {version}, not {operator}{bound}"
    return ""


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    return tuple(numbers + [0] * (4 - len(numbers)))


def operations() -> Finding:
    """What `--metrics` and `--traces` need, which a laboratory does not."""
    wanted = {"metrics": "prometheus-client", "traces": "opentelemetry-sdk"}
    missing = [extra for extra, package in wanted.items() if _package_problem(package)]
    if missing:
        return Finding(
            "operations", Level.OK, f"no {' and no '.join(missing)}: pip install 'vtlab[{','.join(missing)}]'"
        )
    return Finding("operations", Level.OK, "metrics and traces can be had")


def cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Finding(
            "cores", Level.WARNING, "1", "two or more let the guest and its monitor wait less for one another"
        )
    return Finding("cores", Level.OK, str(count))


def shared_memory() -> Finding:
    from vmm.launcher import SHARED_MEMORY

    fix = "guest RAM then lies on disk; give /dev/shm more room (docker run --shm-size=1g)"
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return Finding("shared memory", Level.WARNING, f"{SHARED_MEMORY} is missing", fix)
    free = status.f_bavail * status.f_frsize
    level = Level.OK if free >= SHARED_MEMORY_WANTED and os.access(SHARED_MEMORY, os.W_OK) else Level.WARNING
    return Finding(
        "shared memory", level, f"{free >> 20} MiB free in {SHARED_MEMORY}", fix if level is not Level.OK else ""
    )


def sockets() -> Finding:
    """A Unix socket and a loopback port can be bound."""
    try:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as local:
            local.bind(f"{folder}/s")
        with socket.socket(socket.AF_INET) as loopback:
            loopback.bind(("127.0.0.1", 0))
    except OSError as error:
        return Finding("sockets", Level.FAILURE, str(error), "allow Unix sockets and 127.0.0.1 in this sandbox")
    return Finding("sockets", Level.OK, "Unix sockets and loopback ports")


def trust() -> Finding:
    """Keys can be made, and the folder of the runtime file is private."""
    from vtlab.client.runtime import published, runtime_file
    from vtlab.trust.certificates import ensure_trust

    folder = runtime_file().parent
    try:
        with tempfile.TemporaryDirectory() as temporary:
            ensure_trust(Path(temporary) / "trust")
        if folder.exists() and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077):
            return Finding("trust", Level.FAILURE, f"{folder} is open to others", f"chmod 700 {folder}")
    except OSError as error:
        return Finding("trust", Level.FAILURE, f"cannot make keys: {error}", "set TMPDIR to a folder of yours")
    running = published()
    where = f"a laboratory runs at {running.vmm}" if running else "no laboratory runs"
    return Finding("trust", Level.OK, f"keys can be made; {where}")


def confinement() -> Finding:
    """What this kernel has to keep the three processes apart, and whether it is used."""
    from vtlab.confinement import bpf, landlock
    from vtlab.confinement.confine import LANDLOCK_WANTED, VARIABLE, Mode, mode

    fix = f"a kernel from 6.12 on with `landlock` in lsm=, or deploy/compose.yaml; {VARIABLE}=required accepts no less"
    try:
        wanted = mode()
    except VtlabError as error:
        return Finding("confinement", Level.FAILURE, str(error), f"unset {VARIABLE}")
    if wanted is Mode.OFF:
        return Finding("confinement", Level.WARNING, f"{VARIABLE}=off: none", f"unset {VARIABLE}, but for a debugger")
    version, filters = landlock.abi(), bpf.available()
    detail = f"Landlock {version} ({', '.join(landlock.kept(version))})" if version else "no Landlock"
    detail += f", {'seccomp' if filters else 'no seccomp'}; the three processes have one uid, "
    detail += "and Landlock tells their files apart" if version else "and nothing tells their files apart"
    if version >= LANDLOCK_WANTED and filters:
        return Finding("confinement", Level.OK, detail)
    # A laboratory works without; one that must not is told so by the variable.
    level = Level.FAILURE if wanted is Mode.REQUIRED else Level.WARNING
    return Finding("confinement", level, detail, fix)


def tiny_guest() -> Finding:
    """Three processes start and VTL0 executes: this tries the core, the nested tables and every channel."""
    from vmm.launcher import launch
    from vtlab.v1 import vcpu_pb2, vmm_pb2

    begin = time.monotonic()
    try:
        with launch() as lab:
            machine = lab.create(
                TINY_GUEST,
                ram=2 << 20,
                image_format=vcpu_pb2.IMAGE_FORMAT_FLAT,
                load_address=0x7C00,
                entry=0x7C00,
                start_mode=vcpu_pb2.START_MODE_REAL,
            )
            with machine:
                machine.start()
                value = machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=30).debug_exit
                took = time.monotonic() - begin
    except VtlabError as error:
        return Finding(
            "guest", Level.FAILURE, str(error), "see the checks above; VTLAB_DEBUG=1 shows the processes' logs"
        )
    if value != TINY_GUEST_VALUE:
        return Finding("guest", Level.FAILURE, f"it left {value:#x} instead of {TINY_GUEST_VALUE:#x}")
    level = Level.OK if took <= START_WANTED else Level.WARNING
    return Finding("guest", level, f"three processes started and a guest ran to its end in {took:.2f} s")


ALL: tuple[Callable[[], Finding], ...] = (
    python,
    packages,
    operations,
    cores,
    shared_memory,
    sockets,
    trust,
    confinement,
    tiny_guest,
)
