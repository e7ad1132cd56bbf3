"""The guest process lies as VTL0's CPU. It loses its own machine; nobody believes it about another, or about VTL1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.escape import attacker, lies
from tests.integration.escape.conftest import Escaped
from tests.waiting import wait_until
from vmm import launcher, supervisor
from vmm.launcher import launch
from vtl0_guest.kernels import selfguard_image
from vtlab.ram import Store, store_folder
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2
from vtlab.v1.monitor_pb2 import Quote, SignedQuote
from vtlab_attacks.kernels import kernel_symbols

TIMEOUT = 60.0


@pytest.fixture
def liar(confined: Escaped) -> Iterator[Escaped]:
    yield confined
    confined("be_honest")


def boots(escaped: Escaped) -> None:
    """The next machine of the same laboratory, with the same processes."""
    with escaped.lab.create(selfguard_image(), command_line="heki=1") as machine:
        machine.start()
        wait_until(lambda: escaped.lab.policy.get(machine).locked, TIMEOUT, "the policy is locked")


@pytest.mark.parametrize("name", [name for name in lies.NAMES if name != "silence"])
def test_an_exit_that_cannot_be(liar: Escaped, name: str) -> None:
    before = liar.lab.pids
    with liar.lab.create(selfguard_image(), command_line="heki=1") as machine:
        liar("lie", name)
        machine.start()
        ended = machine.wait_state(vmm_pb2.MACHINE_STATE_FAILED, timeout=TIMEOUT)
        assert "guest at unix:" in ended.reason, ended.reason
    liar("be_honest")
    assert liar.lab.pids == before, "nobody else fell"
    boots(liar)


def test_silence_stops_nobody_else(liar: Escaped) -> None:
    """As a processor that is in an endless loop: clients are answered, the machine can be ended."""
    with liar.lab.create(selfguard_image(), command_line="heki=1") as machine:
        liar("lie", "silence")
        machine.start()
        assert machine.info().state == vmm_pb2.MACHINE_STATE_RUNNING
        assert liar.lab.policy.get(machine).locked is False
        assert [one.vm for one in liar.lab.machines()] == [machine.name]
    liar("be_honest")
    boots(liar)


def test_what_it_overwrites_nobody_else_sees(liar: Escaped) -> None:
    """It owns VTL0's execution. Sealed bytes stay what they are for the VMM, its devices, VTL1 and its quotes."""
    lab = liar.lab
    with lab.create(selfguard_image(), command_line="heki=1") as machine:
        machine.start()
        wait_until(lambda: lab.policy.get(machine).locked, TIMEOUT, "the policy is locked")
        gpa = kernel_symbols().physical("text_start")
        sealed = store_folder(lab.directory / "vmm", Store.SEALED) / f"{machine.name}.ram.ro"
        private = store_folder(lab.directory / "vmm", Store.PRIVATE) / f"{machine.name}.private"
        before, secrets = machine.read_memory(gpa, 256), private.read_bytes()
        measured = measurements(lab.policy.quote(machine, b"0123456789abcdef"))
        assert at(sealed, gpa) == before
        liar("overwrite", gpa, 256)
        with pytest.raises(PermissionError):
            liar("overwrite_sealed", gpa)
        assert at(store_folder(lab.directory / "vmm", Store.WRITABLE) / f"{machine.name}.ram.rw", gpa) == b"\xcc" * 256
        assert machine.read_memory(gpa, 256) == at(sealed, gpa) == before
        assert private.read_bytes() == secrets
        assert measurements(lab.policy.quote(machine, b"0123456789abcdef")) == measured


def at(file: Path, gpa: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(gpa)
        return opened.read(256)


def measurements(signed: SignedQuote) -> list[bytes]:
    return [one.SerializeToString() for one in Quote.FromString(signed.quote).measurements]


def test_a_process_that_only_says_that_it_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, and its place is taken: the laboratory neither waits for it nor hangs at its own end."""
    monkeypatch.setattr(launcher, "SERVERS", launcher.SERVERS | {Role.GUEST: attacker.__name__})
    monkeypatch.setattr(supervisor, "DYING", 0.2)
    with launch() as lab:
        before = lab.pids["guest"]
        assert Escaped(lab)("say_that_it_is_dead") == 1
        assert lab.supervisor.wait_restarted(Role.GUEST, 1, TIMEOUT)
        assert lab.pids["guest"] != before
        assert not Path(f"/proc/{before}").exists()
        boots(Escaped(lab))


def test_a_descriptor_that_it_sends_is_not_taken(liar: Escaped) -> None:
    """Over the connection that the VMM holds to it: gRPC gives it no room, and the byte with it ends the channel."""
    with liar.lab.create(selfguard_image(), command_line="heki=1") as machine:
        machine.start()
        assert liar("send_descriptor") > 0
        folder = Path(f"/proc/{liar.lab.pids['vmm']}/fd")
        try:
            held = [str(entry.readlink()) for entry in folder.iterdir()]
        except PermissionError:
            pytest.skip("only root sees what a process holds that cannot be dumped")
        assert str(liar.lab.directory / "guest.log") not in held
    boots(liar)
