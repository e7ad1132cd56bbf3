"""What a process finds on its disk when it starts: the VMM's journal, the monitor's sealed store.

All of it may be truncated, damaged, of a newer version, or somebody else's. It is refused with a
reason, or is what it was.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from tests.fuzz.making import RAM, Maker
from tests.fuzz.target import Defect, Target, mutated
from tests.unit.vmm.fakes import FakeLevel
from vmm.events import EventLog
from vmm.images import ImageStore
from vmm.journal import Journal
from vmm.machines import Machines
from vmm.memory import Memory
from vmm.past import Past
from vtl1_monitor.keeper import Keeper
from vtl1_monitor.sealed import BrokenSeal, SealedStore
from vtl1_monitor.snapshot import Sealed
from vtlab.errors import VtlabError
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.journal_pb2 import MachineRecord, PartitionRecord, VcpuRecord
from vtlab.v1.vmm_pb2 import Event


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """Cut short, bits flipped, or changed in more places."""
    kind = rng.random()
    if kind < 0.3:
        return data[: rng.randrange(len(data) + 1)]
    if kind < 0.6:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return mutated(rng, [data], 1 << 20)


class JournalTarget(Target):
    """A journal of a machine that worked: the file damaged, or whole with records that no VMM would write."""

    _KINDS: tuple[tuple[str, type[Message]], ...] = (
        ("machine", MachineRecord),
        ("partition", PartitionRecord),
        ("vcpu/0", VcpuRecord),
        ("vcpu/1", VcpuRecord),
    )

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtlab-fuzz-")
        root = Path(self._folder.name)
        (root / "lived").mkdir()
        sha256, _ = ImageStore(root / "lived" / "images").add([b"\xf4"])
        journal = Journal(root / "lived" / "journal")
        machines = Machines(root / "lived", lambda vtl, present=True: FakeLevel(vtl), journal)
        spec = vmm_pb2.MachineSpec(ram_size=RAM, vp_count=2, vtl1=True, image=vcpu_pb2.BootImage(sha256=sha256))
        machine = machines.create("vm", spec)
        machine.start()
        machine.pause()
        self._records = journal.read("vm")
        self._events = [Event.FromString(data) for data in journal.events("vm")[0]]
        known: dict[str, list[Any]] = {"vm": ["vm"], "vp_count": [2], "ram_size": [RAM]}
        self._makers = {name: Maker(kind, known) for name, kind in self._KINDS}
        machine.stop()
        journal._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._whole = (root / "lived" / "journal").read_bytes()
        self._journal = journal
        self._path = root / "journal"
        self._memory = root / "memory"
        Memory(self._memory_folder(), RAM, lambda _pages: None).close()
        self._machine = machine

    def _memory_folder(self) -> Path:
        self._memory.mkdir()
        return self._memory

    def close(self) -> None:
        self._machine.destroy()
        self._journal.close()
        self._folder.cleanup()

    def step(self, rng: random.Random) -> str:
        for name in ("journal", "journal-wal", "journal-shm"):
            self._path.with_name(name).unlink(missing_ok=True)
        kind = rng.random()
        if kind < 0.4:
            self._path.write_bytes(_damaged(rng, self._whole))
        else:
            self._path.write_bytes(self._whole)
            if kind < 0.45:
                with closing(sqlite3.connect(self._path)) as database:
                    database.execute(f"PRAGMA user_version = {rng.choice((0, 2, 99, -1))}")
            else:
                self._records_of_another(rng)
        try:
            journal = Journal(self._path)
        except VtlabError:
            return "refused"
        with closing(journal):
            return self._read(journal)

    def _records_of_another(self, rng: random.Random) -> None:
        """SQLite finds nothing wrong with it."""
        with closing(sqlite3.connect(self._path, isolation_level=None)) as database:
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice([*self._makers, "pages/0"])
                maker = self._makers.get(name)
                old = self._records.get(name, b"\0" * 64)
                data = _damaged(rng, old) if maker is None or rng.random() < 0.5 else maker.data(rng)
                value: object = data if rng.random() < 0.95 else rng.choice(("text", 7, None, 1.5))
                with suppress(sqlite3.IntegrityError):
                    database.execute("INSERT OR REPLACE INTO records VALUES ('vm', ?, ?)", (name, value))
            if rng.random() < 0.2:
                odd = rng.choice((b"", b"\xff" * 9, "text", 3))
                database.execute("UPDATE events SET data = ? WHERE sequence % 2", (odd,))

    def _read(self, journal: Journal) -> str:
        """All that a VMM reads before it speaks to a level."""
        try:
            machines = journal.machines()
            for vm in machines:
                past = Past(journal, vm)
                EventLog(vm, journal.numbers(), kept=past.events).kept()
                Memory.reopened(self._memory, RAM, lambda _pages: None, past.pages).close()
                past.restore(self._machine._new_board())
        except VtlabError:
            return "refused when it was read"
        except (ValueError, OSError):  # as Machines.revive takes them
            return "no such machine"
        return f"{len(machines)} machines"


class SealedTarget(Target):
    """The sealed store, its counter and its key."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtlab-fuzz-")
        self._path = Path(self._folder.name)
        store = SealedStore(self._path)
        keeper = Keeper(store)
        sessions = [(1, b"enter", b"exit")]
        keeper.sealed = Sealed(b"request", bytes(range(256)) * 8, sessions, None, {"vm": ("text", "name")})
        self._before: dict[str, bytes] = {}
        for _ in range(3):
            keeper._seal()
            self._old, self._before = self._before, self._files()
        self._content = store.unseal()

    def close(self) -> None:
        self._folder.cleanup()

    def _files(self) -> dict[str, bytes]:
        return {name: (self._path / name).read_bytes() for name in ("sealed", "sealed.counter", "sealed.key")}

    def step(self, rng: random.Random) -> str:
        files = dict(self._before)
        name = rng.choice(("sealed", "sealed", "sealed", "sealed.counter", "sealed.key"))
        kind = rng.random()
        if kind < 0.1:
            files["sealed"] = self._old["sealed"]
        elif kind < 0.2:
            files["sealed"] = files["sealed"].replace(b"sealed 2", b"sealed 3", 1)
        elif kind < 0.25:
            del files[name]
        else:
            files[name] = _damaged(rng, files[name])
        for one in self._before:
            (self._path / one).unlink(missing_ok=True)
        for one, data in files.items():
            (self._path / one).write_bytes(data)
        try:
            store = SealedStore(self._path)
            content = store.unseal()
            loaded = Keeper(store).load()
        except BrokenSeal:
            return "refused"
        if content is None:
            return "nothing is sealed"
        # With its own key and content, and a counter that is not above it, it is the one that was sealed.
        if content != self._content or loaded is None or files["sealed"] != self._before["sealed"]:
            raise Defect(f"a store that was changed is believed ({name})")
        return "as it was sealed"
