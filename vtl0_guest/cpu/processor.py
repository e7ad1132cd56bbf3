"""One processor: entering it runs the guest until something is for somebody else to decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from iced_x86 import Instruction, Mnemonic
from unicorn import UcError

from vtl0_guest.cpu import (
    delivery,
    device_memory,
    exits,
    layout,
    levels,
    machine_check,
    memory_faults,
    startup,
    startup_window,
    state,
)
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import decode
from vtl0_guest.cpu.devices.bus import MmioDevice, SystemManagementInterrupt
from vtl0_guest.cpu.environment import Gpr, Seg
from vtl0_guest.cpu.faults import CannotEmulate, GuestFault, NestedFault, Shutdown, general_protection, undefined_opcode
from vtl0_guest.cpu.gates import Event
from vtl0_guest.cpu.instructions import calls, control_registers, moves, ports, system
from vtl0_guest.cpu.instructions.table import TABLE
from vtl0_guest.cpu.native_hooks import Reason
from vtl0_guest.cpu.nested import ADDRESS
from vtl0_guest.cpu.operation import Operation
from vtl0_guest.cpu.resolution import Resolver
from vtl0_guest.cpu.smm import processor as smm
from vtl0_guest.cpu.turns import Outcome, Turns
from vtl0_guest.cpu.vmcb import ExitCode
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import VECTORS_WITH_ERROR_CODE, Rflags, Vector

if TYPE_CHECKING:
    from vtl0_guest.cpu.core import Core

_TURN_DONE = Outcome.DONE
_IF, _TF = int(Rflags.IF), int(Rflags.TF)
_DR6_BS = 0x4000
_SVM = 0x100
_RIP = layout.RIP // 8
_MACHINE_CHECKS = 4  # that may wait; the first ones are lost, as in a bank
_MAX_UNSENT = 4096  # bytes of serial output that may wait
_ENDS = frozenset({"debug_exit", "reset_request", "power_off", "shutdown", "failure"})
_CARRIERS = _ENDS | {"output"}
_PROMPT = frozenset({"output", "kicked"})
_HYPERCALLS = frozenset({Mnemonic.VMCALL, Mnemonic.VMMCALL})
_PORT_MNEMONICS = frozenset(
    {
        Mnemonic.IN,
        Mnemonic.OUT,
        Mnemonic.INSB,
        Mnemonic.INSW,
        Mnemonic.INSD,
        Mnemonic.OUTSB,
        Mnemonic.OUTSW,
        Mnemonic.OUTSD,
    }
)


class Processor:
    """A virtual processor of one level. `run` from one thread at a time; `kick` and `wake` from any."""

    def __init__(self, core: Core, context: Context) -> None:
        self._core = core
        self._context = context
        self._environment = context.environment
        self._engine = context.engine
        self._origin = exits.origin_bytes(context.vp_index, context.vtl)
        self._resolver = Resolver(core, context, self._park_at_enter, self._report)
        self._open: Operation | None = None
        self._parked = False
        self._stopped: Operation | None = None
        self._kicked = False
        self._output_due = False
        self._before_sleep = registers_pb2.ProcessorState()
        self._smi_pending = False
        self._nmi_pending = False
        self._nmi_blocked = False
        self._machine_checks: deque[vcpu_pb2.MachineCheck] = deque(maxlen=_MACHINE_CHECKS)
        # RIP and RSP of the IRET that ends an NMI's handler, from its exit until it has run.
        self._iret: tuple[int, int] | None = None
        self._stops_behind_iret = False
        self._external: deque[int] = deque()
        self._retried: tuple[int, int] | None = None
        self._nested_generation = -1
        self._window: startup_window.Runs | None = None
        self._split = False
        self._running = False
        self._seat = core.turns.seat(self)
        self._turn_over = False
        self._idle = False
        self._yields = False
        self._entering: vcpu_pb2.Enter | None = None
        self._result: bytes | BaseException | None = None
        self._held: Operation | None = None
        context.hyperv.attend = self._ask
        context.left_smm = self._left_smm
        self._reasons: dict[int, Callable[[], Operation | None]] = {
            Reason.EXIT: self._on_exit,
            Reason.IN: self._on_port,
            Reason.OUT: self._on_port,
            Reason.SYSCALL: self._on_syscall,
            Reason.SYSENTER: self._on_sysenter,
            Reason.STORE_REFUSED: self._on_store_refused,
            Reason.BUDGET_SPENT: self._on_budget_spent,
            Reason.TASK_SWITCH: self._on_task_switch,
        }
        # Exits of the engine that are no instruction of TABLE.
        self._exits: dict[int, Callable[[], Operation | None]] = {
            _SVM + code: partial(self._on_exception, code - ExitCode.EXCEPTION)
            for code in range(ExitCode.EXCEPTION, ExitCode.LAST_EXCEPTION + 1)
        }
        self._exits |= {
            _SVM + ExitCode.INTERRUPT: lambda: None,
            _SVM + ExitCode.NMI: self._on_stop,
            _SVM + ExitCode.NESTED_PAGE_FAULT: self._on_nested_page_fault,
            _SVM + ExitCode.EXCEPTION + Vector.UD: self._on_undefined_opcode,
            _SVM + ExitCode.SOFTWARE_INTERRUPT: self._on_software_interrupt,
            _SVM + ExitCode.ICEBP: self._on_software_interrupt,
            _SVM + ExitCode.IRET: self._on_iret,
            _SVM + ExitCode.RSM: self._on_rsm,
            _SVM + ExitCode.PAUSE: self._on_pause,
        }

    # ------------------------------------------------------------------------------------------ from outside

    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        """Ends the last exit as `enter` says, applies its updates, and runs until the next exit, which it serializes.

        Raises:
            vtlab.errors.BadArgument: an update that this processor cannot take; nothing ran.
        """
        self._running, self._entering = True, enter
        if self._core.shares_state:
            self._core.announce_due()
        self._core.turns.run(self._seat)
        self._running = False
        if self._core.shares_state:
            self._core.announce_due()
        if self._context.hyperv.synic.due:
            self._core.look_again()
        result, self._result = self._result, None
        if isinstance(result, BaseException):
            raise result
        assert result is not None
        return result

    def serve_while_away(self) -> None:
        """Delivers synthetic messages to a processor that is not entered. For the core's timer thread."""
        hyperv = self._context.hyperv
        if not hyperv.synic.due or self._running:
            return
        self._core.turns.between(hyperv.synic.deliver)

    def kick(self) -> None:
        """Makes the present `run` return soon, with KICKED if nothing else comes first. Lost if none is running."""
        self._kicked = True
        self._engine.set_stop()
        self._core.turns.kick(self._seat)

    def wake(self) -> None:
        """An interrupt, INIT or SIPI may have become deliverable."""
        self._engine.set_pending(True)
        if self._core.platform.urgent(self._context.vp_index):
            self._engine.set_stop()
        self._core.turns.wake(self._seat)

    def collect_output(self) -> None:
        """Serial output has waited long enough: exit with it."""
        self._output_due = True
        self._ask()

    def state(self) -> registers_pb2.ProcessorState:
        """Reads everything. Only while not running."""
        return state.read(self._context)

    def load_state(self, message: registers_pb2.ProcessorState) -> None:
        """Replaces everything, as after a reset. Only while not running."""
        state.load(self._context, message)
        self._open = self._stopped = None
        self._context.smm.reset()
        self._context.resume_pins()
        self._smi_pending = False
        self._forget_events()
        self._context.hyperv.reset()
        self._engine.flush_code()

    @property
    def context(self) -> Context:
        return self._context

    @property
    def entered(self) -> bool:
        """It is inside `run`."""
        return self._running

    def _ask(self) -> None:
        self._engine.set_stop()
        self._core.turns.wake(self._seat)

    def _forget_events(self) -> None:
        self._retried = None
        self._nmi_pending = self._nmi_blocked = False
        self._iret, self._stops_behind_iret = None, False
        self._external.clear()
        self._engine.intercept(ExitCode.IRET, False)

    # ------------------------------------------------------------------------------------------------ turns

    def begin_turn(self, contended: bool) -> None:
        self._turn_over = False
        if contended != self._yields:
            self._yields = contended
            self._engine.intercept(ExitCode.PAUSE, contended)

    @property
    def kicked(self) -> bool:
        return self._kicked

    def turn(self) -> Outcome:
        hyperv = self._context.hyperv
        runtime, instant = hyperv.runtime, hyperv.instant
        runtime.start()
        instant.begin_turn()
        if self._core.platform.smram.used:
            self._context.show_smram()
        try:
            operation = None
            enter, self._entering = self._entering, None
            if enter is not None:
                operation = self._enter(enter)
            operation = operation or self._held
            while operation is None:
                operation = self._step()
                if operation is None:
                    if self._idle:
                        return Outcome.IDLE
                    if self._turn_over and not instant.keeps_turn():
                        return Outcome.OVER
            if self._core.output_waits and self._must_hold(operation):
                self._held = operation
                return Outcome.IDLE
            self._held = None
            if self._core.shares_state and self._has_output and operation.exit.WhichOneof("reason") not in _CARRIERS:
                # The other level may run next, and this one not for long: its output goes first.
                self._held, operation = operation, Operation(vcpu_pb2.Exit(output=vcpu_pb2.Output()))
            self._result = self._leave(operation)
        except BaseException as error:  # noqa: BLE001 - another processor's thread may drive this one
            self._result = error
        finally:
            runtime.stop()
        return _TURN_DONE

    @property
    def _has_output(self) -> bool:
        """Serial output waits that an exit of this processor may carry."""
        return self._core.output_waits and self._core.carrier in (None, self._context.vp_index)

    def _takes_output(self, message: vcpu_pb2.Exit) -> bool:
        reason = message.WhichOneof("reason")
        if reason == "kicked" and self._engine.counts:
            return False  # when it came out is not repeatable
        return self._has_output or reason in _ENDS

    def _must_hold(self, operation: Operation) -> bool:
        """An exit that may end the machine, or let the other level run, waits while output before it is on its way."""
        reason = operation.exit.WhichOneof("reason")
        waits = reason not in _PROMPT if self._core.shares_state else reason in _ENDS
        return waits and not self._has_output and not self._kicked

    def release(self) -> None:
        """What held an exit back may be over."""
        if self._held is not None:
            self._core.turns.wake(self._seat)

    def end_turn(self) -> None:
        self._turn_over = True
        self._engine.set_stop()

    # ------------------------------------------------------------------------------------------ enter and leave

    def _enter(self, enter: vcpu_pb2.Enter) -> Operation | None:
        open_operation, self._open = self._open, None
        if self._core.carrier == self._context.vp_index:
            self._core.carrier_returned()
        updates = enter.updates
        if updates:
            self._resolver.prepare(updates)
            if self._parked:
                self._parked, open_operation = False, None
        if self._stopped is not None:
            return self._stopped
        try:
            if open_operation is not None:
                after = self._resolve(open_operation, enter.resolution)
                if after is not None:
                    return after
            if updates or enter.HasField("registers"):
                return self._finish(enter)
        except CannotEmulate as error:
            return self._failure(str(error))
        return None

    def _resolve(self, operation: Operation, resolution: vcpu_pb2.Resolution) -> Operation | None:
        try:
            after = self._resolver.resolve(operation, resolution)
            if after is None and operation.exit.HasField("port"):
                return self._device_exit()
            return after
        except GuestFault as fault:
            return self._deliver(delivery.from_fault(fault, self._environment.rip))
        except NestedFault as fault:
            return self._nested_fault(fault)

    def _finish(self, enter: vcpu_pb2.Enter) -> Operation | None:
        for event in self._resolver.finish(enter):
            if event.external:
                self._queue(event)
                continue
            after = self._deliver(event)
            if after is not None:
                return after
        return None

    def _queue(self, event: Event) -> None:
        """An NMI or external interrupt from outside: taken when the processor lets it in."""
        if event.vector == Vector.NMI:
            self._nmi_pending = True
        else:
            self._external.append(event.vector)
        self._engine.set_pending(True)

    def _leave(self, operation: Operation) -> bytes:
        """The exit as it is sent: its reason, what every exit carries, and what waits to be carried."""
        context, core = self._context, self._core
        if operation.stays_stopped:
            self._stopped = operation
        else:
            self._open = operation
        message = operation.exit
        exit_ = message.SerializeToString() + exits.common_bytes(
            self._origin, self._environment, context.cr8, operation.code, operation.length
        )
        if core.shares_state:
            exit_ += vcpu_pb2.Exit(shared=levels.save_shared(context)).SerializeToString()
        self._output_due = False
        if context.hyperv.instant.open and not message.HasField("output"):
            context.hyperv.instant.forget()
        if context.hyperv.synic.delivered:
            exit_ += vcpu_pb2.Exit(synic_delivered=context.hyperv.synic.take_delivered()).SerializeToString()
        if core.output_waits and self._takes_output(message):
            core.output_waits, core.carrier = False, context.vp_index
            exit_ += vcpu_pb2.Exit(serial=core.platform.serial.drain()).SerializeToString()
        return exit_

    # -------------------------------------------------------------------------------------------------- the loop

    def _step(self) -> Operation | None:
        """Takes what is due, then runs the guest up to the next stop and deals with it."""
        due = self._due()
        if due is not None or self._idle:
            return due
        self._synchronize()
        try:
            reason = self._engine.run()
        except UcError as error:
            return self._failure(f"the engine stopped at {self._environment.rip:#x}: {error}")
        try:
            try:
                return self._reasons[reason]()
            except GuestFault as fault:
                return self._deliver(delivery.from_fault(fault, self._environment.rip))
            except NestedFault as fault:
                return self._nested_fault(fault)
        except CannotEmulate as error:
            return self._failure(str(error))

    def _due(self) -> Operation | None:
        """Kicks, output, traps and interrupts. Notes whether there is nothing to run: in HLT, or before SIPI."""
        context, platform = self._context, self._core.platform
        self._idle = False
        if self._kicked:
            self._kicked = False
            self._engine.clear_stop()
            return Operation(vcpu_pb2.Exit(kicked=vcpu_pb2.Kicked()))
        if (
            self._core.output_waits
            and self._has_output
            and (self._output_due or platform.serial.unsent > _MAX_UNSENT)
            and not context.hyperv.instant.keeps_turn()
        ):
            return Operation(vcpu_pb2.Exit(output=vcpu_pb2.Output()))
        if context.trap_pending:
            context.trap_pending = False
            context.debug[4] |= _DR6_BS
            return self._deliver(Event(Vector.DB, None, self._environment.rip))
        if context.asleep:
            return self._wake_up()
        if context.hyperv.synic.due:
            context.hyperv.synic.deliver()
        if self._iret is not None:
            self._look_behind_iret()
        if self._engine.pending:
            self._engine.set_pending(False)  # before looking: what arrives from here on is a new request
            taken = self._take_smi()
            if taken is None and not context.smm.active:
                taken = self._take_held() or self._take_startup()
            taken = taken or self._take_interrupt()
            if taken is not None:
                return taken
        if context.halted or context.waits_for_startup:
            if self._has_output:
                return Operation(vcpu_pb2.Exit(output=vcpu_pb2.Output()))
            self._idle = True
        return None

    def _take_held(self) -> Operation | None:
        """An INIT or SIPI that waits for a decision."""
        operation = startup.held(self._context)
        if operation is not None:
            self._engine.set_pending(True)  # more may wait behind it
        return operation

    def _fall_asleep(self) -> None:
        """S3: this processor wakes at the waking vector, the others at SIPI."""
        self._core.sleep(self._context.vp_index)
        self._before_sleep = state.read(self._context)
        self._context.asleep = True

    def _park_at_enter(self) -> None:
        """An update wants it, in place of what the last exit was about."""
        self.park()
        self._context.smm.reset()
        self._context.resume_pins()
        self._smi_pending = False
        self._parked = True

    def park(self) -> None:
        """What S3 makes of a processor that did not ask for it. Only while it has no turn."""
        startup.init(self._context)
        self._forget_events()

    def _wake_up(self) -> Operation | None:
        """Sleeps on until the alarm; then from INIT's state to the waking vector, unless VTL1 says how to go on."""
        if self._core.platform.power.asleep:
            self._idle = True
            return None
        self._context.asleep = False
        try:
            startup.wake(self._context)
        except Shutdown as shutdown:
            return self._shutdown(shutdown)
        self._forget_events()
        if not self._context.state_loads_exit:
            return None
        load = vcpu_pb2.StateLoad(
            cause=vcpu_pb2.STATE_LOAD_CAUSE_WAKE, state=state.read(self._context), before=self._before_sleep
        )
        self._context.open_window(())  # of no page, unless the answer has some
        return Operation(vcpu_pb2.Exit(state_load=load), lambda _value: self._leave_empty_window(), shuts_down=True)

    def _leave_empty_window(self) -> None:
        if not self._context.window:
            self._context.open_window(None)

    def _take_smi(self) -> Operation | None:
        """SMI comes before all others; inside SMM and before SIPI it waits, as INIT and NMI do inside."""
        context = self._context
        if self._core.platform.take_smi(context.vp_index):
            self._smi_pending = True
        if not self._smi_pending or context.smm.active or context.waits_for_startup or context.window is not None:
            return None
        if self._environment.interrupt_shadow:
            self._engine.set_pending(True)
            return None
        self._smi_pending = False
        if context.intercepts.no_smi:
            return None
        nmi_blocked, self._nmi_blocked, self._iret = self._nmi_blocked, True, None
        self._engine.intercept(ExitCode.IRET, False)
        try:
            smm.enter(context, nmi_blocked)
        except Shutdown as shutdown:
            return self._shutdown(shutdown)
        return None

    def _on_rsm(self) -> Operation | None:
        """RSM: #UD outside SMM. What it loads may be for VTL1 to judge."""
        if not self._context.smm.active:
            raise undefined_opcode()
        try:
            return smm.resume(self._context)
        except Shutdown as shutdown:
            return self._shutdown(shutdown)

    def _left_smm(self) -> None:
        """NMIs are as they were before the SMI."""
        self._nmi_blocked = self._context.smm.nmi_blocked
        self._engine.intercept(ExitCode.IRET, self._nmi_blocked)

    def _take_startup(self) -> Operation | None:
        """INIT and SIPI. INIT of the boot processor, which would run firmware, is a request to reset the machine."""
        context = self._context
        init, vector = self._core.platform.take_startup(context.vp_index)
        if init:
            if not context.vp_index:
                return Operation(vcpu_pb2.Exit(reset_request=vcpu_pb2.ResetRequest(source="INIT")))
            startup.init(context)
            self._forget_events()
        if vector is not None and context.waits_for_startup:
            startup.start(context, vector)
        return None

    def _take_interrupt(self) -> Operation | None:
        """Delivers the highest interrupt if it can be taken now; leaves a note for the block hook if not."""
        platform, context = self._core.platform, self._context
        if context.waits_for_startup:
            return None
        if platform.take_nmi(context.vp_index):
            self._nmi_pending = True
        if self._machine_checks and not context.smm.active:
            return self._take_machine_check()
        shadow = self._environment.interrupt_shadow
        if self._nmi_pending and not self._nmi_blocked:
            if shadow:
                self._engine.set_pending(True)
                return None
            self._nmi_pending, self._nmi_blocked, context.halted = False, True, False
            self._engine.intercept(ExitCode.IRET, True)
            return self._deliver(Event(Vector.NMI, None, self._environment.rip, external=True))
        own = platform.pending_vector(context.vp_index)
        if own is None and not self._external:
            return None
        if shadow or not self._environment.rflags & _IF:
            self._engine.set_pending(True)
            if context.hyperv.idle:
                context.hyperv.idle = context.halted = False
            return None
        vector = self._external.popleft() if own is None else platform.acknowledge(context.vp_index)
        context.halted = False
        self._engine.set_pending(True)  # another one may wait: ask again after this one
        return self._deliver(Event(vector, None, self._environment.rip, external=True))

    def _take_machine_check(self) -> Operation | None:
        """At the next border between instructions, whatever else is held back."""
        error = self._machine_checks.popleft()
        self._context.halted = False
        self._engine.set_pending(True)
        if self._machine_checks:
            self._engine.set_stop()  # with interrupts off, too
        try:
            event = machine_check.take(self._context, error)
        except Shutdown as shutdown:
            return self._shutdown(shutdown)
        return self._deliver(event)

    def _report(self, error: vcpu_pb2.MachineCheck) -> None:
        """From outside: an error of the hardware, taken as soon as this processor runs."""
        self._machine_checks.append(error)
        self._engine.set_pending(True)

    def _synchronize(self) -> None:
        """Code and nested rights that others changed, and who sees SMRAM."""
        if self._core.platform.smram.used:
            self._context.show_smram()
        self._core.coherence.run(self._context.vp_index)
        nested, window = self._core.nested, self._context.window
        split = nested.split and not self._context.kernel_right_alone
        if nested.generation != self._nested_generation or window is not self._window or split is not self._split:
            self._nested_generation, self._window, self._split = nested.generation, window, split
            if window is None:
                self._engine.set_roots(nested.root(False), nested.root(split))
            else:
                self._engine.set_roots(*startup_window.roots(nested, self._context.vp_index, window))
            self._engine.flush_translations()

    def _by_user_right(self) -> bool:
        """Whether UMX governs what runs now."""
        return self._environment.cpl == 3 and not self._context.kernel_right_alone

    # ------------------------------------------------------------------------------------------- stop reasons

    def _on_budget_spent(self) -> Operation | None:
        """The IRET that ends an NMI's handler has run, unless it is the first block itself; or the turn is over."""
        engine = self._engine
        if self._place() == self._iret and not engine.spent:
            engine.stop_after(1)
            return None
        engine.stop_no_more()
        engine.watch_blocks(not self._environment.long_mode)
        self._turn_over = self._turn_over or engine.spent
        return None

    def _on_task_switch(self) -> Operation | None:
        raise CannotEmulate("a hardware task switch, which this processor does not have")

    def _fetch(self) -> tuple[Instruction, bytes]:
        environment = self._environment
        rip, bitness = environment.words[_RIP], environment.bitness
        if bitness != 64:
            rip = environment.segment(Seg.CS).base + rip & 0xFFFF_FFFF
        code = self._context.memory.code(rip)
        return decode(bitness, code), code

    def _retry_stale(self, instruction: Instruction) -> Operation | None:
        """The engine ran other bytes than memory holds: flush and run again, once at the same place.

        If they are the same, the engine took an instruction that does not exist, as one with LOCK that may not have it.
        """
        place = (self._environment.rip, self._engine.detail)
        if self._retried == place:
            if instruction.is_invalid:
                raise undefined_opcode()
            raise CannotEmulate(f"{instruction} at {place[0]:#x} cannot be the cause of exit {place[1]:#x}")
        self._retried = place
        self._engine.flush_code()
        return None

    def _end(self, operation: Operation | None, instruction: Instruction, code: bytes) -> Operation | None:
        """After a handler: move on if it is done, else remember what the exit needs."""
        self._retried = None
        if operation is None:
            self._context.advance(instruction.len)
            return None
        operation.length, operation.code = instruction.len, code
        return operation

    def _on_exit(self) -> Operation | None:
        detail = self._engine.detail
        handler = self._exits.get(detail)
        if handler is not None:
            return handler()
        row = TABLE.get(detail - _SVM)
        if row is None:
            kind = "exception outside guest mode" if detail < _SVM else "unexpected exit"
            raise CannotEmulate(f"{kind}: {detail:#x}")
        instruction, raw = self._fetch()
        if row.mnemonics and instruction.mnemonic not in row.mnemonics:
            return self._retry_stale(instruction)
        return self._end(row.handler(self._context, instruction), instruction, raw)

    def _on_stop(self) -> Operation | None:
        """Somebody asked for it: what for, _due() finds."""
        self._engine.clear_stop()
        return None

    def _on_iret(self) -> Operation | None:
        """NMIs may come again behind this IRET (Intel SDM volume 3, "Handling multiple NMIs")."""
        self._engine.intercept(ExitCode.IRET, False)
        self._iret = self._place()
        if self._yields:  # who sent it may wait without PAUSE, for what the handler did or for what comes behind
            turns = self._core.turns
            if isinstance(turns, Turns):
                turns.hand_over_soon()
            else:
                self._turn_over = True
        return None

    def _place(self) -> tuple[int, int]:
        return self._environment.rip, self._environment.gpr(Gpr.RSP)

    def _look_behind_iret(self) -> None:
        """If the IRET has run, NMIs may come; if one waits for that, the engine is to stop at the next block."""
        if self._place() != self._iret:
            self._iret, self._nmi_blocked, self._stops_behind_iret = None, False, False
            self._engine.set_pending(True)
        elif not self._stops_behind_iret and (self._nmi_pending or self._core.platform.urgent(self._context.vp_index)):
            self._stops_behind_iret = True
            # The page that it goes to is translated anew, with the hook that counts blocks.
            self._engine.watch_blocks(True)
            self._engine.stop_after(0)
            memory, stack = self._context.memory, self._environment.segment(Seg.SS).base
            try:
                target = memory.read_int(stack + self._environment.gpr(Gpr.RSP), 8, implicit=True)
                gpa = memory.code_gpa(target) if self._environment.bitness == 64 else None
            except (GuestFault, NestedFault):
                gpa = None
            if gpa is None:
                self._engine.flush_code()
            else:
                self._engine.invalidate_pages(self._core.nested.entry(gpa >> 12) & ADDRESS, 1)

    def _on_pause(self) -> Operation | None:
        """The guest spins while others are ready: they go on."""
        instruction, raw = self._fetch()
        if instruction.mnemonic != Mnemonic.PAUSE:
            return self._retry_stale(instruction)
        self._turn_over = True
        return self._end(None, instruction, raw)

    def _on_undefined_opcode(self) -> Operation | None:
        instruction, raw = self._fetch()
        if instruction.mnemonic in _HYPERCALLS:
            return self._end(system.hypercall(self._context, instruction), instruction, raw)
        if instruction.mnemonic == Mnemonic.INT1:
            return self._on_software_interrupt()  # the engine does not know the opcode
        if instruction.mnemonic in system.RANDOM and self._engine.counts:
            return self._end(system.random_number(self._context, instruction), instruction, raw)
        raise undefined_opcode()

    def _on_exception(self, vector: int) -> Operation | None:
        context, engine = self._context, self._engine
        if vector == Vector.GP:
            instruction, raw = self._fetch()
            if instruction.mnemonic == Mnemonic.XSETBV and engine.error_code == 0:
                return self._end(control_registers.xsetbv(context, instruction), instruction, raw)
            if raw and instruction.is_invalid:
                raise undefined_opcode()  # the engine takes some registers for memory operands
        if vector == Vector.DB:
            context.debug[4] |= _DR6_BS
        error = engine.error_code if vector in VECTORS_WITH_ERROR_CODE else None
        address = engine.fault_address if vector == Vector.PF else None
        raise GuestFault(vector, error, address)

    def _on_software_interrupt(self) -> Operation | None:
        instruction, _ = self._fetch()
        if instruction.mnemonic not in system.SOFTWARE_INTERRUPTS:
            return self._retry_stale(instruction)
        event = system.software_interrupt(self._context, instruction)
        if event is None:
            self._context.advance(instruction.len)
            return None
        return self._deliver(event)

    def _on_port(self) -> Operation | None:
        engine = self._engine
        instruction, raw = self._fetch()
        if instruction.mnemonic not in _PORT_MNEMONICS:
            return self._retry_stale(instruction)
        operation = ports.access(self._context, instruction, engine.detail & 0xFFFF, engine.port_size, engine.value)
        ended = self._end(operation, instruction, raw)
        if ended is not None:
            return ended
        if not self._core.output_waits and self._core.platform.serial.unsent:
            self._core.output_started()
        return self._device_exit()

    def _device_exit(self) -> Operation | None:
        """What a device ended the run with, now that the instruction is over."""
        value = self._core.platform.take_exit()
        if value is None:
            return None
        if isinstance(value, SystemManagementInterrupt):
            self._smi_pending = True
            self._engine.set_pending(True)
            return None
        if isinstance(value, vcpu_pb2.Sleep):
            value.waking_vector = startup.waking_vector(self._context)
            return Operation(vcpu_pb2.Exit(sleep=value), lambda _value: self._fall_asleep(), 0, lambda _value: None)
        if isinstance(value, vcpu_pb2.DebugExit):
            return Operation(vcpu_pb2.Exit(debug_exit=value))
        if isinstance(value, vcpu_pb2.PowerOff):
            return Operation(vcpu_pb2.Exit(power_off=value))
        return Operation(vcpu_pb2.Exit(reset_request=value))

    def _on_syscall(self) -> Operation | None:
        calls.syscall(self._context, 2)
        return None

    def _on_sysenter(self) -> Operation | None:
        calls.sysenter(self._context)
        return None

    # -------------------------------------------------------------------------------------------------- memory

    def _on_store_refused(self) -> Operation | None:
        """A store to a page that is mapped read-only: a table of the guest that VTL1 guards."""
        engine = self._engine
        gpa = self._core.gpa_of(engine.address)
        if gpa is None:
            raise CannotEmulate(f"refused store at system-physical {engine.address:#x}")
        size = engine.port_size
        data = (engine.value & (1 << 8 * size) - 1).to_bytes(size, "little")
        raise NestedFault(gpa, vcpu_pb2.ACCESS_KIND_WRITE, data=data)

    def _on_nested_page_fault(self) -> Operation | None:
        engine = self._engine
        access = memory_faults.access_kind(engine.error_code)
        if access == vcpu_pb2.ACCESS_KIND_EXECUTE and self._context.window is not None:
            inside = startup_window.contains(self._context.window, engine.fault_address >> 12)
            if not inside or self._environment.cpl == 3:
                return startup.fetch_outside(self._context, engine.fault_address)
        if self._core.coherence.allow(engine.fault_address >> 12, access, self._by_user_right()):
            return None
        raise NestedFault(engine.fault_address, access)

    def _nested_fault(self, fault: NestedFault) -> Operation | None:
        """A device's registers, the hypercall page, or an exit."""
        instruction: Instruction | None = None
        raw = b""
        if fault.access != vcpu_pb2.ACCESS_KIND_EXECUTE:
            instruction, raw = self._fetch()
        try:
            device = self._context.device_at(fault.gpa)
            if device is not None and instruction is not None and not fault.page_walk:
                return self._device_registers(device, fault.gpa & 0xFFF, instruction)
            fault = memory_faults.locate(self._context, instruction, fault)
            if instruction is not None and self._is_store_elsewhere(instruction, fault):
                return self._execute_elsewhere(instruction, 0)
        except GuestFault as other:
            return self._deliver(delivery.from_fault(other, self._environment.rip))
        except NestedFault as other:  # of ordinary memory that the instruction accesses too
            fault = memory_faults.locate(self._context, instruction, other)
        if self._core.is_overlay(fault.gpa) and fault.access == vcpu_pb2.ACCESS_KIND_WRITE:
            return self._deliver(delivery.from_fault(general_protection(), self._environment.rip))
        operation = memory_faults.operation(
            self._context, instruction, fault, self._core.nested.ram_pages, self._finish_elsewhere
        )
        operation.code = raw
        operation.length = instruction.len if instruction is not None else 0
        return operation

    def _is_store_elsewhere(self, instruction: Instruction, fault: NestedFault) -> bool:
        """A store where no RAM is whose bytes only the engine knows. What it reads there is asked for first."""
        beyond = fault.gpa >> 12 >= self._core.nested.ram_pages and not fault.page_walk
        if not beyond or fault.access != vcpu_pb2.ACCESS_KIND_WRITE or moves.is_plain(instruction):
            return False
        if device_memory.reads(self._context, instruction, fault.gpa >> 12):
            fault.access = vcpu_pb2.ACCESS_KIND_READ
            return False
        return True

    def _execute_elsewhere(self, instruction: Instruction, value: int) -> Operation | None:
        """An instruction where no RAM is: its loads give `value`, its stores are exits after it."""
        elsewhere = device_memory.Elsewhere(value)
        operation = self._execute(instruction, elsewhere)
        return operation or memory_faults.announce(elsewhere.stores, self._hold)

    def _finish_elsewhere(self, instruction: Instruction, value: int) -> None:
        """The same where it is an open exit that is completed."""
        try:
            self._hold(self._execute_elsewhere(instruction, value))
        except NestedFault as fault:
            raise CannotEmulate(f"{instruction} at {fault.gpa:#x}") from None
        self._context.repeat = True  # RIP has moved

    def _hold(self, operation: Operation | None) -> None:
        """An exit that follows the one that is being completed."""
        self._held = operation

    def _device_registers(self, device: MmioDevice, offset: int, instruction: Instruction) -> Operation | None:
        context = self._context
        if moves.device_access(context, instruction, device, offset):
            context.advance(instruction.len)
            return None
        return self._execute(instruction, None)

    def _execute(self, instruction: Instruction, elsewhere: device_memory.Elsewhere | None) -> Operation | None:
        """By the engine, on a copy of the registers. What it stops for instead is dealt with as ever."""
        context, core = self._context, self._core
        if not device_memory.execute(context, core.nested, core.scratch, instruction, elsewhere):
            return self._reasons[self._engine.reason]()
        if self._environment.rflags & _TF and not device_memory.loads_stack_segment(instruction):
            context.trap_pending = True
        return None

    # ------------------------------------------------------------------------------------------------ delivery

    def _deliver(self, event: Event) -> Operation | None:
        """Enters the handler; a triple fault or a refusal by the nested table becomes an exit."""
        context = self._context
        context.halted = context.hyperv.idle = False
        try:
            delivery.deliver(self._environment, context.memory, event)
        except Shutdown as shutdown:
            return self._shutdown(shutdown)
        except NestedFault as fault:
            return self._delivery_refused(event, fault)
        return None

    @staticmethod
    def _shutdown(cause: Shutdown) -> Operation:
        return Operation(vcpu_pb2.Exit(shutdown=vcpu_pb2.Shutdown(cause=str(cause))), stays_stopped=True)

    def _delivery_refused(self, event: Event, fault: NestedFault) -> Operation:
        operation = memory_faults.operation(self._context, None, fault, self._core.nested.ram_pages)
        operation.commit = operation.complete = None
        operation.event = event
        return operation

    def _failure(self, message: str) -> Operation:
        return Operation(vcpu_pb2.Exit(failure=vcpu_pb2.EmulationFailure(message=message)), stays_stopped=True)
