"""The policy as a model: what may be written, and nothing else. Values are strict, unknown keys are refused.

Cross-field rules that pydantic cannot give a place for are in `cross_checks`, which names the key at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from vtl1_monitor.policy.bits import ALL_BITS, FREE_BITS, Xcr0, bit_mask, msr_index
from vtlab.services import ACTION_NAME_SIZE, Service
from vtlab.x86.registers import Cr0, Cr4, Efer

Path = tuple[str | int, ...]

MAX_RULES = 1024
"""Entries in one list or mapping of a policy."""


class Violation(Enum):
    """What happens to the operation that a rule refuses."""

    GP = "gp"
    SKIP = "skip"
    LOG = "log"
    HALT = "halt"
    RESET = "reset"


class MeasurementFailure(Enum):
    """What happens if sealed bytes are not those of the image."""

    REFUSE = "refuse"
    HALT = "halt"
    RESET = "reset"


class Phase(Enum):
    """When a memory rule takes effect."""

    LOCK = "lock"
    END_OF_BOOT = "end_of_boot"


class SmmMode(Enum):
    """What an SMI does while VTL1 is enabled."""

    SUSPEND = "suspend"
    DENY = "deny"


class SleepMode(Enum):
    """What S3 is while VTL1 is enabled."""

    RESTORE = "restore"
    VERIFY = "verify"
    RESET = "reset"
    REFUSE = "refuse"


class StateViolation(Enum):
    """What happens if a whole state that breaks a rule is about to be loaded."""

    RESET = "reset"
    HALT = "halt"


class Execute(Enum):
    """Which privilege levels may fetch (TLFS: KMX below CPL3, UMX at CPL3)."""

    NONE = "none"
    KERNEL = "kernel"
    USER = "user"
    BOTH = "both"


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _by_value(kind: type[Enum]) -> BeforeValidator:
    def convert(value: object) -> object:
        for member in kind:
            if member.value == value:
                return member
        raise ValueError(f"must be one of {', '.join(str(member.value) for member in kind)}")

    return BeforeValidator(convert)


ViolationName = Annotated[Violation, _by_value(Violation)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\x20-\x7e]+$")]
Number = Annotated[int, Field(ge=0, le=ALL_BITS)]

Cr0Bit = Annotated[int, BeforeValidator(lambda value: bit_mask(value, Cr0))]
Cr4Bit = Annotated[int, BeforeValidator(lambda value: bit_mask(value, Cr4))]
EferBit = Annotated[int, BeforeValidator(lambda value: bit_mask(value, Efer))]
Xcr0Bit = Annotated[int, BeforeValidator(lambda value: bit_mask(value, Xcr0))]
MsrBit = Annotated[int, BeforeValidator(lambda value: bit_mask(value, None))]
Bit = TypeVar("Bit", bound=int)


def _all_or_some(value: object) -> object:
    """`true` is every bit, `false` none."""
    if isinstance(value, bool):
        return list(range(64)) if value else []
    return value


class BitsRule(Model, Generic[Bit]):
    """What is pinned of one register; each list holds masks of one bit. `all_frozen`: `frozen` was `true`."""

    must_be_1: list[Bit] = []
    must_be_0: list[Bit] = []
    frozen: Annotated[list[Bit], BeforeValidator(_all_or_some)] = []
    watched: Annotated[list[Bit], BeforeValidator(_all_or_some)] = []

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if value in ("frozen", "watched"):
            return {value: True}
        if not isinstance(value, dict):
            raise ValueError("must be 'frozen', 'watched' or a mapping")
        return value


class ValueRule(BitsRule[Bit], Generic[Bit]):
    value: Number | None = None


def _exactly(word: str) -> BeforeValidator:
    def convert(value: object) -> object:
        if value != word:
            raise ValueError(f"must be '{word}'")
        return value

    return BeforeValidator(convert)


Frozen = Annotated[str, _exactly("frozen")]


def _cr3_word(value: object) -> object:
    if value not in ("page_tables", "frozen"):
        raise ValueError("must be 'page_tables' or 'frozen'")
    return value


class Registers(Model):
    cr0: BitsRule[Cr0Bit] | None = None
    cr4: BitsRule[Cr4Bit] | None = None
    efer: BitsRule[EferBit] | None = None
    xcr0: BitsRule[Xcr0Bit] | None = None
    cr3: Annotated[Literal["page_tables", "frozen"], BeforeValidator(_cr3_word)] | None = None
    gdtr: Frozen | None = None
    idtr: Frozen | None = None
    ldtr: Frozen | None = None
    tr: Frozen | None = None


_ACCESS = re.compile(r"[r-][w-][x-]")


class MemoryRule(Model):
    name: Name
    section: str | None = Field(default=None, min_length=1, max_length=256)
    symbol: str | None = Field(default=None, min_length=1, max_length=256)
    gpa: Number | None = None
    gva: Number | None = None
    size: Annotated[int, Field(gt=0, le=1 << 52)] | None = None
    default: bool = False
    access: str
    execute: Annotated[Execute, _by_value(Execute)] | None = None
    private: bool = False
    when: Annotated[Phase, _by_value(Phase)] = Phase.LOCK
    measure: bool | None = None

    @field_validator("access")
    @classmethod
    def _three_characters(cls, value: str) -> str:
        if not _ACCESS.fullmatch(value):
            raise ValueError(f"'{value}' is not three characters like r-x, rw- or ---")
        return value

    @property
    def kernel_execute(self) -> bool:
        return self.who_executes in (Execute.KERNEL, Execute.BOTH)

    @property
    def user_execute(self) -> bool:
        return self.who_executes in (Execute.USER, Execute.BOTH)

    @property
    def who_executes(self) -> Execute:
        return self.execute or (Execute.KERNEL if self.access[2] == "x" else Execute.NONE)

    @property
    def selectors(self) -> list[str]:
        """The keys that say where; a valid rule has one."""
        given = {"section": self.section, "symbol": self.symbol, "gpa": self.gpa, "gva": self.gva}
        return [key for key, value in given.items() if value is not None] + ["default"] * self.default


class PageTables(Model):
    guard: bool = False
    when: Annotated[Phase, _by_value(Phase)] = Phase.LOCK


class StartupWord(Enum):
    """Startups that are not judged one by one."""

    DENY = "deny"
    ALLOW = "allow"


class Pins(Enum):
    """What a vCPU that leaves the trampoline without a pinned bit meets."""

    DEMAND = "demand"
    SET = "set"


LOW_MEMORY = "low_memory"


class Trampoline(Model):
    """`trampoline`: name of a memory rule, or LOW_MEMORY."""

    trampoline: Name
    pins: Annotated[Pins, _by_value(Pins)] = Pins.DEMAND


def _startup(value: object) -> object:
    if isinstance(value, dict):
        return Trampoline.model_validate(value)
    for word in StartupWord:
        if word.value == value:
            return word
    raise ValueError("must be 'deny', 'allow' or a mapping with 'trampoline'")


class Modules(Model):
    certificate_section: str = Field(min_length=1, max_length=256)


class Patches(Model):
    section: str = Field(min_length=1, max_length=256)


def _service(value: object) -> object:
    if isinstance(value, str) and value in Service.__members__:
        return Service[value]
    raise ValueError(f"no service '{value}'; there are {', '.join(Service.__members__)}")


ServiceName = Annotated[Service, BeforeValidator(_service)]
ActionName = Annotated[str, Field(min_length=1, max_length=ACTION_NAME_SIZE, pattern=r"^[\x21-\x7e]+$")]


class Authentication(Model):
    """One named action that VTL0 may prove its right to after lock."""

    public_key: str = Field(pattern=r"^[0-9a-fA-F]{64}$", description="Ed25519 public key (RFC 8032), hexadecimal")
    allows: list[str] = Field(default=[], max_length=MAX_RULES)
    services: list[ServiceName] = Field(default=[], max_length=len(Service))


class Violations(BaseModel):
    """`default`, `measurement`, and the name of any rule."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, ViolationName] = Field(init=False)

    default: ViolationName = Violation.GP
    measurement: Annotated[MeasurementFailure, _by_value(MeasurementFailure)] = MeasurementFailure.HALT

    @property
    def by_rule(self) -> dict[str, Violation]:
        return dict(self.__pydantic_extra__ or {})


