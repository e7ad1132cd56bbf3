"""Entering and leaving: kicks, waiting in HLT, output, events, several processors, and hostile code."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.cpu.machine import CODE, DATA, RAM_SIZE, STACK, A, Guest
from vtlab import errors
from vtlab.ram import Ram, create_ram_files
from vtlab.v1 import registers_pb2


def in_background(guest: Guest) -> threading.Thread:
    thread = threading.Thread(target=guest.run)
    thread.start()
    return thread


def finish(thread: threading.Thread) -> None:
    thread.join(20)
    assert not thread.is_alive()


def wait_until(guest: Guest, address: int, value: int) -> None:
    limit = time.monotonic() + 20
    while guest.peek(address) < value:
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_kick_ends_a_loop_exactly(guest: Guest) -> None:
    """No store of a read-modify-write is done twice, however often the loop is stopped."""
    guest.long_mode("mov ebx, 0x200000; l: inc qword ptr [rbx]; inc rax; jmp l")
    for _ in range(50):
        before = guest.peek(DATA)
        thread = in_background(guest)
        wait_until(guest, DATA, before + 1)
        guest.processor.kick()
        finish(thread)
        assert guest.exit.WhichOneof("reason") == "kicked"
        # Stopped at a block's start: both counters agree.
        assert guest.exit.registers.rax == guest.peek(DATA)


def test_kick_before_the_run_ends_it_at_once(guest: Guest) -> None:
    guest.long_mode("l: jmp l")
    guest.processor.kick()
    assert guest.run() == "kicked"


def test_kick_ends_a_halt(guest: Guest) -> None:
    guest.long_mode("sti; hlt; vmmcall")
    thread = in_background(guest)
    time.sleep(0.02)
    guest.processor.kick()
    finish(thread)
    assert guest.exit.WhichOneof("reason") == "kicked"
    thread = in_background(guest)
    time.sleep(0.02)
    guest.processor.kick()
    finish(thread)
    assert guest.exit.WhichOneof("reason") == "kicked", "still halted"
    event = A.Update(event=A.PendingEvent(interrupt_vector=0x33))
    assert guest.run(updates=[event]) == "hypercall"
    assert guest.vector == 0x33


def test_halt_with_interrupts_off_exits_and_can_be_taken_up(guest: Guest) -> None:
    guest.long_mode("hlt; vmmcall")
    assert guest.run() == "halt"
    assert not guest.exit.halt.interrupts_enabled
    event = A.Update(event=A.PendingEvent(nmi=True))
    assert guest.run(A.ACTION_COMMIT, updates=[event]) == "hypercall"
    assert guest.vector == 2


def test_watched_halt(guest: Guest) -> None:
    guest.long_mode("sti; hlt; vmmcall")
    guest.filter(hlt=True)
    assert guest.run() == "halt"
    assert guest.exit.halt.interrupts_enabled
    assert guest.run(A.ACTION_SKIP) == "hypercall"


def test_output_leaves_when_the_guest_idles_or_waits_too_long(guest: Guest) -> None:
    guest.long_mode("mov edx, 0x3f8; mov al, 0x41; out dx, al; sti; hlt")
    assert guest.run() == "output"
    assert guest.exit.serial[0].data == b"A"
    guest.long_mode("mov edx, 0x3f8; mov al, 0x42; out dx, al; l: jmp l")
    assert guest.run() == "output"
    assert guest.exit.serial[0].data == b"B"


def test_much_output_leaves_in_parts(guest: Guest) -> None:
    guest.long_mode("mov edx, 0x3f8; mov ecx, 6000; mov al, 0x2e; l: out dx, al; dec ecx; jnz l; vmmcall")
    sent = b""
    while guest.run() == "output":
        sent += b"".join(part.data for part in guest.exit.serial)
    sent += b"".join(part.data for part in guest.exit.serial)
    assert sent == b"." * 6000


def test_serial_input_reaches_the_guest(guest: Guest) -> None:
    guest.long_mode("mov edx, 0x3fd; l: in al, dx; test al, 1; jz l; mov edx, 0x3f8; in al, dx; vmmcall")
    data = A.Update(serial_input=A.SerialInput(port=0, data=b"Q"))
    assert guest.run(updates=[data]) == "hypercall"
    assert guest.exit.registers.rax & 0xFF == ord("Q")
    with pytest.raises(errors.BadArgument, match="serial port 7"):
        guest.run(updates=[A.Update(serial_input=A.SerialInput(port=7, data=b"Q"))])


def test_injected_exception(guest: Guest) -> None:
    guest.long_mode("nop; vmmcall")
    event = A.Update(event=A.PendingEvent(exception=A.Exception(vector=14, error_code=4, address=0x1234)))
    assert guest.run(updates=[event]) == "hypercall"
    assert guest.vector == 14
    assert guest.frame(2) == [4, CODE]
    assert guest.exit.registers.cr2 == 0x1234


def test_register_updates(guest: Guest) -> None:
    guest.long_mode("vmmcall; vmmcall")
    guest.run()
    names = registers_pb2
    values = {
        names.REGISTER_NAME_R15: 5,
        names.REGISTER_NAME_RSP: STACK - 64,
        names.REGISTER_NAME_CR4: 0x222 | 1 << 40,
        names.REGISTER_NAME_RFLAGS: 0x202,
    }
    updates = [A.Update(register=names.RegisterValue(name=name, value=value)) for name, value in values.items()]
    assert guest.run(updates=updates) == "hypercall"
    registers = guest.exit.registers
    assert (registers.r15, registers.rsp, registers.cr4, registers.rflags) == (5, STACK - 64, 0x222, 0x202)
    with pytest.raises(errors.BadArgument, match="0x7"):
        guest.run(updates=[A.Update(register=names.RegisterValue(name=7))])  # type: ignore[arg-type]
    with pytest.raises(errors.BadArgument, match="MSR"):
        guest.run(updates=[A.Update(msr=names.MsrValue(index=0x40000000))])


def test_task_register_from_outside_cannot_abort_the_engine(guest: Guest) -> None:
    guest.long_mode("int 0x80; vmmcall", cpl=3)
    broken = registers_pb2.RegisterValue(name=registers_pb2.REGISTER_NAME_TR, segment=registers_pb2.Segment())
    guest.run(updates=[A.Update(register=broken)])
    assert guest.processor.state().tr.attributes & 0x8F == 0x8B


def test_unknown_processor(guest: Guest) -> None:
    with pytest.raises(errors.BadArgument, match="vCPU 3"):
        guest.core.processor(3)


def test_two_processors_take_turns(ram: Ram, tmp_path: Path) -> None:
    guest = Guest(ram, tmp_path, vp_count=2)
    try:
        guest.long_mode("mov ebx, 0x200000; mov ecx, 300000; l: lock inc qword ptr [rbx]; dec ecx; jnz l; vmmcall")
        guest.core.processor(1).load_state(guest.processor.state())
        threads = [
            threading.Thread(target=guest.core.processor(index).run, args=(A.Enter(reason=A.ENTER_REASON_RESUME),))
            for index in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            finish(thread)
        assert guest.peek(DATA) == 600000
        assert guest.core.processor(1).state().registers.rcx == 0
    finally:
        guest.close()


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("ram")
    create_ram_files(directory, RAM_SIZE)
    with Ram(directory, RAM_SIZE, "vtl0") as ram:
        guest = Guest(ram, directory)
        yield guest
        guest.close()


_PRIVILEGED_CODES = """
0f22c0 0f22d8 0f22e0 0f20c0 0f30 0f32 0f0117 0f011f 0f00d8 0f00d0 f4 0fa2 0f01d1 0f01d8 cd80 cc f1 cf 48cf cb 0f05
0f07 0f34 0f35 ff2b ff1b 0f23f8 0f21f8 fb fa 9d 8ed8 8ed0 6c 6e f36c ec ee 0faa 0f08 0f09 0f013b 0f01f8 0fae23 0fae2b
0fc70b d9f6 dd23 8ee0"""
_PRIVILEGED = [bytes.fromhex(code) for code in _PRIVILEGED_CODES.split()]
_LOADS = st.builds(
    lambda register, value: bytes([0xB8 + register]) + struct.pack("<I", value),
    st.integers(0, 7),
    st.sampled_from([0x10000, 0x11000, 0x5000, 0x6000, 0x200000, 8, 0x28, 0x80010033, 0x220, 0xC0000080, 0xFEE00000]),
)
_HOSTILE = st.lists(st.one_of(st.sampled_from(_PRIVILEGED), _LOADS, st.binary(min_size=1, max_size=5)), max_size=40)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=_HOSTILE, mode=st.sampled_from(["long", "user", "protected", "protected user", "real"]))
def test_hostile_code_never_ends_or_hangs_the_process(battered: Guest, parts: list[bytes], mode: str) -> None:
    body = b"".join(parts)
    guest = battered
    guest.core.protect(
        A.ProtectionUpdate(
            runs=[0, RAM_SIZE >> 12],
            access=A.PageAccess(read=True, write=True, kernel_execute=True),
            store=A.PAGE_STORE_WRITABLE,
        )
    )
    start = {
        "long": lambda: guest.long_mode(body),
        "user": lambda: guest.long_mode(body, cpl=3),
        "protected": lambda: guest.protected_mode(body),
        "protected user": lambda: guest.protected_mode(body, cpl=3),
        "real": lambda: guest.real_mode(body),
    }
    start[mode]()
    over = threading.Event()

    def kicks() -> None:
        while not over.wait(0.005):
            guest.processor.kick()

    thread = threading.Thread(target=kicks)
    thread.start()
    try:
        for _ in range(6):
            if guest.run(A.ACTION_DENY) in ("shutdown", "failure", "kicked"):
                break
            assert guest.exit.registers.cpl in (0, 1, 2, 3)
    finally:
        over.set()
        thread.join()


def test_pending_interrupt_costs_a_guest_that_masks_it_nothing(guest: Guest) -> None:
    """It waits without an exit per block, and is taken at the first instruction after the shadow of STI."""
    guest.long_mode("mov ecx, 3000000; l: dec ecx; jnz l; sti; nop; vmmcall")
    begin = time.monotonic()
    assert guest.run(updates=[A.Update(event=A.PendingEvent(interrupt_vector=0x44))]) == "hypercall"
    assert guest.vector == 0x44
    assert guest.frame(1)[0] == CODE + 5 + 4 + 1 + 1
    assert time.monotonic() - begin < 10, "3 million exits would take longer"


def test_interrupt_ends_a_loop_without_a_kick(guest: Guest) -> None:
    guest.long_mode("sti; mov ebx, 0x200000; l: inc qword ptr [rbx]; jmp l")
    thread = in_background(guest)
    wait_until(guest, DATA, 1)
    guest.processor._external.append(0x66)
    guest.processor.wake()
    finish(thread)
    assert guest.vector == 0x66


@pytest.mark.parametrize(
    ("busy", "duration", "ago", "used", "starved"),
    [
        (True, 0.1, 0.1, 0.0001, True),  # a guest that set 100 ms and has run for 100 us since
        (True, 0.1, 3.0, 0.0001, True),  # even now
        (True, 0.1, 30.0, 0.0001, False),  # but not for ever
        (True, 0.1, 0.1, 0.01, False),  # it has run for long enough to have done what it set the timer for
        (True, 0.001, 0.001, 0.0004, True),
        (True, 0.001, 0.001, 0.0006, False),  # half of a short one is enough
        (True, 0.0, 0.0001, 0.0, False),  # was due when it was set
        (False, 0.1, 0.1, 0.0, False),  # nothing runs: it halts, and the timer is what it waits for
    ],
)
def test_a_timer_waits_for_a_processor_that_the_host_does_not_let_run(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, busy: bool, duration: float, ago: float, used: float, starved: bool
) -> None:
    core, now = guest.core, 1000.0
    monkeypatch.setattr(type(core.turns), "busy", busy)
    monkeypatch.setattr(
        "vtl0_guest.cpu.core.time", SimpleNamespace(monotonic=lambda: now + ago, process_time=lambda: used)
    )
    assert core._starved(now + duration, (now, 0.0)) is starved
