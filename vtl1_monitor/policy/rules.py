"""A resolved policy: numbers only. Everything that judges, filters or seals works on these values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vtl1_monitor.policy.schema import Lifecycle, MeasurementFailure, Phase, Violation
from vtl1_monitor.rights import PRIVATE_PAGE, Run
from vtlab.services import Service


@dataclass(frozen=True)
class ValueRule:
    """Pins of one register; masks of 64 bits.

    Attributes:
        fixed_mask: bits that may only become what `fixed_value` has.
        frozen_mask: bits that may not change at all.
        watched_mask: bits whose change is recorded.
        written_at_lock: LOCK_REGS writes `fixed_value`.
    """

    name: str
    violation: Violation
    fixed_mask: int = 0
    fixed_value: int = 0
    frozen_mask: int = 0
    watched_mask: int = 0
    written_at_lock: bool = False

    @property
    def mask(self) -> int:
        """Bits whose change must exit."""
        return self.fixed_mask | self.frozen_mask | self.watched_mask

    def refused(self, old: int, new: int) -> int:
        """The changed bits that may not change so."""
        return (old ^ new) & (self.frozen_mask | self.fixed_mask & (new ^ self.fixed_value))


@dataclass(frozen=True)
class TableRule:
    """A register of which no change is allowed (GDTR, IDTR, LDTR, TR), or CR3 limited to known roots."""

    name: str
    violation: Violation


@dataclass(frozen=True)
class MemoryRule:
    """Rights of some pages.

    Attributes:
        run: the pages.
        code: vtl1_monitor.rights.
        exact: (gpa, size) in bytes of what was named, before rounding to pages.
        measured: compare the sealed pages with the image.
        line, key: place in the policy text, for later errors.
    """

    name: str
    run: Run
    code: int
    exact: tuple[int, int]
    phase: Phase
    violation: Violation
    measured: bool
    line: int
    key: str


@dataclass(frozen=True)
class StartupRule:
    """INIT and SIPI of vCPUs. The empty value refuses both.

    Attributes:
        allowed: nothing is judged.
        run: pages of the trampoline, the only ones that may be executed from SIPI until every pin holds.
        low_memory: the trampoline is any page below 1 MiB that is what it was when the policy was locked.
        sets_pins: VTL1 sets pinned bits that a vCPU lacks when it leaves the trampoline, instead of refusing it.
    """

    violation: Violation = Violation.GP
    allowed: bool = False
    run: Run | None = None
    low_memory: bool = False
    sets_pins: bool = False

    @property
    def trampoline(self) -> bool:
        return self.run is not None or self.low_memory

    def covers(self, page: int) -> bool:
        """Whether SIPI may start a vCPU there."""
        return self.low_memory or (self.run is not None and self.run.first <= page < self.run.end)


@dataclass(frozen=True)
class Action:
    """What a re-authenticated VTL0 may do once."""

    name: str
    public_key: bytes
    allows: frozenset[str]
    services: frozenset[Service]


@dataclass(frozen=True)
class Rules:
    """All rules of one machine. The empty value allows everything: it is what holds before a policy is taken.

    Attributes:
        waking: pages of the code that wakes from S3, where the policy has it run.
    """

    policy_name: str = ""
    registers: Mapping[int, ValueRule] = field(default_factory=dict)
    msrs: Mapping[int, ValueRule] = field(default_factory=dict)
    tables: Mapping[int, TableRule] = field(default_factory=dict)
    cr3: TableRule | None = None
    cr3_frozen: bool = False
    memory: tuple[MemoryRule, ...] = ()
    default_code: int | None = None
    default_name: str = ""
    guard_page_tables: Phase | None = None
    violations: Mapping[str, Violation] = field(default_factory=dict)
    default_violation: Violation = Violation.GP
    measurement_failure: MeasurementFailure = MeasurementFailure.HALT
    certificates: tuple[int, int] | None = None
    patches: tuple[int, int] | None = None
    services: frozenset[Service] = frozenset(Service)
    actions: Mapping[str, Action] = field(default_factory=dict)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    waking: Run | None = None
    startup: StartupRule = field(default_factory=lambda: StartupRule(allowed=True))

    def violation(self, rule: str) -> Violation:
        """What breaking a rule does."""
        return self.violations.get(rule, self.default_violation)

    def without_registers(self) -> Rules:
        """The same before LOCK_REGS: memory rules only."""
        return replace(self, registers={}, msrs={}, tables={}, cr3=None, startup=StartupRule(allowed=True))

    @property
    def private(self) -> tuple[MemoryRule, ...]:
        return tuple(rule for rule in self.memory if rule.code == PRIVATE_PAGE)