class Verified(Enum):
    """Whether the kernel may hand the machine to another one that VTL1 has verified."""

    VERIFY = "verify"
    REFUSE = "refuse"


VerifiedName = Annotated[Verified, _by_value(Verified)]


class Upgrade(Enum):
    """Whether a newer policy may replace the one in force."""

    SIGNED = "signed"
    REFUSE = "refuse"


class Hibernate(Enum):
    """What S4 is while VTL1 is enabled."""

    SEAL = "seal"
    REFUSE = "refuse"


class Lifecycle(Model):
    """What the machine may become, and what of the rules its own life may undo meanwhile (docs/lifecycle.md)."""

    smm: Annotated[SmmMode, _by_value(SmmMode)] = SmmMode.SUSPEND
    rsm_violation: Annotated[StateViolation, _by_value(StateViolation)] = StateViolation.RESET
    kexec: VerifiedName = Verified.VERIFY
    kdump: VerifiedName = Verified.VERIFY
    upgrade: Annotated[Upgrade, _by_value(Upgrade)] = Upgrade.REFUSE
    minimum_kernel_version: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    s3: Annotated[SleepMode, _by_value(SleepMode)] = SleepMode.RESTORE
    waking: Name | None = None
    poison: Annotated[StateViolation, _by_value(StateViolation)] = StateViolation.RESET
    hibernate: Annotated[Hibernate, _by_value(Hibernate)] = Hibernate.SEAL


