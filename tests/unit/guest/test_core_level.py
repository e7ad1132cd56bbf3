"""What a level leaves behind that is closed, or whose attach failed: nothing."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from vtl0_guest.cpu import core
from vtl0_guest.cpu.engine import Engine
from vtl0_guest.cpu.processor import Processor
from vtl0_guest.server import CoreLevel
from vtlab.ram import create_ram_files
from vtlab.v1 import registers_pb2, vcpu_pb2

RAM_SIZE = 2 << 20


def opened_below(folder: Path) -> list[str]:
    """Descriptors of this process that lead there; a mapping has one of its own."""
    places = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            places.append(str(entry.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return [place for place in places if place.startswith(str(folder))]


class Broken(Exception):
    """Something that cannot be done."""


def attach_request(folder: Path) -> vcpu_pb2.AttachRequest:
    create_ram_files(folder, RAM_SIZE)
    state = registers_pb2.ProcessorState()
    return vcpu_pb2.AttachRequest(vm="one", vp_count=1, ram_size=RAM_SIZE, memory_directory=str(folder), start=state)


def fails(*_arguments: object, **_named: object) -> None:
    raise Broken


@pytest.mark.parametrize(
    ("owner", "name"),
    [(core, "Processor"), (core, "Coherence"), (Processor, "load_state")],
    ids=["half a core", "nearly a core", "no first state"],
)
def test_memory_is_closed_wherever_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    request = attach_request(tmp_path)
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(Broken):
        CoreLevel(request)
    assert opened_below(tmp_path) == []


def test_an_engine_goes_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds all memory that it made, so it cannot wait for the collector of cycles."""
    engines: list[weakref.ref[object]] = []
    map_memory = Engine._map_memory

    def remember(engine: Engine) -> None:
        engines.append(weakref.ref(engine._uc))
        map_memory(engine)

    monkeypatch.setattr(Engine, "_map_memory", remember)
    gc.disable()
    try:
        CoreLevel(attach_request(tmp_path)).close()
        assert [engine() for engine in engines] == [None]
    finally:
        gc.enable()
    assert opened_below(tmp_path) == []
