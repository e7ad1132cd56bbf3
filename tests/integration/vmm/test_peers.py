"""A level in another process, over a real channel: repetition, silence, nonsense."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from vmm.peers import RemoteLevel
from vtlab.channels import ServerConfig, dial, serve
from vtlab.errors import Cancelled, Conflict, GuestMisbehaved, PeerUnavailable
from vtlab.session import Session
from vtlab.trust.certificates import ensure_trust
from vtlab.trust.roles import Role
from vtlab.v1 import vcpu_pb2_grpc
from vtlab.v1.vcpu_pb2 import Enter, Exit, Kicked, RunRequest, RunResponse, SerialOutput


class Toy(vcpu_pb2_grpc.VcpuServiceServicer):
    """A vCPU that counts how often it really executed, and can misbehave once per name in `faults`."""

    def __init__(self) -> None:
        self.executed: list[int] = []
        self.faults: list[str] = []
        self.released = threading.Event()
        self.session = Session("vCPU 0", self._execute)

    def _execute(self, enter: Enter) -> bytes:
        self.executed.append(enter.sequence)
        if "silent" in self.faults:
            self.released.wait(30)
        exit_ = Exit(kicked=Kicked(), vtl=0)
        if "large" in self.faults:
            exit_.serial.append(SerialOutput(data=bytes(100_000)))
        if "other level" in self.faults:
            exit_.vtl = 1
        return exit_.SerializeToString()

    def Run(self, request_iterator: Iterator[RunRequest], context: grpc.ServicerContext) -> Iterator[RunResponse]:
        for request in request_iterator:
            exit_ = Exit.FromString(self.session.answer(request.enter))
            if "lost answer" in self.faults:
                self.faults.remove("lost answer")
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            if "ends" in self.faults:
                self.faults.remove("ends")
                return
            if "other number" in self.faults:
                exit_.sequence += 1
            yield RunResponse(exit=exit_)


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_trust(tmp_path_factory.mktemp("trust"))


@pytest.fixture
def toy() -> Iterator[Toy]:
    result = Toy()  # type: ignore[abstract]
    yield result
    result.released.set()


@pytest.fixture
def make_level(toy: Toy, trust: Path, tmp_path: Path) -> Iterator[Callable[..., RemoteLevel]]:
    """Connects to the toy; closed after the test."""

    def register(server: grpc.Server) -> None:
        vcpu_pb2_grpc.add_VcpuServiceServicer_to_server(toy, server)

    server = serve(ServerConfig((f"unix:{tmp_path}/g",), trust, "guest", tmp_path), register)
    channel = dial(server.addresses[0], trust, Role.VMM, Role.GUEST)
    levels: list[RemoteLevel] = []

    def make(patience: float | None = None) -> RemoteLevel:
        levels.append(RemoteLevel(channel, 0, "guest at test", patience))
        return levels[-1]

    yield make
    for level in levels:
        level.close()
    toy.released.set()
    channel.close()
    server.stop(0)


def test_enters_and_exits(make_level: Callable[..., RemoteLevel], toy: Toy) -> None:
    level = make_level()
    assert [level.enter(Enter(sequence=number)).sequence for number in (1, 2, 3)] == [1, 2, 3]
    assert toy.executed == [1, 2, 3]


@pytest.mark.parametrize("fault", ["lost answer", "ends"])
def test_a_broken_stream_repeats_the_enter_and_nothing_happens_twice(
    make_level: Callable[..., RemoteLevel], toy: Toy, fault: str
) -> None:
    level = make_level()
    level.enter(Enter(sequence=1))
    toy.faults.append(fault)
    assert level.enter(Enter(sequence=2)).sequence == 2
    assert toy.executed == [1, 2]
    assert level.enter(Enter(sequence=3)).sequence == 3


def test_silence_is_bounded(make_level: Callable[..., RemoteLevel], toy: Toy) -> None:
    level = make_level(patience=0.3)
    toy.faults.append("silent")
    with pytest.raises(PeerUnavailable, match=r"guest at test: did not answer within 0.3 s"):
        level.enter(Enter(sequence=1))
    assert toy.executed == [1]


@pytest.mark.parametrize("fault", ["large", "other number", "other level"])
def test_nonsense_is_not_believed(make_level: Callable[..., RemoteLevel], toy: Toy, fault: str) -> None:
    level = make_level()
    toy.faults.append(fault)
    with pytest.raises(GuestMisbehaved, match="guest at test"):
        level.enter(Enter(sequence=1))


def test_a_refusal_keeps_its_type(make_level: Callable[..., RemoteLevel]) -> None:
    level = make_level()
    with pytest.raises(Conflict, match="enter 5"):
        level.enter(Enter(sequence=5))


def test_hanging_up_ends_a_wait(make_level: Callable[..., RemoteLevel], toy: Toy) -> None:
    level = make_level()
    toy.faults.append("silent")
    seen: list[Exception] = []

    def wait() -> None:
        try:
            level.enter(Enter(sequence=1))
        except Cancelled as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not toy.executed:
        thread.join(0.01)
    level.hang_up()
    thread.join(5)
    assert len(seen) == 1


def counting(
    last: int, seen: list[int], before: Callable[[int], object] = lambda _number: None
) -> Callable[[Exit], Enter | None]:
    """Enters up to number `last`; calls `before` with the number of each exit."""

    def answer(exit_: Exit) -> Enter | None:
        seen.append(exit_.sequence)
        before(exit_.sequence)
        return Enter(sequence=exit_.sequence + 1) if exit_.sequence < last else None

    return answer


def test_driving_goes_from_exit_to_exit(make_level: Callable[..., RemoteLevel], toy: Toy) -> None:
    level, seen = make_level(), list[int]()
    level.drive(Enter(sequence=1), counting(100, seen))
    assert seen == toy.executed == list(range(1, 101))
    level.drive(Enter(sequence=101), counting(102, seen))
    assert toy.executed == list(range(1, 103))


@pytest.mark.parametrize("fault", ["lost answer", "ends"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_broken_stream_is_driven_on(make_level: Callable[..., RemoteLevel], toy: Toy, fault: str, at: int) -> None:
    level, seen = make_level(), list[int]()
    toy.faults += [fault] * (at == 0)
    level.drive(Enter(sequence=1), counting(5, seen, lambda number: toy.faults.extend([fault] * (number == at))))
    assert seen == toy.executed == [1, 2, 3, 4, 5]
    assert not toy.faults


def test_what_serving_raises_comes_out_of_driving(make_level: Callable[..., RemoteLevel], toy: Toy) -> None:
    level = make_level()

    def broken(_exit: Exit) -> Enter:
        raise PeerUnavailable("another level", "is gone")  # no reason to repeat the enter

    with pytest.raises(PeerUnavailable, match="another level"):
        level.drive(Enter(sequence=1), broken)
    assert toy.executed == [1]


@pytest.mark.parametrize("fault", ["large", "other number", "other level"])
def test_nonsense_is_not_served(make_level: Callable[..., RemoteLevel], toy: Toy, fault: str) -> None:
    toy.faults.append(fault)
    seen: list[int] = []
    with pytest.raises(GuestMisbehaved, match="guest at test"):
        make_level().drive(Enter(sequence=1), counting(2, seen))
    assert not seen


def test_a_refusal_ends_driving(make_level: Callable[..., RemoteLevel]) -> None:
    with pytest.raises(Conflict, match="enter 5"):
        make_level().drive(Enter(sequence=5), counting(5, []))


@pytest.mark.parametrize("served", [0, 2])
def test_hanging_up_ends_driving(make_level: Callable[..., RemoteLevel], toy: Toy, served: int) -> None:
    level, raised = make_level(), list[Exception]()
    toy.faults += ["silent"] * (served == 0)

    def drive() -> None:
        try:
            level.drive(
                Enter(sequence=1), counting(9, [], lambda number: toy.faults.extend(["silent"] * (number == served)))
            )
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=drive)
    thread.start()
    while len(toy.executed) <= served:
        thread.join(0.01)
    level.hang_up()
    thread.join(5)
    assert len(raised) == 1


def test_hanging_up_while_an_exit_is_served(make_level: Callable[..., RemoteLevel], toy: Toy) -> None:
    level = make_level()
    with pytest.raises(Cancelled):
        level.drive(Enter(sequence=1), counting(9, [], lambda number: level.hang_up() if number == 3 else None))
    assert toy.executed[:3] == [1, 2, 3]


def test_a_kick_that_nobody_hears(make_level: Callable[..., RemoteLevel]) -> None:
    assert make_level().kick(0, 1) is False  # the toy does not implement it
