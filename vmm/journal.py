"""What a VMM writes down to go on after its own death: a SQLite file in WAL mode, one transaction a decision.

Guarantee: what a transaction wrote is there after kill -9 of the VMM at any instant, whole or not at all. A power cut
may take the last transactions (PRAGMA synchronous is NORMAL: the log is not flushed at each of them); guest RAM is gone
with the power anyway.

A machine is a few records by name (vmm.ledger says which), the events that last, and for each kind of them how many
older ones were dropped. This module knows nothing of their content.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vtlab.errors import InternalError

VERSION = 2
# Event numbers that are reserved at once: readers of events must never see a number twice.
BLOCK = 4096
# What a damaged file makes of any statement: the words of SQLite's own complaint may come out of it.
_DAMAGE = (sqlite3.Error, UnicodeError)
_SCHEMA = """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE records (vm TEXT, name TEXT, data BLOB NOT NULL, PRIMARY KEY (vm, name)) WITHOUT ROWID;
    CREATE TABLE events (sequence INTEGER PRIMARY KEY, vm TEXT NOT NULL, kind INTEGER NOT NULL, data BLOB NOT NULL);
    CREATE TABLE dropped (vm TEXT, kind INTEGER, count INTEGER, last INTEGER, PRIMARY KEY (vm, kind)) WITHOUT ROWID;
"""


class Journal:
    """One file. Thread-safe.

    Attributes:
        transactions: written by this object.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes it.

        Raises:
            InternalError: it is damaged or from another version; nothing in it was changed.
        """
        self._path = path
        self.transactions = 0
        self._lock = threading.RLock()
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)
            version = self._open()
        except _DAMAGE as error:
            raise self._unusable(str(error)) from None
        if version != VERSION:
            self._database.close()
            raise self._unusable(f"has version {version}, this VMM writes {VERSION}")

    def _open(self) -> int:
        execute = self._database.execute
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        if not execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone():
            self._database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
        damage = execute("PRAGMA quick_check").fetchone()
        if damage != ("ok",):
            raise sqlite3.DatabaseError(damage[0] if damage else "cannot be checked")
        return int(execute("PRAGMA user_version").fetchone()[0])

    def _unusable(self, why: str) -> InternalError:
        return InternalError(f"journal {self._path}", why)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing; within another one, part of it. Raises InternalError."""
        with self._lock:
            if self._database.in_transaction:
                yield self._database
                return
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                except BaseException:
                    self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
            except _DAMAGE as error:
                raise self._unusable(f"cannot be read or written: {error}") from None

    def write(
        self,
        vm: str,
        records: Mapping[str, bytes],
        events: Iterable[tuple[int, int, bytes]] = (),
        dropped: Mapping[int, tuple[int, int]] | None = None,
        forget: str = "",
    ) -> None:
        """One transaction.

        Args:
            records: by name, replacing those of the same name.
            events: number, kind and content of each new one.
            dropped: kind -> how many events were dropped in all, and the number of the last.
            forget: records whose names begin so are removed first.

        Raises:
            InternalError: it cannot be written; nothing was.
        """
        self.transactions += 1
        with self._transaction() as database:
            if forget:
                database.execute("DELETE FROM records WHERE vm = ? AND name GLOB ?", (vm, f"{forget}*"))
            for name, data in records.items():
                database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (vm, name, data))
            for sequence, kind, data in events:
                database.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (sequence, vm, kind, data))
            for kind, (count, last) in (dropped or {}).items():
                database.execute("INSERT OR REPLACE INTO dropped VALUES (?, ?, ?, ?)", (vm, kind, count, last))
                database.execute("DELETE FROM events WHERE vm = ? AND kind = ? AND sequence <= ?", (vm, kind, last))

    def machines(self) -> list[str]:
        """Names of all machines."""
        with self._transaction() as database:
            return [row[0] for row in database.execute("SELECT DISTINCT vm FROM records ORDER BY vm")]

    def read(self, vm: str) -> dict[str, bytes]:
        """The records of a machine by name. Raises InternalError if it is damaged."""
        with self._transaction() as database:
            rows = dict(database.execute("SELECT name, data FROM records WHERE vm = ?", (vm,)))
        self._check_types(vm, rows.values())
        return rows

    def _check_types(self, vm: str, data: Iterable[object]) -> None:
        """SQLite keeps any type in any column; none but ours was written by a VMM."""
        if not all(isinstance(one, bytes) for one in data):
            raise self._unusable(f"a record of machine '{vm}' is not of bytes")

    def events(self, vm: str) -> tuple[list[bytes], dict[int, tuple[int, int]]]:
        """The events that are kept, in order, and what was dropped (see write). Raises InternalError."""
        with self._transaction() as database:
            kept = database.execute("SELECT data FROM events WHERE vm = ? ORDER BY sequence", (vm,)).fetchall()
            rows = database.execute("SELECT kind, count, last FROM dropped WHERE vm = ?", (vm,)).fetchall()
        self._check_types(vm, (row[0] for row in kept))
        return [row[0] for row in kept], {kind: (count, last) for kind, count, last in rows}

    def forget(self, vm: str) -> None:
        """Removes a machine."""
        with self._transaction() as database:
            for table in ("records", "events", "dropped"):
                database.execute(f"DELETE FROM {table} WHERE vm = ?", (vm,))  # noqa: S608 - names of ours

    def next_event(self) -> int:
        """A number above all that were given out."""
        with self._transaction() as database:
            row = database.execute("SELECT value FROM meta WHERE name = 'event numbers'").fetchone()
            return int(row[0]) if row else 1

    def numbers(self) -> Iterator[int]:
        """Numbers of events, ascending, each given once in the life of the file."""
        while True:
            with self._transaction() as database:
                first = self.next_event()
                database.execute("INSERT OR REPLACE INTO meta VALUES ('event numbers', ?)", (first + BLOCK,))
            yield from range(first, first + BLOCK)

    @property
    def size(self) -> int:
        """Bytes of the file, without its write-ahead log."""
        return self._path.stat().st_size

    def close(self) -> None:
        with self._lock:
            self._database.close()
