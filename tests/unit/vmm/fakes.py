"""Levels without processes: they speak Enter and Exit values, and block like real ones where a guest would run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from vmm.level import LevelLost, Recoveries
from vtlab.errors import Cancelled, VtlabError
from vtlab.v1 import vcpu_pb2
from vtlab.v1.registers_pb2 import ProcessorState, RegisterName
from vtlab.v1.vcpu_pb2 import AttachRequest, Enter, Exit, Kicked, VtlReturn

Step = Exit | VtlabError | Callable[[Enter], Exit]


class FakeLevel:
    """Answers enters from a script; VTL0 with an empty script runs until it is kicked, VTL1 returns at once.

    Attributes:
        script: what comes next; an error is raised.
        entered: every enter, as it came.
        attached: every AttachRequest.
        log: names of calls in order, shared between levels to see their order.
    """

    def __init__(self, vtl: int, log: list[str] | None = None) -> None:
        self.vtl = vtl
        self.recoveries = Recoveries()
        self.name = f"fake VTL{vtl}"
        self.script: deque[Step] = deque()
        self.entered: list[Enter] = []
        self.attached: list[AttachRequest] = []
        self.log = log if log is not None else []
        self.processor_state = ProcessorState()
        self.refuse_attach: VtlabError | None = None
        self.refuse_reconnect: VtlabError | None = None
        self.deaf = False
        self.lost = False
        self._changed = threading.Condition()
        self._kicked = 0
        self._hung_up = False

    def say(self, *steps: Step) -> None:
        """Adds to the script; a vCPU that runs takes it at once."""
        with self._changed:
            self.script += steps
            self._changed.notify_all()

    def attach(self, request: AttachRequest) -> None:
        self.log.append(f"attach {self.vtl} {request.generation}")
        if self.refuse_attach:
            raise self.refuse_attach
        self.attached.append(request)

    def reconnect(self, request: AttachRequest) -> list[Enter]:
        self.log.append(f"reconnect {self.vtl} {request.generation}")
        if self.refuse_reconnect:
            raise self.refuse_reconnect
        if self.lost:
            raise LevelLost(self.name, "is lost")
        return [
            next((enter for enter in reversed(self.entered) if enter.vp_index == vp), Enter())
            for vp in range(request.vp_count)
        ]

    def detach(self, vm: str, *, reset: bool = False) -> None:
        self.log.append(f"detach {self.vtl}")

    def state(self, vp_index: int) -> ProcessorState:
        return self.processor_state

    def kick(self, vp_index: int, sequence: int) -> bool:
        with self._changed:
            if not self.deaf:
                self._kicked = max(self._kicked, sequence)
                self._changed.notify_all()
        return True

    def drive(self, enter: Enter, answer: Callable[[Exit], Enter | None]) -> None:
        following: Enter | None = enter
        while following is not None:
            following = answer(self.enter(following))

    def enter(self, enter: Enter) -> Exit:
        copy = Enter()
        copy.CopyFrom(enter)
        with self._changed:
            self._apply(copy)
            self.entered.append(copy)
            self._changed.notify_all()
            while not self.script:
                if self._hung_up:
                    raise Cancelled(self.name, "hung up")
                if self.vtl:
                    self.script.append(Exit(vtl_return=VtlReturn()))
                elif self._kicked >= enter.sequence:
                    self.script.append(Exit(kicked=Kicked()))
                else:
                    self._changed.wait()
            step = self.script.popleft()
        if isinstance(step, VtlabError):
            raise step
        exit_ = Exit()
        exit_.CopyFrom(step if isinstance(step, Exit) else step(copy))
        exit_.sequence, exit_.vp_index, exit_.vtl = enter.sequence, enter.vp_index, self.vtl
        return exit_

    def _apply(self, enter: Enter) -> None:
        if enter.sequence == 1:
            self._kicked = 0
        for update in enter.updates:
            if update.HasField("register"):
                name = RegisterName.Name(update.register.name).removeprefix("REGISTER_NAME_").lower()
                if isinstance(getattr(self.processor_state.registers, name, None), int):
                    setattr(self.processor_state.registers, name, update.register.value)

    def listen(self, interrupted: Callable[[int, int], None]) -> None:
        self.interrupted = interrupted

    def hang_up(self) -> None:
        with self._changed:
            self._hung_up = True
            self._changed.notify_all()

    def close(self) -> None:
        self.hang_up()

    def wait_entered(self, count: int, timeout: float = 5.0) -> list[Enter]:
        """The enters, once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.entered) >= count, timeout), f"only {len(self.entered)}"
            return list(self.entered)


def returns(*updates: vcpu_pb2.Update, action: vcpu_pb2.Action.ValueType = 0, reason: str = "") -> Exit:  # type: ignore[assignment]
    """VTL1 returns with a verdict."""
    resolution = vcpu_pb2.Resolution(action=action, reason=reason)
    return Exit(vtl_return=VtlReturn(resolution=resolution, updates=updates))
