"""One level of one machine: its engines, its memory as the nested table shows it, its devices and its timer."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vtl0_guest.cpu import hypercall_page, msrs, startup
from vtl0_guest.cpu.coherence import Coherence
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.devices.bus import Platform
from vtl0_guest.cpu.devices.virtual_clock import VirtualClock
from vtl0_guest.cpu.engine import Engine, Region
from vtl0_guest.cpu.faults import NestedFault
from vtl0_guest.cpu.guest_memory import PhysicalMemory
from vtl0_guest.cpu.hyperv.virtual_processor import Partition
from vtl0_guest.cpu.level_turns import LevelTurns
from vtl0_guest.cpu.nested import (
    ADDRESS,
    EXTRA_BASE,
    MAX_DETOURS,
    PRIVATE_BASE,
    REGION_SHIFT,
    SCRATCH_BASE,
    SEALED_BASE,
    SMRAM_BASE,
    WRITABLE_BASE,
    NestedTable,
    P,
)
from vtl0_guest.cpu.processor import Processor
from vtl0_guest.cpu.schedule import Schedule
from vtl0_guest.cpu.smm import memory as smram
from vtl0_guest.cpu.smm.memory import Smram
from vtl0_guest.cpu.turns import Turns
from vtlab import errors
from vtlab.ram import PAGE_SIZE, Ram, RamFile
from vtlab.v1 import vcpu_pb2

_BASES = {RamFile.WRITABLE: WRITABLE_BASE, RamFile.SEALED: SEALED_BASE, RamFile.PRIVATE: PRIVATE_BASE}
_STORES = {
    vcpu_pb2.PAGE_STORE_WRITABLE: RamFile.WRITABLE,
    vcpu_pb2.PAGE_STORE_SEALED: RamFile.SEALED,
    vcpu_pb2.PAGE_STORE_PRIVATE: RamFile.PRIVATE,
}
_ALL = vcpu_pb2.PageAccess(read=True, write=True, kernel_execute=True, user_execute=True)
_READ_EXECUTE = vcpu_pb2.PageAccess(read=True, kernel_execute=True, user_execute=True)
# Serial output waits this long for another exit, in seconds.
_OUTPUT_DELAY = 0.010
# Seconds for which a timer of VTL0 waits, in steps, for VTL1 to come in for something that was due before.
_GIVE_PRECEDENCE, _STEP = 10.0, 0.001
# CPU time that this process must have had since a timer was set before the timer fires into a processor that runs, in
# seconds and as a part of the timer's own time; and for how long it waits for that.
_OWN_TIME, _OWN_PART, _OWN_PATIENCE = 0.002, 0.5, 10.0
# From so many runs on, translated code between them is forgotten too: one call for all.
_MANY_RUNS = 64


class _Buffer(ctypes.Structure):
    """Py_buffer, as far as the address (Python's C API, stable ABI)."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("object", ctypes.py_object),
        ("length", ctypes.c_ssize_t),
        ("rest", ctypes.c_byte * 64),
    )


