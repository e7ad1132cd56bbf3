"""PROTECT_MEMORY: the guest takes rights from its own pages while it boots. It can only tighten the policy."""

from __future__ import annotations

import errno

from vtl1_monitor import rights
from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.rights import Change, Scattered
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
_POSSIBLE = frozenset({_READ, _READ | _WRITE, _READ | _EXECUTE})


def protect_memory(call: Call) -> Steps:
    """(pa of heki_page, number of ranges). All ranges are judged before any is applied."""
    memory = call.machine.memory
    ranges = read_ranges(memory, call.first, call.second)
    check_disjoint(ranges)
    _check(ranges)
    single = [one for one in ranges if one.epa - one.pa == PAGE_SIZE]
    changes = []
    if len(single) < len(ranges):
        for one in ranges:
            if one.size != PAGE_SIZE:
                pieces = memory.pieces(one.run)
                changes += [Change(run, *_judge(run, one.attributes, code, owner)) for run, code, owner in pieces]
    yield from protect(memory, changes, _judge_pages(memory, single))
    return 0


def _check(ranges: list[Range]) -> None:
    """Raises Refused for a range that no policy could allow."""
    for va, pa, epa, wanted in ranges:
        if (va | pa | epa) % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"range {pa:#x}-{epa:#x} is not page-aligned")
        if wanted not in _POSSIBLE:
            if wanted & ~_KNOWN or not wanted & _READ:
                raise Refused(errno.EINVAL, f"range {pa:#x}-{epa:#x} has attributes {wanted:#x}")
            raise Refused(errno.EACCES, f"range {pa:#x}-{epa:#x} would be writable and executable")


def _judge_pages(memory: GuestMemory, ranges: list[Range]) -> list[Scattered]:
    """Ranges of one page each, of which a list may have thousands: like pages are judged once."""
    pages = [pa >> 12 for _, pa, _, _ in ranges]
    wanted = [attributes for _, _, _, attributes in ranges]
    questions = list(zip(wanted, memory.codes_of(pages), memory.owners_of(pages), strict=True))
    answers = {
        question: _judge(rights.Run(pages[questions.index(question)], 1), *question) for question in set(questions)
    }
    if len(answers) == 1:
        return [Scattered(pages, *answers[questions[0]])]
    by_answer: dict[tuple[int, str], list[int]] = {}
    for page, question in zip(pages, questions, strict=True):
        by_answer.setdefault(answers[question], []).append(page)
    return [Scattered(like, *answer) for answer, like in by_answer.items()]


def _judge(run: rights.Run, wanted: int, code: int, owner: str) -> tuple[int, str]:
    """New code and owner of pages. Raises Refused if that would relax what holds, naming the run."""
    if code & rights.STORE_MASK == rights.PRIVATE or code & rights.PAGE_TABLE or owner == MODULES:
        raise Refused(errno.EACCES, f"{_place(run)} is {rights.access_text(code)}, rule '{owner}'")
    asked = _asked(wanted)
    if asked & ~code:
        raise Refused(errno.EACCES, f"{_place(run)} is {rights.access_text(code)} by rule '{owner}': cannot be relaxed")
    # As in LVBS, EXECUTE is about the kernel; user programs keep what the policy gives them.
    new = asked | code & rights.USER_EXECUTE | (rights.WRITABLE if wanted & _WRITE else rights.SEALED)
    return new, owner if new == code else OWNER


def _asked(wanted: int) -> int:
    """The rights that the attributes name."""
    asked = rights.READ if wanted & _READ else 0
    asked |= rights.WRITE if wanted & _WRITE else 0
    return asked | (rights.KERNEL_EXECUTE if wanted & _EXECUTE else 0)


def _place(run: rights.Run) -> str:
    return f"{run.first * PAGE_SIZE:#x}-{run.end * PAGE_SIZE:#x}"
