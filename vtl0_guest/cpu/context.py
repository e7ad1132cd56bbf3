"""What instruction handlers work on: one processor's state, memory, devices and filter."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from vtl0_guest.cpu.control import ControlState
from vtl0_guest.cpu.devices.bus import MmioDevice, Platform
from vtl0_guest.cpu.engine import Engine
from vtl0_guest.cpu.environment import Environment, Seg
from vtl0_guest.cpu.guest_memory import GuestMemory, PhysicalMemory
from vtl0_guest.cpu.hyperv.virtual_processor import Partition, VirtualProcessor
from vtl0_guest.cpu.intercepts import Intercepts
from vtl0_guest.cpu.smm.mode import SystemManagement
from vtl0_guest.cpu.startup_window import Runs
from vtl0_guest.cpu.vmcb import ExitCode
from vtlab.x86.registers import Rflags

_TF, _IF = int(Rflags.TF), int(Rflags.IF)
_CS_LONG = 1 << 13


class Context:
    """One processor of one level.

    Attributes:
        intercepts: the filter that is in force.
        smm: system-management mode.
        show_smram: to be called when it may have to show or hide.
        left_smm: to be called when RSM has loaded its state.
        hyperv: synthetic interrupts, timers, clocks and pages.
        debug: DR0-DR3, DR6, DR7. They are the core's own: the engine never sees an armed breakpoint.
        shadows: MSRs that the core keeps for the guest and the engine does not have.
        trap_pending: an emulated instruction ran with RFLAGS.TF set, so #DB is due.
        halted: in HLT.
        waits_for_startup: after INIT, until SIPI: runs nothing and takes no interrupt.
        window: pages that alone may be executed since SIPI (startup_window.py); None: no window is open.
        asleep: in S3.
        random: what RDRAND and RDSEED give where runs repeat; else the engine has them.
        repeat: the instruction that was emulated has elements left (REP): RIP stays on it.
    """

    def __init__(
        self,
        vp_index: int,
        vp_count: int,
        vtl: int,
        engine: Engine,
        physical: PhysicalMemory,
        platform: Platform,
        shadows: dict[int, int],
        partition: Partition,
    ) -> None:
        self.vp_index = vp_index
        self.vp_count = vp_count
        self.vtl = vtl
        self.engine = engine
        self.environment = Environment(engine)
        self.memory = GuestMemory(physical, self.environment, self.device_at)
        self.platform = platform
        self.local_apic = platform.local_apic(vp_index)
        self.hyperv = VirtualProcessor(vp_index, partition, platform)
        if platform.clock.tsc_is_host:
            self.hyperv.instant.watch = partial(engine.intercept, ExitCode.RDTSC)
        else:
            engine.intercept(ExitCode.RDTSC, True)
        self.intercepts = self._filter = Intercepts()
        self.smm = SystemManagement()
        self.show_smram: Callable[[], None] = lambda: None
        self.left_smm: Callable[[], None] = lambda: None
        self.debug = [0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self.shadows = shadows
        self.trap_pending = False
        self.halted = False
        self.waits_for_startup = False
        self.random = random.Random(vp_index)
        self.repeat = False
        self.asleep = False
        self.window: Runs | None = None
        self.kernel_right_alone = False
        self.local_apic.is_parked = self._is_parked

    def _is_parked(self) -> bool:
        """Runs nothing, and no interrupt that can be masked would change that."""
        return self.waits_for_startup or (self.halted and not self.environment.rflags & _IF)

    def open_window(self, runs: Runs | None) -> None:
        """Limits what may be executed; None ends that. Pins that INIT clears are suspended as long as it is open."""
        if (runs is None) == (self.window is None):
            self.window = runs
            return
        self.window = runs
        self.set_filter(self._filter)

    def set_filter(self, intercepts: Intercepts) -> None:
        """The filter from now on; inside SMM most of it waits for RSM, and in the window after SIPI for its end."""
        self._filter = intercepts
        if self.smm.active:
            self.intercepts = intercepts.inside_smm()
        else:
            self.intercepts = intercepts if self.window is None else intercepts.inside_window()

    def suspend_pins(self) -> None:
        """SMI."""
        self.intercepts = self._filter.inside_smm()

    def resume_pins(self) -> None:
        """RSM."""
        self.set_filter(self._filter)

    @property
    def state_loads_exit(self) -> bool:
        """VTL1 wants to see what RSM is about to load."""
        return self._filter.state_loads

    def device_at(self, gpa: int) -> MmioDevice | None:
        """What answers instead of memory at the page of a guest-physical address."""
        base = self.local_apic.mmio_base
        if base is not None and base >> 12 == gpa >> 12:
            return self.local_apic
        return self.platform.mmio.get(gpa & ~0xFFF)

    def device_pages(self) -> list[int]:
        """Guest page numbers where devices answer."""
        bases = [self.local_apic.mmio_base, *self.platform.mmio]
        return [base >> 12 for base in bases if base is not None]

    def control_state(self) -> ControlState:
        environment = self.environment
        cs_long = bool(environment.segment(Seg.CS).attributes & _CS_LONG)
        return ControlState(environment.cr(0), environment.cr(4), environment.efer, cs_long)

    @property
    def cr8(self) -> int:
        return self.local_apic.tpr >> 4

    def advance(self, length: int) -> None:
        """Ends an emulated instruction: RIP moves on, RF and the interrupt shadow end, a single-step trap falls due."""
        if self.repeat:
            self.repeat = False
        elif self.environment.advance(length) & _TF:
            self.trap_pending = True
