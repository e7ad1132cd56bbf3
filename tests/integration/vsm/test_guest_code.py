"""A guest that brings its own VTL1: switches, private memory, protection, intercepts; three real processes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from tests.integration.vsm import guest
from vtlab.client import Lab, Machine
from vtlab.errors import Refused
from vtlab.hyperv.profiles import PROFILES
from vtlab.v1 import vmm_pb2

STOPPED = vmm_pb2.MACHINE_STATE_STOPPED
TIMEOUT = 30.0
Run = Callable[..., Machine]


@pytest.fixture
def run(lab: Lab) -> Iterator[Run]:
    """Boots a guest and waits for its end; the machine is destroyed after the test."""
    made: list[Machine] = []

    def boot(body: str, profile: str = "", vp_count: int = 1, config: int = 0x3F, above: str = "") -> Machine:
        machine = guest.create(lab, guest.assemble(body, config, above), vp_count, profile)
        made.append(machine)
        machine.start()
        end = machine.wait_state(STOPPED, timeout=TIMEOUT)
        assert end.debug_exit == 0x2A, end.reason
        return machine

    yield boot
    for machine in made:
        machine.destroy()


def words(machine: Machine, address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", machine.read_memory(address, 8 * count))


def test_a_call_passes_shared_registers_and_keeps_private_ones(run: Run) -> None:
    machine = run("")
    enabled, result, vector, stack = words(machine, guest.RESULT, 4)
    assert enabled == 0, "a status of HvCallEnablePartitionVtl or HvCallEnableVpVtl"
    assert (result, vector, stack) == (0x77, 0xB0B, guest.STACK0)
    rbx, r12, seen_vector, stack1 = words(machine, guest.SEEN, 4)
    assert (rbx, r12, seen_vector, stack1) == (0xB0B, 0x1212, 0xB0B, guest.STACK1)
    statuses = struct.unpack("<4I", machine.read_memory(guest.SEEN + 32, 16))
    assert [status & 0xFFFF for status in statuses] == [0, 0, 0, 0]


def test_memory_that_vtl1_keeps_is_not_vtl0s(run: Run) -> None:
    machine = run("")
    with pytest.raises(Refused):
        machine.read_memory(guest.SECRET, 8)


@pytest.mark.parametrize(("profile", "size"), [("openvmm", 80), ("tlfs", 240), ("kvm", 240)])
def test_a_memory_intercept_is_a_message(run: Run, profile: str, size: int) -> None:
    machine = run(guest.GUARDED_READ, profile)
    value, rip = words(machine, guest.RESULT + 32, 2)
    assert value == 0x5EC4E7, "VTL1 opened the page and the instruction ran again"
    message = machine.read_memory(guest.COPIES, 256)
    kind, length = struct.unpack_from("<IB", message)
    assert (kind, length) == (0x80000001, size)
    payload = message[16:]
    vp, instruction, access = struct.unpack_from("<IBB", payload)
    assert (vp, instruction, access) == (0, 3, 0)
    assert struct.unpack_from("<Q", payload, 24) == (rip,)
    assert struct.unpack_from("<I", payload, 40) == (6,)
    assert struct.unpack_from("<QQ", payload, 48) == (0, guest.GUARDED)
    assert payload[64:67] == bytes.fromhex("488b00")
    rax = struct.unpack_from("<Q", payload, 112)[0]
    assert rax == (guest.GUARDED if size == 240 else 0)


def test_vtl1_denies_a_write_of_cr4(run: Run) -> None:
    machine = run(guest.CR4_WRITE)
    (cr4,) = words(machine, guest.RESULT + 48, 1)
    assert cr4 & 1 << 20 == 0
    message = machine.read_memory(guest.COPIES, 256)
    assert struct.unpack_from("<I", message) == (0x80010006,)
    name, value = struct.unpack_from("<I16s", message, 16 + 44)
    assert name == 0x40003
    assert int.from_bytes(value, "little") == cr4 | 1 << 20


def test_a_second_call_goes_on_behind_the_return(run: Run) -> None:
    machine = run(f"mov r8d, 5; call enter; mov qword ptr [{guest.RESULT + 56}], r8")
    assert words(machine, guest.RESULT + 56, 1) == (6,)


@pytest.mark.parametrize("body", [guest.HALTS, guest.SPINS], ids=["halts", "spins"])
def test_an_interrupt_of_vtl1_preempts_vtl0(run: Run, body: str) -> None:
    machine = run(body)
    assert words(machine, guest.RESULT + 64, 1) == (1,)
    assert words(machine, guest.SEEN + 64, 1) == (1,)


DENY_LOWER_VTL_STARTUP = 0x40


@pytest.mark.parametrize("profile", PROFILES)
def test_init_and_sipi_start_a_vp_without_vtl1(run: Run, profile: str) -> None:
    machine = run(guest.start_vp1(guest.WAIT_FOR_EVER), profile, vp_count=2)
    assert machine.read_memory(guest.AP_MARK, 1) == b"\x01"


@pytest.mark.parametrize("profile", PROFILES)
def test_they_are_dropped_where_the_vp_has_vtl1(run: Run, profile: str) -> None:
    machine = run(guest.start_vp1(guest.WAIT_A_WHILE), profile, vp_count=2, above=guest.ENABLE_ON_VP1)
    assert words(machine, guest.RESULT + 56, 1)[0] & 0xFFFFFFFF == 0, "a status of HvCallEnableVpVtl"
    assert machine.read_memory(guest.AP_MARK, 1) == b"\0"


def test_they_are_dropped_where_vtl1_denies_startups(run: Run) -> None:
    machine = run(guest.start_vp1(guest.WAIT_A_WHILE), vp_count=2, config=0x3F | DENY_LOWER_VTL_STARTUP)
    assert machine.read_memory(guest.AP_MARK, 1) == b"\0"