class Policy(Model):
    version: Literal[1]
    name: Name
    registers: Registers = Registers()
    msrs: dict[str, ValueRule[MsrBit]] = Field(default={}, max_length=MAX_RULES)
    memory: list[MemoryRule] = Field(default=[], max_length=MAX_RULES)
    page_tables: PageTables = PageTables()
    violation: Violations = Violations()
    lifecycle: Lifecycle = Lifecycle()
    modules: Modules | None = None
    patches: Patches | None = None
    services: list[ServiceName] | None = Field(default=None, max_length=len(Service))
    actions: dict[ActionName, Authentication] = Field(default={}, max_length=MAX_RULES)
    startup: Annotated[StartupWord | Trampoline, BeforeValidator(_startup)] = StartupWord.DENY

    def rule_names(self) -> set[str]:
        """Names under which a verdict can be recorded and `violation` can be set."""
        registers = {key for key in Registers.model_fields if getattr(self.registers, key) is not None}
        names = registers | set(self.msrs) | {rule.name for rule in self.memory} | {"modules", "services", "startup"}
        return names | ({"page_tables"} if self.page_tables.guard else set())


def mask(bits: list[int]) -> int:
    """The bits together."""
    result = 0
    for bit in bits:
        result |= bit
    return result


def frozen_mask(bits: list[int], free: int = 0) -> int:
    """As mask; all 64 bits (`frozen: true`) leave out those that a guest changes in normal operation."""
    result = mask(bits)
    return result & ~free if result == ALL_BITS else result


def free_bits(key: str) -> int:
    """Bits of a control register that `frozen: true` does not pin."""
    return {"cr0": FREE_BITS[Cr0], "cr4": FREE_BITS[Cr4], "efer": FREE_BITS[Efer]}.get(key, 0)


def cross_checks(policy: Policy) -> Iterator[tuple[Path, str]]:
    """What is wrong with a policy whose parts are each right: (place, message)."""
    yield from _register_checks(policy)
    yield from _memory_checks(policy)
    names = policy.rule_names()
    for name in policy.violation.by_rule:
        if name not in names:
            yield ("violation", name), f"no rule is called '{name}'"
    for rule in policy.memory:
        if rule.private and policy.violation.by_rule.get(rule.name) in (Violation.LOG, Violation.SKIP):
            yield ("violation", rule.name), "private memory is never opened: use gp, halt or reset"
    yield from _action_checks(policy)
    yield from _startup_checks(policy)
    yield from _sleep_checks(policy)


def _sleep_checks(policy: Policy) -> Iterator[tuple[Path, str]]:
    name = policy.lifecycle.waking
    if name is None:
        if policy.lifecycle.s3 is SleepMode.VERIFY:
            yield ("lifecycle", "s3"), "'verify' needs 'waking', the memory rule of the waking code"
        return
    rule = next((rule for rule in policy.memory if rule.name == name), None)
    if rule is None:
        yield ("lifecycle", "waking"), f"no memory rule is called '{name}'"
    elif rule.default or not rule.access.startswith("r-"):
        yield ("lifecycle", "waking"), f"'{name}' is not memory that VTL0 reads and cannot write"


def _startup_checks(policy: Policy) -> Iterator[tuple[Path, str]]:
    if not isinstance(policy.startup, Trampoline) or policy.startup.trampoline == LOW_MEMORY:
        return
    name = policy.startup.trampoline
    rule = next((rule for rule in policy.memory if rule.name == name), None)
    if rule is None:
        yield ("startup", "trampoline"), f"no memory rule is called '{name}'"
    elif rule.default or rule.access[1] != "-" or not rule.kernel_execute:
        yield ("startup", "trampoline"), f"'{name}' is not memory that the kernel executes and cannot write"


