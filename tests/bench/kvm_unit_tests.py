"""The public kvm-unit-tests (x86) here and under QEMU's TCG: what each image reports, and how long it takes.

    python -m tests.bench.kvm_unit_tests FOLDER [FOLDER…] [--rounds N] [--only NAME…] [--json FILE] [--markdown FILE]

A FOLDER is a built tree of the suite; its x86/unittests.cfg says how each image is started. Each image runs on both
sides, one right after the other, so that what else the machine does meets both. QEMU gets no Hyper-V features, which
TCG refuses. Beside the wall time stands the CPU time of all processes that take part, which other work disturbs less.
With --shared one laboratory serves all images, as `vtlab up` would; else each has three processes of its own.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmm.launcher import LocalLab, launch

OURS, QEMU = "ours", "qemu"
RUNNER = shlex.split(
    "--no-reboot -nodefaults -device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=0x4 "
    "-vnc none -serial stdio -machine accel=tcg"
)
OVER_TIME, REFUSED = 124, -1
MEANINGS = {
    0: "ended without a verdict",
    1: "pass",
    3: "fail",
    77: "skip",
    OVER_TIME: "over time",
    REFUSED: "refused",
    127: "aborted",
}
# Images that make no sense here, by the prefix of their file's name: why.
LEFT_OUT = {
    "svm": "hardware virtualisation",
    "vmx": "hardware virtualisation",
    "pmu": "performance counters of the host",
    "vmware_backdoors": "needs KVM's emulation of another hypervisor's ports",
    "intel-iommu": "needs an IOMMU",
}
LIMIT = 90.0  # seconds, as the suite's runner has it
PATIENCE = 60.0  # seconds for one that is over time to end


@dataclass(frozen=True)
class Case:
    """One section of unittests.cfg."""

    name: str
    image: Path
    processors: str
    options: tuple[str, ...]


@dataclass
class Result:
    """Of one image on one side. `wall` and `cpu` have a figure for each round, in seconds."""

    code: int
    passed: int
    failed: int
    skipped: int
    failures: list[str]
    wall: list[float]
    cpu: list[float]

    def __str__(self) -> str:
        return f"{MEANINGS.get(self.code, f'code {self.code}')} {self.passed}/{self.failed}/{self.skipped}"


def cases(folders: Sequence[Path]) -> Iterator[Case]:
    """What is to be run; of sections with the same name the first counts."""
    seen: set[str] = set()
    for folder in folders:
        config = configparser.ConfigParser(interpolation=None, strict=False)
        config.read(folder / "x86" / "unittests.cfg")
        for name in config.sections():
            section = config[name]
            image = folder / "x86" / section.get("file", "")
            left_out = image.name.startswith(tuple(LEFT_OUT)) or section.get("arch") == "i386"
            if name in seen or left_out or not image.is_file() or "nodefault" in section.get("groups", ""):
                continue
            seen.add(name)
            options = section.get("extra_params", "").replace("`date +%s`", str(int(time.time())))
            yield Case(name, image, section.get("smp", "1"), tuple(shlex.split(options)))


def _cpu(lab: LocalLab | None) -> float:
    """CPU seconds of all children that have ended, and of a laboratory's processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for pid in lab.pids.values() if lab is not None else ():
        # After the name, which may hold anything: state, parent, …; utime and stime are the 12th and 13th.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return used.ru_utime + used.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def _for_tcg(options: Sequence[str]) -> list[str]:
    """The options without what QEMU's TCG has not."""
    kept = [",".join(w for w in option.split(",") if not w.startswith(("hv_", "hv-"))) for option in options]
    return ["max" if option == "host" else option for option in kept if option != "-enable-kvm"]


@dataclass(frozen=True)
class Setting:
    """What is the same for all images: seconds that one may take, the runner's file of variables, where logs go."""

    limit: float
    environment: Path
    logs: Path | None
    lab: LocalLab | None

    def variables(self) -> dict[str, str]:
        if self.lab is None:
            return dict(os.environ)
        where = self.lab.addresses
        return os.environ | {
            "VTLAB_VMM": where.vmm,
            "VTLAB_MONITOR": where.monitor,
            "VTLAB_TRUST": str(where.trust),
        }


