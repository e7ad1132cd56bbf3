"""Devices that a machine has only if its specification names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmm.board import Board
from vmm.devices import hyperv_testdev
from vmm.devices.bus import PortDevice
from vtlab.errors import BadArgument

_TABLE: dict[str, Callable[[Board], PortDevice]] = {
    hyperv_testdev.NAME: lambda board: hyperv_testdev.HypervTestDevice(
        board.connections, board.spec.vp_count, board.tell
    ),
}
NAMES = tuple(_TABLE)


def check(names: Iterable[str]) -> None:
    """Raises BadArgument for a name that no device has."""
    for name in names:
        if name not in _TABLE:
            raise BadArgument(f"device '{name}'", f"is not one of {', '.join(NAMES)}")


def build(board: Board) -> list[PortDevice]:
    """Those that the machine's specification names."""
    return [_TABLE[name](board) for name in dict.fromkeys(board.spec.devices)]
