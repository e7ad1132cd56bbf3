"""Requests to the guard device: their layout, their status codes, and who may make them. Pure.

A descriptor has 64 bytes; the device writes `status` and `result`, the guest all else:

    u32 action, reserved; u64 arguments[4]; u32 status, reserved; u64 result, reserved;

Whoever rings the doorbell makes the requests, known by RIP and CPL of that store. Code at CPL0 may make every request
that no restriction on its address forbids, code above CPL0 those that a delegation to its address allows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

DESCRIPTOR = struct.Struct("<2I4Q2I2Q")
STATUS = struct.Struct("<I")
STATUS_OFFSET, RESULT_OFFSET = 40, 48
MAX_RULES = 64  # delegations, and restrictions
ANY = 0  # an action of a restriction: all


class Action(IntEnum):
    """What the device can be asked for; arguments in brackets."""

    PIN = 1  # (0 or 4, mask): these bits of CR0 or CR4 do not change any more
    PIN_MSR = 2  # (index): does not change any more
    PROTECT = 3  # (gpa, size, rights 1 R, 2 W, 4 X): what the kernel may do with these pages
    WRITE_REGISTER = 4  # (0 or 4, value): the write that a pin forbids
    STAND_DOWN = 5  # (kind): all protection is lifted, for another kernel to come
    DELEGATE = 6  # (action, first RIP, last RIP, CPL): code there, up to that CPL, may ask for it
    RESTRICT = 7  # (action or 0, first RIP, last RIP): code there may not ask for it
    LOCK = 8  # (): no more DELEGATE and RESTRICT


class Status(IntEnum):
    """Of a request."""

    PENDING = 0
    OK = 1
    UNKNOWN_ACTION = 2
    RESERVED_SET = 3
    BAD_ARGUMENT = 4
    DENIED = 5
    LOCKED = 6
    TOO_MANY = 7


class StandDown(IntEnum):
    """Kinds of Action.STAND_DOWN."""

    KEXEC = 1
    SUSPEND = 2


class Request(NamedTuple):
    """A descriptor, as the guest wrote it."""

    action: int
    arguments: tuple[int, int, int, int]
    clean: bool


def decode(descriptor: bytes) -> Request:
    action, reserved, a, b, c, d, _status, reserved2, _result, reserved3 = DESCRIPTOR.unpack(descriptor)
    return Request(action, (a, b, c, d), not (reserved or reserved2 or reserved3))


class Rule(NamedTuple):
    """A delegation or restriction: RIP from `first` to `last`, for a delegation up to `cpl`."""

    action: int
    first: int
    last: int
    cpl: int = 0

    def covers(self, action: int, rip: int) -> bool:
        return self.action in (ANY, action) and self.first <= rip <= self.last


@dataclass
class Authority:
    """Who may ask for what."""

    delegations: list[Rule] = field(default_factory=list)
    restrictions: list[Rule] = field(default_factory=list)
    locked: bool = False

    def permits(self, action: int, rip: int, cpl: int) -> bool:
        if cpl == 0:
            return not any(rule.covers(action, rip) for rule in self.restrictions)
        return any(rule.covers(action, rip) and cpl <= rule.cpl for rule in self.delegations)

    def delegate(self, arguments: tuple[int, int, int, int]) -> Status:
        """What decides over others is not delegated."""
        action, first, last, cpl = arguments
        if action not in _DELEGABLE or not first <= last or not 0 < cpl <= 3:
            return Status.BAD_ARGUMENT
        return self._add(self.delegations, Rule(action, first, last, cpl))

    def restrict(self, arguments: tuple[int, int, int, int]) -> Status:
        action, first, last, spare = arguments
        if action not in (ANY, *Action) or not first <= last or spare:
            return Status.BAD_ARGUMENT
        return self._add(self.restrictions, Rule(action, first, last))

    def _add(self, rules: list[Rule], rule: Rule) -> Status:
        if self.locked:
            return Status.LOCKED
        if len(rules) >= MAX_RULES:
            return Status.TOO_MANY
        rules.append(rule)
        return Status.OK

    def lock(self) -> Status:
        if self.locked:
            return Status.LOCKED
        self.locked = True
        return Status.OK


_DELEGABLE = frozenset({Action.PIN, Action.PIN_MSR, Action.PROTECT, Action.WRITE_REGISTER, Action.STAND_DOWN})
