"""Which sealed state of which machine may be restored: the last one, once.

A key exists as long as what it sealed may come back; then nobody can read it any more, whoever has kept a copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

KEY_SIZE = 32


class Ticket(NamedTuple):
    """`number` counts what was sealed of a machine, from 1; `key` is None once it is used or void."""

    number: int
    key: bytes | None


class Tickets:
    """Of one monitor, by the names of machines. They outlive RESET, and this process as part of its sealed store."""

    def __init__(self, kept: Mapping[str, Ticket] | None = None) -> None:
        self._tickets = dict(kept or {})

    def kept(self) -> dict[str, Ticket]:
        """All of them."""
        return dict(self._tickets)

    def issue(self, vm: str) -> Ticket:
        """A new one; the one before it is void."""
        ticket = Ticket(self.last(vm) + 1, os.urandom(KEY_SIZE))
        self._tickets[vm] = ticket
        return ticket

    def last(self, vm: str) -> int:
        """Number of the last one; 0 if there was none."""
        return self._tickets[vm].number if vm in self._tickets else 0

    def take(self, vm: str) -> bytes | None:
        """The key, which is void from now on; None if nothing may be restored."""
        key = self._tickets[vm].key if vm in self._tickets else None
        self.void(vm)
        return key

    def void(self, vm: str) -> None:
        """What was sealed of the machine is history."""
        if vm in self._tickets:
            self._tickets[vm] = Ticket(self._tickets[vm].number, None)

    def forget(self, vm: str) -> None:
        """The machine is gone."""
        self._tickets.pop(vm, None)
