"""How long the kernel takes here, guarded and not, and under QEMU's TCG: the same images, in turns, in one run.

    python -m tests.integration.linux.compare [ROUNDS] [--processors N…]

Each round boots three times for each number of vCPUs, to the reboot that ends the script of init.sh; its figures are
wall-clock seconds and, in brackets, the CPU seconds of all processes that take part. What is said in the end are the
medians of the ratios within a round. A machine that does other work too disturbs CPU time less.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.integration.linux.images import Images, find
from vmm.launcher import launch
from vtlab.client import Lab
from vtlab.v1 import vmm_pb2

RAM = 256 << 20
LINE = "console=ttyS0 LOOP=20000"
POLICY = Path(__file__).parents[3] / "deploy" / "policies" / "linux.yaml"
_PATIENCE = 300
_QEMU_PATIENCE = 45
_NAMES = ("open", "guarded", "QEMU")


class Taken(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def _cpu() -> float:
    """CPU seconds of this process, of its children, and of those that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, …; utime and stime are the 12th and 13th.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + sum(os.times()[:4])


def ours(lab: Lab, images: Images, processors: int, guarded: bool) -> None:
    """From start to stop; a guarded one is guarded as soon as its user space speaks."""
    with lab.create(
        images.kernel,
        ram=RAM,
        vp_count=processors,
        command_line=LINE,
        modules=[images.initrd],
        stop_on_reset=True,
    ) as machine:
        if guarded:
            lab.policy.set(machine, POLICY.read_text(), POLICY.name)
        machine.start()
        machine.wait_serial("init: started", timeout=_PATIENCE)
        if guarded:
            machine.guard()
        machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=_PATIENCE)


def qemu(images: Images, processors: int) -> None:
    """The same under QEMU."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", str(RAM >> 20), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-smp", str(processors)),
        *("-serial", "stdio", "-kernel", str(images.kernel), "-initrd", str(images.initrd), "-append", LINE),
    ]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=_QEMU_PATIENCE)


def timed(action: Callable[[], None]) -> Taken:
    """Of one boot. QEMU's now and then never ends: that is said, and it begins anew. Ours raises TimedOut."""
    while True:
        began, before = time.monotonic(), _cpu()
        try:
            action()
        except subprocess.TimeoutExpired as hung:
            sys.stdout.write(f"QEMU did not end within {hung.timeout:g} s: again\n")
        else:
            return Taken(time.monotonic() - began, _cpu() - before)


def main(rounds: int, processors: Sequence[int]) -> None:
    images = find()
    if images is None or shutil.which("qemu-system-x86_64") is None:
        sys.exit("needs the images of 'make linux' and qemu-system-x86_64")
    rows: dict[int, list[list[Taken]]] = {count: [] for count in processors}
    with launch() as lab:
        for number in range(rounds):
            for count in processors:
                row = _round(lab, images, count, number)
                rows[count].append(row)
                figures = (f"{name} {one.wall:6.2f} s [{one.cpu:5.2f}]" for name, one in zip(_NAMES, row, strict=True))
                load = " ".join(f"{value:.1f}" for value in os.getloadavg())
                sys.stdout.write(f"{count} vCPU   " + "   ".join(figures) + f"   load {load}\n")
                sys.stdout.flush()
    for count, (above, below) in itertools.product(processors, ((0, 2), (1, 2), (1, 0))):
        wall, cpu = (statistics.median(row[above][kind] / row[below][kind] for row in rows[count]) for kind in (0, 1))
        sys.stdout.write(f"{count} vCPU: {_NAMES[above]} / {_NAMES[below]}: {wall:.2f} [{cpu:.2f}]\n")


def _round(lab: Lab, images: Images, processors: int, number: int) -> list[Taken]:
    kinds = (
        partial(ours, lab, images, processors, False),
        partial(ours, lab, images, processors, True),
        partial(qemu, images, processors),
    )
    row = [Taken(0, 0)] * 3
    for step in range(3):
        which = (number + step) % 3  # nobody is always first
        row[which] = timed(kinds[which])
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.integration.linux.compare")
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--processors", nargs="+", type=int, default=[1])
    given = parser.parse_args()
    main(given.rounds, given.processors)
