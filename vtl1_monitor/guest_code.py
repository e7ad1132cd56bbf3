"""The guest-code personality: VTL1 is machine code that VTL0 supplied, on a processor core of its own.

The core sees all memory, each page in the file that holds it, and has its own local APIC, SynIC, timers and serial
ports. What it does that a machine must answer (hypercalls, MSRs, CPUID) exits to the VMM like VTL0's does. Who supplied
the code decides about VTL0; a policy that the operator sets observes the code itself (observer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from vtl0_guest.cpu import msrs
from vtl0_guest.cpu.core import Core
from vtl0_guest.cpu.devices.apic_registers import Register
from vtl0_guest.cpu.devices.bus import Platform
from vtl0_guest.cpu.devices.platform import build_platform
from vtl0_guest.cpu.processor import Processor
from vtl1_monitor.machine import Machine
from vtl1_monitor.observer import ENDINGS, Observer
from vtlab.errors import WrongState
from vtlab.hyperv.layouts import ENTRY_REASON_INTERRUPT, ENTRY_REASON_VTL_CALL
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.vcpu import Vcpu, Wakes

VTL = 1
# Seconds that a kicked vCPU may take to exit.
_STOP_TIMEOUT = 5.0
_SOFTWARE_ENABLED = 0x1FF
# Joined to an exit, it says of its hypercall that a policy observes it.
_OBSERVED = vcpu_pb2.Exit(hypercall=vcpu_pb2.Hypercall(observed=True)).SerializeToString()


class GuestCodeProcessor:
    """A processor of the core, entered as the higher level of its vCPU (vtlab.vcpu.Processor)."""

    def __init__(self, processor: Processor, platform: Platform, observer: Observer) -> None:
        self._processor = processor
        self._platform = platform
        self._observer = observer
        # A verdict after which nothing of VTL1 runs, until it has been told.
        self._ending: vcpu_pb2.Resolution | None = None
        self.kick = processor.kick
        self.state = processor.state

    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        """As Processor.run; an entry for an interrupt that is none, by TPR and priority, is an empty VTL return.

        With INTERCEPT nothing runs: the answer is the policy's verdict on what the open hypercall would change.
        """
        if enter.reason == vcpu_pb2.ENTER_REASON_INTERCEPT:
            return self._judge_change(enter.intercept)
        if self._ending is not None:
            return self._ended(self._ending)
        enter.updates.extend(self._observer.take_updates())
        exit_ = self._enter(enter)
        return self._observe(enter.sequence, exit_) if self._observer.present else exit_

    def _enter(self, enter: vcpu_pb2.Enter) -> bytes:
        if enter.reason == vcpu_pb2.ENTER_REASON_INTERRUPT:
            return self._interrupt(enter)
        if enter.reason == vcpu_pb2.ENTER_REASON_VTL_CALL:
            self._note_entry(ENTRY_REASON_VTL_CALL, enter)
        return self._processor.run(enter)

    def _observe(self, sequence: int, raw: bytes) -> bytes:
        """Ends the exits that are the policy's; the first that is not, with what those carried, is the VMM's."""
        carried = b""
        while True:
            exit_ = vcpu_pb2.Exit.FromString(raw)
            exit_.sequence = sequence
            resolution = self._observer.judge(exit_)
            if resolution is None or self._only_the_vmm_can(exit_, resolution):
                observed = exit_.HasField("hypercall") and self._observer.in_force
                return carried + raw + (_OBSERVED if observed else b"")
            kept = vcpu_pb2.Exit(serial=exit_.serial, synic_delivered=exit_.synic_delivered)
            carried += kept.SerializeToString()
            if resolution.action in ENDINGS:
                return carried + self._ended(resolution)
            again = vcpu_pb2.Enter(resolution=resolution, updates=self._observer.take_updates())
            raw = self._processor.run(again)

    def _only_the_vmm_can(self, exit_: vcpu_pb2.Exit, resolution: vcpu_pb2.Resolution) -> bool:
        """The policy allows the write of an MSR that this core does not model."""
        allowed = resolution.action == vcpu_pb2.ACTION_COMMIT and exit_.HasField("msr")
        return allowed and not msrs.modelled(self._processor.context, exit_.msr.index)

    def _judge_change(self, change: vcpu_pb2.Exit) -> bytes:
        resolution = self._observer.judge_change(change)
        if resolution.action in ENDINGS:
            self._ending = resolution
        return self._ended(resolution)

    def _ended(self, resolution: vcpu_pb2.Resolution) -> bytes:
        exit_ = vcpu_pb2.Exit(vp_index=self._processor.context.vp_index, vtl=VTL)
        exit_.vtl_return.resolution.CopyFrom(resolution)
        return exit_.SerializeToString()

    def _note_entry(self, reason: int, enter: vcpu_pb2.Enter) -> None:
        assist = self._processor.context.hyperv.assist
        assist.note_entry(reason, enter.registers.rax, enter.registers.rcx)

    def _interrupt(self, enter: vcpu_pb2.Enter) -> bytes:
        """Updates first, since one of them may raise the interrupt; nothing runs if none is deliverable then."""
        context = self._processor.context
        self._processor.kick()
        first = self._processor.run(vcpu_pb2.Enter(resolution=enter.resolution, updates=enter.updates))
        updated = vcpu_pb2.Exit.FromString(first)
        if not updated.HasField("kicked"):
            return first
        if self._platform.pending_vector(context.vp_index) is None:
            updated.vtl_return.SetInParent()
            return updated.SerializeToString()
        self._note_entry(ENTRY_REASON_INTERRUPT, enter)
        second = self._processor.run(vcpu_pb2.Enter(registers=enter.registers, shared=enter.shared))
        carried = vcpu_pb2.Exit(serial=updated.serial, synic_delivered=updated.synic_delivered)
        return carried.SerializeToString() + second  # of messages joined, lists are joined


class GuestCode:
    """VTL1 of one machine. Thread-safe."""

    def __init__(self, machine: Machine, turn_file: Path, *, local_apic_enabled: bool = False) -> None:
        """The machine's memory must outlive it. Raises EngineUnsupported (vtl0_guest.cpu.unicorn_library), OSError."""
        ram, vp_count = machine.memory.ram, len(machine.processors)
        self._platform = build_platform(vp_count, ram.size)
        self._core = Core(ram, vp_count, VTL, self._platform)
        self._core.share(turn_file)
        if local_apic_enabled:
            for index in range(vp_count):
                self._platform.local_apic(index).mmio_write(Register.SVR << 4, 4, _SOFTWARE_ENABLED)
        self._wakes = Wakes()
        self._vcpus = [
            Vcpu(
                index,
                VTL,
                GuestCodeProcessor(self._core.processor(index), self._platform, Observer(machine, index)),
            )
            for index in range(vp_count)
        ]
        core_wakes = self._platform.on_wake

        def on_wake(vp_index: int) -> None:
            core_wakes(vp_index)
            self._woken(vp_index)

        self._platform.on_wake = on_wake

    def reference(self) -> vcpu_pb2.ReferenceClock:
        """The partition's clock, for the lower level."""
        clock = self._core.reference
        return vcpu_pb2.ReferenceClock(scale=clock.scale, offset=clock.offset, tsc_hz=clock.tsc_hz)

    @property
    def last_enters(self) -> list[vcpu_pb2.Enter]:
        """Of each vCPU, the last one that was accepted."""
        return [vcpu.last_enter for vcpu in self._vcpus]

    def answer(self, enter: vcpu_pb2.Enter) -> bytes:
        """Executes an enter of a vCPU that exists. Raises as Session.answer()."""
        exit_ = self._vcpus[enter.vp_index].answer(enter)
        if vcpu_pb2.Exit.FromString(exit_).HasField("hypercall"):
            self._woken(enter.vp_index)  # what came while it ran, and was not taken before it may be a VTL return
        return exit_

    def kick(self, vp_index: int, sequence: int) -> bool:
        return self._vcpus[vp_index].kick(sequence)

    def state(self, vp_index: int) -> registers_pb2.ProcessorState:
        """Raises WrongState while that vCPU runs."""
        return self._vcpus[vp_index].state()

    def events(self, on_end: Callable[[Callable[[], None]], object]) -> Iterator[vcpu_pb2.EventsResponse]:
        """Interrupts that became deliverable on vCPUs that were not entered."""
        return self._wakes.stream(on_end)

    def close(self) -> None:
        """Ends what runs and lets go of the memory. Raises WrongState if a vCPU does not exit."""
        self._wakes.close()
        for vcpu in self._vcpus:
            if not vcpu.stop(_STOP_TIMEOUT):
                raise WrongState(vcpu.name, state="running", operation="let go of its machine")
        self._core.close()

    def _woken(self, vp_index: int) -> None:
        if not self._wakes.heard or self._vcpus[vp_index].running:
            return
        vector = self._platform.pending_vector(vp_index)
        if vector is not None:
            self._wakes.report(vp_index, vector, self._vcpus[vp_index].exited)
