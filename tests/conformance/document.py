"""docs/conformance.md, from the rows. `python -m vtlab_conformance.document > docs/conformance.md` writes it anew."""

from __future__ import annotations

import sys

from vtlab.hyperv.status import HvStatus
from vtlab_conformance.report import call_name
from vtlab_conformance.scenarios import SCENARIOS
from vtlab_conformance.steps import NO_VECTOR, Row, Run
from vtlab_conformance.unreachable import UNREACHABLE

_PROFILES = ("tlfs", "openvmm", "kvm")
_INTRODUCTION = """\
# VSM conformance

`vtlab conformance` runs the rules of virtual secure mode as rows: a hypercall, an instruction or an interrupt of a
level, and the status, exception, message or state that it must give. Machine code of a guest does it; what counts is
what that guest saw.

```
vtlab conformance                           # every profile; exit code 0 if all rows came out as they must, else 1
vtlab conformance --profile openvmm --json  # one JSON value a row, then the summary
vtlab conformance --junit report.xml        # for CI
```

The rows are data in `tests/conformance/rows`. `tests/conformance/image.py` compiles them into a table; the guest of
`vtl0_guest/kernels/conformance` interprets it, at VTL0 and at the VTL1 that it brings. Rows of one boot build on one
another; the boots are in `tests/conformance/scenarios.py`.

## On another hypervisor

`vtlab conformance --profile kvm --image-only FOLDER` writes each boot as a multiboot 1 image. It needs two vCPUs,
32 MiB, a 16550 at 0x3F8 and, to end by itself, isa-debug-exit at 0xF4 (it writes 0, or 1 if a row failed). For
instance:

```
qemu-system-x86_64 -accel kvm -cpu host,hv-passthrough -smp 2 -m 32 -kernel kvm-vtl1.multiboot -display none \\
  -serial file:vtl1.log -device isa-debug-exit,iobase=0xf4,iosize=4 -device hyperv-testdev
vtlab conformance --profile kvm --judge vtl1.log --judge protection.log
```

On COM1 each row is a line, `ROW name ok` or `ROW name FAIL step 0x1 vtl 0x1 vp 0x0: result want 0x50 got 0x0`; the last
line is `SUMMARY rows 0x7b failed 0x1`. A row without a line has failed. The boot `without-vsm` is for a partition
without AccessVSM. Rows of HvCallPostMessage and HvCallSignalEvent use the connections of hyperv-testdev.

The profiles are told in [vsm-profiles.md](vsm-profiles.md). Sources: TLFS is Microsoft's specification, openvmm its
open-source front end, KUT the public unit test of the KVM work, Linux what its VTL1 expects.
"""


def _expectation(row: Row) -> str:
    """What the row expects, without what it sees in memory: statuses, exceptions."""
    found = dict.fromkeys(
        f"{call_name(step.code)} {HvStatus(step.status).name}" if step.code is not None else f"vector {step.vector:#x}"
        for step in row.steps
        if isinstance(step, Run) and (step.code is not None or step.vector != NO_VECTOR)
    )
    return "<br>".join(found) or "state"


def _by_profile(rows: list[Row]) -> str:
    answers = [_expectation(row) for row in rows]
    if len(set(answers)) == 1:
        return answers[0]
    return "<br>".join(f"{name}: {answer}" for name, answer in zip(_PROFILES, answers, strict=True))


def _callers(row: Row) -> str:
    levels = sorted({(step.vp, step.vtl) for step in row.steps if isinstance(step, Run)})
    return ", ".join(f"VTL{vtl}" + (f" of VP {vp}" if vp else "") for vp, vtl in levels)


def page() -> str:
    """The whole page."""
    lines = [_INTRODUCTION, "## Pairs of hypercall and status that no row reaches\n"]
    lines += ["| hypercall | status | profiles | why |", "| --- | --- | --- | --- |"]
    for item in UNREACHABLE:
        name, status = call_name(item.code), f"{item.status.name} ({item.status:#x})"
        lines.append(f"| {name} | {status} | {', '.join(item.profiles)} | {item.reason} |")
    sections: dict[str, list[str]] = {}
    for scenario in SCENARIOS:
        for rows in zip(*(scenario.rows(profile) for profile in _PROFILES), strict=True):
            row = rows[0]
            cells = (f"`{row.name}`", row.rule, _callers(row), _by_profile(list(rows)), row.source)
            sections.setdefault(row.section, []).append(f"| {' | '.join(cells)} |")
    for section in sorted(sections):
        lines += [
            "",
            f"## {section}",
            "",
            "| row | rule | runs at | expects | source |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += sections[section]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
