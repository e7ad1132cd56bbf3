"""Policy model + boot image + the guest's page tables -> rules in guest-physical pages.

Pure over `Translate`. What is absent from the image or contradicts it is a problem with line and key; all are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vtl1_monitor.policy.bits import ALL_BITS, CONTROL_REGISTERS, TABLE_REGISTERS, msr_index
from vtl1_monitor.policy.image import Area, BootImage
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.rules import Action, MemoryRule, Rules, StartupRule, TableRule, ValueRule
from vtl1_monitor.policy.schema import (
    LOW_MEMORY,
    BitsRule,
    Path,
    Phase,
    Pins,
    Policy,
    StartupWord,
    Trampoline,
    free_bits,
    frozen_mask,
    mask,
)
from vtl1_monitor.policy.schema import MemoryRule as MemoryModel
from vtl1_monitor.policy.schema import ValueRule as ValueModel
from vtl1_monitor.policy.text import PolicyText
from vtl1_monitor.rights import PRIVATE_PAGE, RIGHTS, SEALED, STORE_MASK, Run, page_code
from vtlab.errors import NotFound
from vtlab.ram import PAGE_SIZE
from vtlab.services import Service

# Guest-virtual address -> guest-physical address, None where nothing is mapped.
Translate = Callable[[int], int | None]


class _Problem(Exception):
    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


class _Extent(NamedTuple):
    gpa: int
    size: int
    area: Area | None


def resolve(parsed: PolicyText, image: BootImage, ram_size: int, translate: Translate | None) -> Rules:
    """The rules that the policy means on this machine.

    Args:
        ram_size: bytes.
        translate: by the guest's page tables; None while there are none (then `gva` rules cannot be resolved).

    Raises:
        PolicyProblems: symbols or sections that are absent, ranges outside RAM, unaligned or contradicting rules.
    """
    policy = parsed.model
    problems = []
    memory: list[MemoryRule] = []
    for index, rule in enumerate(policy.memory):
        if rule.default:
            continue
        try:
            memory.append(_memory_rule(parsed, index, rule, image, ram_size, translate))
        except _Problem as problem:
            path: Path = ("memory", index, problem.key) if problem.key else ("memory", index)
            problems.append(parsed.problem(path, problem.message))
    sections = {}
    for path, name in _named_sections(policy):
        try:
            area = image.section(name)
            sections[path[0]] = (area.gpa, area.size)
            if not _inside_sealed(area, memory):
                problems.append(parsed.problem(path, f"section {name} is in no measured memory rule without w"))
        except NotFound as error:
            problems.append(parsed.problem(path, error.detail))
    problems += [parsed.problem(("memory", index), message) for index, message in _contradictions(memory)]
    if problems:
        raise PolicyProblems(parsed.file_name, problems)
    return _assemble(policy, tuple(memory), sections.get("modules"), sections.get("patches"))


def _named_sections(policy: Policy) -> Iterator[tuple[Path, str]]:
    if policy.modules is not None:
        yield ("modules", "certificate_section"), policy.modules.certificate_section
    if policy.patches is not None:
        yield ("patches", "section"), policy.patches.section


def _inside_sealed(area: Area, memory: list[MemoryRule]) -> bool:
    """True if what VTL1 will read from there is what the image has and VTL0 cannot write it."""
    return any(
        rule.measured and rule.phase is Phase.LOCK and rule.exact[0] <= area.gpa and area.end <= sum(rule.exact)
        for rule in memory
    )


def _assemble(
    policy: Policy,
    memory: tuple[MemoryRule, ...],
    certificates: tuple[int, int] | None,
    patches: tuple[int, int] | None,
) -> Rules:
    violations = policy.violation

    default = next((rule for rule in policy.memory if rule.default), None)
    registers = {}
    for key, name in CONTROL_REGISTERS.items():
        rule = getattr(policy.registers, key)
        if rule is not None:
            registers[int(name)] = _value_rule(key, rule, free_bits(key), policy)
    tables = {
        int(name): TableRule(key, violations.by_rule.get(key, violations.default))
        for key, name in TABLE_REGISTERS.items()
        if getattr(policy.registers, key) is not None
    }
    cr3 = policy.registers.cr3
    return Rules(
        startup=_startup_rule(policy, memory),
        policy_name=policy.name,
        registers=registers,
        msrs={msr_index(key): _value_rule(key, rule, 0, policy) for key, rule in policy.msrs.items()},
        tables=tables,
        cr3=TableRule("cr3", violations.by_rule.get("cr3", violations.default)) if cr3 else None,
        cr3_frozen=cr3 == "frozen",
        memory=memory,
        default_code=_code(default) if default else None,
        default_name=default.name if default else "",
        guard_page_tables=policy.page_tables.when if policy.page_tables.guard else None,
        violations=violations.by_rule,
        default_violation=violations.default,
        measurement_failure=violations.measurement,
        certificates=certificates,
        patches=patches,
        services=frozenset(Service) if policy.services is None else frozenset(policy.services) | _ALWAYS,
        actions={
            name: Action(name, bytes.fromhex(action.public_key), frozenset(action.allows), frozenset(action.services))
            for name, action in policy.actions.items()
        },
        lifecycle=policy.lifecycle,
        waking=next((rule.run for rule in memory if rule.name == policy.lifecycle.waking), None),
    )


def _startup_rule(policy: Policy, memory: tuple[MemoryRule, ...]) -> StartupRule:
    violation = policy.violation.by_rule.get("startup", policy.violation.default)
    startup = policy.startup
    if not isinstance(startup, Trampoline):
        return StartupRule(violation, allowed=startup is StartupWord.ALLOW)
    run = next((rule.run for rule in memory if rule.name == startup.trampoline), None)
    sets = startup.pins is Pins.SET
    return StartupRule(violation, run=run, low_memory=startup.trampoline == LOW_MEMORY, sets_pins=sets)


# A policy that forgot these could be taken but never locked.
_ALWAYS = frozenset({Service.TAKE_POLICY, Service.LOCK_REGS, Service.SIGNAL_END_OF_BOOT})


def _value_rule(key: str, rule: BitsRule[int], free: int, policy: Policy) -> ValueRule:
    ones, zeros = mask(rule.must_be_1), mask(rule.must_be_0)
    value = rule.value if isinstance(rule, ValueModel) else None
    return ValueRule(
        name=key,
        violation=policy.violation.by_rule.get(key, policy.violation.default),
        fixed_mask=ALL_BITS if value is not None else ones | zeros,
        fixed_value=value if value is not None else ones,
        frozen_mask=frozen_mask(rule.frozen, free),
        watched_mask=mask(rule.watched),
        written_at_lock=value is not None,
    )


def _code(rule: MemoryModel) -> int:
    read, write, _ = (character != "-" for character in rule.access)
    return page_code(
        read=read,
        write=write,
        kernel_execute=rule.kernel_execute,
        user_execute=rule.user_execute,
        private=rule.private,
    )


def _memory_rule(
    parsed: PolicyText,
    index: int,
    rule: MemoryModel,
    image: BootImage,
    ram_size: int,
    translate: Translate | None,
) -> MemoryRule:
    selector = rule.selectors[0]
    extent = _extent(rule, image, translate)
    if extent.gpa % PAGE_SIZE:
        raise _Problem(selector, f"starts at {extent.gpa:#x}, which is not the start of a page")
    if extent.gpa + extent.size > ram_size:
        raise _Problem(selector, f"{extent.gpa:#x}-{extent.gpa + extent.size:#x} is not RAM (it ends at {ram_size:#x})")
    if extent.area is not None:
        for other in image.neighbours(extent.area):
            if other.name != extent.area.name and not _contains(other, extent.area):
                raise _Problem(selector, f"ends at {extent.area.end:#x}, in the page of section {other.name}")
        _check_mapping(selector, extent.area, translate)
    code = _code(rule)
    sealed = code & STORE_MASK == SEALED
    named = selector in ("section", "symbol")
    place: Path = ("memory", index)
    return MemoryRule(
        name=rule.name,
        run=Run(extent.gpa // PAGE_SIZE, -(-extent.size // PAGE_SIZE)),
        code=code,
        exact=(extent.gpa, extent.size),
        phase=rule.when,
        violation=parsed.model.violation.by_rule.get(rule.name, parsed.model.violation.default),
        measured=sealed and (named if rule.measure is None else rule.measure),
        line=parsed.lines.get(place, 0),
        key=f"memory.{index}",
    )


def _contains(outer: Area, inner: Area) -> bool:
    """A symbol lies inside its section; what follows it there is the policy's business, and is measured with it."""
    return outer.gpa <= inner.gpa and inner.end <= outer.end


