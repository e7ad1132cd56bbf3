"""What a machine did, in a few lines: its exits, what was decided on them, switches of level, the guest's answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum

from pydantic import BaseModel, ConfigDict

from vtlab.client.describe import detail
from vtlab.client.names import event_name
from vtlab.client.symbols import Symbols
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.services import Service
from vtlab.v1 import vmm_pb2

LINES = 200  # of one cell; the middle counts least
# How a mark ends that stands for lines which are not told.
LEFT_OUT = ("lines left out", " times")
LOOP_LINES, LOOP_TIMES = 6, 8  # so few lines, so often, are a loop
COMMAND_PORT = 1

_RIP = re.compile(r"at RIP (0x[0-9a-f]+)")
_HYPERCALL = re.compile(r"^hypercall (0x[0-9a-f]+)")
_SERVICE = re.compile(r"^(call|return) (0x[0-9a-f]+)$")


class Line(BaseModel):
    """One thing, or the same thing several times.

    Attributes:
        at: milliseconds since the guest was ready.
        kind: of the event, or "mark" where a part of the cell begins.
        vtl: whose it is.
        text: for people.
        times: how often in a row.
    """

    model_config = ConfigDict(frozen=True)

    at: int
    kind: str
    vtl: int = 0
    vp: int = 0
    text: str
    times: int = 1


def lines(
    events: Iterable[vmm_pb2.Event], marks: Sequence[tuple[int, str]], symbols: Symbols, limit: int = LINES
) -> tuple[Line, ...]:
    """The events since the first mark, the same again as a number of times.

    Args:
        marks: when which part of the cell began, in nanoseconds since the epoch; nothing is told before the first.
        symbols: to name where something happened.
        limit: lines; where there are more, those in the middle go.
    """
    start = marks[0][0] if marks else 0
    pending = list(marks)
    told: list[Line] = []
    unfinished = ""  # of an answer that arrives in pieces
    for event in events:
        when = event.time.ToNanoseconds()
        while pending and pending[0][0] <= when:
            moment, name = pending.pop(0)
            told.append(Line(at=(moment - start) // 1_000_000, kind="mark", text=name))
        if when < start:
            continue
        text = _text(event, symbols)
        if event.HasField("serial"):
            *whole, unfinished = (unfinished + text).split("\n")
            text = "; ".join(whole)
        if not text:
            continue
        line = Line(
            at=(when - start) // 1_000_000,
            kind=event_name(event.kind),
            vtl=event.vtl,
            vp=event.vp_index,
            text=text,
        )
        if told and told[-1].model_copy(update={"at": line.at, "times": 1}) == line:
            told[-1] = told[-1].model_copy(update={"times": told[-1].times + 1})
        else:
            told.append(line)
    told += [Line(at=(moment - start) // 1_000_000, kind="mark", text=name) for moment, name in pending]
    told = _without_loops(told)
    if len(told) <= limit:
        return tuple(told)
    head = limit // 2
    tail = len(told) - (limit - head - 1)
    gap = Line(at=told[head].at, kind="mark", text=f"{tail - head} lines left out")
    return (*told[:head], gap, *told[tail:])


def _without_loops(told: list[Line]) -> list[Line]:
    """A guest that does the same few things for ever, as one that resets itself, is told once, with a count."""
    kept: list[Line] = []
    same = [(line.kind, line.vtl, line.vp, line.text) for line in told]
    at = 0
    while at < len(told):
        for size in range(2, LOOP_LINES + 1):
            end = at + size
            while same[end : end + size] == same[at : at + size]:
                end += size
            if end - at >= LOOP_TIMES * size:
                break
        else:
            kept.append(told[at])
            at += 1
            continue
        times = (end - at) // size
        again = Line(at=told[end - 1].at, kind="mark", text=f"the {size} lines above again, {times - 1} times")
        kept += [*told[at : at + size], again]
        at = end
    return kept


def _text(event: vmm_pb2.Event, symbols: Symbols) -> str:
    """Nothing for what has a place of its own: the kernel's log."""
    if event.HasField("serial"):
        return event.serial.data.decode("latin-1").replace("\r", "") if event.serial.port == COMMAND_PORT else ""
    told = _RIP.sub(lambda found: f"at {symbols.describe(int(found[1], 16))}", detail(event))
    told = _HYPERCALL.sub(lambda found: f"hypercall {_name(HypercallCode, int(found[1], 16) & 0xFFFF)}", told)
    return _SERVICE.sub(lambda found: f"{found[1]} {_name(Service, int(found[2], 16))}", told)


def _name(kind: type[IntEnum], number: int) -> str:
    return kind(number).name if number in set(kind) else f"{number:#x}"
