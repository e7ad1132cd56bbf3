"""What an attack or a control leaves behind, and how it is judged: by the machine's state, never by a fault alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Any

from vtlab.client.driver import Driver, GuestFault, GuestRefusal
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.errors import Refused
from vtlab_attacks.guest import Guest


class Outcome(Enum):
    """Of an attack."""

    SUCCEEDED = "succeeded"  # the state is what the attack aimed at
    BLOCKED = "blocked"  # the state is what it was, and the guest took a fault or was refused
    UNCLEAR = "unclear"  # neither: no evidence


@dataclass(frozen=True)
class Evidence:
    """State of the machine around one operation.

    Attributes:
        what: which state, in the words of the manuals.
        before, after: that state, read through the SDK.
        reached: that state is what the operation aimed at.
        intact: that state is what it was.
        denial: the fault that the guest took, or the refusal that it got; empty if there was none.
    """

    what: str
    before: str
    after: str
    reached: bool
    intact: bool
    denial: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.reached:
            return Outcome.SUCCEEDED
        return Outcome.BLOCKED if self.intact and self.denial else Outcome.UNCLEAR

    @property
    def kept(self) -> bool:
        """For a control: it had its effect and nobody objected."""
        return self.reached and not self.denial


Run = Callable[[Machine, Driver, Symbols], Evidence]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: for the command line.
        sentence: what it does.
        source: who describes it.
        run: does it once, on a machine whose guest is ready.
        impossible_unprotected: why it cannot succeed on a machine without VTL1 either; empty if it can.
        vp_count: vCPUs that it needs.
    """

    name: str
    sentence: str
    source: str
    run: Run
    impossible_unprotected: str = ""
    vp_count: int = 1


@dataclass(frozen=True)
class Control:
    """A legitimate operation that must keep working under VTL1. Attributes as of Attack.

    Attributes:
        needs_vtl1: it is an operation of VTL1, which other designs do not have.
    """

    name: str
    sentence: str
    run: Run
    needs_vtl1: bool = False


@dataclass(frozen=True)
class Transition:
    """A legitimate change in the machine's life, executed by the guest's own code: what an attack may come after.

    Attributes:
        name, sentence, source: as of Attack.
        run: makes it happen once. The guest that it returns waits for commands; if it was protected before, it asked
            for protection again wherever the change lifted it. Evidence.reached: the change was complete; else the
            guest is broken.
        vp_count: vCPUs that it needs.
        interrupted: things come at instants that differ from run to run, so their order says nothing.
    """

    name: str
    sentence: str
    source: str
    run: Callable[[Guest], tuple[Guest, Evidence]]
    vp_count: int = 1
    interrupted: bool = False


class Attempts:
    """Steps of an operation, each of which the guest may refuse; remembers what it said."""

    def __init__(self, symbols: Symbols) -> None:
        self._symbols = symbols
        self.denials: list[str] = []

    def step(self, operation: Callable[..., Any], *arguments: Any) -> bool:
        """Does one step; True if nobody objected."""
        try:
            operation(*arguments)
        except GuestFault as fault:
            self.denials.append(self._describe(fault))
        except GuestRefusal as refusal:
            self.denials.append(f"refused {refusal}")
        except Refused as refusal:  # a client's own request, judged like the guest's
            self.denials.append(f"client refused: {refusal.detail}")
        else:
            return True
        return False

    def note(self, denial: str) -> None:
        """A refusal that came as a value, such as a hypercall status; empty means there was none."""
        if denial:
            self.denials.append(denial)

    def _describe(self, fault: GuestFault) -> str:
        return str(fault).replace(f"at {fault.rip:#x}", f"at {self._symbols.describe(fault.rip)}")

    def __str__(self) -> str:
        """What the guest took, step by step; the same again as a number of times."""
        runs = [(denial, len(list(same))) for denial, same in groupby(self.denials)]
        return "; ".join(denial if count == 1 else f"{denial} (×{count})" for denial, count in runs)


def observe(
    what: str,
    state: Callable[[], Any],
    steps: Callable[[Attempts], None],
    symbols: Symbols,
    reached: Callable[[Any, Any], bool] = lambda before, after: before != after,
    show: Callable[[Any], str] = str,
) -> Evidence:
    """Reads the state, attempts the steps, reads it again.

    Args:
        what, state, show: the state, how to read it, how to print it.
        steps: the operation.
        symbols: to name where faults happened.
        reached: whether before and after mean that the operation reached its aim.
    """
    attempts = Attempts(symbols)
    before = state()
    shown_before = show(before)
    steps(attempts)
    after = state()
    return Evidence(what, shown_before, show(after), reached(before, after), before == after, str(attempts))
