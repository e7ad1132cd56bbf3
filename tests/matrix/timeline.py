"""What a machine did, in a few lines: its exits, what was decided on them, switches of level, the guest's answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from vtlab.client.describe import detail
from vtlab.client.names import event_name
from vtlab.client.symbols import Symbols
from vtlab.v1 import vmm_pb2

LINES = 80  # of one cell; the latest count most
COMMAND_PORT = 1

_RIP = re.compile(r"at RIP (0x[0-9a-f]+)")


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
    """The events since the first mark, the same again as a number of times, the last `limit` of them.

    Args:
        marks: when which part of the cell began, in nanoseconds since the epoch; nothing is told before the first.
        symbols: to name where something happened.
    """
    start = marks[0][0] if marks else 0
    pending = list(marks)
    told: list[Line] = []
    for event in events:
        when = event.time.ToNanoseconds()
        while pending and pending[0][0] <= when:
            moment, name = pending.pop(0)
            told.append(Line(at=(moment - start) // 1_000_000, kind="mark", text=name))
        if when < start:
            continue
        text = _text(event, symbols)
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
    if len(told) <= limit:
        return tuple(told)
    left_out = len(told) - limit + 1
    return (Line(at=told[0].at, kind="mark", text=f"{left_out} earlier lines left out"), *told[left_out:])


def _text(event: vmm_pb2.Event, symbols: Symbols) -> str:
    """Nothing for what has a place of its own: the kernel's log."""
    if event.HasField("serial"):
        return event.serial.data.decode("utf-8", "replace").strip() if event.serial.port == COMMAND_PORT else ""
    return _RIP.sub(lambda found: f"at {symbols.describe(int(found[1], 16))}", detail(event))