def _extent(rule: MemoryModel, image: BootImage, translate: Translate | None) -> _Extent:
    if rule.gpa is not None:
        return _Extent(rule.gpa, rule.size or 0, None)
    if rule.gva is not None:
        return _Extent(_translated(rule.gva, rule.size or 0, translate), rule.size or 0, None)
    try:
        area = image.section(rule.section) if rule.section is not None else image.symbol(rule.symbol or "")
    except NotFound as error:
        raise _Problem(rule.selectors[0], error.detail) from None
    if rule.size is not None:
        area = Area(area.name, area.gva, area.gpa, rule.size)
    if not area.size:
        raise _Problem("symbol", f"symbol {area.name} has no size: give 'size' in bytes")
    if rule.symbol is not None and area.end % PAGE_SIZE:
        raise _Problem("symbol", f"symbol {area.name} ends at {area.end:#x}, inside a page")
    return _Extent(area.gpa, area.size, area)


def _translated(gva: int, size: int, translate: Translate | None) -> int:
    """Where adjacent virtual pages are, which must be adjacent in guest-physical memory too."""
    if translate is None:
        raise _Problem("gva", "cannot be resolved before the guest has page tables")
    first = translate(gva)
    if first is None:
        raise _Problem("gva", f"{gva:#x} is not mapped by the guest")
    for offset in range(PAGE_SIZE, size, PAGE_SIZE):
        if translate(gva + offset) != first + offset:
            raise _Problem("gva", f"{gva + offset:#x} is not mapped at {first + offset:#x}, behind the page before")
    return first


