"""The two levels as the VMM sees them: a vCPU is entered and exits.

One stream a vCPU carries enters and exits. If it breaks, the level is asked whether it still holds the machine, and the
same enter is sent again on a new stream, within a budget: by the contract it does nothing twice. A process that was
restarted and holds nothing is a LevelLost. What a level answers is checked here; nobody else has to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc
import tenacity
from google.protobuf.message import DecodeError

from vmm.driven import DrivenStream
from vmm.level import LevelLost, Recoveries
from vtlab import vcpu_rpc
from vtlab.errors import Cancelled, GuestMisbehaved, NotFound, PeerUnavailable, VtlabError
from vtlab.run_messages import framed
from vtlab.status import from_rpc_error, translated
from vtlab.v1 import vcpu_pb2, vcpu_pb2_grpc
from vtlab.v1.registers_pb2 import ProcessorState
from vtlab.v1.vcpu_pb2 import AttachRequest, Enter, Exit, RunResponse

# Seconds that Attach, Detach, Kick and GetState may take.
CALL_TIMEOUT = 30.0
# Bytes of an exit of VTL0, whose process may be hostile: registers, an instruction, some KiB of serial output.
MAX_GUEST_EXIT = 64 << 10

# What it means that a process holds nothing of the machine, by level.
_LOST = ("crashed, and VTL0's CPU with it", "was started anew, and VTL1 is lost: {}")
Answer = TypeVar("Answer")

_RUN = f"/{vcpu_rpc.NAME}/Run"


def _may_come_back(error: BaseException) -> bool:
    return isinstance(error, PeerUnavailable) and not isinstance(error, LevelLost)


class _Stream:
    """Enters and exits of one vCPU, one at a time, as bytes.

    Messages are built and parsed by the thread of the vCPU: gRPC's own threads would do it while that one waits for the
    interpreter, which costs more than the work itself.
    """

    def __init__(self, run: grpc.StreamStreamMultiCallable[bytes, bytes]) -> None:
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._call = run(iter(self._requests.get, None))
        self._responses: Iterator[bytes] = iter(self._call)

    def enter(self, request: bytes) -> bytes:
        self._requests.put(request)
        try:
            return next(self._responses)
        except StopIteration:
            raise PeerUnavailable("stream", "ended by the peer") from None

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class RemoteLevel:
    """One level of one machine, in another process (vmm.level.Level).

    Attributes:
        name: role and address, for errors.
        vtl: 0 or 1.
        recoveries: from breaks of its streams.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        vtl: int,
        name: str,
        patience: float | None = None,
        restart_budget: float = 45.0,
        channels: Callable[[], grpc.Channel] | None = None,
    ) -> None:
        """Args:
        patience: seconds within which enter() must be answered; None for ever (a guest runs).
        restart_budget: seconds that the process may be away.
        channels: gives the channel to use once a stream broke: certificates may have been replaced or revoked since.
        """
        self._restart_budget = restart_budget
        self._machine: tuple[str, int] | None = None
        self.name = name
        self.vtl = vtl
        self.patience = patience
        self._channels = channels
        self._use(channel)
        self._streams: dict[int, _Stream] = {}
        self._driven: dict[int, DrivenStream] = {}
        self._deadlines: dict[int, float] = {}
        self._lock = threading.Lock()
        self._hang_ups = 0
        self._closed = False
        self.recoveries = Recoveries()
        self._runs_code = False
        self._listening: Callable[[], object] | None = None
        if patience is not None:
            threading.Thread(target=self._watch, name=f"watch-vtl{vtl}", daemon=True).start()

    def _use(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = vcpu_pb2_grpc.VcpuServiceStub(channel)
        self._run: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_RUN)

    def attach(self, request: AttachRequest) -> vcpu_pb2.AttachResponse:
        """Binds the process to a machine. Raises what the process refuses with, or PeerUnavailable."""
        response: vcpu_pb2.AttachResponse = self._when_back(self._stub.Attach, request)
        self._serves(request)
        return response

    def reconnect(self, request: AttachRequest) -> list[Enter]:
        """See Level.reconnect."""
        self._serves(request)
        return self._where_it_stands()

    def _serves(self, request: AttachRequest) -> None:
        self._machine = request.vm, request.generation
        # Guest code may run for ever, at every level.
        self._runs_code = not self.vtl or request.personality == vcpu_pb2.PERSONALITY_GUEST_CODE

    def _where_it_stands(self) -> list[Enter]:
        """Raises LevelLost, PeerUnavailable."""
        assert self._machine is not None, "no machine is attached"
        vm, generation = self._machine
        try:
            answer = self._when_back(self._stub.Reconnect, vcpu_pb2.ReconnectRequest(vm=vm, generation=generation))
        except NotFound as error:
            raise LevelLost(self.name, _LOST[self.vtl].format(error.detail)) from None
        return list(answer.enters)

    def _when_back(self, method: Callable[..., Any], request: Any) -> Any:
        """The answer to a call that may be repeated, also of a process that is being restarted."""

        def once() -> Any:
            with translated(self.name):
                return method(request, timeout=CALL_TIMEOUT)

        return self._attempts(once)

    def _attempts(self, once: Callable[[], Answer], late: Callable[[], bool] = lambda: False) -> Answer:
        """Tries until the level is there, the budget is spent or somebody hangs up. Raises as `once`, or Cancelled."""
        hang_ups = self._hang_ups

        def attempt() -> Answer:
            if hang_ups != self._hang_ups:
                raise Cancelled(self.name, "hung up")
            channel = self._channels() if self._channels is not None else self._channel
            if channel is not self._channel:
                self._use(channel)
            return once()

        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self._restart_budget),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.2),
            retry=tenacity.retry_if_exception(lambda error: _may_come_back(error) and not late()),
            reraise=True,
        )
        return attempts(attempt)

    def detach(self, vm: str, *, reset: bool = False) -> None:
        """Ends the streams and makes the process forget the machine."""
        self._stop_listening()
        self.hang_up()
        with translated(self.name):
            self._stub.Detach(vcpu_pb2.DetachRequest(vm=vm, reset=reset), timeout=CALL_TIMEOUT)

    def state(self, vp_index: int) -> ProcessorState:
        """Reads a vCPU that is not running."""
        with translated(self.name):
            return self._stub.GetState(vcpu_pb2.GetStateRequest(vp_index=vp_index), timeout=CALL_TIMEOUT).state

    def kick(self, vp_index: int, sequence: int) -> bool:
        """Makes that enter exit soon. False if it had exited already, or if the level cannot be reached."""
        try:
            request = vcpu_pb2.KickRequest(vp_index=vp_index, sequence=sequence)
            with translated(self.name):
                return self._stub.Kick(request, timeout=CALL_TIMEOUT).running
        except VtlabError:
            return False  # who waits for the exit learns from the stream that the level is gone

    def enter(self, enter: Enter) -> Exit:
        """See Level.enter. An enter is repeated on a new stream if the old one broke."""
        request = framed(enter.SerializeToString())
        vp_index = enter.vp_index
        if self.patience is not None and not self._runs_code:
            self._deadlines[vp_index] = time.monotonic() + self.patience
        try:
            stream = self._streams.get(vp_index) or self._open(vp_index)
            data = stream.enter(request)
        except (grpc.RpcError, PeerUnavailable) as error:
            data = self._again(vp_index, request, error)
        finally:
            if self.patience is not None:
                self._deadlines.pop(vp_index, None)
        return self._exit(data, enter)

    def drive(self, enter: Enter, answer: Callable[[Exit], Enter | None]) -> None:
        """See Level.drive. `answer` runs on another thread than the caller's, which waits."""
        vp_index = enter.vp_index

        def following(data: bytes) -> bytes | None:
            nonlocal enter
            following_enter = answer(self._exit(data, enter))
            if following_enter is None:
                return None
            enter = following_enter
            return framed(enter.SerializeToString())

        request: bytes | None = framed(enter.SerializeToString())
        while request is not None:
            with translated(self.name):
                stream = DrivenStream(self._run, request, following)
            with self._lock:
                self._driven[vp_index] = stream
                repeated = self._streams.pop(vp_index, None)
            if repeated is not None:
                repeated.close()
            try:
                request = stream.wait()
            finally:
                with self._lock:
                    self._driven.pop(vp_index, None)
            if request is not None:
                request = following(self._again(vp_index, request, stream.failure))

    def _exit(self, data: bytes, enter: Enter) -> Exit:
        """Parses what answers an enter. Raises GuestMisbehaved."""
        if not self.vtl and len(data) > MAX_GUEST_EXIT:
            raise GuestMisbehaved(self.name, f"an exit has {len(data)} bytes, more than {MAX_GUEST_EXIT}")
        try:
            exit_ = RunResponse.FromString(data).exit
        except DecodeError as error:
            raise GuestMisbehaved(self.name, f"an exit is no message: {error}") from None
        vp_index = enter.vp_index
        if exit_.sequence != enter.sequence or exit_.vp_index != vp_index or exit_.vtl != self.vtl:
            raise GuestMisbehaved(
                self.name,
                f"answered enter {enter.sequence} of vCPU {vp_index} with exit {exit_.sequence} of vCPU "
                f"{exit_.vp_index} at VTL{exit_.vtl}",
            )
        return exit_

    def listen(self, interrupted: Callable[[int, int], None]) -> None:
        """See Level.listen; ends when the level is detached or closed."""
        self._stop_listening()
        with translated(self.name):
            call = self._stub.Events(vcpu_pb2.EventsRequest())
        self._listening = call.cancel

        def follow() -> None:
            try:
                for response in call:
                    if response.HasField("interrupt_pending"):
                        interrupted(response.vp_index, response.interrupt_pending.after)
            except grpc.RpcError:
                return  # the level is gone, or the machine is: the vCPU's own stream says so

        threading.Thread(target=follow, name=f"events-vtl{self.vtl}", daemon=True).start()

    def _stop_listening(self) -> None:
        cancel, self._listening = self._listening, None
        if cancel is not None:
            cancel()

    def hang_up(self) -> None:
        """Ends all streams: who waits in enter() gets Cancelled. The next enter() opens a new one."""
        with self._lock:
            self._hang_ups += 1
            streams: list[_Stream | DrivenStream] = [*self._streams.values(), *self._driven.values()]
            self._streams.clear()
        for stream in streams:
            stream.close()

    def close(self) -> None:
        self._closed = True
        self._stop_listening()
        self.hang_up()

    def _open(self, vp_index: int) -> _Stream:
        with translated(self.name):
            stream = _Stream(self._run)
        with self._lock:
            self._streams[vp_index] = stream
        return stream

    def _again(self, vp_index: int, request: bytes, first: Exception) -> bytes:
        """Repeats an enter on new streams until the level is back, the budget is spent, or it refuses."""
        failure = self._translate(first, vp_index)
        if not isinstance(failure, PeerUnavailable) or self._late(vp_index):
            raise failure from None
        broken = time.monotonic()
        data = self._attempts(lambda: self._once(vp_index, request), lambda: self._late(vp_index))
        self.recoveries.add(time.monotonic() - broken)
        return data

    def _once(self, vp_index: int, request: bytes) -> bytes:
        if self._machine is not None:
            self._where_it_stands()
        if vp_index in self._deadlines:
            self._deadlines[vp_index] = time.monotonic() + (self.patience or 0)  # it begins anew
        try:
            return self._open(vp_index).enter(request)
        except grpc.RpcError as error:
            raise self._translate(error, vp_index) from None

    def _translate(self, error: Exception, vp_index: int) -> VtlabError:
        if self._late(vp_index):
            return PeerUnavailable(self.name, f"did not answer within {self.patience:g} s")
        if isinstance(error, grpc.RpcError):
            failure = from_rpc_error(error, self.name)
            return Cancelled(self.name, "hung up") if isinstance(failure, Cancelled) else failure
        return PeerUnavailable(self.name, str(error))

    def _late(self, vp_index: int) -> bool:
        return time.monotonic() > self._deadlines.get(vp_index, float("inf"))

    def _watch(self) -> None:
        """Cancels the stream of an enter that is not answered in time; the waiting thread then reports it."""
        assert self.patience is not None
        tick = threading.Event()
        while not self._closed:
            tick.wait(min(0.25, self.patience / 4))
            for vp_index in [vp for vp, deadline in list(self._deadlines.items()) if time.monotonic() > deadline]:
                with self._lock:
                    stream = self._streams.pop(vp_index, None)
                if stream is not None:
                    stream.close()