def _address(view: mmap.mmap) -> int:
    """Host address of a mapping, also of a read-only one."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address = buffer.address
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return int(address or 0)


class Core:
    """The processors of one level of one machine.

    `ram` must outlive the core. Initially every page is in the writable file with all rights.

    Attributes:
        reference: the partition reference time.
        nested: the nested page table that all processors share.
        scratch: pages that stand for device registers during one instruction (device_memory.py).
        turns: of the processors; one runs at a time.
        coherence: sees to code that one processor writes and another runs.
        carrier: the processor whose last exit carried serial output, until it is entered again. Others carry none
            meanwhile, so that whoever takes exits on several threads gets the output in order.
        output_waits: the guest has written serial output that no exit has carried away.
        shares_state: every exit carries what the levels of a vCPU share, since the other level runs guest code too.
    """

    shares_state = False

    def __init__(
        self,
        ram: Ram,
        vp_count: int,
        vtl: int,
        platform: Platform,
        reference_start: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Builds it; nothing runs yet.

        Args:
            reference_start: the platform clock's time at which the partition reference counter is 0; None: now.
            seed: runs repeat (schedule.py); the platform's clock is a VirtualClock then.

        Raises EngineUnsupported (vtl0_guest.cpu.unicorn_library) if this Unicorn is not the known one.
        """
        self.platform = platform
        self.vtl = vtl
        self.nested = NestedTable(ram.size, ram.size, vp_count)
        with ExitStack() as held:
            self.turns = self._new_turns(seed)
            self._ram = ram
            self._overlay = mmap.mmap(-1, PAGE_SIZE)
            self._overlay[:] = hypercall_page.content()
            self._overlay_page: int | None = None
            # What each page has, so that taking an overlay away restores it.
            self._under_overlay: tuple[int, int] = (0, 0)
            regions = [
                Region(_BASES[file], ram.size, _address(view), not memoryview(view).readonly)
                for file, view in ram.views.items()
            ]
            regions.append(Region(EXTRA_BASE, PAGE_SIZE, _address(self._overlay), False))
            self._smram = Smram(self.nested)
            regions.append(Region(SMRAM_BASE, smram.SIZE, _address(self._smram.buffer), True))
            scratch = mmap.mmap(-1, MAX_DETOURS * PAGE_SIZE)
            self.scratch = memoryview(scratch)
            regions.append(Region(SCRATCH_BASE, len(scratch), _address(scratch), True))
            views: list[memoryview | None] = [None] * 16
            for file, view in ram.views.items():
                views[_BASES[file] >> REGION_SHIFT] = memoryview(view)
            views[SMRAM_BASE >> REGION_SHIFT] = memoryview(self._smram.buffer)
            views[EXTRA_BASE >> REGION_SHIFT] = memoryview(self._overlay).toreadonly()
            self._views = views
            held.callback(self._release_views)
            self.nested.map(0, self.nested.ram_pages, WRITABLE_BASE, _ALL)
            self._physical = physical = PhysicalMemory(self.nested, views, self._stored)
            held.callback(physical.close)
            partition = Partition(platform.clock, physical, vp_count, reference_start)
            self.reference = partition.reference
            self._processors = []
            for index in range(vp_count):
                engine = Engine(regions, self.nested, counts=seed is not None)
                held.callback(engine.close)
                shadows = msrs.initial_shadows()
                context = Context(index, vp_count, vtl, engine, physical, platform, shadows, partition)
                context.random.seed(f"{seed} {index}")
                context.show_smram = partial(self.show_smram, context)
                self._processors.append(Processor(self, context))
                self._hide_device_pages(context)
                if index:
                    startup.init(context)
            engines = [processor.context.engine for processor in self._processors]
            if isinstance(self.turns, Schedule):
                self.turns.count(engines)
            self.coherence = Coherence(self.nested, engines, self._content)
            self.carrier: int | None = None
            self._closed = False
            self.output_waits = False
            self._timer_changed = threading.Condition()
            self._rearmed = False
            self._precedence_until: float | None = None
            self._announcing = threading.Lock()
            # When timers were set that the timer thread has not looked at yet: time.monotonic(), time.process_time().
            self._set_at = 0.0, 0.0
            platform.on_wake = self._wake
            platform.on_deadline = self._rearm
            self._timer = threading.Thread(target=self._run_timer, name=f"vtl{vtl}-timer", daemon=True)
            if not isinstance(self.turns, Schedule):
                self._timer.start()
            held.callback(self.turns.close)
            self._held = held.pop_all()

    def _new_turns(self, seed: int | None) -> Turns | Schedule:
        if seed is None:
            return Turns()
        assert isinstance(self.platform.clock, VirtualClock), "runs repeat in virtual time only"
        return Schedule(self.platform.clock, seed, self._deadline, self._let_pass)

    def share(self, turn_file: Path) -> None:
        """The other level of each processor runs guest code too, in another process. Raises OSError."""
        self.shares_state = True
        self.turns.levels = LevelTurns(turn_file, self.vtl, self.turns.preempt)

    def sleep(self, vp_index: int) -> None:
        """S3, asked for by the processor that has the turn."""
        for other in self._processors:
            if other.context.vp_index != vp_index:
                other.park()
        self.platform.power.fall_asleep()

    def show_smram(self, context: Context) -> None:
        """What this processor sees at SMRAM's addresses; it is the one that has the turn."""
        self._smram.show(self.platform.smram.shows(context.smm.active))

    def processor(self, vp_index: int) -> Processor:
        """Raises BadArgument for an index that the machine does not have."""
        if not 0 <= vp_index < len(self._processors):
            raise errors.BadArgument(f"vCPU {vp_index}", f"the machine has {len(self._processors)}")
        return self._processors[vp_index]

    def close(self) -> None:
        """Ends the timer and lets go of the memory. No processor may be running."""
        with self._timer_changed:
            self._closed = True
            self._timer_changed.notify_all()
        if self._timer.is_alive():
            self._timer.join()
        self.platform.on_wake = lambda _vp_index: None
        self.platform.on_deadline = lambda: None
        self._processors.clear()
        self._held.close()

    def _release_views(self) -> None:
        """Else they would keep the memory mapped."""
        self.scratch.release()
        for view in self._views:
            if view is not None:
                view.release()

    # --------------------------------------------------------------------------------------------------- memory

    def protect(self, update: vcpu_pb2.ProtectionUpdate) -> None:
        """Programs the nested entries of runs of pages. Raises BadArgument; nothing is programmed then."""
        runs = list(zip(update.runs[::2], update.runs[1::2], strict=False))
        if len(update.runs) % 2 or any(first + count > self.nested.ram_pages for first, count in runs):
            raise errors.BadArgument("ProtectionUpdate.runs", f"not pairs within {self.nested.ram_pages:#x} pages")
        self._smram.show(False)
        access = update.access
        none = not (access.read or access.write or access.kernel_execute or access.user_execute or access.page_table)
        file = _STORES.get(update.store)
        if none:
            access, base = vcpu_pb2.PageAccess(), WRITABLE_BASE
        elif file is None or file not in self._ram.views:
            raise errors.BadArgument("ProtectionUpdate.store", f"{update.store} is not open in this process")
        else:
            base = _BASES[file]
            if access.write and self._views[base >> REGION_SHIFT].readonly:  # type: ignore[union-attr]
                raise errors.BadArgument("ProtectionUpdate.access", f"{file.value} cannot be written by this process")
        self.nested.map_runs(runs, base, access)
        changes_code = bool(runs) and (access.kernel_execute or access.user_execute)
        for processor in self._processors:
            self._hide_device_pages(processor.context)
            if changes_code:
                self._invalidate_runs(processor.context.engine, base, runs)
        if self._overlay_page is not None and any(first <= self._overlay_page < first + count for first, count in runs):
            self._place_overlay(self._overlay_page)

    @staticmethod
    def _invalidate_runs(engine: Engine, base: int, runs: Sequence[tuple[int, int]]) -> None:
        if len(runs) > _MANY_RUNS:
            low, high = min(first for first, _ in runs), max(first + count for first, count in runs)
            runs = [(low, high - low)]
        for first, count in runs:
            engine.invalidate_pages(base + first * PAGE_SIZE, count)

    def invalidate_code(self, gfns: Iterable[int]) -> None:
        """Forgets translated code of these guest pages; of all, if there are none."""
        pages = list(gfns)
        for processor in self._processors:
            engine = processor.context.engine
            if not pages:
                engine.flush_code()
            for page in pages:
                if page < self.nested.ram_pages:
                    for file in self._ram.views:
                        engine.invalidate_pages(_BASES[file] + page * PAGE_SIZE, 1)

    def _content(self, page: int) -> bytes | None:
        """The bytes of a guest page, or None."""
        try:
            return self._physical.read(page * PAGE_SIZE, PAGE_SIZE)
        except NestedFault:
            return None

    def _stored(self, page: int) -> None:
        """The core wrote to a page itself: code that was translated from it is stale."""
        frame = self.nested.entry(page) & ADDRESS
        for processor in self._processors:
            processor.context.engine.invalidate_pages(frame, 1)

    def _hide_device_pages(self, context: Context) -> None:
        """RAM never shows through the registers of a device."""
        for page in context.device_pages():
            if self.nested.entry(page):
                self.nested.map(page, 1, WRITABLE_BASE, vcpu_pb2.PageAccess())

    def set_hypercall_page(self, update: vcpu_pb2.HypercallPage) -> None:
        """Places, moves or takes away the overlay. Raises BadArgument for a page outside RAM."""
        if update.enabled and update.gfn >= self.nested.ram_pages:
            raise errors.BadArgument(f"hypercall page {update.gfn:#x}", "is outside RAM")
        self._smram.show(False)
        if self._overlay_page is not None:
            self.nested.restore(self._overlay_page, self._under_overlay)
            self._overlay_page = None
        if update.enabled:
            self._place_overlay(update.gfn)

    def _place_overlay(self, page: int) -> None:
        self._under_overlay = (self.nested.entry(page), self.nested.entry(page, user=True))
        self._overlay_page = page
        self.nested.map(page, 1, EXTRA_BASE - page * PAGE_SIZE, _READ_EXECUTE)

    def is_overlay(self, gpa: int) -> bool:
        return self._overlay_page is not None and gpa >> 12 == self._overlay_page

    def gpa_of(self, system_physical: int) -> int | None:
        """Guest-physical address of a place in a RAM file or in the overlay."""
        if system_physical >> REGION_SHIFT == EXTRA_BASE >> REGION_SHIFT:
            page = self._overlay_page
            return None if page is None else page << 12 | system_physical & 0xFFF
        if system_physical >> REGION_SHIFT == SMRAM_BASE >> REGION_SHIFT:
            return self._smram.gpa_of(system_physical)
        gpa = system_physical & (1 << REGION_SHIFT) - 1
        entry = self.nested.entry(gpa >> 12)
        return gpa if entry & P and entry & ADDRESS == system_physical & ADDRESS else None

    # --------------------------------------------------------------------------------------------------- devices

    def serial_input(self, update: vcpu_pb2.SerialInput) -> None:
        """Raises BadArgument for a port that is not there."""
        try:
            self.platform.serial.receive(update.port, update.data)
        except IndexError:
            raise errors.BadArgument(f"serial port {update.port}", "does not exist") from None

    def _wake(self, vp_index: int) -> None:
        self.announce_due()
        if vp_index < len(self._processors):
            self._processors[vp_index].wake()

    def announce_due(self) -> None:
        """Tells the lower level when this one has to come in, if both run guest code."""
        levels = self.turns.levels
        if levels is None or not self.vtl:
            return
        with self._announcing:
            waits = any(
                not processor.entered
                and (processor.context.hyperv.synic.due or self.platform.pending_vector(index) is not None)
                for index, processor in enumerate(self._processors)
            )
            levels.announce_due(0.0 if waits else self.platform.next_deadline())

    def _starved(self, due: float, set_at: tuple[float, float]) -> bool:
        """Whether a processor runs and the host has not let it run, to speak of, since the timer was set.

        A guest that sets a timer and then does something of microseconds has that done when the timer fires, however
        much else the host has to do. On an idle host nothing waits for this.
        """
        moment, used = set_at
        own = min(_OWN_TIME, _OWN_PART * (due - moment))
        late = time.monotonic() - due < _OWN_PATIENCE
        return late and self.turns.busy and time.process_time() - used < own

    def _higher_level_first(self, due: float) -> bool:
        """Whether what is due has to wait because the other level has to come in before."""
        levels = self.turns.levels
        if levels is None or self.vtl or not levels.due_before(due):
            self._precedence_until = None
            return False
        now = time.monotonic()
        if self._precedence_until is None:
            self._precedence_until = now + _GIVE_PRECEDENCE
        return now < self._precedence_until

    def _rearm(self) -> None:
        self.announce_due()
        if isinstance(self.turns, Schedule):
            self.turns.rearm()
            return
        with self._timer_changed:
            if not self._rearmed:
                self._set_at = time.monotonic(), time.process_time()
            self._rearmed = True
            self._timer_changed.notify_all()

    def carrier_returned(self) -> None:
        """The output that an exit carried has been taken."""
        self.carrier = None
        for processor in self._processors:
            processor.release()

    def look_again(self) -> None:
        """A processor that is no longer entered has messages to deliver: the timer must look at it."""
        self._rearm()

    def output_started(self) -> None:
        """Serial output waits: the timer must look at it."""
        self.output_waits = True
        self._rearm()

    def _run_timer(self) -> None:
        """Lets time pass for the devices, and sends serial output on its way."""
        platform = self.platform
        seen, set_at = 0.0, self._set_at
        while True:
            with self._timer_changed:
                if self._closed:
                    return
                self._rearmed = False  # what changes from here on is seen before the wait
                latest = self._set_at
            for processor in self._processors:
                processor.serve_while_away()
            now = platform.clock.now()
            due = self._deadline()
            if due is not None and due != seen:
                seen, set_at = due, latest
            if due is None or due > now:
                with self._timer_changed:
                    if not self._rearmed and not self._closed:
                        self._timer_changed.wait(None if due is None else due - now)
                continue
            if self._higher_level_first(due) or self._starved(due, set_at):
                with self._timer_changed:
                    self._timer_changed.wait(_STEP)
                continue
            if self._let_pass(now):
                with self._timer_changed:
                    self._timer_changed.wait(_OUTPUT_DELAY)

    def _deadline(self) -> float | None:
        """Clock.now() at which _let_pass() has something to do."""
        unsent = self.platform.serial.first_unsent
        deadlines = (self.platform.next_deadline(), None if unsent is None else unsent + _OUTPUT_DELAY)
        return min((moment for moment in deadlines if moment is not None), default=None)

    def _let_pass(self, now: float) -> bool:
        """Does what is due until a moment; True if serial output is."""
        unsent = self.platform.serial.first_unsent
        self.platform.advance(now)
        if unsent is None or unsent + _OUTPUT_DELAY > now:
            return False
        for processor in self._processors:
            processor.collect_output()
        return True
