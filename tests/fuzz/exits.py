"""What the processes of the levels answer to the VMM: bytes of exits, checked as from the stream, and then served.

VTL0's process is taken to be hostile: whatever it says, VTL1's pages and the sealed ones stay what they were, as in
tests.fuzz.hypercalls, whose board this is. VTL1's own answers are fuzzed on boards of their own, without that check,
since VTL1 may do what it likes with its pages; there the VMM has to survive.
"""

from __future__ import annotations

import random
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tests.fuzz.hypercalls import RAM, VPS, HypercallTarget
from tests.fuzz.making import Maker
from tests.fuzz.target import Defect
from tests.unit.vmm.fakes import FakeLevel
from vmm.board import Ending
from vmm.exits import serve
from vmm.intercept_filter import Watched
from vmm.peers import RemoteLevel
from vmm.processor import Processor
from vmm.vtl import VTL0
from vtlab.errors import VtlabError
from vtlab.hyperv.profiles import PROFILES
from vtlab.run_messages import framed
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, InterceptFilter, RunResponse, VtlReturn

_RENEW_AFTER = 20_000
_CHECK_EVERY = 1_000
_ALL_BITS = (1 << 64) - 1
_KNOWN = {
    "port": [0x3F8, 0x510, 0x514, 0x518, 0xF4, 0xE9],
    "size": [1, 2, 4],
    "leaf": [0, 1, *range(0x4000_0000, 0x4000_0007)],
    "index": [0x4000_0000, 0x4000_0001, 0x4000_0002, 0x4000_0003, 0xC000_0080, 0x277, 0x1B],
    "vtl": [0],
    "vp_index": [*range(VPS)],
    "gfns": [*range(RAM // 4096)],
    "runs": [0, 1, 2, 16, RAM // 4096],
}
_REASONS = [field.name for field in Exit.DESCRIPTOR.oneofs_by_name["reason"].fields]
# Those that say little and end the machine come once where the others come ten times.
_FEW = frozenset({"power_off", "debug_exit", "failure", "reset_request", "shutdown", "output", "kicked", "protect"})
_WEIGHTS = [1 if name in _FEW else 10 for name in _REASONS]
_EVERYTHING = InterceptFilter(
    cr0_mask=_ALL_BITS,
    cr4_mask=_ALL_BITS,
    efer_mask=_ALL_BITS,
    cr3_writes=True,
    gdtr_writes=True,
    idtr_writes=True,
    startups=True,
    state_loads=True,
    sleeps=True,
)


class ExitTarget(HypercallTarget):
    """RunResponses of VTL0's process, and in every fourth machine of VTL1's too."""

    def __init__(self) -> None:
        super().__init__()
        # Nobody is dialled: only what parses an answer is used of it.
        self._channel = grpc.insecure_channel("unix:/nonexistent/vtlab-fuzz")
        self._wire = RemoteLevel(self._channel, 0, "guest")
        self._upper = RemoteLevel(self._channel, 1, "monitor")
        self._responses, self._exits = Maker(RunResponse, _KNOWN), Maker(Exit, _KNOWN)
        self._reasons = {name: self._maker_of(name) for name in _REASONS}
        self._returns = Maker(VtlReturn, _KNOWN)
        self._trusted = True
        self._steps = 0

    @staticmethod
    def _maker_of(reason: str) -> Maker:
        field: Any = Exit.DESCRIPTOR.fields_by_name[reason]
        return Maker(field.message_type._concrete_class, _KNOWN)

    def close(self) -> None:
        self._channel.close()
        super().close()

    def step(self, rng: random.Random) -> str:
        if self._steps % _RENEW_AFTER == 0:
            self._trusted = rng.random() < 0.75
            board = self.renew(rng.choice(sorted(PROFILES)), vcpu_pb2.PERSONALITY_POLICY, vtl1=rng.random() < 0.8)
            for processor in board.processors:
                processor.watched = Watched(_EVERYTHING if rng.random() < 0.5 else InterceptFilter())
        elif self._steps % _CHECK_EVERY == 0:
            self.check()
        self._steps += 1
        assert self.board is not None
        processor = rng.choice(self.board.processors)
        enter = Enter(vp_index=processor.index, sequence=processor.resumed)
        data = self._answer(rng, enter)
        try:
            exit_ = self._wire._exit(data, enter)
        except VtlabError:
            return "no exit of VTL0"
        return f"{exit_.WhichOneof('reason')}: {self._served(rng, processor, exit_)}"

    def _answer(self, rng: random.Random, enter: Enter) -> bytes:
        if rng.random() < 0.1:
            return self._responses.data(rng, damaged=0.5)
        exit_ = self._exits.message(rng)
        (reason,) = rng.choices(_REASONS, _WEIGHTS)
        getattr(exit_, reason).CopyFrom(self._reasons[reason].message(rng))
        exit_.vp_index, exit_.sequence, exit_.vtl = enter.vp_index, enter.sequence, 0
        del exit_.serial[4:]
        return framed(exit_.SerializeToString())

    def _served(self, rng: random.Random, processor: Processor, exit_: Exit) -> str:
        board = self.board
        assert board is not None
        monitor, guest = board.monitor, board.guest
        assert isinstance(monitor, FakeLevel)
        assert isinstance(guest, FakeLevel)
        monitor.script.extend([lambda _enter: self._verdict(rng)] * 2)
        try:
            answer = serve(board, processor, exit_)
        except VtlabError:
            return "the machine fails"
        finally:
            processor.vtl.active = VTL0
            board.over = False
            monitor.script.clear()
            monitor.entered.clear()
            for one in board.processors:
                if one.waiting > 64:
                    one._pending.clear()  # an enter would have taken them
        if isinstance(answer, Ending):
            return "the machine ends"
        if answer.vp_index != processor.index or answer.sequence != processor.resumed:
            raise Defect(f"exit {exit_} is answered with enter {answer.sequence} of vCPU {answer.vp_index}")
        return "answered"

    def _verdict(self, rng: random.Random) -> Exit:
        """VTL1's answer: any of its verdicts, or bytes of any kind if it is the one that is fuzzed."""
        if self._trusted:
            resolution = vcpu_pb2.Resolution(action=rng.randrange(9), value=rng.getrandbits(64))  # type: ignore[arg-type]
            return Exit(vtl_return=VtlReturn(resolution=resolution))
        kind = rng.random()
        if kind < 0.1:
            return self._parsed(self._responses.data(rng, damaged=0.5))
        exit_ = self._exits.message(rng)
        if kind < 0.7:
            exit_.vtl_return.CopyFrom(self._returns.message(rng))
            if rng.random() < 0.9:
                exit_.vtl_return.ClearField("stand_down")
            if rng.random() < 0.7:
                exit_.vtl_return.ClearField("peers")
        elif kind < 0.9:
            exit_.protect.CopyFrom(self._reasons["protect"].message(rng))
        return self._parsed(framed(exit_.SerializeToString()))

    def _parsed(self, data: bytes) -> Exit:
        try:
            found = RunResponse.FromString(data).exit
            enter = Enter(vp_index=found.vp_index, sequence=found.sequence)
            return self._upper._exit(data, enter)
        except (VtlabError, DecodeError):
            return Exit()

    def check(self) -> None:
        """Only where VTL1 is not the one that is fuzzed."""
        if self._trusted:
            super().check()
