"""The records of engines in the functions that are replaced for the whole process."""

from __future__ import annotations

import gc
from pathlib import Path

from tests.unit.cpu.machine import RAM_SIZE, Guest
from vtl0_guest.cpu import native_memory
from vtlab.ram import Ram, create_ram_files


def _named() -> set[int]:
    """Engines that records name."""
    return {record.engine for record in native_memory._this_process()._records if record.engine}


def test_an_engine_that_is_dropped_takes_its_record_along(tmp_path: Path) -> None:
    """Bug: the next engine at the same address was taken for it, and its code was noted in memory that was gone.

    That ended the process, or changed a byte of something else.
    """
    create_ram_files(tmp_path, RAM_SIZE)
    gc.collect()
    before = _named()
    with Ram(tmp_path, RAM_SIZE, "vtl0") as ram:
        guest = Guest(ram, tmp_path, seed=1)  # no timer that would hold on to it
        assert len(_named() - before) == 1
        del guest
        gc.collect()
        assert _named() == before