def _register_checks(policy: Policy) -> Iterator[tuple[Path, str]]:
    registers: list[tuple[Path, BitsRule[int]]] = []
    for key in ("cr0", "cr4", "efer", "xcr0"):
        rule = getattr(policy.registers, key)
        if rule is not None:
            registers.append((("registers", key), rule))
    indexes: dict[int, str] = {}
    for name, value_rule in policy.msrs.items():
        registers.append((("msrs", name), value_rule))
        try:
            index = msr_index(name)
        except ValueError as error:
            yield ("msrs", name), str(error)
            continue
        if index in indexes:
            yield ("msrs", name), f"is the same MSR as '{indexes[index]}'"
        indexes[index] = name
        others = value_rule.must_be_1 + value_rule.must_be_0 + value_rule.frozen
        if value_rule.value is not None and others:
            yield ("msrs", name, "value"), "fixes every bit: leave out must_be_1, must_be_0 and frozen"
    for path, rule in registers:
        if mask(rule.must_be_1) & mask(rule.must_be_0):
            yield (*path, "must_be_0"), "a bit is also in must_be_1"
    if policy.registers.cr3 == "page_tables" and not policy.page_tables.guard:
        yield ("registers", "cr3"), "'page_tables' needs page_tables.guard: true"
    if policy.registers.cr3 == "page_tables" and policy.page_tables.when is not Phase.LOCK:
        yield ("page_tables", "when"), "registers.cr3 needs the tables guarded when registers are locked"


# An action never reopens the policy.
_NEVER_GRANTED = frozenset({Service.TAKE_POLICY, Service.LOCK_REGS, Service.SIGNAL_END_OF_BOOT})


def _action_checks(policy: Policy) -> Iterator[tuple[Path, str]]:
    pins = {key for key in Registers.model_fields if getattr(policy.registers, key) is not None} | set(policy.msrs)
    for action, authentication in policy.actions.items():
        for index, name in enumerate(authentication.allows):
            if name not in pins:
                yield ("actions", action, "allows", index), f"no register or MSR rule is called '{name}'"
        for index, service in enumerate(authentication.services):
            if service in _NEVER_GRANTED:
                yield ("actions", action, "services", index), f"{service.name} is never granted"


def _memory_checks(policy: Policy) -> Iterator[tuple[Path, str]]:
    taken = set(Registers.model_fields) | set(policy.msrs) | {"modules", "services", "page_tables"}
    taken |= {"default", "measurement", "startup", LOW_MEMORY}
    defaults = 0
    for index, rule in enumerate(policy.memory):
        place: Path = ("memory", index)
        if rule.name in taken:
            yield (*place, "name"), f"'{rule.name}' is the name of another rule"
        taken.add(rule.name)
        if len(rule.selectors) != 1:
            given = " and ".join(rule.selectors) or "none"
            yield place, f"needs exactly one of section, symbol, gpa, gva, default: true; has {given}"
        for key in ("gpa", "gva"):
            if getattr(rule, key) is not None and rule.size is None:
                yield (*place, key), "needs 'size', in bytes"
        if rule.size is not None and (rule.section is not None or rule.default):
            yield (*place, "size"), "is for symbol, gpa and gva"
        defaults += rule.default
        if rule.default and (defaults > 1 or rule.private or rule.when is not Phase.LOCK):
            yield (*place, "default"), "there is one default rule, not private, when: lock"
        yield from ((place + key, message) for key, message in _access_checks(rule))


def _access_checks(rule: MemoryRule) -> Iterator[tuple[Path, str]]:
    read, write, execute = (character != "-" for character in rule.access)
    if (write or execute) and not read:
        yield ("access",), f"'{rule.access}': pages that can be written or executed can be read"
    if execute and rule.who_executes is Execute.NONE:
        yield ("execute",), f"'none' contradicts access '{rule.access}'"
    if rule.kernel_execute and not execute:
        yield ("execute",), f"'{rule.who_executes.value}' contradicts access '{rule.access}'"
    if not read and rule.who_executes is not Execute.NONE:
        yield ("execute",), f"contradicts access '{rule.access}'"
    if write and rule.kernel_execute and not rule.default:
        yield ("access",), "memory that the kernel executes may not be writable"
    if rule.private and rule.access != "---":
        yield ("private",), "private memory has access '---'"
    if rule.measure and (write or rule.private or rule.default):
        yield ("measure",), "only memory that VTL0 cannot write is measured"
