"""Is each rule of the policy needed? With one rule removed, at least one cell has to turn red: an attack succeeds, or
the guest does not start or loses something legitimate.

A rule is what can be taken out of the policy by itself: one bit of a control register, one MSR, one range of memory,
one key of a further section. What is only watched refuses nothing, so it is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import yaml

from vtlab.errors import BadArgument
from vtlab_attacks.campaign import DESIGN
from vtlab_attacks.guest import kernel_symbols
from vtlab_matrix.cells import BOOT, EVERY_ATTACK, EVERY_TRANSITION, Cell, Verdict
from vtlab_matrix.laboratory import Task
from vtlab_matrix.matrix import Runner
from vtlab_matrix.outcome import Outcome

RED = (Verdict.SUCCEEDED, Verdict.GUEST_BROKEN)
BATCH = 10  # cells that are tried together, where nothing says which would turn red
REFUSED_POLICY = "deprivileging failed: policy taken"  # by VTL1, in the guest's log
POLICY_SECTION = ".vtlab.policy"
# What the policy says about itself, and what follows a refusal: not what is refused.
NO_RULES = ("version", "name", "violation", "services", "actions")
WATCHED = "watched"
# Sections that are one rule.
WHOLE = ("page_tables", "startup")
# A rule that another one is built on goes with it, or what is left would be no policy.
BUILT_ON = {"page_tables": ("registers", "cr3"), "memory: trampoline": ("startup",)}


def shipped_policy() -> str:
    """The text that the guest kernel hands to VTL1."""
    data: bytes = kernel_symbols().sections[POLICY_SECTION].data
    return data.rstrip(b"\0").decode()


def mutations(policy: str) -> dict[str, str]:
    """Policies that lack one rule each, by the rule's name."""
    whole: dict[str, Any] = yaml.safe_load(policy)
    return {name: _without(whole, path, BUILT_ON.get(name)) for path, name in _rules(whole)}


def _rules(whole: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where each rule stands, and its name."""
    for section, content in whole.items():
        if section in NO_RULES:
            continue
        if section == "memory":
            yield from (((section, at), f"memory: {one['name']}") for at, one in enumerate(content))
        elif section in WHOLE or not isinstance(content, dict):
            yield (section,), section
        else:
            for key, rule in content.items():
                yield from _parts((section, key), f"{section}: {key}", rule)


def _parts(path: tuple[str | int, ...], name: str, rule: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """A register's rule by its bits; any other is one."""
    if rule == WATCHED:
        return
    bits = isinstance(rule, dict) and all(isinstance(one, list) for one in rule.values())
    if not bits:
        yield path, name
        return
    for kind, listed in rule.items():
        if kind != WATCHED:
            yield from (((*path, kind, at), f"{name}.{bit} {kind}") for at, bit in enumerate(listed))


def _without(whole: dict[str, Any], path: Sequence[str | int], also: Sequence[str] | None) -> str:
    left: Any = copy.deepcopy(whole)
    for one in [path, also] if also else [path]:
        place = left
        for step in one[:-1]:
            place = place[step]
        del place[one[-1]]
    return yaml.safe_dump(left, sort_keys=False)


def run_mutations(
    runner: Runner,
    patterns: Sequence[str],
    on_outcome: Callable[[Outcome], None],
    attacks: Sequence[str] = ("*",),
    policy: str = "",
) -> dict[str, list[Outcome]]:
    """Which cells turn red without which rule, by the rule's name.

    A rule's cells are tried in parts until something is red: see _parts_to_try. The parts of all rules go side by side.

    Args:
        patterns: names of rules, as of fnmatch.
        attacks: patterns of those to try.
        policy: in place of the guest's own.

    Raises:
        BadArgument: a pattern matches no rule.
    """
    text = policy or shipped_policy()
    every = mutations(text)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise BadArgument(f"--mutate {pattern}", f"matches none of {', '.join(every)}")
    chosen = {name: one for name, one in every.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    attack_cells = [
        Cell(design=DESIGN, kind="attack", name=name)
        for name in EVERY_ATTACK
        if any(fnmatchcase(name, pattern) for pattern in attacks)
    ]

    def run(tasks: Iterable[Task]) -> Iterator[Outcome]:
        for outcome in runner.run(tasks):
            on_outcome(outcome)
            yield outcome

    usual = {one.cell: one for one in run(Task(cell, text) for cell in attack_cells)}
    good = [cell for cell in attack_cells if not usual[cell].verdict.red]
    left = {name: _parts_to_try([(cell, _met(name, usual[cell])) for cell in good], name) for name in chosen}
    red: dict[str, list[Outcome]] = {name: [] for name in chosen}
    names = {mutated: name for name, mutated in chosen.items()}
    while left:
        parts = {name: next(cells, None) for name, cells in left.items()}
        for one in run(Task(cell, chosen[name]) for name, cells in parts.items() for cell in cells or ()):
            if one.verdict in RED and not _no_policy(one):
                red[names[one.policy]].append(one)
        left = {name: cells for name, cells in left.items() if parts[name] is not None and not red[name]}
    order = [BOOT, *EVERY_TRANSITION, *EVERY_ATTACK]
    return {name: sorted(cells, key=lambda one: order.index(one.cell.name)) for name, cells in red.items()}


def _parts_to_try(attacks: Sequence[tuple[Cell, bool]], name: str) -> Iterator[Sequence[Cell]]:
    """First the guest starts and does what is legitimate, then come attacks that met the rule. A rule that none met
    serves a transition more likely than an attack, so all of those come next; then what is left.
    """
    yield [Cell(design=DESIGN, kind="transition", name=BOOT)]
    topic = name.rpartition(": ")[2]
    moves = [Cell(design=DESIGN, kind="transition", name=one) for one in EVERY_TRANSITION]
    near = [cell for cell, met in attacks if met] + [cell for cell in moves if topic in cell.name]
    if near:
        yield near
    others = [cell for cell in [*moves, *(cell for cell, _ in attacks)] if cell not in near]
    yield from (others[at : at + BATCH] for at in range(0, len(others), BATCH))


def _met(name: str, usual: Outcome) -> bool:
    """Whether the attack met that rule, by what VTL1 said when it refused. Those that did are tried first."""
    rule = name.rpartition(": ")[2].partition(" must_be")[0].partition(".")[0]
    return any(refused.startswith(f"{rule}: ") for refused in usual.rules) or f": {rule} " in usual.evidence.denial


def _no_policy(outcome: Outcome) -> bool:
    """VTL1 refuses what is left, so it is no policy: that says nothing of the rule."""
    return REFUSED_POLICY in outcome.log
