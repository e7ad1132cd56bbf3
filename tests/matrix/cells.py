"""Which cells the matrix has, which of them are asked for, and in which order they run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vtlab.errors import BadArgument
from vtlab_attacks.table import ATTACKS, TRANSITION_ATTACKS, TRANSITIONS

BOOT = "boot"  # what comes before an attack if no transition does; as a transition, the machine's first start
EVERY_ATTACK = {attack.name: attack for attack in [*ATTACKS, *TRANSITION_ATTACKS]}
EVERY_TRANSITION = {transition.name: transition for transition in TRANSITIONS}


class Verdict(StrEnum):
    """What the machine's state says of a cell."""

    BLOCKED = "BLOCKED"  # the attack changed nothing and met a fault or a refusal
    SUCCEEDED = "SUCCEEDED"  # the attack reached its aim
    KEPT = "KEPT"  # the transition was complete, and all that worked before it works after it
    GUEST_BROKEN = "GUEST-BROKEN"  # it was not, or something works no more
    UNCLEAR = "UNCLEAR"  # the evidence says neither

    @property
    def red(self) -> bool:
        return self not in (Verdict.BLOCKED, Verdict.KEPT)


class Cell(BaseModel):
    """One cell. `after` is the transition before an attack; empty means that the attack follows the boot."""

    model_config = ConfigDict(frozen=True)

    design: str
    kind: Literal["attack", "transition"]
    name: str
    after: str = ""

    def __str__(self) -> str:
        return f"{self.design}: {self.name}" + (f" after {self.after}" if self.after else "")


@dataclass(frozen=True)
class Selection:
    """Patterns as of fnmatch; an empty tuple asks for none, None for all.

    Attributes:
        known: all designs, in the order of the tables.
        designs, attacks: by name.
        after: what attacks come after: transitions, or BOOT.
        transitions: those with a cell of their own, BOOT among them.
        seed: of the order of the cells, and of whatever is random in them.
    """

    known: Sequence[str]
    designs: Sequence[str] | None = None
    attacks: Sequence[str] | None = None
    after: Sequence[str] | None = None
    transitions: Sequence[str] | None = None
    seed: int = 0


def _chosen(option: str, patterns: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    names = list(known)
    if patterns is None:
        return names
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadArgument(f"--{option} {pattern}", f"matches none of {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def plan(selection: Selection) -> tuple[list[Cell], list[Cell]]:
    """Cells of transitions, then cells of attacks, each in the order that the seed gives.

    Transitions come first: where one breaks the guest, there is nothing left to attack after it.

    Raises:
        BadArgument: a pattern matches nothing.
    """
    designs = _chosen("designs", selection.designs, selection.known)
    attacks = _chosen("attacks", selection.attacks, EVERY_ATTACK)
    after = _chosen("after", selection.after, [BOOT, *EVERY_TRANSITION])
    moves = _chosen("transitions", selection.transitions, [BOOT, *EVERY_TRANSITION])
    transitions = [Cell(design=design, kind="transition", name=name) for design in designs for name in moves]
    cells = [
        Cell(design=design, kind="attack", name=name, after="" if move == BOOT else move)
        for design in designs
        for name in attacks
        for move in after
    ]
    order = random.Random(selection.seed)
    order.shuffle(transitions)
    order.shuffle(cells)
    return transitions, cells
