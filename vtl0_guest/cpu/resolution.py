"""Entering: programming what the updates say and ending the open exit as it was decided (vcpu.proto, Action)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from vtl0_guest.cpu import delivery, levels, startup_window, state
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.faults import CannotEmulate, GuestFault, Shutdown, general_protection
from vtl0_guest.cpu.gates import Event
from vtl0_guest.cpu.hyperv import updates as synthetic
from vtl0_guest.cpu.intercepts import Intercepts
from vtl0_guest.cpu.operation import Operation
from vtl0_guest.cpu.vmcb import ExitCode
from vtlab import errors
from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Vector

if TYPE_CHECKING:
    from vtl0_guest.cpu.core import Core

# All other answers to a state that is about to be loaded are a shutdown.
_ENDS_STATE_LOAD = frozenset({vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_HALT, vcpu_pb2.ACTION_RESET})


def _exception(message: vcpu_pb2.Exception, rip: int) -> Event:
    vector = message.vector & 0x1F
    error = message.error_code if message.HasField("error_code") else None
    return Event(vector, error, rip, address=message.address if vector == Vector.PF else None)


def fault_of(resolution: vcpu_pb2.Resolution) -> GuestFault | None:
    """The exception that a resolution names."""
    if not resolution.HasField("exception"):
        return None
    event = _exception(resolution.exception, 0)
    return GuestFault(event.vector, event.error_code, event.address)


class Resolver:
    """Applies one processor's enters."""

    def __init__(
        self,
        core: Core,
        context: Context,
        park: Callable[[], object],
        report: Callable[[vcpu_pb2.MachineCheck], object],
    ) -> None:
        """Args:
        park: leaves the processor as INIT does.
        report: takes an error of the hardware.
        """
        self._core = core
        self._report = report
        self._context = context
        self._actions = {
            vcpu_pb2.ACTION_UNSPECIFIED: self._deny,
            vcpu_pb2.ACTION_DENY: self._deny,
            vcpu_pb2.ACTION_COMMIT: self._commit,
            vcpu_pb2.ACTION_REPLACE: self._commit,
            vcpu_pb2.ACTION_SKIP: self._skip,
            vcpu_pb2.ACTION_RETRY: self._retry,
            vcpu_pb2.ACTION_COMPLETE: self._complete,
            vcpu_pb2.ACTION_HALT: self._halt,
            vcpu_pb2.ACTION_RESET: self._reset,
        }
        # Kinds of updates that have something to do, or to be checked, before the last exit ends.
        self._preparations: dict[str, Callable[[vcpu_pb2.Update], object]] = {
            "protection": lambda update: core.protect(update.protection),
            "intercepts": self._set_intercepts,
            "invalidate_code": lambda update: core.invalidate_code(update.invalidate_code.gfns),
            "hypercall_page": lambda update: core.set_hypercall_page(update.hypercall_page),
            "startup_window": self._open_window,
            "execute_control": self._control_execution,
            "park_processor": lambda _update: park(),
            "flush_translations": lambda _update: context.engine.flush_translations(),
            **synthetic.CHECKS,
        }

    # ------------------------------------------------------------------------------------------------- updates

    def prepare(self, updates: Iterable[vcpu_pb2.Update]) -> None:
        """What must hold before the last exit ends: rights, filter, code, hypercall page. Raises BadArgument."""
        for update in updates:
            prepare = self._preparations.get(update.WhichOneof("change") or "")
            if prepare is not None:
                prepare(update)

    def _set_intercepts(self, update: vcpu_pb2.Update) -> None:
        context, wanted = self._context, update.intercepts
        context.set_filter(Intercepts(wanted))
        context.engine.intercept(ExitCode.INVLPG, wanted.invlpg)
        context.local_apic.holds_startups = wanted.startups

    def _control_execution(self, update: vcpu_pb2.Update) -> None:
        self._context.kernel_right_alone = update.execute_control.kernel_right_alone

    def _open_window(self, update: vcpu_pb2.Update) -> None:
        runs = startup_window.checked(list(update.startup_window.runs), self._core.nested.ram_pages)
        if self._context.window is not None:
            self._context.open_window(runs)

    def finish(self, enter: vcpu_pb2.Enter) -> Iterator[Event]:
        """Registers, MSRs, input and events, after the last exit has ended. Yields what is to be delivered."""
        context = self._context
        for update in enter.updates:
            if update.HasField("start_processor"):  # before what another level leaves to it
                state.load(context, update.start_processor.state)
        if enter.HasField("registers"):
            levels.load_shared(context, enter.registers, enter.shared if enter.HasField("shared") else None)
        for update in enter.updates:
            kind = update.WhichOneof("change")
            if kind == "register":
                state.set_register(context, update.register)
            elif kind == "event":
                yield from self._event(update.event)
            elif kind == "msr":
                state.set_msr(context, update.msr.index, update.msr.value)
            elif kind == "serial_input":
                self._core.serial_input(update.serial_input)
            elif kind in synthetic.APPLY:
                synthetic.APPLY[kind](context.hyperv, update)

    def _event(self, event: vcpu_pb2.PendingEvent) -> Iterator[Event]:
        rip = self._context.environment.rip
        kind = event.WhichOneof("event")
        if kind == "exception":
            yield _exception(event.exception, rip)
        elif kind == "interrupt_vector":
            yield Event(event.interrupt_vector & 0xFF, None, rip, external=True)
        elif kind == "nmi" and event.nmi:
            yield Event(Vector.NMI, None, rip, external=True)
        elif kind == "machine_check":
            self._report(event.machine_check)
        elif kind == "irq_pulse":
            if event.irq_pulse > 15:
                raise errors.BadArgument(f"IRQ {event.irq_pulse}", "is not an ISA line")
            self._core.platform.pulse_irq(event.irq_pulse)
        elif kind == "irq_line":
            if event.irq_line.irq > 15:
                raise errors.BadArgument(f"IRQ {event.irq_line.irq}", "is not an ISA line")
            self._core.platform.set_irq(event.irq_line.irq, event.irq_line.asserted)

    # ---------------------------------------------------------------------------------------------- resolutions

    def resolve(self, operation: Operation, resolution: vcpu_pb2.Resolution) -> Operation | None:
        """Ends an open exit. Raises GuestFault for what the guest takes; returns an operation that stays stopped."""
        if not operation.decidable:
            return None
        if operation.shuts_down and resolution.action not in _ENDS_STATE_LOAD:
            kind = operation.exit.WhichOneof("reason")
            cause = f"{kind} refused: {resolution.reason or 'nobody allowed it'}"
            return Operation(vcpu_pb2.Exit(shutdown=vcpu_pb2.Shutdown(cause=cause)), stays_stopped=True)
        try:
            action = self._actions[resolution.action]
        except KeyError:
            raise general_protection() from None
        return action(operation, resolution)

    def _end(self, operation: Operation) -> None:
        if operation.length:
            self._context.advance(operation.length)

    def _deny(self, operation: Operation, resolution: vcpu_pb2.Resolution) -> Operation | None:
        if operation.refuse is not None:
            operation.refuse(resolution)
            return None
        fault = fault_of(resolution) or general_protection()
        if operation.event is not None:
            # Refused while something else was delivered: that delivery faulted.
            interrupted = operation.event
            first = None if interrupted.software or interrupted.external else interrupted.vector
            try:
                fault = delivery.combine(first, fault)
            except Shutdown as shutdown:
                exit_ = vcpu_pb2.Exit(shutdown=vcpu_pb2.Shutdown(cause=str(shutdown)))
                return Operation(exit_, stays_stopped=True)
        raise fault

    def _commit(self, operation: Operation, resolution: vcpu_pb2.Resolution) -> Operation | None:
        if operation.commit is None:
            raise CannotEmulate(f"{operation.exit.WhichOneof('reason')} cannot be committed by the core")
        replaced = resolution.action == vcpu_pb2.ACTION_REPLACE
        operation.commit(resolution.value if replaced else operation.value)
        self._end(operation)
        return None

    def _skip(self, operation: Operation, _resolution: vcpu_pb2.Resolution) -> Operation | None:
        if operation.refuse is not None:
            operation.refuse(vcpu_pb2.Resolution())
            return None
        if not operation.length:
            raise CannotEmulate(f"{operation.exit.WhichOneof('reason')} has no instruction to skip")
        self._end(operation)
        return None

    def _retry(self, operation: Operation, _resolution: vcpu_pb2.Resolution) -> Operation | None:
        if operation.event is not None:
            delivery.deliver(self._context.environment, self._context.memory, operation.event)
        return None

    def _complete(self, operation: Operation, resolution: vcpu_pb2.Resolution) -> Operation | None:
        if operation.event is not None:
            # A gate, a TSS or a stack where nothing is: all ones make no gate, and no frame is kept.
            return self._deny(operation, vcpu_pb2.Resolution())
        if operation.complete is None:
            raise CannotEmulate(f"{operation.exit.WhichOneof('reason')} cannot be completed by the core")
        operation.complete(resolution.value)
        if operation.length:
            self._context.advance(operation.length)
        return None

    def _halt(self, _operation: Operation, resolution: vcpu_pb2.Resolution) -> Operation | None:
        message = f"halted by verdict: {resolution.reason}" if resolution.reason else "halted by verdict"
        return Operation(vcpu_pb2.Exit(failure=vcpu_pb2.EmulationFailure(message=message)), stays_stopped=True)

    def _reset(self, _operation: Operation, _resolution: vcpu_pb2.Resolution) -> Operation | None:
        return Operation(vcpu_pb2.Exit(reset_request=vcpu_pb2.ResetRequest(source="verdict")), stays_stopped=True)
