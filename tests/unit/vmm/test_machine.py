"""A machine between two levels: failing closed, reset, and what clients may do to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.vmm.fakes import FakeLevel, returns
from tests.waiting import wait_until
from vmm import client_access
from vmm.machine import Machine
from vmm.states import CREATED, FAILED, PAUSED, RUNNING, STOPPED, Operation
from vmm.vtl import VTL1
from vtlab.errors import (
    BadArgument,
    BadImage,
    GuestMisbehaved,
    LimitExceeded,
    NotFound,
    PeerUnavailable,
    Refused,
    VtlabError,
)
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import (
    MsrValue,
    ProcessorState,
    RegisterName,
    Registers,
    RegisterValue,
    Segment,
    TableRegister,
)
from vtlab.v1.vcpu_pb2 import (
    BootImage,
    BootModule,
    Exit,
    Halt,
    Kicked,
    Output,
    PageAccess,
    ProtectionUpdate,
    RegisterWrite,
    SerialInput,
    Shutdown,
)
from vtlab.v1.vmm_pb2 import HijackRequest

Parts = tuple[Machine, FakeLevel, FakeLevel]
N = RegisterName
CR4_WRITE = Exit(register_write=RegisterWrite(name=N.REGISTER_NAME_CR4, old_value=0x300000, new_value=0))


def enable_vtl1(machine: Machine) -> None:
    machine._board.processors[0].vtl.enabled |= 1 << VTL1


def set_registers(machine: Machine, *values: RegisterValue, msrs: tuple[MsrValue, ...] = ()) -> ProcessorState:
    with machine.doing(Operation.SET_REGISTERS, parked=True) as board:
        return client_access.set_registers(board, 0, values, msrs)


def general(name: N.ValueType, value: int) -> RegisterValue:
    return RegisterValue(name=name, value=value)


# ---------------------------------------------------------------------------------------------------- failing closed


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (PeerUnavailable("monitor", "did not answer within 10 s"), "did not answer"),
        (GuestMisbehaved("monitor", "answered with nonsense"), "nonsense"),
        (Exit(kicked=Kicked()), "VTL1 of vm0: exits with kicked"),
        (Exit(), "exits with nothing"),
        (returns(vcpu_pb2.Update(protection=ProtectionUpdate(runs=[1]))), "pairs"),
    ],
    ids=["gone", "nonsense", "kicked", "empty", "impossible-rights"],
)
def test_without_a_verdict_the_vcpu_stays_stopped(machine_parts: Parts, step: Exit | VtlabError, reason: str) -> None:
    machine, guest, monitor = machine_parts
    enable_vtl1(machine)
    monitor.say(step)
    guest.say(CR4_WRITE)
    machine.start()
    wait_until(lambda: machine.describe().state == FAILED)
    assert reason in machine.describe().reason
    assert len(guest.entered) == 1  # the write that was not judged was never answered


def test_a_defect_of_ours_fails_closed_too(machine_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, guest, _ = machine_parts

    def broken(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("vmm.run_loop.serve", broken)
    guest.say(Exit(output=Output()))
    machine.start()
    wait_until(lambda: machine.describe().state == FAILED)
    assert "ZeroDivisionError: on purpose" in machine.describe().reason
    assert len(guest.entered) == 1


def test_a_guest_that_is_gone(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    guest.say(PeerUnavailable("guest at unix:/x", "socket closed"))
    machine.start()
    wait_until(lambda: machine.describe().state == FAILED)
    assert "guest at unix:/x" in machine.describe().reason
    guest.script.clear()
    assert machine.reset().state == RUNNING
    assert machine.describe().reason == ""


def test_a_guest_that_ignores_kicks_is_cut_off(machine_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, guest, _ = machine_parts
    monkeypatch.setattr("vmm.machine._STOP_PATIENCE", 0.1)
    guest.deaf = True
    machine.start()
    guest.wait_entered(1)
    assert machine.stop().state == STOPPED
    assert machine._board.gate._places[0].name == "GONE"


@pytest.mark.parametrize("level", [0, 1])
def test_create_leaves_nothing_behind_if_a_level_refuses(
    make_machine: Callable[..., Parts],
    level: int,
    monkeypatch: pytest.MonkeyPatch,
    log: list[str],
    tmp_path: Path,
) -> None:
    error = BadImage("image", "no such format")
    real = FakeLevel.attach

    def refuse(self: FakeLevel, request: vcpu_pb2.AttachRequest) -> None:
        if self.vtl == level:
            raise error
        real(self, request)

    monkeypatch.setattr(FakeLevel, "attach", refuse)
    with pytest.raises(BadImage):
        make_machine()
    assert not (tmp_path / "vm0").exists()
    assert {"detach 0", "detach 1"} <= set(log)


def test_create_with_an_image_that_nobody_uploaded(make_machine: Callable[..., Parts]) -> None:
    with pytest.raises(NotFound, match="00000000"):
        make_machine(image=BootImage(sha256=bytes(32)))
    with pytest.raises(NotFound, match="image"):
        make_machine(image=BootImage())


def test_modules_are_placed_beside_the_image(make_machine: Callable[..., Parts]) -> None:
    machine, guest, _ = make_machine()
    sha256 = machine.spec.image.sha256
    module = BootModule(sha256=sha256, command_line="m")
    _, guest, _ = make_machine(image=BootImage(sha256=sha256, command_line="c", modules=[module]))
    (request,) = guest.attached
    assert request.image.command_line == "c"
    assert (request.image.modules[0].path, request.image.modules[0].command_line) == ("module-0", "m")


# -------------------------------------------------------------------------------------------------------------- reset


def test_reset_order(machine_parts: Parts, log: list[str]) -> None:
    """VTL1 wipes itself, everything is zeroed, then both levels begin anew; the guest runs last."""
    machine, guest, _ = machine_parts
    machine.start()
    enable_vtl1(machine)
    hide = ProtectionUpdate(runs=[3, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_PRIVATE)
    with machine.doing(Operation.READ_MEMORY) as board:
        board.memory.write(0x3000, b"secret")
        board.protect([hide])
        board.vtl.enabled = 3
        board.msrs.guest_os_id = 5
    guest.say(Exit(shutdown=Shutdown(cause="#DF")))
    wait_until(lambda: len(log) >= 6)
    assert log == ["attach 1 1", "attach 0 1", "detach 1", "detach 0", "attach 1 2", "attach 0 2"]
    with machine.doing(Operation.READ_MEMORY) as board:
        assert board.memory.read(0x3000, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert (board.vtl.enabled, board.msrs.guest_os_id) == (1, 0)
    assert not machine.describe().vtl1_enabled
    enters = guest.wait_entered(2)
    assert enters[-1].sequence == 1
    assert not enters[-1].updates


@pytest.mark.parametrize(("wanted", "enabled", "left"), [(0, 1, 0), (1, 1, 1), (1, 3, 0)])
def test_ram_outlives_a_reset_only_where_vtl1_has_no_say(
    machine_parts: Parts, wanted: int, enabled: int, left: int
) -> None:
    machine, guest, _ = machine_parts
    machine.spec.keep_memory_on_reset = bool(wanted)
    machine.start()
    with machine.doing(Operation.READ_MEMORY) as board:
        board.memory.write(0x3000, b"secret")
        board.vtl.enabled = enabled
    guest.say(Exit(shutdown=Shutdown(cause="#DF")))
    wait_until(lambda: machine.describe().generation == 2 and machine.describe().state == RUNNING)
    with machine.doing(Operation.READ_MEMORY) as board:
        assert board.memory.read(0x3000, 6) == (b"secret" if left else bytes(6))


def test_reset_that_cannot_attach_fails(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.refuse_attach = PeerUnavailable("guest", "gone")
    with pytest.raises(PeerUnavailable):
        machine.reset()
    assert machine.describe().state == FAILED
    assert "reset" in machine.describe().reason
    guest.refuse_attach = None
    assert machine.reset().state == RUNNING


# ---------------------------------------------------------------------------------------------------- looking, pausing


def test_a_paused_machine_does_not_run(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.wait_entered(1)
    machine.pause()
    before = len(guest.entered)
    guest.say(Exit(output=Output()))
    assert len(guest.entered) == before
    machine.resume()
    guest.wait_entered(before + 1)
    assert not machine.pause().reason


def test_serial_input_reaches_a_running_guest(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.wait_entered(1)
    with machine.doing(Operation.WRITE_SERIAL) as board:
        client_access.write_serial(board, 1, b"ping\n")
    updates = guest.wait_entered(2)[1].updates
    assert [update.serial_input for update in updates] == [SerialInput(port=1, data=b"ping\n")]


def test_serial_input_is_bounded(machine_parts: Parts) -> None:
    machine, _, _ = machine_parts
    with machine.doing(Operation.WRITE_SERIAL) as board:
        for port, data in ((2, b"x"), (0, bytes(70_000))):
            with pytest.raises(BadArgument):
                client_access.write_serial(board, port, data)
        for _ in range(client_access.MAX_WAITING):
            client_access.write_serial(board, 0, b"x")
        with pytest.raises(LimitExceeded, match="not taken"):
            client_access.write_serial(board, 0, b"x")


def test_a_halted_vcpu_waits_for_a_client(machine_parts: Parts) -> None:
    """HLT with interrupts off: nothing runs until registers are set."""
    machine, guest, _ = machine_parts
    guest.say(Exit(halt=Halt()))
    machine.start()
    guest.wait_entered(1)
    wait_until(lambda: machine._board.gate._places[0].name == "PARKED")
    assert machine.describe().state == RUNNING
    state = set_registers(machine, general(N.REGISTER_NAME_RIP, 0x1234))
    assert state.registers.rip == 0x1234
    wait_until(lambda: machine._board.gate._places[0].name == "INSIDE")


def test_set_registers_runs_nothing_of_a_paused_guest(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.wait_entered(1)
    machine.pause()
    before = len(guest.entered)
    set_registers(machine, general(N.REGISTER_NAME_RAX, 7))
    assert len(guest.entered) == before + 1  # entered once, kicked beforehand
    assert guest._kicked >= guest.entered[-1].sequence
    assert machine.describe().state == PAUSED


def test_no_such_register(machine_parts: Parts) -> None:
    machine, _, _ = machine_parts
    for bad in (RegisterValue(), RegisterValue(name=0x1234)):  # type: ignore[arg-type]
        with pytest.raises(BadArgument):
            set_registers(machine, bad)
    with pytest.raises(BadArgument, match="MSR 0x99"):
        set_registers(machine, msrs=(MsrValue(index=0x99),))
    with machine.doing(Operation.GET_REGISTERS, parked=True) as board, pytest.raises(BadArgument, match="vp_index"):
        client_access.get_registers(board, 1)


# -------------------------------------------------------------------------------------------- clients while VTL1 is on


def test_general_registers_are_free(machine_parts: Parts) -> None:
    machine, _, monitor = machine_parts
    enable_vtl1(machine)
    for name in (N.REGISTER_NAME_RAX, N.REGISTER_NAME_R15, N.REGISTER_NAME_RIP, N.REGISTER_NAME_RFLAGS):
        set_registers(machine, general(name, 1))
    assert not monitor.entered


@pytest.mark.parametrize(
    "value",
    [
        general(N.REGISTER_NAME_CR0, 1),
        general(N.REGISTER_NAME_CR3, 1),
        general(N.REGISTER_NAME_CR4, 1),
        general(N.REGISTER_NAME_EFER, 1),
        general(N.REGISTER_NAME_XFEM, 1),
        general(N.REGISTER_NAME_DR7, 1),
        RegisterValue(name=N.REGISTER_NAME_CS, segment=Segment(selector=8)),
        RegisterValue(name=N.REGISTER_NAME_TR, segment=Segment(selector=8)),
        RegisterValue(name=N.REGISTER_NAME_IDTR, table=TableRegister(base=0x1000, limit=0xFFF)),
    ],
    ids=lambda value: N.Name(value.name),
)
def test_everything_else_is_judged_and_an_empty_verdict_refuses(machine_parts: Parts, value: RegisterValue) -> None:
    machine, guest, monitor = machine_parts
    enable_vtl1(machine)
    before = ProcessorState()
    before.CopyFrom(guest.processor_state)
    with pytest.raises(Refused):
        set_registers(machine, general(N.REGISTER_NAME_RAX, 7), value)
    (enter,) = monitor.entered
    assert enter.reason == vcpu_pb2.ENTER_REASON_CLIENT_WRITE
    assert enter.intercept.origin == vcpu_pb2.ORIGIN_CLIENT
    assert enter.intercept.register_write.name == value.name
    assert guest.processor_state == before  # RAX, which was free, was not written either


def test_an_allowed_write_happens(machine_parts: Parts) -> None:
    machine, guest, monitor = machine_parts
    enable_vtl1(machine)
    guest.processor_state.registers.cr4 = 0x20
    monitor.say(returns(action=vcpu_pb2.ACTION_COMMIT))
    assert set_registers(machine, general(N.REGISTER_NAME_CR4, 0x80)).registers.cr4 == 0x80
    write = monitor.entered[0].intercept.register_write
    assert (write.old_value, write.new_value) == (0x20, 0x80)


def test_msrs_are_judged(machine_parts: Parts) -> None:
    machine, guest, monitor = machine_parts
    guest.processor_state.msrs.append(MsrValue(index=0xC0000082, value=5))
    enable_vtl1(machine)
    monitor.say(returns(action=vcpu_pb2.ACTION_DENY, reason="LSTAR is frozen"))
    with pytest.raises(Refused, match="LSTAR is frozen") as caught:
        set_registers(machine, msrs=(MsrValue(index=0xC0000082, value=6),))
    assert caught.value.subject == "MSR 0xc0000082"
    assert monitor.entered[0].intercept.msr.old_value == 5


def test_without_vtl1_clients_may_write_anything(machine_parts: Parts) -> None:
    machine, _, monitor = machine_parts
    assert set_registers(machine, general(N.REGISTER_NAME_CR4, 0x80)).registers.cr4 == 0x80
    assert not monitor.entered


def test_memory_of_clients_has_vtl0s_rights(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    seal = ProtectionUpdate(runs=[3, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    hide = ProtectionUpdate(runs=[4, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_PRIVATE)
    machine.start()
    guest.wait_entered(1)
    with machine.doing(Operation.WRITE_MEMORY) as board:
        board.protect([seal, hide])
        client_access.write_memory(board, 0x2000, b"code")
        assert client_access.read_memory(board, 0x2FFE, 4) == bytes(4)
        with pytest.raises(Refused, match="page 0x3"):
            client_access.write_memory(board, 0x2FFE, b"1234")
        with pytest.raises(Refused, match="page 0x4"):
            client_access.read_memory(board, 0x4000, 1)
        with pytest.raises(BadArgument):
            client_access.read_memory(board, 0, (1 << 20) + 1)
    wait_until(lambda: any(update.HasField("invalidate_code") for enter in guest.entered for update in enter.updates))


def test_hijack(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.wait_entered(1)
    guest.processor_state.registers.rip = 0x1000
    request = HijackRequest(
        code=b"\xf4", code_gpa=0x2000, registers=[general(N.REGISTER_NAME_RIP, 0x2000)], resume=False
    )
    before = machine.hijack(request)
    assert machine.describe().state == PAUSED
    assert guest.processor_state.registers.rip == 0x2000
    with machine.doing(Operation.READ_MEMORY) as board:
        assert board.memory.read(0x2000, 1) == b"\xf4"
    assert before.registers.rip in (0x1000, 0x2000)  # the fake hands out its one state by reference
    request.resume = True
    machine.hijack(request)
    assert machine.describe().state == RUNNING


def test_a_refused_hijack_goes_on_as_before(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.wait_entered(1)
    enable_vtl1(machine)
    with pytest.raises(Refused):
        machine.hijack(HijackRequest(registers=[general(N.REGISTER_NAME_CR0, 0)]))
    assert machine.describe().state == RUNNING
    wait_until(lambda: machine._board.gate._places[0].name == "INSIDE")


def checked(machine: Machine, address: int = 0x5000) -> None:
    machine.check(0, vcpu_pb2.MachineCheck(status=1 << 58, address=address, mcg_status=1))


def test_a_machine_check_is_vtl0s_if_vtl1_lets_it_have_it(machine_parts: Parts) -> None:
    machine, guest, monitor = machine_parts
    machine.start()
    enable_vtl1(machine)
    monitor.say(returns(action=vcpu_pb2.ACTION_COMMIT))
    checked(machine)
    assert monitor.entered[-1].intercept.machine_check.address == 0x5000
    wait_until(lambda: any(one.event.HasField("machine_check") for enter in guest.entered for one in enter.updates))
    assert machine.describe().generation == 1


@pytest.mark.parametrize(
    ("action", "state", "generation"),
    [
        (vcpu_pb2.ACTION_RESET, RUNNING, 2),
        (vcpu_pb2.ACTION_HALT, STOPPED, 1),
        (vcpu_pb2.ACTION_UNSPECIFIED, STOPPED, 1),
    ],
)
def test_a_machine_check_that_vtl0_does_not_hear_of(
    machine_parts: Parts, action: vcpu_pb2.Action.ValueType, state: int, generation: int
) -> None:
    machine, guest, monitor = machine_parts
    machine.start()
    enable_vtl1(machine)
    monitor.say(returns(action=action, reason="a bad page"))
    checked(machine)
    seen = machine.describe()
    assert (seen.state, seen.generation) == (state, generation)
    assert "a bad page" in seen.reason
    assert not any(one.event.HasField("machine_check") for enter in guest.entered for one in enter.updates)


def test_an_nmi_without_vtl1(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    machine.start()
    guest.wait_entered(1)
    with machine.doing(Operation.INJECT) as board:
        client_access.inject_nmi(board, 0)
        with pytest.raises(BadArgument, match="vp_index"):
            client_access.inject_nmi(board, 9)
    wait_until(lambda: any(one.event.nmi for enter in guest.entered for one in enter.updates))


def test_translate(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    guest.processor_state.registers.CopyFrom(Registers(cr0=0x80000001, cr3=0x1000, cr4=0x20, efer=0xD00))
    with machine.doing(Operation.TRANSLATE, parked=True) as board:
        for level, entry in enumerate((0x2003, 0x3003, 0x4003, 0x8000_0000_0000_9001)):
            board.memory.write(0x1000 + level * PAGE_SIZE, entry.to_bytes(8, "little"))
        found = client_access.translate(board, 0, 0x123)
        assert found.present
        assert found.gpa == 0x9123
        assert not found.user
        assert list(found.entries) == [0x1000, 0x2000, 0x3000, 0x4000]
        assert found.access == board.memory.access(0x9000)
        missing = client_access.translate(board, 0, 0x1000)
        assert not missing.present
        assert len(missing.entries) == 4
        with pytest.raises(BadArgument, match="canonical"):
            client_access.translate(board, 0, 1 << 60)


def test_state_events_tell_the_story(machine_parts: Parts) -> None:
    machine, _, _ = machine_parts
    machine.start()
    machine.pause()
    machine.stop()
    states = [event.state.state for event in machine.events.kept((vmm_pb2.EVENT_KIND_STATE,))]
    assert states == [CREATED, RUNNING, PAUSED, STOPPED]
