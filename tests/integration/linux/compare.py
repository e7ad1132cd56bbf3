"""How long the kernel takes here, guarded and not, and under QEMU's TCG: the same images, in turns, in one run.

    python -m tests.integration.linux.compare [ROUNDS]

Each round boots three times to the reboot that ends the script of init.sh; its figures are wall-clock seconds. What is
said in the end are the medians, and the medians of the ratios within a round, which a loaded machine disturbs less.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.integration.linux.images import Images, find
from vmm.launcher import launch
from vtlab.client import Lab
from vtlab.v1 import vmm_pb2

RAM = 256 << 20
LINE = "console=ttyS0 LOOP=20000"
POLICY = Path(__file__).parents[3] / "deploy" / "policies" / "linux.yaml"
_PATIENCE = 300


def ours(lab: Lab, images: Images, guarded: bool) -> float:
    """Seconds from start to stop; a guarded one is guarded as soon as its user space speaks."""
    with lab.create(images.kernel, ram=RAM, command_line=LINE, modules=[images.initrd], stop_on_reset=True) as machine:
        if guarded:
            lab.policy.set(machine, POLICY.read_text(), POLICY.name)
        began = time.monotonic()
        machine.start()
        machine.wait_serial("init: started", timeout=_PATIENCE)
        if guarded:
            machine.guard()
        machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=_PATIENCE)
        return time.monotonic() - began


def qemu(images: Images) -> float:
    """The same under QEMU."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", str(RAM >> 20), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-kernel", str(images.kernel), "-initrd", str(images.initrd), "-append", LINE),
    ]
    began = time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=_PATIENCE)
    return time.monotonic() - began


def main(rounds: int) -> None:
    images = find()
    if images is None or shutil.which("qemu-system-x86_64") is None:
        sys.exit("needs the images of 'make linux' and qemu-system-x86_64")
    rows = []
    with launch() as lab:
        for number in range(rounds):
            kinds = [lambda: ours(lab, images, False), lambda: ours(lab, images, True), lambda: qemu(images)]
            times = [0.0, 0.0, 0.0]
            for step in range(3):
                which = (number + step) % 3  # nobody is always first
                times[which] = kinds[which]()
            rows.append(times)
            sys.stdout.write("open {:6.2f} s   guarded {:6.2f} s   QEMU {:6.2f} s\n".format(*times))
            sys.stdout.flush()
    medians = [statistics.median(row[column] for row in rows) for column in range(3)]
    sys.stdout.write("medians {:.2f}, {:.2f}, {:.2f} s\n".format(*medians))
    for name, above, below in (("open / QEMU", 0, 2), ("guarded / QEMU", 1, 2), ("guarded / open", 1, 0)):
        ratio = statistics.median(row[above] / row[below] for row in rows)
        sys.stdout.write(f"{name}: {ratio:.2f}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
