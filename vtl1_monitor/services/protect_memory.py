"""PROTECT_MEMORY: the guest takes rights from its own pages while it boots. It can only tighten the policy."""

from __future__ import annotations

import errno

from vtl1_monitor import rights
from vtl1_monitor.rights import Change
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.services.heki_page import Range, check_disjoint, read_ranges
from vtl1_monitor.steps import Steps, protect
from vtl1_monitor.table_guard import MODULES
from vtlab.ram import PAGE_SIZE
from vtlab.services import Rights

OWNER = "services"

# Plain integers: this runs for every range of a long list.
_READ, _WRITE, _EXECUTE = int(Rights.READ), int(Rights.WRITE), int(Rights.EXECUTE)
_KNOWN = _READ | _WRITE | _EXECUTE


def protect_memory(call: Call) -> Steps:
    """(pa of heki_page, number of ranges). All ranges are judged before any is applied."""
    memory = call.machine.memory
    ranges = read_ranges(memory, call.first, call.second)
    check_disjoint(ranges)
    changes = [change for one in ranges for change in _changes(call, one)]
    yield from protect(memory, changes)
    return 0


def _changes(call: Call, one: Range) -> list[Change]:
    if one.pa % PAGE_SIZE or one.epa % PAGE_SIZE or one.va % PAGE_SIZE:
        raise Refused(errno.EINVAL, f"range {one.pa:#x}-{one.epa:#x} is not page-aligned")
    wanted = one.attributes
    if wanted & ~_KNOWN or not wanted & _READ:
        raise Refused(errno.EINVAL, f"range {one.pa:#x}-{one.epa:#x} has attributes {wanted:#x}")
    if wanted & _WRITE and wanted & _EXECUTE:
        raise Refused(errno.EACCES, f"range {one.pa:#x}-{one.epa:#x} would be writable and executable")
    asked = _asked(wanted)
    changes = []
    for run, code, owner in call.machine.memory.pieces(one.run):
        if code & rights.STORE_MASK == rights.PRIVATE or code & rights.PAGE_TABLE or owner == MODULES:
            raise Refused(errno.EACCES, f"{_place(run)} is {rights.access_text(code)}, rule '{owner}'")
        if asked & ~code:
            raise Refused(
                errno.EACCES, f"{_place(run)} is {rights.access_text(code)} by rule '{owner}': cannot be relaxed"
            )
        # As in LVBS, EXECUTE is about the kernel; user programs keep what the policy gives them.
        new = asked | code & rights.USER_EXECUTE | (rights.WRITABLE if wanted & _WRITE else rights.SEALED)
        changes.append(Change(run, new, owner if new == code else OWNER))
    return changes


def _asked(wanted: int) -> int:
    """The rights that the attributes name."""
    asked = rights.READ if wanted & _READ else 0
    asked |= rights.WRITE if wanted & _WRITE else 0
    return asked | (rights.KERNEL_EXECUTE if wanted & _EXECUTE else 0)


def _place(run: rights.Run) -> str:
    return f"{run.first * PAGE_SIZE:#x}-{run.end * PAGE_SIZE:#x}"
