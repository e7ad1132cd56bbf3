"""Bodies of `vtlab demo` and `vtlab attack`: real attacks on a real guest, judged by the machine's state.

The attacks are vtlab_attacks'; how they are told is vmm.cli.telling's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from vmm.cli.output import print_json, print_table
from vmm.cli.telling import ConsoleTeller, JsonTeller, Teller
from vmm.launcher import LocalLab
from vtlab.client import Lab
from vtlab.errors import BadArgument
from vtlab_attacks.campaign import DESIGN, Result, Summary, run_all
from vtlab_attacks.evidence import Attack, Control
from vtlab_attacks.guest import boot
from vtlab_attacks.table import ATTACKS, CONTROLS


def demo(lab: Lab, as_json: bool = False, design: str = DESIGN) -> int:
    """Three processes, VTL1 coming to life, every attack without and with it, every control with it.

    Args:
        design: what the guest protects itself with; if not VTL1, the figures are what they are.

    Returns:
        0 if each attack was blocked, each control kept, and each attack that is possible without VTL1 was real there.
        For other designs than vtl, 0 if each attack left evidence.
    """
    started = time.monotonic()
    teller: Teller = JsonTeller() if as_json else ConsoleTeller()
    teller.processes(lab.pids if isinstance(lab, LocalLab) else {})
    with boot(lab, protected=True, design=design) as guest:
        teller.boot_log(guest.machine.serial(0).splitlines(), design)
        if design == DESIGN:
            teller.policy(lab.policy.get(guest.machine))
    summary = Summary(design=design)
    for result in _run(lab, teller, ATTACKS, CONTROLS, design):
        summary = summary.add(result)
    teller.summary(summary, time.monotonic() - started)
    return 0 if summary.passed else 1


def attack(lab: Lab, names: Sequence[str], as_json: bool = False, design: str = DESIGN) -> int:
    """Attacks by name, without VTL1 and with it, and controls with it; 0 if each came out as it must.

    Raises:
        BadArgument: an unknown name.
    """
    teller: Teller = JsonTeller() if as_json else ConsoleTeller()
    entries = select(names)
    attacks = [entry for entry in entries if isinstance(entry, Attack)]
    controls = [entry for entry in entries if isinstance(entry, Control)]
    return 0 if all(result.as_expected for result in _run(lab, teller, attacks, controls, design)) else 1


def _run(lab: Lab, teller: Teller, attacks: Sequence[Attack], controls: Sequence[Control], design: str) -> list[Result]:
    done: list[Result] = []
    teller.begin(len(attacks) + len(controls))
    try:
        for results in run_all(lab, attacks, controls, design=design):
            teller.results(results)
            done += results
    finally:
        teller.end()
    return done


def select(names: Sequence[str]) -> list[Attack | Control]:
    """Attacks and controls by name. Raises BadArgument for an unknown one."""
    known: dict[str, Attack | Control] = {entry.name: entry for entry in [*ATTACKS, *CONTROLS]}
    for name in names:
        if name not in known:
            raise BadArgument(f"attack {name!r}", f"is none of {', '.join(known)}")
    return [known[name] for name in names]


def list_attacks(as_json: bool = False) -> int:
    """What `vtlab attack` can run."""
    rows = [[entry.name, entry.sentence, entry.source] for entry in ATTACKS]
    rows += [[control.name, control.sentence, "legitimate"] for control in CONTROLS]
    if as_json:
        for name, sentence, source in rows:
            print_json({"name": name, "sentence": sentence, "source": source})
    else:
        print_table("", ["name", "what it does", "described by"], rows)
    return 0
