"""What a machine did, in lines."""

from __future__ import annotations

from typing import Any

import pytest

from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import Cpuid, Exit, SerialOutput
from vtlab_attacks.guest import kernel_symbols
from vtlab_matrix.timeline import lines

MS = 1_000_000


def event(ms: int, **detail: Any) -> vmm_pb2.Event:
    kinds = {"serial": vmm_pb2.EVENT_KIND_SERIAL, "vtl_event": vmm_pb2.EVENT_KIND_VTL, "exit": vmm_pb2.EVENT_KIND_EXIT}
    one = vmm_pb2.Event(kind=kinds[next(iter(detail))], **detail)
    one.time.FromNanoseconds(ms * MS)
    return one


def call(ms: int, code: int = 17) -> vmm_pb2.Event:
    return event(ms, vtl_event=vmm_pb2.VtlEvent(what="call", code=code))


def test_marks_stand_where_parts_begin_and_nothing_is_told_before_the_first() -> None:
    told = lines(
        [call(1), call(12), call(31)], [(10 * MS, "one"), (20 * MS, "two"), (40 * MS, "three")], kernel_symbols()
    )
    assert [(line.at, line.text) for line in told] == [
        (0, "one"),
        (2, "call 0x11"),
        (10, "two"),
        (21, "call 0x11"),
        (30, "three"),
    ]


def test_the_same_again_is_counted() -> None:
    told = lines([call(1), call(2), call(3), call(4, 18)], [(0, "one")], kernel_symbols())
    assert [(line.text, line.times) for line in told] == [("one", 1), ("call 0x11", 3), ("call 0x12", 1)]


def test_lines_in_the_middle_go_first() -> None:
    told = lines([call(number, 100 + number) for number in range(100)], [(0, "one")], kernel_symbols(), limit=10)
    texts = [line.text for line in told]
    assert texts[:2] == ["one", "call 0x64"]
    assert texts[5] == "92 lines left out"
    assert len(texts) == 10
    assert texts[-1] == "call 0xc7"


def test_a_loop_is_told_once() -> None:
    events = [call(number, (0x20, 0x21, 0x22)[number % 3]) for number in range(300)]
    told = lines([*events, call(301, 0x30)], [(0, "one")], kernel_symbols())
    assert [line.text for line in told] == [
        "one",
        "call 0x20",
        "call 0x21",
        "call 0x22",
        "the 3 lines above again, 99 times",
        "call 0x30",
    ]


def test_services_and_hypercalls_have_names() -> None:
    assert lines([call(1, 0x1FF05)], [], kernel_symbols())[0].text == "call PING"


@pytest.mark.parametrize(("port", "told"), [(0, []), (1, ["ok 0x1"])])
def test_of_serial_output_only_answers_are_told(port: int, told: list[str]) -> None:
    said = event(1, serial=SerialOutput(port=port, data=b"ok 0x1\n"))
    assert [line.text for line in lines([said], [], kernel_symbols())] == told


def test_an_answer_in_pieces_is_one_line() -> None:
    pieces = [event(ms, serial=SerialOutput(port=1, data=data)) for ms, data in ((1, b"fault ve"), (2, b"ctor=13\nok"))]
    assert [line.text for line in lines(pieces, [], kernel_symbols())] == ["fault vector=13"]


def test_places_have_names() -> None:
    symbols = kernel_symbols()
    one = Exit(cpuid=Cpuid(leaf=1))
    one.registers.rip = symbols["gadget_mov_cr4"]
    assert [line.text for line in lines([event(1, exit=one)], [], symbols)] == ["CPUID 0x1.0x0 at gadget_mov_cr4"]
