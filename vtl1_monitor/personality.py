"""The policy personality: one vCPU of VTL1 as a state machine. An Enter is a value, so is the Exit that answers it.

    idle --VTL_CALL--> serving --(service yields)--> Protect ... RESUME(status) --> serving --> VtlReturn --> idle
    idle --INTERCEPT | CLIENT_WRITE | ENABLE--> VtlReturn --> idle
    idle --ENABLE by a client--> serving (services/guard.py)

What fits no arrow is refused (WrongState) and changes nothing: the vCPU of VTL0 stays stopped.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vtl1_monitor import rights
from vtl1_monitor.machine import Machine
from vtl1_monitor.memory import GuestFault
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.services.guard import guard
from vtl1_monitor.services.startup import fetch_outside
from vtl1_monitor.services.table import serve
from vtl1_monitor.state_load import woken
from vtl1_monitor.steps import ProtectFailed, Steps, protect
from vtlab.enums import name_of
from vtlab.errors import WrongState
from vtlab.services import Service
from vtlab.v1 import registers_pb2, vcpu_pb2

VTL = 1
# In place of a service number, for what an operator asks.
_GUARD = -1
_STARTUP = -2


Keep = Callable[[int, vcpu_pb2.Enter, vcpu_pb2.Exit], object]


class PolicyProcessor:
    """One vCPU of VTL1. All of a machine share its Machine; while one is in a service, the others wait."""

    def __init__(self, machine: Machine, vp_index: int, keep: Keep = lambda *_: None) -> None:
        """:param keep: has what must outlive this process written down before the exit leaves it."""
        self._machine = machine
        self._keep = keep
        self._vp_index = vp_index
        self._steps: Steps | None = None
        self._call: Call | None = None

    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        """From an Enter to its Exit, serialized. Raises WrongState."""
        machine = self._machine
        with machine.turn:
            machine.wait_for_turn(self)
            handler = _HANDLERS.get((self._steps is not None, enter.reason))
            if handler is None:
                reason = name_of(vcpu_pb2.EnterReason, enter.reason)
                state = "a service waits for its protection" if self._steps is not None else "it waits for VTL0"
                raise WrongState(f"vCPU {self._vp_index} of VTL1", state=state, operation=f"be entered with {reason}")
            before = machine.judging if enter.reason in _JUDGING else None
            exit_ = handler(self, enter)
            idle = before is not None and before == machine.judging and not exit_.HasField("protect")
            if not idle and not (
                enter.reason == vcpu_pb2.ENTER_REASON_VTL_CALL and enter.registers.rdi == Service.PING
            ):
                self._keep(self._vp_index, enter, exit_)
            return exit_.SerializeToString()

    def take_up(self, enter: vcpu_pb2.Enter, undo: list[Change]) -> None:
        """A service that waited for protections when the monitor died begins anew with the next RESUME.

        Args:
            enter: that it began with.
            undo: what it had closed, which it must find as it was.
        """

        def again() -> Steps:
            yield vcpu_pb2.Protect()  # not sent: the one that was open is answered by the RESUME
            yield from protect(self._machine.memory, undo)
            return (yield from steps)

        self._call, steps = _BEGINNINGS[enter.reason](self, enter)
        self._call.again = True
        self._steps = again()
        next(self._steps)
        self._machine.serve_for(self)

    def _vtl_call(self, enter: vcpu_pb2.Enter) -> vcpu_pb2.Exit:
        self._call, steps = self._begin_call(enter)
        if self._machine.broken:
            return self._halted()
        self._steps = steps
        return self._advance(None)

    def _begin_call(self, enter: vcpu_pb2.Enter) -> tuple[Call, Steps]:
        call = Call(self._machine, self._vp_index, enter.registers.rdi, enter.registers)
        return call, serve(call)

    def _resume(self, enter: vcpu_pb2.Enter) -> vcpu_pb2.Exit:
        if self._call is not None and enter.HasField("state"):
            self._call.state.CopyFrom(enter.state)
        return self._advance(enter.status)

    def _advance(self, status: int | None) -> vcpu_pb2.Exit:
        """Lets the service run to its next request or its end."""
        assert self._steps is not None
        assert self._call is not None
        steps, call = self._steps, self._call
        if status is not None:
            self._machine.serve_for(None)
        self._steps = None
        try:
            request = next(steps) if status is None else steps.send(status)
        except StopIteration as stop:
            return self._returned(call, int(stop.value))
        except Refused as refusal:
            return self._refused(call, refusal)
        except GuestFault as fault:
            return self._refused(call, Refused(errno.EFAULT, str(fault)))
        except ProtectFailed as failure:
            self._machine.break_down(str(failure))
            call.resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_HALT, reason=str(failure))
            return self._refused(call, Refused(errno.EIO, str(failure)))
        except BaseException as error:
            self._machine.break_down(f"{call.name} failed: {type(error).__name__}")
            raise
        self._steps = steps
        self._machine.serve_for(self)
        if isinstance(request, vcpu_pb2.StateRequest):
            return vcpu_pb2.Exit(vp_index=self._vp_index, vtl=VTL, state_request=request)
        return vcpu_pb2.Exit(vp_index=self._vp_index, vtl=VTL, protect=request)

    def _refused(self, call: Call, refusal: Refused) -> vcpu_pb2.Exit:
        if call.service == _STARTUP:
            return self._returned(call, 0)
        if call.service == _GUARD:
            resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_DENY, reason=str(refusal))
            self._call = None
            return self._vtl_return(resolution, [])
        resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMPLETE, reason=f"{call.name}: {refusal}")
        self._machine.verdicts.record(call.as_exit(), call.resolution or resolution, "services")
        return self._returned(call, -refusal.number)

    def _returned(self, call: Call, result: int) -> vcpu_pb2.Exit:
        self._call = None
        if call.stand_down is not None:
            answer = vcpu_pb2.VtlReturn(stand_down=call.stand_down)
            return vcpu_pb2.Exit(vp_index=self._vp_index, vtl=VTL, vtl_return=answer)
        if call.service == _GUARD:
            return self._vtl_return(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT), call.updates)
        if call.service == _STARTUP:
            return self._vtl_return(call.resolution, call.updates)
        update = vcpu_pb2.Update()
        update.register.name, update.register.value = registers_pb2.REGISTER_NAME_R8, result % (1 << 64)
        return self._vtl_return(call.resolution, [*call.updates, update], parks_others=call.parks_others)

    def _halted(self) -> vcpu_pb2.Exit:
        """The answer to everything once the machine is broken."""
        call, self._call = self._call, None
        resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_HALT, reason=self._machine.broken)
        if call is None:
            return self._vtl_return(resolution, [])
        call.updates.clear()
        call.resolution = resolution
        return self._returned(call, -errno.EPERM)

    def _intercept(self, enter: vcpu_pb2.Enter) -> vcpu_pb2.Exit:
        if self._machine.broken:
            return self._halted()
        intercept = enter.intercept
        client = enter.reason == vcpu_pb2.ENTER_REASON_CLIENT_WRITE
        if client != (intercept.origin == vcpu_pb2.ORIGIN_CLIENT):
            origin = name_of(vcpu_pb2.Origin, intercept.origin)
            raise WrongState(f"vCPU {self._vp_index} of VTL1", f"entered with a write whose origin is {origin}")
        load = intercept.state_load
        if load.cause == vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END:
            self._call, self._steps = self._begin_startup(enter)
            return self._advance(None)
        verdict = self._machine.judge(self._vp_index, intercept)
        updates = []
        if verdict.resolution.action == vcpu_pb2.ACTION_RETRY and intercept.WhichOneof("reason") == "memory_fault":
            updates.append(self._opened(intercept.memory_fault))
        if load.cause == vcpu_pb2.STATE_LOAD_CAUSE_WAKE and verdict.allowed:
            updates.append(woken(self._machine.rules, load))
        return self._vtl_return(verdict.resolution, updates)

    def _begin_startup(self, enter: vcpu_pb2.Enter) -> tuple[Call, Steps]:
        call = Call(self._machine, self._vp_index, _STARTUP, enter.intercept.registers)
        return call, fetch_outside(call, enter.intercept)

    def _opened(self, fault: vcpu_pb2.MemoryFault) -> vcpu_pb2.Update:
        """A rule with `log` was broken: its page has the missing right from here on."""
        memory = self._machine.memory
        gfn = fault.gpa >> 12
        code = memory.codes[gfn] & rights.RIGHTS | _RIGHT[fault.access] | rights.READ
        code |= rights.WRITABLE if code & rights.WRITE else rights.SEALED
        run = Run(gfn, 1)
        memory.record([Change(run, code, memory.owner(gfn))])
        return vcpu_pb2.Update(protection=rights.protection_update(code, [run]))

    def _enable(self, enter: vcpu_pb2.Enter) -> vcpu_pb2.Exit:
        """By the guest's hypercall, after which it calls; or by an operator, which guards it at once."""
        if enter.intercept.origin != vcpu_pb2.ORIGIN_CLIENT:
            return self._vtl_return(None, [])
        self._call, self._steps = self._begin_guard(enter)
        return self._advance(None)

    def _begin_guard(self, enter: vcpu_pb2.Enter) -> tuple[Call, Steps]:
        call = Call(self._machine, self._vp_index, _GUARD, enter.registers)
        return call, guard(call)

    def _vtl_return(
        self, resolution: vcpu_pb2.Resolution | None, updates: list[vcpu_pb2.Update], *, parks_others: bool = False
    ) -> vcpu_pb2.Exit:
        pending = self._machine.pending_filter(self._vp_index)
        if pending is not None:
            updates.append(vcpu_pb2.Update(intercepts=pending))
        exit_ = vcpu_pb2.Exit()  # filled in place: messages given to a constructor are copied, slowly
        exit_.vp_index, exit_.vtl = self._vp_index, VTL
        answer = exit_.vtl_return
        answer.SetInParent()
        if resolution is not None:
            answer.resolution.CopyFrom(resolution)
        answer.updates.extend(updates)
        stop_all = False
        for update in updates:
            stop_all = stop_all or update.HasField("protection")
        for index in range(len(self._machine.processors)):
            if index != self._vp_index:
                stop_all = stop_all or self._machine.lacks_strict_filter(index)
                if parks_others:
                    park = vcpu_pb2.Update(park_processor=vcpu_pb2.ParkProcessor())
                    answer.peers.append(vcpu_pb2.PeerUpdate(vp_index=index, update=park))
                changed = self._machine.pending_filter(index)
                if changed is not None:
                    update = vcpu_pb2.Update(intercepts=changed)
                    answer.peers.append(vcpu_pb2.PeerUpdate(vp_index=index, update=update))
        answer.stop_all = stop_all
        return exit_


