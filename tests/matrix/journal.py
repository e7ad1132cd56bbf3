"""What came of the cells of a run that has not ended yet, so that an interruption costs no cell that was done.

JSON lines: a head that says for which code, images and seed they hold, then one outcome a line.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from vtlab.errors import Conflict
from vtlab_matrix.cells import Cell
from vtlab_matrix.outcome import Outcome

# Packages whose files decide what comes of a cell: code, kernels, modules, policies.
PACKAGES = ("vtlab", "vmm", "vtl0_guest", "vtl1_monitor", "vtlab_attacks", "vtlab_matrix")
FORMAT = 1


def digest(seed: int) -> str:
    """SHA-256 over all that decides what comes of a cell."""
    total = hashlib.sha256(f"{FORMAT} {seed}".encode())
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.suffix not in (".pyc", ".pyo"):
                    total.update(f"{package}/{path.relative_to(folder)}\0".encode())
                    total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def default_path() -> Path:
    """In the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vtlab" / "matrix.jsonl"


class Journal:
    """One file, one run at a time.

    Attributes:
        done: outcomes of the interrupted run that still hold.
    """

    def __init__(self, path: Path, key: str, fresh: bool = False) -> None:
        """Opens or makes it; what belongs to other code, images or another seed is dropped.

        Args:
            key: see digest.
            fresh: drop everything.

        Raises:
            Conflict: another run writes it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Conflict(str(path), "another run writes this journal; give this one its own by --journal") from None
        self._file.seek(0)
        head = json.dumps({"journal": FORMAT, "key": key})
        rows = [] if fresh else self._file.read().split(b"\n")
        self.done: dict[Cell, Outcome] = {}
        if rows and rows[0] == head.encode():
            for row in rows[1:-1]:  # what follows the last line's end was cut short
                try:
                    outcome = Outcome.model_validate_json(row)
                except ValidationError:
                    continue
                self.done[outcome.cell] = outcome
        self._file.truncate(0)
        self._write(head)
        for outcome in self.done.values():
            self._write(outcome.model_dump_json())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Remembers what came of a cell."""
        self._write(outcome.model_dump_json())

    def finish(self) -> None:
        """The run has ended, so nothing is left to go on with."""
        self._path.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
