"""Is each rule of the policy needed? With one rule removed, at least one cell has to turn red.

A rule is what can be taken out of the policy by itself: one bit of a control register, one MSR, one range of memory,
one key of a further section. What is only watched refuses nothing, so it is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import yaml

from vtlab.errors import BadArgument
from vtlab_attacks.campaign import DESIGN
from vtlab_attacks.guest import kernel_symbols
from vtlab_matrix.cells import BOOT, EVERY_ATTACK, Cell, Verdict
from vtlab_matrix.laboratory import Task
from vtlab_matrix.matrix import Runner
from vtlab_matrix.outcome import Outcome

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

    Attacks that met the rule are tried first; all others only if none of those turns red.

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
    cells = [Cell(design=DESIGN, kind="transition", name=BOOT)]
    cells += [
        Cell(design=DESIGN, kind="attack", name=name)
        for name in EVERY_ATTACK
        if any(fnmatchcase(name, pattern) for pattern in attacks)
    ]
    names = {one: name for name, one in chosen.items()}
    red: dict[str, list[Outcome]] = {name: [] for name in chosen}
    usual: dict[Cell, Outcome] = {}
    for outcome in runner.run([Task(cell, text) for cell in cells]):
        on_outcome(outcome)
        usual[outcome.cell] = outcome
    cells = [cell for cell in cells if not usual[cell].verdict.red]
    for mutated, name in names.items():
        met = [cell for cell in cells if cell.kind == "transition" or _met(name, usual[cell])]
        for some in (met, [cell for cell in cells if cell not in met]):
            for outcome in [] if red[name] else list(runner.run([Task(cell, mutated) for cell in some])):
                on_outcome(outcome)
                if outcome.verdict.red and not _no_policy(outcome):
                    red[name].append(outcome)
    return red


def _met(name: str, usual: Outcome) -> bool:
    """Whether the attack met that rule, by what VTL1 said when it refused. Those that did are tried first."""
    rule = name.rpartition(": ")[2].partition(" must_be")[0].partition(".")[0]
    return any(refused.startswith(f"{rule}: ") for refused in usual.rules)


def _no_policy(outcome: Outcome) -> bool:
    """What is left is no policy that the guest can start with: that says nothing of the rule."""
    return outcome.verdict is Verdict.GUEST_BROKEN and bool(outcome.evidence.error)