_RIGHT: dict[int, int] = {
    vcpu_pb2.ACCESS_KIND_READ: rights.READ,
    vcpu_pb2.ACCESS_KIND_WRITE: rights.WRITE,
    vcpu_pb2.ACCESS_KIND_EXECUTE: rights.KERNEL_EXECUTE | rights.USER_EXECUTE,
}

# Enters that judge, and change what VTL1 knows only in what Machine.judging tells of.
_JUDGING = frozenset({vcpu_pb2.ENTER_REASON_INTERCEPT, vcpu_pb2.ENTER_REASON_CLIENT_WRITE})
# reason of the enter that a service begins with -> the service
_BEGINNINGS: dict[int, Callable[[PolicyProcessor, vcpu_pb2.Enter], tuple[Call, Steps]]] = {
    vcpu_pb2.ENTER_REASON_VTL_CALL: PolicyProcessor._begin_call,
    vcpu_pb2.ENTER_REASON_ENABLE: PolicyProcessor._begin_guard,
    vcpu_pb2.ENTER_REASON_INTERCEPT: PolicyProcessor._begin_startup,
}
# (a service waits, reason) -> what to do. All other pairs are refused.
_HANDLERS: dict[tuple[bool, int], Callable[[PolicyProcessor, vcpu_pb2.Enter], vcpu_pb2.Exit]] = {
    (False, vcpu_pb2.ENTER_REASON_VTL_CALL): PolicyProcessor._vtl_call,
    (False, vcpu_pb2.ENTER_REASON_INTERCEPT): PolicyProcessor._intercept,
    (False, vcpu_pb2.ENTER_REASON_CLIENT_WRITE): PolicyProcessor._intercept,
    (False, vcpu_pb2.ENTER_REASON_ENABLE): PolicyProcessor._enable,
    (True, vcpu_pb2.ENTER_REASON_RESUME): PolicyProcessor._resume,
}
