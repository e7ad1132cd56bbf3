"""Which rows run together: one boot each, in the order given, since later rows build on what earlier ones did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtlab_conformance.calls import By
from vtlab_conformance.rows import (
    before_vtl1,
    input_value,
    intercepts,
    interrupts,
    levels,
    mbec,
    processors,
    protection,
    registers,
    vtl0_services,
    without_vsm,
)
from vtlab_conformance.steps import Row


@dataclass(frozen=True)
class Scenario:
    """A boot of the guest.

    Attributes:
        builders: give the rows for a profile.
        vsm: the partition may use VSM.
    """

    name: str
    builders: tuple[Callable[[By], list[Row]], ...]
    vsm: bool = True

    def rows(self, profile: str) -> list[Row]:
        return [row for build in self.builders for row in build(By(profile))]


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("vtl0", (input_value.rows, vtl0_services.rows, before_vtl1.rows)),
    Scenario("vtl1", (levels.rows, registers.rows)),
    Scenario("protection", (protection.rows, intercepts.rows)),
    Scenario("interrupts", (interrupts.rows,)),
    Scenario("mbec", (mbec.rows,)),
    Scenario("processors", (processors.together,)),
    Scenario("startup", (processors.startup,)),
    Scenario("without-vsm", (without_vsm.rows,), vsm=False),
)
