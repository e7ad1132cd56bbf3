"""Code that one processor writes and another has translated.

An engine notices its own stores to code and nobody else's. Once a second processor runs, no page is writable and
executable at once for the engines (nested.py, Shown): a fetch makes it executable and not writable, a store writable
and not executable, and with that every engine forgets the page's code. The guest sees nothing of it.

A page that holds both code and data that change would fault for ever; after a few rounds it is shown with all its
rights and watched instead: whenever another processor takes its turn, the page is compared with what it was when that
processor last ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vtl0_guest.cpu.nested import ADDRESS, NX, RW, NestedTable, P, Shown
from vtlab.v1 import vcpu_pb2

_WRITE, _EXECUTE = vcpu_pb2.ACCESS_KIND_WRITE, vcpu_pb2.ACCESS_KIND_EXECUTE
# Stores to a page of code before it is watched, and pages that are watched at once.
_ROUNDS = 4
_WATCHED = 32


class Engine(Protocol):
    def invalidate_pages(self, frame: int, count: int, /) -> None: ...

    def flush_code(self) -> None: ...


class Coherence:
    """Keeps the translated code of a machine's engines equal to memory.

    Attributes:
        active: more than one processor has run.
    """

    def __init__(self, nested: NestedTable, engines: Sequence[Engine], content: Callable[[int], bytes | None]) -> None:
        """`content` gives the bytes of a guest page; None where nothing is mapped."""
        self.active = False
        self._nested = nested
        self._engines = engines
        self._content = content
        self._last: int | None = None
        self._rounds: dict[int, int] = {}
        # Watched page -> what it was when each engine last ran.
        self._watched: dict[int, list[bytes | None]] = {}

    def run(self, number: int) -> None:
        """Engine `number` is about to run."""
        last = self._last
        if last == number:
            return
        self._last = number
        if last is None:
            return
        if not self.active:
            self.active = True
            for engine in self._engines:
                engine.flush_code()
            self._nested.divide()
            return
        for page in list(self._watched):
            if self._nested.shown(page) is Shown.ALL:
                self._compare(page, last, number)
            else:
                del self._watched[page]  # its rights were changed

    def _compare(self, page: int, last: int, number: int) -> None:
        seen, now = self._watched[page], self._content(page)
        seen[last] = now
        if seen[number] is None or seen[number] != now:
            self._engines[number].invalidate_pages(self._nested.entry(page) & ADDRESS, 1)

    def allow(self, page: int, access: vcpu_pb2.AccessKind.ValueType, user: bool) -> bool:
        """A nested fault: whether the page has that right and is now shown with it, so that the access can be repeated.

        Args:
            user: the access was made at CPL3.
        """
        if not self.active:
            return False
        shown, entry = self._nested.shown(page), self._nested.entry(page, user)
        if not entry & P:
            return False
        if access == _EXECUTE and not entry & NX and shown is Shown.WRITABLE:
            self._nested.show(page, Shown.EXECUTABLE)
            return True
        if access == _WRITE and entry & RW and shown is Shown.EXECUTABLE:
            self._forget_code(page)
            rounds = self._rounds[page] = self._rounds.get(page, 0) + 1
            if rounds < _ROUNDS:
                self._nested.show(page, Shown.WRITABLE)
            else:
                self._watch(page)
            return True
        return False

    def _watch(self, page: int) -> None:
        while len(self._watched) >= _WATCHED:
            oldest = next(iter(self._watched))
            del self._watched[oldest]
            if self._nested.shown(oldest) is Shown.ALL:
                self._forget_code(oldest)
                self._nested.show(oldest, Shown.WRITABLE)
            self._rounds.pop(oldest, None)
        self._watched[page] = [None] * len(self._engines)
        self._nested.show(page, Shown.ALL)

    def _forget_code(self, page: int) -> None:
        frame = self._nested.entry(page) & ADDRESS
        for engine in self._engines:
            engine.invalidate_pages(frame, 1)