def run(side: str, case: Case, setting: Setting) -> Result:
    """One image, once."""
    program = [sys.executable, "-m", "vmm.cli.qemu"] if side == OURS else ["qemu-system-x86_64"]
    options = list(case.options) if side == OURS else _for_tcg(case.options)
    command = [*program, *RUNNER, "-kernel", str(case.image), "-smp", case.processors, *options]
    began, before = time.monotonic(), _cpu(setting.lab)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, "-initrd", str(setting.environment)],
            env=setting.variables(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(setting.limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            process.wait()
            code = OVER_TIME
        wall, cpu = time.monotonic() - began, _cpu(setting.lab) - before
        output.seek(0)
        text = output.read().decode(errors="replace").replace("\r", "")
    if setting.logs is not None:
        (setting.logs / f"{case.name}.{side}").write_text(f"{shlex.join(command)}\n{text}")
    lines = text.splitlines()
    if code == 1 and any(line.startswith("vtlab: ") and "warning" not in line for line in lines):
        code = REFUSED  # an option that is not there; success of the guest is 1, too
    count = Counter(line.partition(":")[0] for line in lines)
    failures = [line for line in lines if line.startswith("FAIL")]
    return Result(code, count["PASS"], count["FAIL"], count["SKIP"], failures, [wall], [cpu])


def markdown(rows: dict[str, dict[str, Result]], load: str) -> str:
    """The table, with the totals of the wall time."""
    lines = [
        "| image | ours (pass/fail/skip) | QEMU TCG (pass/fail/skip) | ours s | TCG s | ratio | CPU s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        lines.append(_line(name, str(row[OURS]), str(row[QEMU]), [row]))
    lines.append(_line("all", "", "", rows.values()))
    both = [row for row in rows.values() if row[OURS].code == row[QEMU].code != OVER_TIME]
    if both:
        lines.append(_line(f"the {len(both)} that end alike", "", "", both))
    return "\n".join([*lines, "", f"Load averages before and after: {load}.", ""])


def _line(name: str, ours: str, qemu: str, rows: Iterable[dict[str, Result]]) -> str:
    """One line of the table, with the sums over some images."""
    rows = list(rows)
    wall = [sum(statistics.median(row[side].wall) for row in rows) for side in (OURS, QEMU)]
    cpu = [sum(statistics.median(row[side].cpu) for row in rows) for side in (OURS, QEMU)]
    figures = f"{wall[0]:.2f} | {wall[1]:.2f} | {wall[0] / wall[1]:.2f} | {cpu[0]:.2f}, {cpu[1]:.2f}"
    return f"| {name} | {ours} | {qemu} | {figures} |"


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kvm_unit_tests", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shared", action="store_true", help="one laboratory for all images")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections of unittests.cfg")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="sections to leave out")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that one image may take")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each image printed")
    arguments = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        sys.exit("qemu-system-x86_64 is not installed")
    chosen = [
        case
        for case in cases(arguments.folders)
        if case.name not in arguments.skip and (not arguments.only or case.name in arguments.only)
    ]
    if not chosen:
        sys.exit(f"{arguments.folders[0]}: nothing to run: build the suite there (./configure && make)")
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Result]] = {}
    load = _load()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vtlab-kut-"))
        environment = Path(folder) / "environment"
        environment.write_text("QEMU_ACCEL=tcg\nERRATA_FORCE=y\n")
        lab = stack.enter_context(launch()) if arguments.shared else None
        setting = Setting(arguments.limit, environment, arguments.logs, lab)
        for _ in range(arguments.rounds):
            for case in chosen:
                for side in (OURS, QEMU):
                    one = run(side, case, setting)
                    before = rows.setdefault(case.name, {}).get(side)
                    if before is not None:
                        one.wall, one.cpu = before.wall + one.wall, before.cpu + one.cpu
                    rows[case.name][side] = one
                ours, qemu = rows[case.name][OURS], rows[case.name][QEMU]
                print(f"{case.name:28} {ours!s:28} {ours.wall[-1]:7.2f}   {qemu!s:28} {qemu.wall[-1]:7.2f}", flush=True)
    table = markdown(rows, f"{load}; {_load()}")
    if arguments.markdown:
        arguments.markdown.write_text(table)
    if arguments.json:
        document = {name: {side: asdict(one) for side, one in row.items()} for name, row in rows.items()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