def _check_mapping(key: str, area: Area, translate: Translate | None) -> None:
    """Where the guest maps the linked address, it must be the loaded bytes that it maps."""
    if translate is None:
        return
    for offset in range(0, area.size, PAGE_SIZE):
        gpa = translate(area.gva + offset)
        if gpa is not None and gpa != area.gpa + offset:
            raise _Problem(
                key, f"{area.gva + offset:#x} is mapped at {gpa:#x}, but was loaded at {area.gpa + offset:#x}"
            )


def _contradictions(memory: list[MemoryRule]) -> Iterator[tuple[int, str]]:
    """Pairs of rules that give a page different rights; a later phase may take rights away."""
    ordered = sorted(memory, key=lambda rule: rule.run)
    for position, rule in enumerate(ordered):
        for other in ordered[position + 1 :]:
            if other.run.first >= rule.run.end:
                break
            if rule.code == other.code and rule.phase is other.phase:
                continue
            early, late = sorted((rule, other), key=lambda one: one.phase is Phase.END_OF_BOOT)
            if early.phase is not late.phase and _tightens(early.code, late.code):
                continue
            later_in_text = max((rule, other), key=lambda one: one.line)
            first_in_text = other if later_in_text is rule else rule
            index = int(later_in_text.key.rpartition(".")[2])
            page = max(rule.run.first, other.run.first) * PAGE_SIZE
            yield index, f"'{later_in_text.name}' and '{first_in_text.name}' both cover {page:#x} with different rights"


def _tightens(early: int, late: int) -> bool:
    return not late & RIGHTS & ~early and early != PRIVATE_PAGE
