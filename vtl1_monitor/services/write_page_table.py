"""WRITE_PAGE_TABLE: the guest changes page tables that only VTL1 can write, by the rules of page_tables.py."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator

from vtl1_monitor.judge import CR3_BASE
from vtl1_monitor.page_tables import BadTables
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.steps import Protect, Steps
from vtl1_monitor.table_guard import Busy, TableGuard
from vtlab.ram import PAGE_SIZE
from vtlab.services import PageTableOperation


def write_page_table(call: Call) -> Steps:
    """(pa, value, operation)."""
    guard = call.machine.guard
    if guard is None:
        raise Refused(errno.ENOENT, "the policy does not guard page tables")
    operation = _OPERATIONS.get(call.third)
    if operation is None:
        raise Refused(errno.EINVAL, f"operation {call.third}")
    try:
        yield from operation(call, guard)
    except BadTables as error:
        raise Refused(errno.EACCES, str(error)) from None
    except Busy as error:
        raise Refused(errno.EBUSY, str(error)) from None
    except KeyError:
        raise Refused(errno.ENOENT, f"{call.first:#x} is in no guarded table") from None
    return 0


def _write(call: Call, guard: TableGuard) -> Generator[Protect, int, None]:
    if call.first % 8:
        raise Refused(errno.EINVAL, f"entry at {call.first:#x} is not aligned")
    yield from guard.write(call.first, call.second)


def _add_root(call: Call, guard: TableGuard) -> Generator[Protect, int, None]:
    yield from guard.add_root(_page(call))
    call.machine.filter_changed(stricter=False)


def _release(call: Call, guard: TableGuard) -> Generator[Protect, int, None]:
    loaded, page = (call.registers.cr3 & CR3_BASE) // PAGE_SIZE, _page(call)
    if not (call.again and page not in guard.levels):
        yield from guard.release(page, loaded, only_processor=len(call.machine.processors) == 1)
    call.machine.filter_changed()


def _page(call: Call) -> int:
    if call.first % PAGE_SIZE or call.second:
        raise Refused(errno.EINVAL, f"table {call.first:#x} with value {call.second:#x}")
    return call.first // PAGE_SIZE


_OPERATIONS: dict[int, Callable[[Call, TableGuard], Generator[Protect, int, None]]] = {
    PageTableOperation.WRITE: _write,
    PageTableOperation.ADD_ROOT: _add_root,
    PageTableOperation.RELEASE: _release,
}
