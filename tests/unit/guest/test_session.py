"""Numbers, kicks, streams and attaching, with a processor that the test holds by the hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from vtl0_guest.session import Guest
from vtlab.errors import BadArgument, BadImage, Conflict, NotFound, WrongState
from vtlab.v1 import registers_pb2, vcpu_pb2

TIMEOUT = 10


class FakeProcessor:
    """Exits when told to, or when kicked; a kick before a run ends that run."""

    def __init__(self) -> None:
        self.enters: list[int] = []
        self.entered = threading.Semaphore(0)
        self.exits: SimpleQueue[vcpu_pb2.Exit] = SimpleQueue()
        self.automatic = True

    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        self.enters.append(enter.sequence)
        self.entered.release()
        if self.automatic and self.exits.empty():
            return vcpu_pb2.Exit(vp_index=enter.vp_index, output=vcpu_pb2.Output()).SerializeToString()
        return self.exits.get(timeout=TIMEOUT).SerializeToString()

    def kick(self) -> None:
        self.exits.put(vcpu_pb2.Exit(kicked=vcpu_pb2.Kicked()))

    def state(self) -> registers_pb2.ProcessorState:
        return registers_pb2.ProcessorState(xcr0=len(self.enters) + 1)


class FakeLevel:
    def __init__(self, request: vcpu_pb2.AttachRequest) -> None:
        self.request = request
        self.processors = [FakeProcessor() for _ in range(request.vp_count)]
        self.woken: Callable[[int], None] = lambda _vp_index: None
        self.vector: int | None = None
        self.closed = False

    def watch(self, woken: Callable[[int], None]) -> None:
        self.woken = woken

    def pending_vector(self, vp_index: int) -> int | None:
        return self.vector

    def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.levels: list[FakeLevel] = []
        self.guest = Guest(self._build)

    def _build(self, request: vcpu_pb2.AttachRequest) -> FakeLevel:
        if request.image.path == "bad":
            raise BadImage("bad", "is bad")
        self.levels.append(FakeLevel(request))
        return self.levels[-1]

    def attach(self, **changes: object) -> FakeLevel:
        fields: dict[str, object] = {"vm": "a", "generation": 1, "vp_count": 1, "ram_size": 1 << 20}
        self.guest.attach(vcpu_pb2.AttachRequest(**(fields | changes)))  # type: ignore[arg-type]
        return self.levels[-1]

    def stream(self, *numbers: int, vp_index: int = 0) -> list[vcpu_pb2.Exit]:
        answer = self.guest.stream(vp_index)
        return [vcpu_pb2.Exit.FromString(answer(enter(number, vp_index))) for number in numbers]


def enter(number: int, vp_index: int = 0) -> vcpu_pb2.Enter:
    return vcpu_pb2.Enter(vp_index=vp_index, sequence=number, reason=vcpu_pb2.ENTER_REASON_RESUME)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.guest.close()


def test_each_enter_has_one_exit_with_its_number(bench: Bench) -> None:
    level = bench.attach()
    assert [exit_.sequence for exit_ in bench.stream(1, 2, 3)] == [1, 2, 3]
    assert level.processors[0].enters == [1, 2, 3]


def test_repeated_number_is_answered_once_done(bench: Bench) -> None:
    level = bench.attach()
    level.processors[0].exits.put(vcpu_pb2.Exit(halt=vcpu_pb2.Halt(interrupts_enabled=True)))
    first = bench.stream(1)
    assert bench.stream(1) == first
    assert level.processors[0].enters == [1]


@pytest.mark.parametrize("number", [0, 2, 3])
def test_other_numbers_are_refused(bench: Bench, number: int) -> None:
    level = bench.attach()
    with pytest.raises(Conflict, match="vCPU 0 of VTL0"):
        bench.stream(number)
    assert level.processors[0].enters == []


def test_kick_ends_only_the_enter_it_names(bench: Bench) -> None:
    level = bench.attach()
    bench.stream(1)
    assert bench.guest.kick(0, 1) is False, "it has exited"
    level.processors[0].automatic = False
    answers: list[vcpu_pb2.Exit] = []
    runner = threading.Thread(target=lambda: answers.extend(bench.stream(2)))
    runner.start()
    assert level.processors[0].entered.acquire(timeout=TIMEOUT)
    assert level.processors[0].entered.acquire(timeout=TIMEOUT)
    assert bench.guest.kick(0, 1) is False
    assert bench.guest.kick(0, 2) is True
    runner.join(TIMEOUT)
    assert [exit_.WhichOneof("reason") for exit_ in answers] == ["kicked"]


def test_kick_may_come_before_its_enter(bench: Bench) -> None:
    bench.attach()
    assert bench.guest.kick(0, 2) is True
    assert [exit_.WhichOneof("reason") for exit_ in bench.stream(1, 2, 3)] == ["output", "kicked", "output"]


def test_newer_stream_takes_over_and_gets_the_kept_exit(bench: Bench) -> None:
    level = bench.attach()
    level.processors[0].automatic = False
    failures: list[Exception] = []

    def old() -> None:
        try:
            bench.stream(1)
        except Conflict as error:
            failures.append(error)

    older = threading.Thread(target=old)
    older.start()
    assert level.processors[0].entered.acquire(timeout=TIMEOUT)
    answers: list[vcpu_pb2.Exit] = []
    newer = threading.Thread(target=lambda: answers.extend(bench.stream(1)))
    vcpu = bench.guest._vcpu(0)
    newer.start()
    while vcpu._stream < 2:
        newer.join(0.001)
    level.processors[0].exits.put(vcpu_pb2.Exit(output=vcpu_pb2.Output()))
    older.join(TIMEOUT)
    newer.join(TIMEOUT)
    assert [exit_.sequence for exit_ in answers] == [1]
    assert level.processors[0].enters == [1]
    assert "another stream took over" in str(failures[0])


def test_stream_is_for_one_vcpu(bench: Bench) -> None:
    bench.attach(vp_count=2)
    answer = bench.guest.stream(0)
    answer(enter(1, 0))
    with pytest.raises(BadArgument, match="vp_index"):
        answer(enter(1, 1))
    assert bench.stream(1, vp_index=1)[0].sequence == 1
    with pytest.raises(NotFound, match="vCPU 2"):
        bench.stream(1, vp_index=2)


def test_state_is_read_only_while_not_running(bench: Bench) -> None:
    level = bench.attach()
    bench.stream(1)
    assert bench.guest.state(0).xcr0 == 2
    level.processors[0].automatic = False
    level.processors[0].entered.acquire()
    runner = threading.Thread(target=lambda: bench.stream(2))
    runner.start()
    assert level.processors[0].entered.acquire(timeout=TIMEOUT)
    with pytest.raises(WrongState, match="running"):
        bench.guest.state(0)
    bench.guest.kick(0, 2)
    runner.join(TIMEOUT)
    assert bench.guest.state(0).xcr0 == 3


def test_failed_enter_is_not_run_again(bench: Bench) -> None:
    level = bench.attach()
    level.processors[0].exits.put(None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        bench.stream(1)
    with pytest.raises(Conflict, match="failed"):
        bench.stream(1)
    assert level.processors[0].enters == [1]


# ------------------------------------------------------------------------------------------------------- attaching


def test_nothing_works_before_attach(bench: Bench) -> None:
    for call in (lambda: bench.stream(1), lambda: bench.guest.kick(0, 1), lambda: bench.guest.state(0)):
        with pytest.raises(WrongState, match="not attached"):
            call()
    bench.guest.detach("a")


def test_second_attach_changes_nothing(bench: Bench) -> None:
    level = bench.attach()
    bench.stream(1)
    assert bench.attach() is level
    assert bench.stream(2)[0].sequence == 2


def test_higher_generation_replaces_the_machine(bench: Bench) -> None:
    old = bench.attach()
    bench.stream(1)
    new = bench.attach(generation=2)
    assert old.closed
    assert not new.closed
    assert bench.stream(1)[0].sequence == 1
    with pytest.raises(Conflict, match="generation 1 after 2"):
        bench.attach(generation=1)
    with pytest.raises(Conflict):
        bench.attach(generation=2, ram_size=2 << 20)


def test_a_running_vcpu_is_kicked_before_its_machine_goes(bench: Bench) -> None:
    level = bench.attach()
    level.processors[0].automatic = False
    runner = threading.Thread(target=lambda: bench.stream(1))
    runner.start()
    assert level.processors[0].entered.acquire(timeout=TIMEOUT)
    bench.guest.detach("a")
    runner.join(TIMEOUT)
    assert level.closed


def test_other_machine_is_refused_until_detach(bench: Bench) -> None:
    level = bench.attach()
    with pytest.raises(WrongState, match="machine a"):
        bench.attach(vm="b")
    with pytest.raises(WrongState, match="machine a"):
        bench.guest.detach("b")
    bench.guest.detach("a")
    assert level.closed
    assert bench.attach(vm="b").request.vm == "b"


def test_failed_attach_leaves_nothing(bench: Bench) -> None:
    old = bench.attach()
    with pytest.raises(BadImage):
        bench.attach(generation=2, image=vcpu_pb2.BootImage(path="bad"))
    assert old.closed
    with pytest.raises(WrongState, match="not attached"):
        bench.stream(1)
    assert bench.attach(generation=2) is not old


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vm": ""}, "vm"),
        ({"vtl": 1}, "vtl"),
        ({"vp_count": 0}, "vp_count"),
        ({"vp_count": 65}, "vp_count"),
        ({"ram_size": 0}, "ram_size"),
        ({"ram_size": 4097}, "ram_size"),
    ],
)
def test_fields_are_checked(bench: Bench, changes: dict[str, object], field: str) -> None:
    with pytest.raises(BadArgument) as error:
        bench.attach(**changes)
    assert error.value.subject == field
    assert bench.levels == []


# ---------------------------------------------------------------------------------------------------------- events


def test_interrupts_of_vcpus_that_are_not_entered_are_reported(bench: Bench) -> None:
    level = bench.attach()
    ends: list[Callable[[], None]] = []
    events = bench.guest.events(ends.append)
    seen: list[vcpu_pb2.EventsResponse] = []
    reader = threading.Thread(target=lambda: seen.extend(events))
    reader.start()
    while not ends:
        reader.join(0.001)
    level.woken(0)
    level.vector = 0x31
    level.woken(0)
    ends[0]()
    reader.join(TIMEOUT)
    assert [(event.vp_index, event.interrupt_pending.vector) for event in seen] == [(0, 0x31)]


def test_events_of_a_call_that_is_over_end_at_once(bench: Bench) -> None:
    assert list(bench.guest.events(lambda _end: False)) == []
